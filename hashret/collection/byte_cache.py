"""`ByteCache`: values that are cached while one state of a collection lasts, bounded by bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")

ENTRY_BYTES = 200  # of a key and its place in the dictionary


class ByteCache(Generic[V]):
    """Values by key, of at most `max_bytes` as `size_of` measures them; the oldest are dropped first.

    Reading takes no lock, because every hit of every query reads. Caches that reorder values on reading need one.
    """

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._size_of = size_of
        self._lock = threading.Lock()
        self._cached: tuple[Hashable, OrderedDict[Hashable, V]] = None, OrderedDict()

    def values(self, state: Hashable = None) -> OrderedDict[Hashable, V]:
        """Return the values that were cached in this state, for reading."""
        cached = self._cached
        return cached[1] if cached[0] == state else OrderedDict()

    def put(self, key: Hashable, value: V, state: Hashable = None) -> None:
        """Cache a value, and drop those of other states."""
        size = self._size_of(value) + ENTRY_BYTES
        with self._lock:
            if self._cached[0] != state:
                self._cached, self.bytes = (state, OrderedDict()), 0
            values = self._cached[1]
            if key in values or size > self.max_bytes:
                return
            values[key] = value
            self.bytes += size
            while self.bytes > self.max_bytes:
                self.bytes -= self._size_of(values.popitem(last=False)[1]) + ENTRY_BYTES
