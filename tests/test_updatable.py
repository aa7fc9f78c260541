"""`UpdatableIndex`: compaction, workspaces and mapped files."""

import itertools
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from brute_force import (
    IndexMachine,
    as_items,
    assert_same,
    check_get,
    check_search,
    check_within,
    make_clusters,
    make_codes,
)
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from hashret.errors import HashretError
from hashret.indexes import BitFlipIndex, FaissIndex, files, tables, updatable
from hashret.indexes.updatable import UpdatableIndex

EXAMPLES = 200 if "HASHRET_SOAK" in os.environ else 25  # sequences of writes
CLASSES: dict[str, type[BitFlipIndex] | type[FaissIndex]] = {"bitflip": BitFlipIndex, "faiss": FaissIndex}

pytestmark = pytest.mark.usefixtures("flip_early")


@pytest.mark.parametrize("engine", sorted(CLASSES))
def test_any_sequence_of_writes_during_background_compaction(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updatable, "_MIN_BACKGROUND", 0)  # however few items there are
    machine = type("Machine", (IndexMachine,), {"spec": engine, "folder": tmp_path})
    run_state_machine_as_test(machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None))


@pytest.mark.parametrize("engine", sorted(CLASSES))
@pytest.mark.parametrize("bits", [16, 64, 256])
def test_the_main_segment_stores_a_shared_code_once(engine: str, bits: int) -> None:
    few = make_codes(bits, 40, 3, 40, 0.5)
    index = CLASSES[engine](bits)
    index.add(few[np.arange(4000) % 40], np.arange(4000))
    assert len(index._state.main.ids) == 4000 and len(index._state.main.codes) == len(np.unique(few, axis=0))


@pytest.mark.parametrize("engine", sorted(CLASSES))
@pytest.mark.parametrize("read", ["get", "in", "search", "within", "few", "save"])
def test_a_read_does_not_see_a_compaction_between_any_two_of_its_lines(engine: str, read: str, tmp_path: Path) -> None:
    codes, ids, recent = make_codes(64, 3200, 1, 400, 0.3), np.arange(3200), np.arange(2000, 2050)
    items = as_items(codes[:2050], ids[:2050])

    def interrupted(line: int) -> bool:
        """Compact the index when a read has run so many lines; return whether it has so many."""
        index, lines = CLASSES[engine](64), 0
        index.add(codes[:2000], ids[:2000])
        index.add(codes[recent], recent)

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal lines
            if event == "line" and Path(frame.f_code.co_filename).parent.name == "indexes":
                lines += 1
                if lines == line:
                    index.add(codes[2050:], ids[2050:])
                    index.remove(ids[2050:])
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            if read == "get":
                result: Any = index.get(recent)
            elif read == "in":
                result = recent[0] in index
            elif read == "search":
                result = index.search(codes[recent], 1, allowed=ids[:2050])
            elif read == "within":
                result = index.within(codes[recent], 0, allowed=ids[:2050])
            elif read == "few":
                result = index.search(codes[recent], 1, allowed=recent)
            else:
                index.save(tmp_path / "index")
        finally:
            sys.settrace(before)
        if read == "get":
            assert (result == codes[recent]).all()
        elif read == "in":
            assert result
        elif read in ("search", "few"):
            assert (result.distances == 0).all() and result.ids.shape == (50, 1)
        elif read == "within":
            assert set(recent.tolist()) <= set(result.ids.tolist())
        else:
            loaded = CLASSES[engine].load(tmp_path / "index")
            assert len(loaded) in (2050, 3200)
            check_get(loaded, items if len(loaded) == 2050 else as_items(codes, ids))
        return lines >= line

    line = 1
    while interrupted(line):
        line += 1 if line < 60 else 7
    assert line > 5


@pytest.mark.parametrize("engine", sorted(CLASSES))
def test_a_file_of_another_class_names_its_class(engine: str, tmp_path: Path) -> None:
    CLASSES[engine](64).save(tmp_path / "index")
    for other in set(CLASSES) - {engine}:
        with pytest.raises(HashretError, match=engine):
            CLASSES[other].load(tmp_path / "index")


def test_the_names_in_index_files_have_not_changed(tmp_path: Path) -> None:
    BitFlipIndex(64).save(tmp_path / "index")
    settings, arrays = files.read(tmp_path / "index", "bitflip", verify=True)
    fields = "codes ids shared starts by_id dead cuts marks bounds postings sifts plan centres radii begins members"
    assert list(arrays) == [f"{segment}.{field}" for segment in ("base", "tail") for field in fields.split()]
    assert settings == {"bits": 64, "live": 0}


@pytest.mark.parametrize("engine", sorted(CLASSES))
def test_no_write_waits_for_a_compaction(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updatable, "_MIN_BACKGROUND", 0)
    index, codes = CLASSES[engine](64), make_codes(64, 9000, 1)
    started, may_end, compact = threading.Event(), threading.Event(), UpdatableIndex._compact

    def wait_and_compact(self: UpdatableIndex, state: Any, *new_items: Any) -> Any:
        started.set()
        assert may_end.wait(60)
        return compact(self, state, *new_items)

    items = as_items(codes[:3000], np.arange(3000))
    index.add(codes[:3000], np.arange(3000))  # many times the maximum of the delta segment
    while index._write_log is not None:
        time.sleep(0.001)
    main = index._state.main
    monkeypatch.setattr(UpdatableIndex, "_compact", wait_and_compact)
    for low in range(3000, 5000, 200):
        index.add(codes[low : low + 200], np.arange(low, low + 200))
        items |= as_items(codes[low : low + 200], np.arange(low, low + 200))
        check_search(index, items, codes[:20], 7)
    assert started.wait(60) and index._state.main.codes is main.codes
    removed = np.arange(0, 5000, 3)  # items that are being compacted, and items added since
    assert index.remove(removed) == len(removed) and index.remove(removed) == 0
    items = {i: code for i, code in items.items() if i % 3}
    index.add(codes[5000:5010], removed[:10])  # ids that are free again
    items |= as_items(codes[5000:5010], removed[:10])
    check_search(index, items, codes[:20], 7)
    assert index._state.main.codes is main.codes
    may_end.set()
    while index._write_log is not None:
        time.sleep(0.001)
    assert len(index._state.main.ids) > len(main.ids)
    check_search(index, items, codes[:20], 7)
    check_within(index, items, codes[:20], 9)
    may_end.clear()
    started.clear()
    assert index.remove(np.array([*items][: len(items) // 2])) == len(items) // 2 and started.wait(60)
    items = dict([*items.items()][len(items) // 2 :])
    monkeypatch.undo()
    index.add(codes[5010:], np.arange(5010, 9000))  # so many that the writer compacts the index itself
    items |= as_items(codes[5010:], np.arange(5010, 9000))
    may_end.set()
    for thread in threading.enumerate():
        if thread.name == "hashret-compaction":
            thread.join()
    check_search(index, items, codes[:20], 7)
    assert len(index) == len(items)


@pytest.mark.parametrize("engine", sorted(CLASSES))
def test_many_items_added_during_a_compaction_are_compacted_too(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updatable, "_MIN_BACKGROUND", 0)
    index, codes = CLASSES[engine](64), make_codes(64, 4000, 1)
    may_end, compact, sizes = threading.Event(), UpdatableIndex._compact, []

    def wait_and_compact(self: UpdatableIndex, state: Any, *new_items: Any) -> Any:
        sizes.append(len(state.delta.ids))
        assert may_end.wait(60)
        return compact(self, state, *new_items)

    monkeypatch.setattr(UpdatableIndex, "_compact", wait_and_compact)
    for low in range(0, 4000, 500):  # the first compaction begins with more than 1,024 items and ends after the last
        index.add(codes[low : low + 500], np.arange(low, low + 500))
    may_end.set()
    while index._write_log is not None:
        time.sleep(0.001)
    assert sizes[0] < len(index._state.main.ids) and len(sizes) > 1
    assert len(index._state.delta.ids) <= index._max_delta(index._state)
    check_search(index, as_items(codes[:4000], np.arange(4000)), codes[:20], 7)


def test_one_thread_searches_different_indexes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread keeps its workspace, which must be large enough for every later search."""
    indexes = []
    for bits, count, min_codes in ((64, 500, 10**6), (64, 3000, 2), (256, 3000, 2), (128, 6000, 2), (24, 2000, 2)):
        monkeypatch.setattr(tables, "MIN_CODES", min_codes)
        codes, queries = make_clusters(bits, count, 0.05, 0)
        index = BitFlipIndex(bits)
        index.add(codes, np.arange(count))
        indexes.append((index, as_items(codes, np.arange(count)), queries))
    for count in (1, 30):
        for index, items, queries in [*indexes, *indexes[::-1]]:
            check_search(index, items, queries[:count], 5)
            check_within(index, items, queries[:count], index.bits // 8)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux reports how files are mapped")
def test_readahead_is_off_for_arrays_with_random_access(tmp_path: Path) -> None:
    index = BitFlipIndex(64)
    index.add(make_codes(64, 20_000, 1, 400, 0.3), np.arange(20_000))
    index.save(tmp_path / "index")
    loaded = BitFlipIndex.load(tmp_path / "index", verify=False)
    parts = Path("/proc/self/smaps").read_text().split("VmFlags:")
    flags = [after.splitlines()[0].split() for part, after in itertools.pairwise(parts) if str(tmp_path) in part]
    assert ["rr" in flag for flag in flags].count(True) >= 2 and not all("rr" in flag for flag in flags)
    assert_same(loaded.search(make_codes(64, 9, 2), 5), index.search(make_codes(64, 9, 2), 5))
