"""Numba for the kernels: decorators that compile them, and intrinsics that Numba lacks.

Each kernel is compiled once per machine, and again when any kernel source changes (see `kernel_cache`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hashret.indexes.kernel_cache import FOLDER, KernelLocator
from hashret.process import numba_cache

_tools: Any = cgutils


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled by Numba at its first call: serial, without the interpreter lock, cached on disk.

    It may not allocate: then Numba counts no references to arrays, which costs more than all else in a search.
    """
    return _compiled(function, _nrt=False)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of kernels, compiled into each that calls it."""
    return _compiled(function, _nrt=False, forceinline=True)


def allocating(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that makes arrays, and leaves the inner loops to others."""
    return _compiled(function)


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    with nullcontext() if FOLDER is None else numba_cache(KernelLocator):
        compiled: Callable[..., Any] = numba.njit(nogil=True, cache=FOLDER is not None, error_model="numpy", **options)(
            function
        )
    return compiled


def _popcount(typing_context: Any, x: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


def _trailing_zeros(typing_context: Any, x: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


def _prefetch(typing_context: Any, array: Any, row: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        kind = signature.args[0]
        view = context.make_array(kind)(context, builder, arguments[0])
        place = [arguments[1], *[context.get_constant(types.intp, 0)] * (kind.ndim - 1)]
        pointer = _tools.get_item_pointer(context, builder, kind, view, place)
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        instruction = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        hint = _tools.get_or_insert_function(builder.module, instruction, "llvm.prefetch.p0")
        builder.call(hint, [pointer, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


# The number of ones in a uint64, by LLVM's ctpop, which vectorises; the place of the lowest one in an int64 but 0.
popcount: Any = intrinsic(_popcount)
trailing_zeros: Any = intrinsic(_trailing_zeros)
# Has a row of an array brought into the cache, so that many rows that are wanted soon are waited for together.
prefetch: Any = intrinsic(_prefetch)
