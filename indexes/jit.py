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

_cgutils: Any = cgutils


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with Numba at its first call: serial, without the interpreter lock, cached on disk.

    The function must not allocate. Then Numba counts no references to arrays, which would dominate a search.
    """
    return _compiled(function, _nrt=False)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function into each kernel that calls it."""
    return _compiled(function, _nrt=False, forceinline=True)


def allocating(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel that allocates arrays and calls other kernels for its inner loops."""
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
        array_type = signature.args[0]
        view = context.make_array(array_type)(context, builder, arguments[0])
        indices = [arguments[1], *[context.get_constant(types.intp, 0)] * (array_type.ndim - 1)]
        pointer = _cgutils.get_item_pointer(context, builder, array_type, view, indices)
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        int32 = ir.IntType(32)
        intrinsic_type = ir.FunctionType(ir.VoidType(), [pointer.type, int32, int32, int32])
        instruction = _cgutils.get_or_insert_function(builder.module, intrinsic_type, "llvm.prefetch.p0")
        builder.call(instruction, [pointer, int32(0), int32(3), int32(1)])  # read, keep in all caches, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


# The number of ones in a uint64, by LLVM's ctpop, which vectorises.
popcount: Any = intrinsic(_popcount)
# The position of the lowest one in an int64 other than 0.
trailing_zeros: Any = intrinsic(_trailing_zeros)
# Prefetch a row of an array into the cache, so that the latencies of many reads overlap.
prefetch: Any = intrinsic(_prefetch)
