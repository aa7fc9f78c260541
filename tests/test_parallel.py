import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from hashret.errors import HashretError
from hashret.parallel import batches, in_order


@pytest.mark.parametrize("helping", [False, True])
def test_results_come_in_the_order_of_the_items(helping: bool) -> None:
    def slow(i: int) -> int:
        time.sleep(0.002 * (i % 5))
        return i * i

    assert list(in_order(slow, range(200), threads=8, helping=helping)) == [i * i for i in range(200)]
    assert list(in_order(slow, [], helping=helping)) == []
    assert list(in_order(slow, range(3), ahead=1, helping=helping)) == [0, 1, 4]


def test_a_helping_caller_works_while_it_would_wait() -> None:
    both = threading.Barrier(2)

    def work(i: int) -> str:
        both.wait(30)  # for whoever is the other of two threads
        return threading.current_thread().name

    names = Counter(in_order(work, range(40), threads=2, ahead=4, helping=True))
    assert len(names) == 2 and names[threading.current_thread().name] == 20


def test_an_error_of_a_helping_caller_waits_for_its_place() -> None:
    tried = threading.Event()

    def work(i: int) -> str:
        if i == 0:
            assert tried.wait(30)  # by the caller, as the only other thread waits here
            return "first"
        tried.set()
        raise ValueError("second")

    results = in_order(work, range(2), threads=2, helping=True)
    assert next(results) == "first"
    with pytest.raises(ValueError, match="second"):
        next(results)


def test_items_are_taken_in_this_thread_and_not_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(1000):
            assert threading.current_thread() is threading.main_thread()
            taken.append(i)
            yield i

    for result in in_order(lambda i: i, items(), threads=2, ahead=10):
        assert len(taken) <= result + 10


def test_heavy_items_are_taken_less_far_ahead() -> None:
    taken: list[int] = []
    weights = [4, 4, 1, 1, 1, 1, 20, *[1] * 50]

    def items() -> Iterator[int]:
        for i in range(len(weights)):
            taken.append(i)
            yield i

    for result in in_order(lambda i: i, items(), threads=1, ahead=10, weigh=lambda i: weights[i]):
        if len(taken) < len(weights):
            # Taking stops as soon as those without a result, but for the last, weigh less than 10.
            assert sum(weights[result : len(taken) - 1]) < 10 <= sum(weights[result : len(taken)])


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hashret-order")]


@pytest.mark.parametrize("helping", [False, True])
def test_errors_of_the_function_and_of_the_items_come_out_in_their_place(helping: bool) -> None:
    def broken_items() -> Iterator[int]:
        yield from range(5)
        raise HashretError("broken stream")

    results = in_order(lambda i: 10 // (i - 20), range(50), threads=3, helping=helping)
    assert [next(results) for _ in range(20)] == [10 // (i - 20) for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(HashretError, match="broken stream"):
        list(in_order(lambda i: i, broken_items(), helping=helping))
    assert not workers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, None])
def test_stopping_early_drops_what_waits_and_leaves_no_thread(error: type[BaseException] | None) -> None:
    done = []

    def work(i: int) -> int:
        time.sleep(0.01)
        done.append(i)
        return i

    results = in_order(work, range(10_000), threads=2, ahead=500)
    assert next(results) == 0
    assert workers()
    if error is None:
        results.close()
    else:
        with pytest.raises(error):
            results.throw(error)
    assert not workers()
    assert len(done) < 500


# Batches


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches_are_the_items_in_order(size: int) -> None:
    for count in (0, 1, 3, 6, 20):
        found = list(batches(iter(range(count)), size))
        assert [item for batch in found for item in batch] == list(range(count))
        assert [len(batch) for batch in found[:-1]] == [size] * (-(-count // size) - 1) if count else found == []


def test_batches_end_where_they_weigh_one() -> None:
    weights = [0.5, 0.5, 0.2, 0.2, 0.2, 3, 0.9, 0.05]
    assert list(batches(weights, 3, lambda weight: weight)) == [[0.5, 0.5], [0.2, 0.2, 0.2], [3], [0.9, 0.05]]
    assert list(batches(weights, 2, lambda weight: 0)) == [weights[i : i + 2] for i in range(0, 8, 2)]
    assert list(batches([], 3, lambda weight: weight)) == []


def test_a_batch_is_given_out_before_more_is_taken() -> None:
    taken: list[int] = []
    items = (taken.append(i) or i for i in range(9))  # type: ignore[func-returns-value]
    weighed = batches(items, 3, lambda i: 0)
    assert next(weighed) == [0, 1, 2] and taken == [0, 1, 2]
