"""How an `UpdatableIndex` merges what was added into its base, and keeps its memory and its file."""

import itertools
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from brute_force import Life, as_items, assert_same, check_get, check_search, check_within, gathered, make
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from hashret.errors import HashretError
from hashret.indexes import BitFlipIndex, FaissIndex, tables, updatable
from hashret.indexes.updatable import UpdatableIndex

CLASSES: dict[str, type[BitFlipIndex] | type[FaissIndex]] = {"bitflip": BitFlipIndex, "faiss": FaissIndex}

pytestmark = pytest.mark.usefixtures("flip_early")


@pytest.mark.parametrize("engine", sorted(CLASSES))
def test_any_life_while_threads_merge(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updatable, "_LARGE", 0)  # however few items there are
    machine = type("Machine", (Life,), {"spec": engine, "folder": tmp_path})
    run_state_machine_as_test(machine, settings=settings(max_examples=100, stateful_step_count=30, deadline=None))


@pytest.mark.parametrize("engine", sorted(CLASSES))
@pytest.mark.parametrize("bits", [16, 64, 256])
def test_items_that_share_a_code_have_one_in_the_base(engine: str, bits: int) -> None:
    few = make(bits, 40, 3, 40, 0.5)
    index = CLASSES[engine](bits)
    index.add(few[np.arange(4000) % 40], np.arange(4000))
    assert len(index._state.base.ids) == 4000 and len(index._state.base.codes) == len(np.unique(few, axis=0))


@pytest.mark.parametrize("engine", sorted(CLASSES))
@pytest.mark.parametrize("read", ["get", "in", "search", "within", "few", "save"])
def test_a_merge_between_any_two_lines_of_a_read_is_not_seen_by_it(engine: str, read: str, tmp_path: Path) -> None:
    codes, ids, recent = make(64, 3200, 1, 400, 0.3), np.arange(3200), np.arange(2000, 2050)
    items = as_items(codes[:2050], ids[:2050])

    def interrupted(line: int) -> bool:
        """Have what is in the tail merged when so many lines of a read have run; whether it has as many."""
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
                found: Any = index.get(recent)
            elif read == "in":
                found = recent[0] in index
            elif read == "search":
                found = index.search(codes[recent], 1, allowed=ids[:2050])
            elif read == "within":
                found = index.within(codes[recent], 0, allowed=ids[:2050])
            elif read == "few":
                found = index.search(codes[recent], 1, allowed=recent)
            else:
                index.save(tmp_path / "index")
        finally:
            sys.settrace(before)
        if read == "get":
            assert (found == codes[recent]).all()
        elif read == "in":
            assert found
        elif read in ("search", "few"):
            assert (found.distances == 0).all() and found.ids.shape == (50, 1)
        elif read == "within":
            assert set(recent.tolist()) <= set(found.ids.tolist())
        else:
            same = CLASSES[engine].load(tmp_path / "index")
            assert len(same) in (2050, 3200)
            check_get(same, items if len(same) == 2050 else as_items(codes, ids))
        return lines >= line

    line = 1
    while interrupted(line):
        line += 1 if line < 60 else 7
    assert line > 5


@pytest.mark.parametrize("engine", sorted(CLASSES))
def test_a_file_of_another_kind_says_which_it_is(engine: str, tmp_path: Path) -> None:
    CLASSES[engine](64).save(tmp_path / "index")
    for other in set(CLASSES) - {engine}:
        with pytest.raises(HashretError, match=engine):
            CLASSES[other].load(tmp_path / "index")


@pytest.mark.parametrize("engine", sorted(CLASSES))
def test_nobody_waits_for_a_merge(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updatable, "_LARGE", 0)
    index, codes = CLASSES[engine](64), make(64, 9000, 1)
    begun, may_end, merged = threading.Event(), threading.Event(), UpdatableIndex._merged

    def slowly(self: UpdatableIndex, state: Any, *more: Any) -> Any:
        begun.set()
        assert may_end.wait(60)
        return merged(self, state, *more)

    items = as_items(codes[:3000], np.arange(3000))
    index.add(codes[:3000], np.arange(3000))  # which is many times what a tail should hold
    while index._since is not None:
        time.sleep(0.001)
    base = index._state.base
    monkeypatch.setattr(UpdatableIndex, "_merged", slowly)
    for low in range(3000, 5000, 200):
        index.add(codes[low : low + 200], np.arange(low, low + 200))
        items |= as_items(codes[low : low + 200], np.arange(low, low + 200))
        check_search(index, items, codes[:20], 7)
    assert begun.wait(60) and index._state.base.codes is base.codes
    gone = np.arange(0, 5000, 3)  # of what is being merged, and of what came since
    assert index.remove(gone) == len(gone) and index.remove(gone) == 0
    items = {i: code for i, code in items.items() if i % 3}
    index.add(codes[5000:5010], gone[:10])  # ids that are free again
    items |= as_items(codes[5000:5010], gone[:10])
    check_search(index, items, codes[:20], 7)
    assert index._state.base.codes is base.codes
    may_end.set()
    while index._since is not None:
        time.sleep(0.001)
    assert len(index._state.base.ids) > len(base.ids)
    check_search(index, items, codes[:20], 7)
    check_within(index, items, codes[:20], 9)
    may_end.clear()
    begun.clear()
    assert index.remove(np.array([*items][: len(items) // 2])) == len(items) // 2 and begun.wait(60)
    items = dict([*items.items()][len(items) // 2 :])
    monkeypatch.undo()
    index.add(codes[5010:], np.arange(5010, 9000))  # so many that nobody waits for the other
    items |= as_items(codes[5010:], np.arange(5010, 9000))
    may_end.set()
    for thread in threading.enumerate():
        if thread.name == "hashret-merge":
            thread.join()
    check_search(index, items, codes[:20], 7)
    assert len(index) == len(items)


@pytest.mark.parametrize("engine", sorted(CLASSES))
def test_what_came_beside_a_merge_is_merged_too_if_it_is_much(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updatable, "_LARGE", 0)
    index, codes = CLASSES[engine](64), make(64, 4000, 1)
    may_end, merged, merges = threading.Event(), UpdatableIndex._merged, []

    def slowly(self: UpdatableIndex, state: Any, *more: Any) -> Any:
        merges.append(len(state.tail.ids))
        assert may_end.wait(60)
        return merged(self, state, *more)

    monkeypatch.setattr(UpdatableIndex, "_merged", slowly)
    for low in range(0, 4000, 500):  # the first merge begins with more than 1,024 items, and ends after the last
        index.add(codes[low : low + 500], np.arange(low, low + 500))
    may_end.set()
    while index._since is not None:
        time.sleep(0.001)
    assert merges[0] < len(index._state.base.ids) and len(merges) > 1
    assert len(index._state.tail.ids) <= index._longest_tail(index._state)
    check_search(index, as_items(codes[:4000], np.arange(4000)), codes[:20], 7)


def test_one_thread_searches_indexes_of_all_kinds_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a search scribbles on is kept for the next, and has to be large enough for all that comes after."""
    kinds = []
    for bits, count, least in ((64, 500, 10**6), (64, 3000, 2), (256, 3000, 2), (128, 6000, 2), (24, 2000, 2)):
        monkeypatch.setattr(tables, "MIN_CODES", least)
        codes, queries = gathered(bits, count, 0.05, 0)
        index = BitFlipIndex(bits)
        index.add(codes, np.arange(count))
        kinds.append((index, as_items(codes, np.arange(count)), queries))
    for asked in (1, 30):
        for index, items, queries in [*kinds, *kinds[::-1]]:
            check_search(index, items, queries[:asked], 5)
            check_within(index, items, queries[:asked], index.bits // 8)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells how files are mapped on Linux alone")
def test_no_more_of_a_mapped_index_is_read_than_is_wanted(tmp_path: Path) -> None:
    index = BitFlipIndex(64)
    index.add(make(64, 20_000, 1, 400, 0.3), np.arange(20_000))
    index.save(tmp_path / "index")
    loaded = BitFlipIndex.load(tmp_path / "index", verify=False)
    parts = Path("/proc/self/smaps").read_text().split("VmFlags:")
    flags = [after.splitlines()[0].split() for part, after in itertools.pairwise(parts) if str(tmp_path) in part]
    assert ["rr" in flag for flag in flags].count(True) >= 2 and not all("rr" in flag for flag in flags)
    assert_same(loaded.search(make(64, 9, 2), 5), index.search(make(64, 9, 2), 5))
