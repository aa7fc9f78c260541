"""The part that all indexes share: adding and removing items while threads search.

An index has a *main segment* of distinct codes with posting lists, which an engine searches, and a small *delta
segment* of items added since, which is scanned. *Compaction* builds both into a new main segment when the delta segment
outgrows its share of the main one or a quarter of all items has tombstones (a log-structured merge tree of two levels;
O'Neil et al. 1996). Compacting a large index in a write would delay the writer and all that wait for it, so a thread
does it while the delta segment grows on. A write never changes what a search reads: it replaces the `State` by a new
one. A search reads the state once, so it sees the index before the write or after it.
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

# The names of the segments in index files, where arrays are named "base.codes": they are part of the file format.
_MAIN, _DELTA = "base", "tail"
_RANDOM_ACCESS = {files.array_name(_MAIN, field) for field in ("ids", "by_id", "postings", "signatures")}
_MAX_ID = np.iinfo(np.int64).max
_MIN_BACKGROUND = 1 << 16  # items from which on compaction runs in a thread: fewer take some 50 ms
_MAX_OVERSIZE = 4  # a delta segment of so many times its maximum size is compacted by the writer


class UpdatableIndex(ABC):
    """An index that items can be added to and removed from, over an engine that searches immutable distinct codes."""

    backend: ClassVar[str]  # the name in factory strings and saved files
    delta_divisor: ClassVar[int]  # the delta segment may hold 1024 items plus a 1/delta_divisor of the main segment

    def __init__(self, bits: int) -> None:
        self.bits = check_bits(bits)
        self._lock = threading.Lock()
        self._count_lock = threading.Lock()
        self._queries = self._probes = 0
        self._write_log: list[Write] | None = None  # the writes since a background compaction began
        self._state = self._build(segments.to_words(np.empty((0, bits // 8), np.uint8)), segments.NO_IDS)

    @classmethod
    def from_options(cls, bits: int, options: str) -> Self:
        """Return an empty index for codes of `bits` bits; raise ValueError for any options, as it takes none."""
        if options:
            raise ValueError(f"there is no index {f'{cls.backend}:{options}'!r}: {cls.backend} takes no options")
        return cls(bits)

    @abstractmethod
    def _build_engine(self, main: Segment) -> tuple[Segment, Any]:
        """Return the main segment, with the tables that the engine needs, and the engine."""

    @abstractmethod
    def _offer_main(self, state: State, queries: Codes, words: Words, allowed: Ids | None, heaps: Heaps) -> None:
        """Offer the items of the main segment to the heap of each query."""

    @abstractmethod
    def _match_main(self, state: State, queries: Codes, words: Words, radius: int) -> tuple[Ids, NDArray[np.uint32]]:
        """Return the codes of the main segment within a radius of each query: limits (q + 1,) and numbers of codes."""

    def __len__(self) -> int:
        return self._state.alive

    def __contains__(self, item_id: object) -> bool:
        if not isinstance(item_id, int | np.integer) or not 0 <= item_id <= _MAX_ID:
            return False
        return bool(states.find(self._state, np.array([item_id], np.int64)).exists[0])

    def get(self, ids: NDArray[np.int64]) -> Codes:
        """Return the codes, uint8 (n, bits // 8), of the items with these ids, int64 (n,), in any order, also repeated.

        Raise KeyError, naming the id, if one is not in the index.
        """
        stored = states.find(self._state, protocol.check_ids(ids))
        if not stored.exists.all():
            raise KeyError(f"id {ids[~stored.exists][0]} is not in the index")
        return segments.from_words(stored.words, self.bits)

    @property
    def searched(self) -> Searched:
        """The number of queries searched, and of buckets probed for them."""
        with self._count_lock:
            return Searched(self._queries, self._probes)

    def _count(self, queries: int) -> None:
        """Count queries that this thread has just searched, and their probes."""
        probes = segments.take_probes()
        with self._count_lock:
            self._queries += queries
            self._probes += probes

    def add(self, codes: Codes, ids: NDArray[np.int64]) -> None:
        """Add codes, uint8 (n, bits // 8), under ids, int64 (n,), not negative.

        Raise ValueError, and change nothing, if an id is in the index already or is repeated.
        """
        codes = protocol.check_items(codes, ids, self.bits)
        if not len(ids):
            return
        ascending = np.sort(ids)
        protocol.check_distinct(ascending)
        words = segments.to_words(codes)
        with self._lock:
            state = self._state
            for segment in state.segments:
                slots = states.alive_slots(segment, ascending)
                if len(slots):
                    raise ValueError(f"id {segment.ids[slots].min()} is in the index already")
            if state.alive + len(ids) > segments.MAX_ITEMS:
                raise ValueError(f"an index holds at most {segments.MAX_ITEMS} items")
            size, max_size = len(state.delta.ids) + len(ids), self._max_delta(state)
            if size > max_size and (len(state.main.ids) < _MIN_BACKGROUND or size > _MAX_OVERSIZE * max_size):
                self._write_log, self._state = None, self._compact(state, (words, ids))
                return
            self._write(states.add(state, words, ids), Write(words, ids))
            if size > max_size:
                self._start_compaction()

    def remove(self, ids: NDArray[np.int64]) -> int:
        """Remove the items with these ids, int64 (n,), and return their number; ignore ids without an item."""
        protocol.check_ids(ids)
        with self._lock:
            before = self._state
            state = states.remove(before, ids)
            total = len(state.main.ids) + len(state.delta.ids)
            many_tombstones = 4 * (total - state.alive) > total
            if many_tombstones and total < _MIN_BACKGROUND:
                self._write_log, self._state = None, self._compact(state)
            elif state is not before:
                self._write(state, Write(None, ids))
                if many_tombstones:
                    self._start_compaction()
            return before.alive - state.alive

    def _write(self, state: State, write: Write) -> None:
        """Replace the state, and log the write if a background compaction is running."""
        self._state = state
        if self._write_log is not None:
            self._write_log.append(write)

    def _start_compaction(self) -> None:
        """Start a background compaction, unless one is running."""
        if self._write_log is None:
            self._write_log = []
            args = self._state, self._write_log
            threading.Thread(target=self._run_compaction, args=args, name="hashret-compaction").start()

    def _run_compaction(self, state: State, write_log: list[Write]) -> None:
        """Compact the state, apply the logged writes and put it in place, unless a writer has compacted the index.

        Repeat if the delta segment is too large again.
        """
        try:
            while True:
                state, applied = self._compact(state), 0
                while len(write_log) > applied + 1:  # apply most writes without the lock, which delays writers
                    state, applied = states.apply(state, write_log[applied]), applied + 1
                with self._lock:
                    if self._write_log is not write_log:
                        return
                    for write in write_log[applied:]:
                        state = states.apply(state, write)
                    self._state = state
                    if len(state.delta.ids) <= self._max_delta(state):
                        return
                    self._write_log = write_log = []
        finally:
            with self._lock:
                if self._write_log is write_log:
                    self._write_log = None

    def _max_delta(self, state: State) -> int:
        return 1024 + len(state.main.ids) // self.delta_divisor

    def search(self, queries: Codes, k: int, *, allowed: NDArray[np.int64] | None = None) -> Hits:
        """Return the k nearest items of each query, uint8 (q, bits // 8), ordered by (distance, id).

        With `allowed`, ascending ids, int64 (a,), only these items qualify; ids that are not in the index are ignored.
        Raise ValueError for k < 1, for arrays of another dtype or shape, and for `allowed` that does not ascend.
        """
        state = self._state
        k = min(check_count(k, 1, "k"), state.alive)
        queries = protocol.as_codes(queries, self.bits)
        words = segments.to_words(queries)
        extract = None
        if allowed is not None:
            allowed = protocol.check_allowed(allowed)
            extract = states.extract_allowed(state, allowed, len(queries))
            k = min(k, len(allowed) if extract is None else len(extract.ids))
        count = len(queries)
        distances, ids = np.empty((count, k), np.int32), np.empty((count, k), np.int64)
        heaps = Heaps(distances, ids, np.zeros(count, np.int64), np.zeros(count, np.int64))

        def search(low: int, high: int) -> None:
            part, part_words = heaps.rows(low, high), words[low:high]
            if extract is not None:
                segments.offer_nearest(extract, part_words, None, part)
            else:
                self._offer_main(state, queries[low:high], part_words, allowed, part)
                if len(state.delta.ids):
                    part.next_levels[:] = 0
                    segments.offer_nearest(state.delta, part_words, allowed, part)
            sort_heaps(part.distances, part.ids, part.sizes)
            self._count(high - low)

        if k:
            split(count, search)
        # Every search offers all qualifying items if fewer than k, so all rows have the same length.
        m = int(heaps.sizes[0]) if count else min(k, states.count_qualifying(state, allowed))
        if m < k:
            distances, ids = np.ascontiguousarray(distances[:, :m]), np.ascontiguousarray(ids[:, :m])
        return Hits(distances, ids)

    def within(self, queries: Codes, max_distance: int, *, allowed: NDArray[np.int64] | None = None) -> RangeHits:
        """Return all items within `max_distance` bits of each query, uint8 (q, bits // 8); `allowed` as in `search`.

        Raise ValueError for max_distance < 0 and for arrays that `search` rejects.
        """
        state = self._state
        radius = min(check_count(max_distance, 0, "max_distance"), self.bits)
        queries = protocol.as_codes(queries, self.bits)
        words = segments.to_words(queries)
        extract = None
        if allowed is not None:
            allowed = protocol.check_allowed(allowed)
            extract = states.extract_allowed(state, allowed, len(queries))

        def search(low: int, high: int) -> RangeHits:
            part = words[low:high]
            if extract is not None:
                hits = ranges.expand(extract, part, segments.match_within(extract, part, radius), None)
            else:
                matches = self._match_main(state, queries[low:high], part, radius)
                hits = ranges.expand(state.main, part, matches, allowed)
                if len(state.delta.ids):
                    matches = segments.match_within(state.delta, part, radius)
                    hits = ranges.merge(hits, ranges.expand(state.delta, part, matches, allowed))
            ordered = RangeHits(hits.limits, np.empty_like(hits.distances), np.empty_like(hits.ids))
            sort_rows(*hits, np.empty(radius + 1, np.int64), *ordered[1:])
            self._count(high - low)
            return ordered

        return ranges.concatenate(split(len(queries), search))

    def save(self, path: Path) -> None:
        """Write the index to one file, and replace the file only when all is on the disk."""
        state = self._state
        with files.Writer(path, self.backend) as writer:
            for name, segment in zip((_MAIN, _DELTA), state.segments, strict=True):
                for field, array in segment._asdict().items():
                    writer.write(files.array_name(name, field), [array])
            for name, array in self._engine_arrays(state.engine).items():
                writer.write(name, [array])
            writer.finish({"bits": self.bits, "live": state.alive, **self._settings()})

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> Self:
        """Return the index saved at `path`.

        With `verify`, read the whole file and raise HashretError, naming it, if it was truncated or altered. Without,
        check only the header and the sizes, and map the file into memory.
        """
        settings, arrays = files.read(path, cls.backend, verify, _RANDOM_ACCESS)
        bits, alive = settings.pop("bits"), settings.pop("live")
        index = cls(bits, **settings)
        main, delta = (
            segments.freeze(Segment(*(arrays[files.array_name(name, field)] for field in Segment._fields)))
            for name in (_MAIN, _DELTA)
        )
        index._state = State(main, delta, index._load_engine(arrays, main), alive)
        return index

    def _settings(self) -> dict[str, Any]:
        """Return the arguments of `__init__` other than bits."""
        return {}

    def _engine_arrays(self, engine: Any) -> dict[str, NDArray[Any]]:
        """Return the engine as arrays to save."""
        return {}

    def _load_engine(self, arrays: dict[str, NDArray[Any]], main: Segment) -> Any:
        """Return the engine from the saved arrays."""
        return None

    def _build(self, words: Words, ids: Ids) -> State:
        main, engine = self._build_engine(segments.build_distinct(words, ids))
        return State(main, segments.build_flat(words[:0], ids[:0]), engine, len(ids))

    def _compact(self, state: State, *new_items: tuple[Words, Ids]) -> State:
        parts = [*map(segments.read_items, state.segments), *new_items]
        return self._build(np.concatenate([words for words, _ in parts]), np.concatenate([ids for _, ids in parts]))
