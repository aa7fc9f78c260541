"""How well codes use their bits: what `hashret info` says of a collection's."""

from typing import NamedTuple

import numpy as np

from hashret.codes import Codes, unpack
from hashret.indexes.segments import group, to_words

CHUNK = 65_536  # codes whose bits are counted at a time


class Health(NamedTuple):
    """Counts over some codes; see `health`."""

    examined: int
    distinct: int
    largest_bucket: int
    dead_bits: int
    balance: float


def health(codes: Codes) -> Health:
    """How many codes there are, and are distinct, and are equal to the commonest; and what their bits tell apart.

    A bit is dead if all codes agree on it. The balance is 1 if every bit is 1 in half of the codes and 0 if all are
    dead: the mean over bits of 1 - |2p - 1|, where p is the share of ones.
    """
    if not len(codes):
        return Health(0, 0, 0, 0, 0.0)
    counts = group(to_words(codes), np.arange(len(codes), dtype=np.int64)).counts
    ones = sum(unpack(codes[start : start + CHUNK]).sum(axis=0) for start in range(0, len(codes), CHUNK))
    share = np.asarray(ones) / len(codes)
    return Health(
        examined=len(codes),
        distinct=len(counts),
        largest_bucket=int(counts.max()) + 1,
        dead_bits=int(((share == 0) | (share == 1)).sum()),
        balance=float(np.mean(1 - np.abs(2 * share - 1))),
    )
