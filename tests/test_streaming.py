"""Indexes built on disk: equal to those built in memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brute_force import Array, as_items, check_search, check_within, make_codes, shapes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hashret.indexes import BitFlipIndex, streaming
from hashret.indexes import files as formats

pytestmark = pytest.mark.usefixtures("flip_early")


@pytest.fixture
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split a few kilobytes recursively into few files, and read few rows at a time."""
    for name, value in {"PART": 600, "PASS": 300, "BLOCK": 128, "FANOUT": 5, "OVERSAMPLING": 4}.items():
        monkeypatch.setattr(streaming, name, value)


def in_batches(codes: Array, ids: Array, size: int) -> Iterator[tuple[Array, Array]]:
    for begin in range(0, len(ids), size):
        yield codes[begin : begin + size], ids[begin : begin + size]


def make_skewed(distribution: str, bits: int, count: int) -> Array:
    codes = make_codes(bits, count, 1, 40, 0.3)
    if distribution == "all equal":
        codes[:] = codes[0]
    elif distribution == "few":
        codes = codes[np.random.default_rng(0).zipf(1.3, count) % 40]
    elif distribution == "one in most":
        codes[: count - 20] = codes[-1]
    elif distribution == "equal at first":  # most bytes of the records are equal
        codes[:, : bits // 8 - 1] = 0
    elif distribution == "ascending":
        codes = codes[np.lexsort(codes.T[::-1])]
    return codes


@pytest.mark.parametrize("bits", [8, 64, 72, 1024])
@pytest.mark.parametrize("distribution", ["any", "all equal", "few", "one in most", "equal at first", "ascending"])
@pytest.mark.parametrize("parts", ["tiny", "large"])
def test_a_build_on_disk_writes_the_same_file_as_add_and_save(
    bits: int, distribution: str, parts: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if parts == "tiny":
        request.getfixturevalue("tiny_parts")
    codes, ids = make_skewed(distribution, bits, 2500), np.random.default_rng(2).permutation(7500)[:2500] << 40
    reports: list[tuple[str, int]] = []
    built = BitFlipIndex.build(
        tmp_path / "built", bits, in_batches(codes, ids, 700), progress=lambda *report: reports.append(report)
    )
    assert reports[0] == ("reading", 700) and {stage for stage, _ in reports} >= {"reading", "sorting", "ids"}
    assert ("sorting", 2500) in reports and ("ids", 2500) in reports
    added = BitFlipIndex(bits)
    added.add(codes, ids)
    added.save(tmp_path / "added")
    settings_built, arrays = formats.read(tmp_path / "built", "bitflip", verify=True)
    settings_added, expected = formats.read(tmp_path / "added", "bitflip", verify=True)
    assert settings_built == settings_added and arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype and array.shape == expected[name].shape, name
        assert (array == expected[name]).all(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["added", "built"]

    items, queries = as_items(codes, ids), np.concatenate([codes[:3], make_codes(bits, 6, 3, 40, 0.3)])
    for index in (built, BitFlipIndex.load(tmp_path / "built")):
        check_search(index, items, queries, 7)
        check_search(index, items, queries, 7, np.sort(ids[::5]))
        check_within(index, items, queries, bits // 5)
    more, fresh = make_codes(bits, 1500, 5, 40, 0.3), np.arange(1500) * 2 + 1
    for low, high in ((0, 5), (5, 1500)):  # into the delta segment, into a new main segment
        with pytest.raises(ValueError, match=str(ids[-1])):
            built.add(more[:1], ids[-1:])
        built.add(more[low:high], fresh[low:high])
        assert built.remove(ids[low:high]) == high - low
        items = {i: code for i, code in items.items() if i not in set(ids[low:high].tolist())}
        items |= as_items(more[low:high], fresh[low:high])
        check_search(built, items, queries, 7)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes, st.integers(1, 300), st.integers(0, 40))
def test_a_build_on_disk_equals_brute_force(
    tmp_path: Path, tiny_parts: None, shape: tuple[int, int, int, float, int], size: int, radius: int
) -> None:
    bits, count, n_centres, noise, seed = shape
    codes, ids = (
        make_codes(bits, count, seed, n_centres, noise),
        np.random.default_rng(seed).permutation(count * 3)[:count],
    )
    index = BitFlipIndex.build(tmp_path / "index", bits, in_batches(codes, ids, size))
    queries, items = np.concatenate([codes[:2], make_codes(bits, 3, seed + 1, n_centres, noise)]), as_items(codes, ids)
    assert len(index) == count
    check_search(index, items, queries, size)
    check_within(index, items, queries, radius)


def test_no_batches_and_empty_batches_build_an_empty_index(tmp_path: Path) -> None:
    none = np.empty((0, 8), np.uint8), np.empty(0, np.int64)
    for batches in ([], [none, none]):
        index = BitFlipIndex.build(tmp_path / "index", 64, batches)
        assert len(index) == 0 and index.search(make_codes(64, 2, 1), 3).ids.shape == (2, 0)
        index.add(make_codes(64, 2, 1), np.array([4, 5]))
        assert index.search(make_codes(64, 1, 1), 1).ids.tolist() == [[4]]


@pytest.mark.parametrize("parts", ["tiny", "large"])
def test_a_build_rejects_what_add_rejects(parts: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if parts == "tiny":
        request.getfixturevalue("tiny_parts")
    codes, ids = make_codes(64, 1000, 1), np.arange(1000)[::-1].copy()
    all_equal, repeated, negative = ids * 0, ids.copy(), ids.copy()
    repeated[3], negative[3] = ids[990], -4
    bad: list[tuple[Any, Any, str]] = [
        (codes, repeated, "id 9 is repeated"),
        (codes, all_equal, "id 0 is repeated"),
        (codes[np.zeros(1000, np.int64)], all_equal, "id 0 is repeated"),
        (codes, negative, "-4"),
        (codes, ids[:-1], "999"),
        (codes, ids.astype(np.int32), "int32"),
        (codes[:, :4].copy(), ids, "32"),
        (codes.astype(np.int8), ids, "int8"),
    ]
    for codes_, ids_, text in bad:
        with pytest.raises(ValueError, match=text):
            BitFlipIndex.build(tmp_path / "index", 64, [(codes[:0], ids[:0]), (codes_, ids_)])
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="12"):
        BitFlipIndex.build(tmp_path / "index", 12, [])


@pytest.mark.parametrize("stage", ["reading", "sorting", "ids", "tables", "fsync"])
def test_an_interrupted_build_leaves_only_the_old_file(
    stage: str, tmp_path: Path, tiny_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, ids = make_codes(64, 1000, 1, 40, 0.3), np.arange(1000)
    halted = []

    def halt(reached: str, done: int) -> None:
        if reached == stage and done:
            halted.append(sorted(path.name for path in tmp_path.rglob("*")))
            raise KeyboardInterrupt

    if stage == "fsync":
        monkeypatch.setattr(os, "fsync", lambda descriptor: halt("fsync", 1))
    for left in ([], ["index"]):
        with pytest.raises(KeyboardInterrupt):
            BitFlipIndex.build(tmp_path / "index", 64, in_batches(codes, ids, 300), progress=halt)
        assert [path.name for path in tmp_path.iterdir()] == left
        (tmp_path / "index").write_bytes(b"old")
    assert len(halted[0]) > 1 and (tmp_path / "index").read_bytes() == b"old"
