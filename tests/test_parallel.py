import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from hashret.errors import HashretError
from hashret.parallel import batches, ordered_map


@pytest.mark.parametrize("caller_runs", [False, True])
def test_results_come_in_the_order_of_the_items(caller_runs: bool) -> None:
    def slow(i: int) -> int:
        time.sleep(0.002 * (i % 5))
        return i * i

    assert list(ordered_map(slow, range(200), threads=8, caller_runs=caller_runs)) == [i * i for i in range(200)]
    assert list(ordered_map(slow, [], caller_runs=caller_runs)) == []
    assert list(ordered_map(slow, range(3), max_pending=1, caller_runs=caller_runs)) == [0, 1, 4]


def test_a_caller_that_runs_items_does_so_while_it_would_wait() -> None:
    both = threading.Barrier(2)

    def work(i: int) -> str:
        both.wait(30)  # until the other of the two threads runs an item too
        return threading.current_thread().name

    names = Counter(ordered_map(work, range(40), threads=2, max_pending=4, caller_runs=True))
    assert len(names) == 2 and names[threading.current_thread().name] == 20


def test_an_error_in_an_item_that_the_caller_runs_is_raised_at_its_turn() -> None:
    tried = threading.Event()

    def work(i: int) -> str:
        if i == 0:
            assert tried.wait(30)  # set by the caller, as the only other thread waits here
            return "first"
        tried.set()
        raise ValueError("second")

    results = ordered_map(work, range(2), threads=2, caller_runs=True)
    assert next(results) == "first"
    with pytest.raises(ValueError, match="second"):
        next(results)


def test_items_are_read_in_the_calling_thread_and_not_far_ahead() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for i in range(1000):
            assert threading.current_thread() is threading.main_thread()
            read.append(i)
            yield i

    for result in ordered_map(lambda i: i, items(), threads=2, max_pending=10):
        assert len(read) <= result + 10


def test_fewer_heavy_items_are_read_ahead() -> None:
    read: list[int] = []
    weights = [4, 4, 1, 1, 1, 1, 20, *[1] * 50]

    def items() -> Iterator[int]:
        for i in range(len(weights)):
            read.append(i)
            yield i

    for result in ordered_map(lambda i: i, items(), threads=1, max_pending=10, weight_of=lambda i: weights[i]):
        if len(read) < len(weights):
            # Reading stops once the items without a result, except the last one, weigh less than 10.
            assert sum(weights[result : len(read) - 1]) < 10 <= sum(weights[result : len(read)])


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hashret-map")]


@pytest.mark.parametrize("caller_runs", [False, True])
def test_errors_of_the_function_and_of_the_items_are_raised_at_their_turn(caller_runs: bool) -> None:
    def broken_items() -> Iterator[int]:
        yield from range(5)
        raise HashretError("broken stream")

    results = ordered_map(lambda i: 10 // (i - 20), range(50), threads=3, caller_runs=caller_runs)
    assert [next(results) for _ in range(20)] == [10 // (i - 20) for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(HashretError, match="broken stream"):
        list(ordered_map(lambda i: i, broken_items(), caller_runs=caller_runs))
    assert not workers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, None])
def test_stopping_early_drops_pending_items_and_leaves_no_thread(error: type[BaseException] | None) -> None:
    done = []

    def work(i: int) -> int:
        time.sleep(0.01)
        done.append(i)
        return i

    results = ordered_map(work, range(10_000), threads=2, max_pending=500)
    assert next(results) == 0
    assert workers()
    if error is None:
        results.close()
    else:
        with pytest.raises(error):
            results.throw(error)
    assert not workers()
    assert len(done) < 500


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches_are_the_items_in_order(size: int) -> None:
    for count in (0, 1, 3, 6, 20):
        found = list(batches(iter(range(count)), size))
        assert [item for batch in found for item in batch] == list(range(count))
        assert [len(batch) for batch in found[:-1]] == [size] * (-(-count // size) - 1) if count else found == []


def test_batches_end_once_they_weigh_one() -> None:
    weights = [0.5, 0.5, 0.2, 0.2, 0.2, 3, 0.9, 0.05]
    assert list(batches(weights, 3, lambda weight: weight)) == [[0.5, 0.5], [0.2, 0.2, 0.2], [3], [0.9, 0.05]]
    assert list(batches(weights, 2, lambda weight: 0)) == [weights[i : i + 2] for i in range(0, 8, 2)]
    assert list(batches([], 3, lambda weight: weight)) == []


def test_a_batch_is_yielded_before_more_items_are_read() -> None:
    read: list[int] = []
    items = (read.append(i) or i for i in range(9))  # type: ignore[func-returns-value]
    weighted = batches(items, 3, lambda i: 0)
    assert next(weighted) == [0, 1, 2] and read == [0, 1, 2]
