from collections import Counter

import numpy as np
import pytest

from hashret.codes import pack
from hashret.health import Health, health


@pytest.mark.parametrize("bits", [8, 64, 72, 256])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_health_counts_what_python_counts(bits: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hashret.health.CHUNK", 300)
    random = np.random.default_rng(bits + count)
    rows = random.random((count, bits)) < np.linspace(0, 1, bits)
    rows[: count // 3] = rows[0]
    told = health(pack(rows))
    buckets = Counter(row.tobytes() for row in rows)
    shares = [sum(map(int, column)) / count for column in rows.T]
    assert told[:4] == (count, len(buckets), max(buckets.values()), sum(share in (0, 1) for share in shares))
    assert told.balance == pytest.approx(sum(1 - abs(2 * share - 1) for share in shares) / bits)


def test_health_at_its_ends() -> None:
    assert health(np.zeros((0, 8), np.uint8)) == Health(0, 0, 0, 0, 0.0)
    assert health(np.zeros((5, 2), np.uint8)) == Health(5, 1, 5, 16, 0.0)
    assert health(np.array([[0, 0], [255, 255]], np.uint8)) == Health(2, 2, 1, 0, 1.0)
