"""Metrics for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"}
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters, histograms and gauges of a service."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        labels = ("route", "method", "status")
        self._requests = Counter("hashret_requests", "Requests answered.", labels, registry=registry)
        self._seconds = Histogram(
            "hashret_request_seconds", "From request to answer.", ["route"], buckets=_SECONDS, registry=registry
        )
        self._wait, self._work, self._size = (
            Histogram(f"hashret_{name}", text, ["stage"], buckets=buckets, registry=registry)
            for name, text, buckets in (
                ("wait_seconds", "The longest wait of a batch.", _SECONDS),
                ("work_seconds", "Work on a batch.", _SECONDS),
                ("batch_size", "Requests answered together.", _SIZES),
            )
        )
        self._items = Gauge("hashret_items", "Items in the collection.", registry=registry)
        self._generation = Gauge("hashret_generation", "Generation of the index.", registry=registry)
        self._searched, self._probes = (
            Counter(f"hashret_index_{name}", text, registry=registry)
            for name, text in (
                ("queries", "Queries that the index was asked."),
                ("probes", "Buckets that the index looked up for them, none where it scanned all codes."),
            )
        )
        self._last_searched = (0, 0)
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def count_response(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a response, and observe the seconds since its request."""
        key = route, method if method in _METHODS else "other", status  # clients can send any method name
        if key not in self._children:  # labels() takes longer than counting
            self._children[key] = self._requests.labels(*map(str, key)), self._seconds.labels(route)
        requests, histogram = self._children[key]
        requests.inc()
        histogram.observe(seconds)

    def observe_batch(self, stage: str, size: int, waited: float, seconds: float) -> None:
        """Observe the size of a batch, the longest wait in it, and the seconds of processing it."""
        self._wait.labels(stage).observe(waited)
        self._work.labels(stage).observe(seconds)
        self._size.labels(stage).observe(size)

    def render(self, items: int, generation: int, searched: tuple[int, int]) -> bytes:
        """Return the text format of Prometheus; `searched` counts queries and probes of the present index."""
        self._items.set(items)
        self._generation.set(generation)
        # A new index counts from zero.
        last = self._last_searched if searched[0] >= self._last_searched[0] else (0, 0)
        self._searched.inc(searched[0] - last[0])
        self._probes.inc(max(0, searched[1] - last[1]))
        self._last_searched = searched
        return generate_latest(self._registry)
