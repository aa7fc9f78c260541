"""The bytes that requests hold in memory: their bodies and their answers, of each request and of all in progress."""

import threading

from hashret.service.problems import Busy, Problem

MAX_REQUEST_BYTES = 64 * 2**20  # body of one request
MAX_ANSWER_BYTES = 32 * 2**20  # body of one response
MAX_BYTES_IN_FLIGHT = 512 * 2**20  # of all requests in progress
SMALL_BYTES = 2**16  # of a request that is never refused for the bytes of others, which slow clients may hold


class Memory:
    """The bytes of all requests in progress."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.bytes = 0


class RequestMemory:
    """The bytes of one request. Its body arrives on the event loop; its answer is made in a thread."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._held = self._received = self._answered = 0
        self._released = False

    def receive(self, size: int) -> None:
        """Count bytes of the body. Raise Problem 413 or `Busy` if they are too many."""
        self._received += size
        if self._received > MAX_REQUEST_BYTES:
            raise too_large()
        self.hold(size)

    def answer(self, size: int) -> None:
        """Count bytes of the answer before they are made. Raise Problem 422 or `Busy` if they are too many."""
        self._answered += size
        if self._answered > MAX_ANSWER_BYTES:
            raise answer_too_large()
        self.hold(size)

    def hold(self, size: int) -> None:
        """Count any bytes. Raise `Busy` if they are too many, or if the request has ended."""
        with self._memory.lock:
            fits = self._held + size <= SMALL_BYTES or self._memory.bytes + size <= MAX_BYTES_IN_FLIGHT
            if self._released or not fits:
                raise Busy("bytes")
            self._memory.bytes += size
            self._held += size

    def release(self) -> None:
        """End the request."""
        with self._memory.lock:
            self._memory.bytes -= self._held
            self._held, self._released = 0, True


def too_large() -> Problem:
    """Return the error for a request with too many bytes."""
    return Problem(413, f"the request has more than {MAX_REQUEST_BYTES // 2**20} MiB: send less at a time", "TooLarge")


def answer_too_large() -> Problem:
    """Return the error for an answer with too many bytes."""
    size = f"{MAX_ANSWER_BYTES / 2**20:.3g} MiB"
    advice = "give a smaller k or limit, fewer queries, or fewer fields, such as fields=id,distance"
    return Problem(422, f"the answer has more than {size}: {advice}", "ValueError")
