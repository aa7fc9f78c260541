"""Codes as the kernels read them: uint64 words, the first bit of a code highest.

Shape (n,) if one word holds a code, else (n, words). Each function here is compiled in two ways, for one word and for
several.
"""

from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, popcount

Words = NDArray[np.uint64]

FAR = 1 << 12  # more than any distance
BLOCK = 1024  # codes compared with every waiting query while they are in the fastest cache
PART = 64  # codes of a block compared once more to find which are near
ZERO: Any = np.int64(0)  # a mere 0 is of a type of its own to Numba, which compiles what it is given to once more


class Query(NamedTuple):
    """One query of a batch."""

    queries: Words  # (q,) or (q, words)
    q: int  # its row


def distance(codes: Words, j: int | np.int64, queries: Words, q: int) -> int:
    """Hamming distance of code j and query q (compiled below for one word or several)."""
    raise NotImplementedError


def substring(codes: Words, j: int | np.int64, first: int, width: int) -> int:
    """The bits first ... first + width - 1 of code j as a number (compiled below for one word or several)."""
    raise NotImplementedError


def least_distance(codes: Words, queries: Words, q: int) -> int:
    """The distance of the code nearest to query q (compiled below for one word or several)."""
    raise NotImplementedError


def least_distances(codes: Words, begin: int, queries: Words, q: int) -> tuple[int, int]:
    """The distances of the nearest to query q of the BLOCK codes from `begin` on and of the BLOCK after; there must be
    as many (compiled below for one word or several)."""
    raise NotImplementedError


def longest(codes: Words) -> int:
    """The greatest distance there can be (compiled below for one word or several)."""
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
def _least_of_words(codes: Words, queries: Words, q: int, words: int) -> int:
    flat, query, least = codes.reshape(codes.size), queries[q], FAR
    for i in range(len(codes)):
        d = 0
        for w in range(words):
            d += popcount(flat[words * i + w] ^ query[w])
        least = min(least, d)
    return least


@overload(least_distance)
def _least_distance(codes, queries, q):  # type: ignore[no-untyped-def]
    def one_word(codes, queries, q):  # type: ignore[no-untyped-def]
        query, least = queries[q], FAR
        for i in range(len(codes)):  # vectorises only because it runs over a whole array
            least = min(least, popcount(codes[i] ^ query))
        return least

    def words(codes, queries, q):  # type: ignore[no-untyped-def]
        if codes.shape[1] == 2:  # vectorises only where the number of words is written down, over a flat array
            return _least_of_words(codes, queries, q, 2)
        if codes.shape[1] == 4:
            return _least_of_words(codes, queries, q, 4)
        return _least_of_words(codes, queries, q, codes.shape[1])

    return one_word if codes.ndim == 1 else words


@overload(least_distances)
def _least_distances(codes, begin, queries, q):  # type: ignore[no-untyped-def]
    def one_word(codes, begin, queries, q):  # type: ignore[no-untyped-def]
        a, b, query, first, second = np.uint64(begin), np.uint64(begin + BLOCK), queries[q], FAR, FAR
        for i in range(BLOCK):  # both at once: the wait for the last of a block is as long as for many codes
            first = min(first, popcount(codes[a + np.uint64(i)] ^ query))
            second = min(second, popcount(codes[b + np.uint64(i)] ^ query))
        return first, second

    def words(codes, begin, queries, q):  # type: ignore[no-untyped-def]
        middle = begin + BLOCK
        return (
            least_distance(codes[begin:middle], queries, q),
            least_distance(codes[middle : middle + BLOCK], queries, q),
        )

    return one_word if codes.ndim == 1 else words


@overload(longest)
def _longest(codes):  # type: ignore[no-untyped-def]
    return (lambda codes: 64) if codes.ndim == 1 else (lambda codes: 64 * codes.shape[1])
