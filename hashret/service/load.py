"""The number of requests in progress, and its limit."""

MAX_IN_FLIGHT = 512  # requests in progress


class Load:
    """The requests in progress on one event loop.

    Those that wait for their clients to send or to read do not count, so that slow clients do not keep others out.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.waiting = 0  # for their clients, of these

    def is_full(self, requests: int) -> bool:
        """Return whether no request may join this many, the waiting ones among them."""
        return requests - self.waiting >= MAX_IN_FLIGHT
