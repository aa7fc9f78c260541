"""Codes as the kernels read them: uint64 words, the first bit of a code highest.

The shape is (n,) if a code fits in one word, else (n, words). Each function is compiled for both.
"""

from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, popcount

Words = NDArray[np.uint64]

FAR = 1 << 12  # more than any distance
BLOCK = 1024  # codes that a scan compares with every query while they are in the fastest cache
SUBBLOCK = 64  # codes of a block that are compared again to find which are near
ZERO: Any = np.int64(0)  # Numba gives the literal 0 a type of its own and compiles the functions called with it again


class Query(NamedTuple):
    """One query of a batch."""

    queries: Words  # (q,) or (q, words)
    q: int  # its row


def distance(codes: Words, j: int | np.int64, queries: Words, q: int) -> int:
    """Return the Hamming distance of code j and query q (compiled below for one word or several)."""
    raise NotImplementedError


def substring(codes: Words, j: int | np.int64, first: int, width: int) -> int:
    """Return bits first ... first + width - 1 of code j as an integer (compiled below for one word or several)."""
    raise NotImplementedError


def min_distance(codes: Words, queries: Words, q: int) -> int:
    """Return the distance of the code nearest to query q (compiled below for one word or several)."""
    raise NotImplementedError


def min_distances(codes: Words, begin: int, queries: Words, q: int) -> tuple[int, int]:
    """Return the least distance to query q of the BLOCK codes from `begin` on, and of the BLOCK codes after them, which
    must exist (compiled below for one word or several)."""
    raise NotImplementedError


def max_distance(codes: Words) -> int:
    """Return the greatest possible distance (compiled below for one word or several)."""
    raise NotImplementedError


@overload(distance)
def _distance(codes, j, queries, q):  # type: ignore[no-untyped-def]
    def one_word(codes, j, queries, q):  # type: ignore[no-untyped-def]
        return popcount(codes[j] ^ queries[q])

    def words(codes, j, queries, q):  # type: ignore[no-untyped-def]
        total = 0
        for w in range(codes.shape[1]):
            total += popcount(codes[j, w] ^ queries[q, w])
        return total

    return one_word if codes.ndim == 1 else words


@overload(substring)
def _substring(codes, j, first, width):  # type: ignore[no-untyped-def]
    def one_word(codes, j, first, width):  # type: ignore[no-untyped-def]
        return np.int64((codes[j] << np.uint64(first)) >> np.uint64(64 - width))

    def words(codes, j, first, width):  # type: ignore[no-untyped-def]
        w, shift = first >> 6, first & 63
        bits = codes[j, w] << np.uint64(shift)
        if shift + width > 64:
            bits |= codes[j, w + 1] >> np.uint64(64 - shift)
        return np.int64(bits >> np.uint64(64 - width))

    return one_word if codes.ndim == 1 else words


@inlined
def _min_of_words(codes: Words, queries: Words, q: int, words: int) -> int:
    flat, query, minimum = codes.reshape(codes.size), queries[q], FAR
    for i in range(len(codes)):
        d = 0
        for w in range(words):
            d += popcount(flat[words * i + w] ^ query[w])
        minimum = min(minimum, d)
    return minimum


@overload(min_distance)
def _min_distance(codes, queries, q):  # type: ignore[no-untyped-def]
    def one_word(codes, queries, q):  # type: ignore[no-untyped-def]
        query, minimum = queries[q], FAR
        for i in range(len(codes)):  # vectorises only as it runs over a whole array
            minimum = min(minimum, popcount(codes[i] ^ query))
        return minimum

    def words(codes, queries, q):  # type: ignore[no-untyped-def]
        if codes.shape[1] == 2:  # vectorises only for a literal number of words, over a flat array
            return _min_of_words(codes, queries, q, 2)
        if codes.shape[1] == 4:
            return _min_of_words(codes, queries, q, 4)
        return _min_of_words(codes, queries, q, codes.shape[1])

    return one_word if codes.ndim == 1 else words


@overload(min_distances)
def _min_distances(codes, begin, queries, q):  # type: ignore[no-untyped-def]
    def one_word(codes, begin, queries, q):  # type: ignore[no-untyped-def]
        a, b, query, first, second = np.uint64(begin), np.uint64(begin + BLOCK), queries[q], FAR, FAR
        for i in range(BLOCK):  # both together: waiting for the last code of a block takes as long as many codes
            first = min(first, popcount(codes[a + np.uint64(i)] ^ query))
            second = min(second, popcount(codes[b + np.uint64(i)] ^ query))
        return first, second

    def words(codes, begin, queries, q):  # type: ignore[no-untyped-def]
        middle = begin + BLOCK
        return (
            min_distance(codes[begin:middle], queries, q),
            min_distance(codes[middle : middle + BLOCK], queries, q),
        )

    return one_word if codes.ndim == 1 else words


@overload(max_distance)
def _max_distance(codes):  # type: ignore[no-untyped-def]
    return (lambda codes: 64) if codes.ndim == 1 else (lambda codes: 64 * codes.shape[1])
