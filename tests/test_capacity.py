from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hashret.collection import Collection, capacity
from hashret.collection.capacity import Estimate, estimate
from hashret.errors import HashretError
from hashret.hasher import Hasher


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MIN_SECONDS": 0.01,
        "BATCH_IMAGES": 20,
        "ROWS": 3000,
        "CODES": 3000,
        "WIDTH": 96,
        "HEIGHT": 64,
    }.items():
        monkeypatch.setattr(capacity, name, value)


def check(estimated: Estimate) -> None:
    """Check that an estimate is proportional to its measurements."""
    assert estimated.seconds == pytest.approx(estimated.images / estimated.images_per_second)
    assert estimated.images_per_second == pytest.approx(estimated.measured / estimated.measured_seconds)
    assert estimated.disk == pytest.approx(estimated.images * (estimated.database_bytes + estimated.index_bytes), abs=1)
    assert estimated.memory == pytest.approx(estimated.images * estimated.index_bytes + estimated.program_bytes, abs=1)
    assert 2**25 < estimated.program_bytes < 2**35


def test_an_estimate_is_near_what_a_collection_takes(tmp_path: Path) -> None:
    estimated = estimate(2000, 16)
    check(estimated)
    assert (estimated.images, estimated.bits, estimated.of) == (2000, 16, "made-up JPEGs of 96 × 64")
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 8, 8), np.uint8)
    with Collection.create(tmp_path / "c", Hasher("lsh", 16).fit(pixels[:100])) as collection:
        np.save(tmp_path / "rows.npy", pixels)
        collection.index(tmp_path / "rows.npy")
        (cache,) = (tmp_path / "c/index").iterdir()
        assert estimated.images * estimated.index_bytes == pytest.approx(cache.stat().st_size, rel=0.3)
        collection.close()
    database = (tmp_path / "c/items.db").stat().st_size
    assert estimated.images * estimated.database_bytes == pytest.approx(database, rel=0.5)


def test_an_estimate_can_use_own_images(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 256, (40, 9, 9, 3), np.uint8))
    for name in ("photos", "broken", "empty"):
        (tmp_path / name).mkdir()
    for i in range(3):
        Image.new("RGB", (50, 40), (i, 0, 0)).save(tmp_path / f"photos/{i}.png")
    for source in (tmp_path / "rows.npy", tmp_path / "photos"):
        estimated = estimate(10**9, 64, source)
        check(estimated)
        assert estimated.of == f"images of {source}"
    (tmp_path / "broken/a.png").write_bytes(b"Dear diary")
    (tmp_path / "broken/b.png").write_bytes((tmp_path / "photos/0.png").read_bytes())
    for name, reason in (("broken", "no image: .*"), ("empty", "no images"), ("none", "there is no")):
        with pytest.raises(HashretError, match=reason):
            estimate(10, 64, tmp_path / name)


@pytest.mark.parametrize(("images", "bits"), [(0, 64), (-1, 64), (1.5, 64), (10, 12), (10, 0)])
def test_invalid_numbers_raise_errors(images: int, bits: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        estimate(images, bits)
