"""What an index is at one moment, and what a write makes of it.

Nothing that a search reads is ever written to: a write makes another state.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.indexes import segments
from hashret.indexes.kernels import Segment
from hashret.indexes.kernels_build import locate
from hashret.indexes.kernels_codes import Words
from hashret.indexes.kernels_heap import Ids
from hashret.indexes.protocol import read_only

_FEW = 64  # so few allowed items are always looked up one by one


class State(NamedTuple):
    base: Segment
    tail: Segment
    engine: Any  # what the index keeps beside the base to search it with
    live: int


class Write(NamedTuple):
    """Items that came, or, without codes, went."""

    words: Words | None
    ids: Ids


def added(state: State, words: Words, ids: Ids) -> State:
    """The state with items in its tail that are not there yet."""
    kept = segments.items(state.tail)
    tail = segments.plain(np.concatenate([kept[0], words]), np.concatenate([kept[1], ids]))
    return state._replace(tail=tail, live=state.live + len(ids))


def removed(state: State, ids: Ids) -> State:
    """The state without those of these items that are there; itself if none is."""
    slots = [live_slots(segment, ids) for segment in (state.base, state.tail)]
    count = sum(map(len, slots))
    if not count:
        return state
    base, tail = (
        segments.buried(segment, gone) if len(gone) else segment
        for segment, gone in zip((state.base, state.tail), slots, strict=True)
    )
    return state._replace(base=base, tail=tail, live=state.live - count)


def written(state: State, write: Write) -> State:
    return removed(state, write.ids) if write.words is None else added(state, write.words, write.ids)


def live_slots(segment: Segment, ids: Ids) -> Ids:
    """The slots of those of these ids that are in the segment, each once."""
    slots: Ids = locate(segment.ids, segment.by_id, read_only(ids))
    slots = np.unique(slots[slots >= 0])
    return slots[~segments.is_dead(segment, slots)]


class Found(NamedTuple):
    """What is known of some ids."""

    words: Words  # (n,) or (n, words): the codes of those that are there
    known: NDArray[np.bool_]  # (n,): which ids are there


def find(state: State, ids: Ids) -> Found:
    """The codes of these ids, in their order."""
    words = np.zeros((len(ids), *state.base.codes.shape[1:]), np.uint64)
    known = np.zeros(len(ids), np.bool_)
    for segment in (state.base, state.tail):
        slots = locate(segment.ids, segment.by_id, ids)
        places = np.flatnonzero(slots >= 0)
        places = places[~segments.is_dead(segment, slots[places])]
        words[places] = segments.items(segment, slots[places])[0]
        known[places] = True
    return Found(words, known)


def few_allowed(state: State, allowed: Ids, queries: int) -> Segment | None:
    """The allowed items by themselves, where scanning them costs less than searching them out among all."""
    total = len(state.base.ids) + len(state.tail.ids)
    if len(allowed) > max(_FEW, min(total // 16, total // 256 * queries)):
        return None
    parts = [segments.items(segment, live_slots(segment, allowed)) for segment in (state.base, state.tail)]
    return segments.plain(np.concatenate([words for words, _ in parts]), np.concatenate([ids for _, ids in parts]))


def qualifying(state: State, allowed: Ids | None) -> int:
    """How many items qualify."""
    if allowed is None:
        return state.live
    return sum(len(live_slots(segment, allowed)) for segment in (state.base, state.tail))
