"""The part that all indexes share: items come and go while threads search.

An index is a *base* of distinct codes with posting lists, on which an engine works, and a small *tail* of items added
since, which is simply scanned. When the tail outgrows its share of the base, or a quarter of all items is dead, both
are built into a new base (a log-structured merge tree of two levels; O'Neil et al. 1996). Where that would keep a write
waiting, and whoever waits for it, a thread does it while the tail goes on to grow. Nothing that a search reads is ever
written to: a write makes a new `State` and puts it in place at once, so that a search, which takes the state once, sees
the index before the write or after it.
"""

import threading
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, check_bits
from hashret.errors import check_count
from hashret.indexes import files, protocol, ranges, segments, states
from hashret.indexes.kernels import Segment
from hashret.indexes.kernels_codes import Words
from hashret.indexes.kernels_heap import Heaps, Ids, sort_heaps
from hashret.indexes.kernels_within import sort_rows
from hashret.indexes.protocol import Hits, Path, RangeHits, Searched
from hashret.indexes.states import State, Write
from hashret.indexes.threads import split

_SCATTERED = {f"base.{name}" for name in ("ids", "by_id", "postings", "sifts")}  # searches read little of these
_MAX_ID = np.iinfo(np.int64).max
_LARGE = 1 << 16  # items that a thread of its own merges: fewer are merged in some 50 ms
_LONGEST = 4  # a tail of so many times its share is merged at once all the same


class UpdatableIndex(ABC):
    """Items that come and go, over an engine that searches distinct codes and cannot change."""

    kind: ClassVar[str]  # what a saved file says it is
    tail_share: ClassVar[int]  # the tail should hold 1024 items and one in so many of the base, at most

    def __init__(self, bits: int) -> None:
        self.bits = check_bits(bits)
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._queries = self._probes = 0
        self._since: list[Write] | None = None  # what was written since a thread began to merge
        self._state = self._built(segments.to_words(np.empty((0, bits // 8), np.uint8)), segments.NO_IDS)

    @classmethod
    def from_options(cls, bits: int, options: str) -> Self:
        """An empty index for codes of `bits` bits; raises ValueError for any options, as it takes none."""
        if options:
            raise ValueError(f"there is no index {f'{cls.kind}:{options}'!r}: {cls.kind} takes no options")
        return cls(bits)

    @abstractmethod
    def _engine(self, base: Segment) -> tuple[Segment, Any]:
        """The base, with whatever an engine adds to it, and the engine."""

    @abstractmethod
    def _nearest(self, state: State, queries: Codes, words: Words, allowed: Ids | None, heaps: Heaps) -> None:
        """Offer the items of the base to a heap for each query."""

    @abstractmethod
    def _matches(self, state: State, queries: Codes, words: Words, radius: int) -> tuple[Ids, NDArray[np.uint32]]:
        """The codes of the base within a radius of each query: limits (q + 1) and their numbers."""

    def __len__(self) -> int:
        return self._state.live

    def __contains__(self, item_id: object) -> bool:
        """Whether there is an item with this id; no object but an integer is an id."""
        if not isinstance(item_id, int | np.integer) or not 0 <= item_id <= _MAX_ID:
            return False
        return bool(states.find(self._state, np.array([item_id], np.int64)).known[0])

    def get(self, ids: NDArray[np.int64]) -> Codes:
        """The codes, uint8 (n, bits // 8), of the items with these ids, int64 (n,), in any order and repeated at will.

        Raises KeyError, naming the id, if one is not there.
        """
        found = states.find(self._state, protocol.check_ids(ids))
        if not found.known.all():
            raise KeyError(f"id {ids[~found.known][0]} is not in the index")
        return segments.from_words(found.words, self.bits)

    @property
    def searched(self) -> Searched:
        """How many queries have been searched for, and how many buckets looked up for them."""
        with self._counting:
            return Searched(self._queries, self._probes)

    def _count(self, queries: int) -> None:
        """Count queries that this thread has just searched for."""
        probes = segments.take_probes()
        with self._counting:
            self._queries += queries
            self._probes += probes

    def add(self, codes: Codes, ids: NDArray[np.int64]) -> None:
        """Add codes, uint8 (n, bits // 8), under ids, int64 (n,), not negative.

        Raises ValueError, and changes nothing, if an id is there already or comes twice.
        """
        codes = protocol.check_items(codes, ids, self.bits)
        if not len(ids):
            return
        ascending = np.sort(ids)
        protocol.check_once(ascending)
        words = segments.to_words(codes)
        with self._lock:
            state = self._state
            for segment in (state.base, state.tail):
                there = states.live_slots(segment, ascending)
                if len(there):
                    raise ValueError(f"id {segment.ids[there].min()} is in the index already")
            if state.live + len(ids) > segments.MAX_ITEMS:
                raise ValueError(f"an index holds at most {segments.MAX_ITEMS} items")
            tail, most = len(state.tail.ids) + len(ids), self._longest_tail(state)
            if tail > most and (len(state.base.ids) < _LARGE or tail > _LONGEST * most):
                self._since, self._state = None, self._merged(state, (words, ids))
                return
            self._write(states.added(state, words, ids), Write(words, ids))
            if tail > most:
                self._merge_beside()

    def remove(self, ids: NDArray[np.int64]) -> int:
        """Remove the items with these ids, int64 (n,), and return how many were there; others are ignored."""
        protocol.check_ids(ids)
        with self._lock:
            before = self._state
            state = states.removed(before, ids)
            total = len(state.base.ids) + len(state.tail.ids)
            many = 4 * (total - state.live) > total
            if many and total < _LARGE:
                self._since, self._state = None, self._merged(state)
            elif state is not before:
                self._write(state, Write(None, ids))
                if many:
                    self._merge_beside()
            return before.live - state.live

    def _write(self, state: State, write: Write) -> None:
        """Put a state in place, and note what made it, if a thread is merging the one before."""
        self._state = state
        if self._since is not None:
            self._since.append(write)

    def _merge_beside(self) -> None:
        """Begin to merge in a thread, unless one does."""
        if self._since is None:
            self._since = []
            threading.Thread(target=self._merge, args=(self._state, self._since), name="hashret-merge").start()

    def _merge(self, state: State, since: list[Write]) -> None:
        """Put a merged state in place, with what was written meanwhile, unless another was merged by then; and once
        more, if that is too much for a tail."""
        try:
            while True:
                state, done = self._merged(state), 0
                while len(since) > done + 1:  # most of it without keeping writers waiting
                    state, done = states.written(state, since[done]), done + 1
                with self._lock:
                    if self._since is not since:
                        return
                    for write in since[done:]:
                        state = states.written(state, write)
                    self._state = state
                    if len(state.tail.ids) <= self._longest_tail(state):
                        return
                    self._since = since = []
        finally:
            with self._lock:
                if self._since is since:
                    self._since = None

    def _longest_tail(self, state: State) -> int:
        return 1024 + len(state.base.ids) // self.tail_share

    def search(self, queries: Codes, k: int, *, allowed: NDArray[np.int64] | None = None) -> Hits:
        """The k nearest items of each query, uint8 (q, bits // 8), ordered by (distance, id).

        Only items in `allowed` qualify, if given: ids, int64 (a,), ascending; unknown ones are ignored. Raises
        ValueError for k < 1, for arrays of another dtype or shape, and for `allowed` that does not ascend.
        """
        state = self._state
        k = min(check_count(k, 1, "k"), state.live)
        queries = protocol.as_codes(queries, self.bits)
        words = segments.to_words(queries)
        few = None
        if allowed is not None:
            allowed = protocol.check_allowed(allowed)
            k = min(k, len(allowed))
            few = states.few_allowed(state, allowed, len(queries))
        if few is not None:
            k = min(k, len(few.ids))
        count = len(queries)
        distances, found = np.empty((count, k), np.int32), np.empty((count, k), np.int64)
        heaps = Heaps(distances, found, np.zeros(count, np.int64), np.zeros(count, np.int64))

        def search(low: int, high: int) -> None:
            part, asked = heaps.rows(low, high), words[low:high]
            if few is not None:
                segments.offer_nearest(few, asked, None, part)
            else:
                self._nearest(state, queries[low:high], asked, allowed, part)
                if len(state.tail.ids):
                    part.reached[:] = 0
                    segments.offer_nearest(state.tail, asked, allowed, part)
            sort_heaps(part.distances, part.ids, part.sizes)
            self._count(high - low)

        if k:
            split(count, search)
        # Every search offers all items if need be, so the rows are equally long.
        m = int(heaps.sizes[0]) if count else min(k, states.qualifying(state, allowed))
        if m < k:
            distances, found = np.ascontiguousarray(distances[:, :m]), np.ascontiguousarray(found[:, :m])
        return Hits(distances, found)

    def within(self, queries: Codes, max_distance: int, *, allowed: NDArray[np.int64] | None = None) -> RangeHits:
        """All items at most `max_distance` bits from each query, uint8 (q, bits // 8); `allowed` as in `search`.

        Raises ValueError for max_distance < 0 and for arrays that `search` refuses.
        """
        state = self._state
        radius = min(check_count(max_distance, 0, "max_distance"), self.bits)
        queries = protocol.as_codes(queries, self.bits)
        words = segments.to_words(queries)
        few = None
        if allowed is not None:
            allowed = protocol.check_allowed(allowed)
            few = states.few_allowed(state, allowed, len(queries))

        def search(low: int, high: int) -> RangeHits:
            asked = words[low:high]
            if few is not None:
                found = ranges.expand(few, asked, segments.within(few, asked, radius), None)
            else:
                found = ranges.expand(
                    state.base, asked, self._matches(state, queries[low:high], asked, radius), allowed
                )
                if len(state.tail.ids):
                    added = ranges.expand(state.tail, asked, segments.within(state.tail, asked, radius), allowed)
                    found = ranges.side_by_side(found, added)
            ordered = RangeHits(found.limits, np.empty_like(found.distances), np.empty_like(found.ids))
            sort_rows(*found, np.empty(radius + 1, np.int64), *ordered[1:])
            self._count(high - low)
            return ordered

        return ranges.one_after_another(split(len(queries), search))

    def save(self, path: Path) -> None:
        """Write the index to one file, replacing it only when all is on the disk."""
        state = self._state
        arrays = {f"base.{name}": array for name, array in state.base._asdict().items()}
        arrays |= {f"tail.{name}": array for name, array in state.tail._asdict().items()}
        arrays |= self._engine_arrays(state.engine)
        with files.Writer(path, self.kind) as writer:
            for name, array in arrays.items():
                writer.write(name, [array])
            writer.finish({"bits": self.bits, "live": state.live, **self._settings()})

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> Self:
        """The index saved at `path`.

        `verify` reads the whole file and raises HashretError, naming it, if it was truncated or altered; without it
        only header and sizes are checked, and the file is mapped, not read.
        """
        settings, arrays = files.read(path, cls.kind, verify, _SCATTERED)
        bits, live = settings.pop("bits"), settings.pop("live")
        index = cls(bits, **settings)
        base, tail = (
            segments.frozen(Segment(*(arrays[f"{segment}.{name}"] for name in Segment._fields)))
            for segment in ("base", "tail")
        )
        index._state = State(base, tail, index._engine_from(arrays, base), live)
        return index

    def _settings(self) -> dict[str, Any]:
        """What `__init__` needs besides bits."""
        return {}

    def _engine_arrays(self, engine: Any) -> dict[str, NDArray[Any]]:
        """The engine as arrays to save."""
        return {}

    def _engine_from(self, arrays: dict[str, NDArray[Any]], base: Segment) -> Any:
        """The engine from the arrays saved."""
        return None

    def _built(self, words: Words, ids: Ids) -> State:
        base, engine = self._engine(segments.distinct(words, ids))
        return State(base, segments.plain(words[:0], ids[:0]), engine, len(ids))

    def _merged(self, state: State, *more: tuple[Words, Ids]) -> State:
        parts = [segments.items(state.base), segments.items(state.tail), *more]
        return self._built(np.concatenate([words for words, _ in parts]), np.concatenate([ids for _, ids in parts]))
