"""The immutable states of an index, and the writes that lead from one to the next.

A write never changes what a search reads: it makes a new state.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.indexes import segments
from hashret.indexes.kernels import Segment
from hashret.indexes.kernels_build import find_slots
from hashret.indexes.kernels_codes import Words
from hashret.indexes.kernels_heap import Ids
from hashret.indexes.protocol import read_only

_FEW = 64  # allowed items that are always extracted and scanned


class State(NamedTuple):
    """A main segment, which an engine searches, and a delta segment of items added since, which is scanned."""

    main: Segment
    delta: Segment
    engine: Any  # the index's own structure for searching the main segment, if it needs one
    alive: int  # the number of items that are not removed

    @property
    def segments(self) -> tuple[Segment, Segment]:
        return self.main, self.delta


class Write(NamedTuple):
    """An entry of the write log: items added, or, without codes, removed."""

    words: Words | None
    ids: Ids


def add(state: State, words: Words, ids: Ids) -> State:
    """Return the state with new items in its delta segment."""
    delta_words, delta_ids = segments.read_items(state.delta)
    delta = segments.build_flat(np.concatenate([delta_words, words]), np.concatenate([delta_ids, ids]))
    return state._replace(delta=delta, alive=state.alive + len(ids))


def remove(state: State, ids: Ids) -> State:
    """Return the state without these items, or the same state if it has none of them."""
    slots = [alive_slots(segment, ids) for segment in state.segments]
    count = sum(map(len, slots))
    if not count:
        return state
    main, delta = (
        segments.mark_deleted(segment, removed) if len(removed) else segment
        for segment, removed in zip(state.segments, slots, strict=True)
    )
    return state._replace(main=main, delta=delta, alive=state.alive - count)


def apply(state: State, write: Write) -> State:
    """Return the state after a write."""
    return remove(state, write.ids) if write.words is None else add(state, write.words, write.ids)


def alive_slots(segment: Segment, ids: Ids) -> Ids:
    """Return the slots of those of these ids that are in the segment, each once."""
    slots: Ids = find_slots(segment.ids, segment.by_id, read_only(ids))
    slots = np.unique(slots[slots >= 0])
    return slots[~segments.is_deleted(segment, slots)]


class StoredCodes(NamedTuple):
    """The codes of requested ids, in their order."""

    words: Words  # (n,) or (n, words): 0 where the id is not in the index
    exists: NDArray[np.bool_]  # (n,): whether the id is in the index


def find(state: State, ids: Ids) -> StoredCodes:
    """Return the codes of these ids."""
    words = np.zeros((len(ids), *state.main.codes.shape[1:]), np.uint64)
    exists = np.zeros(len(ids), np.bool_)
    for segment in state.segments:
        slots = find_slots(segment.ids, segment.by_id, ids)
        positions = np.flatnonzero(slots >= 0)
        positions = positions[~segments.is_deleted(segment, slots[positions])]
        words[positions] = segments.read_items(segment, slots[positions])[0]
        exists[positions] = True
    return StoredCodes(words, exists)


def extract_allowed(state: State, allowed: Ids, queries: int) -> Segment | None:
    """Return a segment of the allowed items alone if scanning it costs less than a filtered search, else None."""
    total = len(state.main.ids) + len(state.delta.ids)
    if len(allowed) > max(_FEW, min(total // 16, total // 256 * queries)):
        return None
    parts = [segments.read_items(segment, alive_slots(segment, allowed)) for segment in state.segments]
    return segments.build_flat(np.concatenate([words for words, _ in parts]), np.concatenate([ids for _, ids in parts]))


def count_qualifying(state: State, allowed: Ids | None) -> int:
    """Return the number of items that qualify."""
    if allowed is None:
        return state.alive
    return sum(len(alive_slots(segment, allowed)) for segment in state.segments)
