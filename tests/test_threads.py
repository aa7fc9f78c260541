"""Batches split among threads."""

import pytest

from hashret.indexes import get_threads, set_threads
from hashret.indexes.threads import split


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 16, 100, 7171])
def test_parts_of_a_batch_come_in_order_from_any_number_of_threads(threads: int, count: int) -> None:
    before = get_threads()
    set_threads(threads)
    try:
        parts = split(count, lambda low, high: list(range(low, high)))
        with pytest.raises(ZeroDivisionError):
            split(max(count, 1), lambda low, high: 1 // (high < count))
    finally:
        set_threads(before)
    assert [i for part in parts for i in part] == list(range(count))
