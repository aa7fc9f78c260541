"""What Prometheus is told."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"}
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and histograms of one service."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        asked = ("route", "method", "status")
        self._requests = Counter("hashret_requests", "Requests answered.", asked, registry=registry)
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
        self._before = (0, 0)
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        key = route, method if method in _METHODS else "other", status  # whoever asks may name methods
        if key not in self._children:  # looking labels up costs more than counting
            self._children[key] = self._requests.labels(*map(str, key)), self._seconds.labels(route)
        requests, histogram = self._children[key]
        requests.inc()
        histogram.observe(seconds)

    def worked(self, stage: str, size: int, waited: float, seconds: float) -> None:
        self._wait.labels(stage).observe(waited)
        self._work.labels(stage).observe(seconds)
        self._size.labels(stage).observe(size)

    def page(self, items: int, generation: int, searched: tuple[int, int]) -> bytes:
        """The text that Prometheus reads; `searched` are the queries and probes of the present index, from its
        beginning on."""
        self._items.set(items)
        self._generation.set(generation)
        before = self._before if searched[0] >= self._before[0] else (0, 0)  # of an index since gone
        self._searched.inc(searched[0] - before[0])
        self._probes.inc(max(0, searched[1] - before[1]))
        self._before = searched
        return generate_latest(self._registry)
