import gc
import hashlib
import io
import itertools
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray
from PIL import Image
from unprivileged import unprivileged

from hashret.codes import Codes, hamming
from hashret.collection import (
    Collection,
    Hit,
    Indexed,
    IndexReport,
    MissingContents,
    index_cache,
    ingest,
    locate,
    summary,
)
from hashret.collection.index_cache import IndexCache
from hashret.collection.models import Models
from hashret.collection.originals import Originals
from hashret.data.contents import PreparedImages, content_bytes
from hashret.errors import HashretError
from hashret.evaluation.measures import health
from hashret.hasher import Hasher
from hashret.stores.sqlite import SqliteStore
from hashret.stores.sqlite_reads import SqliteSnapshot

Pixels = NDArray[np.uint8]
NONE = {"added": 0, "unchanged": 0, "updated": 0, "removed": 0, "failed": 0, "decoded": 0, "ignored": 0}
dates = itertools.count(1_600_000_000, 10)


@cache
def digits() -> Pixels:
    from sklearn.datasets import load_digits

    pixels: Pixels = (load_digits().images * 15).astype(np.uint8)
    return pixels


@cache
def hasher(model: str = "lsh", bits: int = 16) -> Hasher:
    return Hasher(model, bits).fit(digits()[:300])


@cache
def png(i: int) -> bytes:
    """Return digit i as a file. All have the same size, so only time or content can show a change."""
    file = io.BytesIO()
    Image.fromarray(digits()[i]).save(file, "PNG", compress_level=0)
    return file.getvalue()


def write(folder: Path, files: Mapping[str, int | bytes]) -> Path:
    """Write files of digits, or of other bytes, each with its own modification time."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(data) if isinstance(data, int) else data)
        os.utime(path, (next(dates),) * 2)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write(tmp_path / "photos", {f"{i % 3}/{i:02d}.png": i for i in range(12)})


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    with Collection.create(tmp_path / "c", hasher()) as made:
        yield made


def rows(collection: Collection, sql: str) -> list[tuple[Any, ...]]:
    """Return the rows that another program reads from the database."""
    with closing(sqlite3.connect(f"file:{collection.path / 'items.db'}?mode=ro", uri=True)) as conn:
        return conn.execute(sql).fetchall()


def stored(collection: Collection) -> tuple[NDArray[np.int64], Codes]:
    """Return ids and codes of the current model, read from the database."""
    sql = "SELECT item_id, code FROM codes WHERE fingerprint = (SELECT value FROM settings WHERE key = 'fingerprint')"
    found = sorted(rows(collection, sql))
    codes = np.frombuffer(b"".join(code for _, code in found), np.uint8).reshape(len(found), collection.bits // 8)
    return np.array([i for i, _ in found], np.int64), codes


def brute(ids: NDArray[np.int64], codes: Codes, query: Codes, k: int | None, r: int | None) -> list[tuple[int, int]]:
    """Return (distance, id) of the nearest k, of all within r, or both, by brute force."""
    found = sorted(zip(hamming(query, codes)[0].tolist(), ids.tolist(), strict=True))
    return [pair for pair in found if r is None or pair[0] <= r][:k]


def pairs(hits: list[Hit]) -> list[tuple[int, int]]:
    return [(hit.distance, hit.id) for hit in hits]


LIMITS: list[tuple[int | None, int | None]] = [
    (1, None),
    (5, None),
    (10_000, None),
    (None, 0),
    (None, 5),
    (3, 4),
    (99, 2),
]


def check_starts_at_once(reader: Collection) -> None:
    """Check that the cache file is ready after a switch, so that a reader builds no index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SqliteSnapshot, "codes", pytest.fail)
        reader.query_codes(np.zeros((1, reader.bits // 8), np.uint8))


def check_answers(
    collection: Collection, *views: Collection, limits: list[tuple[int | None, int | None]] = LIMITS
) -> None:
    """Check results against brute force over the database, through the collection and other objects of it."""
    ids, codes = stored(collection)
    exact = collection.info()["index"] == "bitflip"
    others = np.random.default_rng(len(ids)).integers(0, 256, (2, collection.bits // 8), np.uint8)
    queries = np.concatenate([codes[:1], others])
    everything = [brute(ids, codes, query[None], None, None) for query in queries]
    for k, r in limits:
        expected = [[pair for pair in ranked if r is None or pair[0] <= r][:k] for ranked in everything]
        for view in (collection, *views):
            found = [pairs(hits) for hits in view.query_codes(queries, k, r)]
            if exact:
                assert found == expected
            else:
                assert [[d for d, _ in hits] for hits in found] == [[d for d, _ in hits] for hits in expected]
                assert all(set(hits) <= set(ranked) for hits, ranked in zip(found, everything, strict=True))
                assert all(len(set(hits)) == len(hits) for hits in found)


def check_codes(collection: Collection) -> None:
    """Check that the stored code of every file and blob is that of the image encoded alone."""
    ids, codes = stored(collection)
    model = collection.hasher
    for i, code in zip(ids.tolist(), codes, strict=True):
        path = collection.get(i).paths[0]
        if not Path(path).is_file():
            continue
        assert (model.encode_pixels(model.preprocessing(Path(path).read_bytes()).pixels[None])[0] == code).all()


def nonzero_counts(report: IndexReport) -> dict[str, int]:
    """Return the counts of a report that are not 0."""
    return {name: count for name, count in report._asdict().items() if name != "failures" and count}


def test_indexing_again_changes_nothing(collection: Collection, photos: Path) -> None:
    assert nonzero_counts(collection.index(photos)) == {"added": 12, "decoded": 12}
    assert collection.index(photos) == IndexReport(**NONE | {"unchanged": 12}, failures=[])
    assert len(collection) == 12
    assert {hit.path for hit in collection.query(photos / "0/00.png", k=12)} == {str(p) for p in photos.rglob("*.png")}
    first = collection.query(photos / "1/04.png", k=1)[0]
    assert first.distance == 0 and first.label == "1" and first.metadata is None and first.paths == [first.path]
    check_codes(collection)
    check_answers(collection)


def test_files_that_were_only_touched_are_not_decoded(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    write(photos, {"0/00.png": 0, "1/01.png": 1})
    assert nonzero_counts(collection.index(photos)) == {"unchanged": 12}
    before = rows(collection, "SELECT * FROM changes")
    (photos / "0/00.png").write_bytes(png(20))  # with an unchanged time: not even read
    (seen,) = rows(collection, "SELECT mtime_ns FROM paths WHERE name = '0/00.png'")[0]
    os.utime(photos / "0/00.png", ns=(seen, seen))
    assert nonzero_counts(collection.index(photos)) == {"unchanged": 12}
    assert rows(collection, "SELECT * FROM changes") == before


def test_a_changed_file_is_encoded_again(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    old = collection.query(photos / "2/02.png", k=1)[0].id
    write(photos, {"2/02.png": 30})
    assert nonzero_counts(collection.index(photos)) == {"unchanged": 11, "updated": 1, "decoded": 1}
    (hit,) = collection.query(photos / "2/02.png", k=1)
    assert hit.distance == 0 and hit.path == str(photos / "2/02.png") and hit.id > 12
    assert len(collection) == 12
    with pytest.raises(HashretError, match=f"no item {old}"):
        collection.get(old)
    check_answers(collection)


def test_a_moved_file_is_not_decoded(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    item = collection.query(photos / "0/03.png", k=1)[0].id
    (photos / "new").mkdir()
    (photos / "0/03.png").rename(photos / "new/name.png")
    assert nonzero_counts(collection.index(photos, prune=True)) == {"added": 1, "unchanged": 11, "removed": 1}
    assert collection.get(item).paths == [str(photos / "new/name.png")] and collection.get(item).label == "new"
    assert len(collection) == 12


def test_equal_files_are_one_item(collection: Collection, photos: Path) -> None:
    write(photos, {"copy.png": 0, "z/copy.png": 0})
    assert nonzero_counts(collection.index(photos)) == {"added": 14, "decoded": 14}
    assert len(collection) == 12 and collection.info()["paths"] == 14
    (hit,) = collection.query(photos / "copy.png", k=1)
    assert (
        hit.paths == [str(photos / name) for name in ("0/00.png", "copy.png", "z/copy.png")]
        and hit.path == hit.paths[0]
    )
    (photos / "0/00.png").unlink()
    assert nonzero_counts(collection.index(photos, prune=True)) == {"unchanged": 13, "removed": 1}
    assert collection.get(hit.id).paths == [str(photos / name) for name in ("copy.png", "z/copy.png")]


def test_a_file_under_two_roots_has_one_path(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    assert nonzero_counts(collection.index(photos / "0")) == {"added": 4}
    assert collection.query(photos / "0/00.png", k=1)[0].paths == [str(photos / "0/00.png")]
    assert collection.info()["paths"] == 16 and len(collection) == 12


def test_pruning_removes_missing_paths_of_this_source_alone(collection: Collection, photos: Path) -> None:
    other = write(photos.parent / "other", {"x.png": 40, "y.png": 0})
    collection.index(photos)
    collection.index(other)
    for name in ("0/00.png", "1/01.png"):
        (photos / name).unlink()
    (other / "x.png").unlink()
    assert nonzero_counts(collection.index(photos)) == {"unchanged": 10}
    assert len(collection) == 13
    assert nonzero_counts(collection.index(photos, prune=True)) == {"unchanged": 10, "removed": 2}
    assert len(collection) == 12  # the content of 0/00.png is still at other/y.png
    assert collection.query_codes(hasher().encode(digits()[:1]), k=1)[0][0].paths == [str(other / "y.png")]
    check_answers(collection)


def test_pruning_most_of_a_source_needs_force(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    shutil.rmtree(photos / "0")
    shutil.rmtree(photos / "1")
    write(photos, {"2/new.png": 50})
    with pytest.raises(HashretError, match=r"8 of 13 paths under .*/photos/ would be removed: .* --force"):
        collection.index(photos, prune=True)
    assert len(collection) == 13
    shutil.rmtree(photos / "2")
    with pytest.raises(HashretError, match="13 of 13"):
        collection.index(photos, prune=True)
    assert len(collection) == 13
    assert nonzero_counts(collection.index(photos, prune=True, force=True)) == {"removed": 13}
    assert len(collection) == 0 and collection.query_codes(np.zeros((2, 2), np.uint8)) == [[], []]


def test_half_of_a_source_may_be_pruned(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    for i in range(6):
        (photos / f"{i % 3}/{i:02d}.png").unlink()
    assert nonzero_counts(collection.index(photos, prune=True)) == {"unchanged": 6, "removed": 6}


def test_a_source_that_is_missing_is_refused(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    photos.rename(photos.parent / "elsewhere")
    with pytest.raises(HashretError, match="there is no"):
        collection.index(photos, prune=True, force=True)
    assert len(collection) == 12


BROKEN = {"broken.jpg": b"Dear diary", "empty.png": b"", "half.png": b""}


def test_unreadable_files_are_reported_once_and_read_again_when_they_change(
    collection: Collection, photos: Path
) -> None:
    write(photos, BROKEN | {"half.png": png(60)[:60]})
    report = collection.index(photos)
    assert nonzero_counts(report) == {"added": 12, "failed": 3, "decoded": 12}
    assert [path for path, _ in report.failures] == [str(photos / name) for name in sorted(BROKEN)]
    assert all(reason and "\n" not in reason for _, reason in report.failures)
    assert nonzero_counts(again := collection.index(photos)) == {"unchanged": 12, "failed": 3} and again.failures == []
    write(photos, {"broken.jpg": b"Dear diary", "half.png": 60})
    report = collection.index(photos, prune=True)
    assert nonzero_counts(report) == {"added": 1, "unchanged": 12, "failed": 2, "decoded": 1}
    assert [path for path, _ in report.failures] == [str(photos / "broken.jpg")]
    assert collection.info()["failures"] == 2 and len(collection) == 13
    (photos / "empty.png").unlink()
    assert nonzero_counts(collection.index(photos, prune=True)) == {"unchanged": 13, "failed": 1, "removed": 1}
    assert collection.info()["failures"] == 1


def test_a_file_that_becomes_unreadable_keeps_its_item(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    before = collection.query(photos / "0/00.png", k=1)
    write(photos, {"0/00.png": b"no more"})
    for failures in (1, 0):
        report = collection.index(photos, prune=True)
        assert nonzero_counts(report) == {"unchanged": 11, "failed": 1} and len(report.failures) == failures
        assert collection.query_codes(hasher().encode(digits()[:1]), k=1)[0] == before
    write(photos, {"0/00.png": 0})
    assert nonzero_counts(collection.index(photos)) == {"unchanged": 12}
    write(photos, {"0/00.png": 70})
    assert nonzero_counts(collection.index(photos)) == {"unchanged": 11, "updated": 1, "decoded": 1}


def test_files_without_permission_are_read_at_every_run_and_never_pruned(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    (photos / "0/00.png").unlink()
    (photos / "0/00.png").symlink_to(photos / "on a disk that is not there.png")
    for _ in range(2):
        report = collection.index(photos, prune=True)
        assert nonzero_counts(report) == {"unchanged": 11, "failed": 1}
        assert [path for path, _ in report.failures] == [str(photos / "0/00.png")]
    assert len(collection) == 12 and collection.info()["failures"] == 0


@pytest.fixture
def anywhere() -> Iterator[Path]:
    """Return a collection's folder that every user may write to; pytest's own is closed to others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Collection.create(
            folder / "first", hasher()
        ) as collection:  # loads modules that the other user may not read
            collection.index(write(folder / "one", {"1.png": 1}), prune=True)
            collection.query(folder / "one/1.png")
            collection.query_codes(np.zeros((1, 2), np.uint8), None, 3)
        folder.chmod(0o777)
        yield folder


def test_files_of_an_unreadable_folder_are_not_pruned(anywhere: Path) -> None:
    with unprivileged():
        photos = write(anywhere / "photos", {f"{i % 3}/{i:02d}.png": i for i in range(12)})
        with Collection.create(anywhere / "c", hasher()) as collection:
            collection.index(photos)
            (photos / "1/01.png").unlink()
            (photos / "0").chmod(0)
            report = collection.index(photos, prune=True)
            assert nonzero_counts(report) == {"unchanged": 7, "failed": 1, "removed": 1}
            assert report.failures == [(f"{photos}/0/", "cannot be read: Permission denied")]
            (photos / "0").chmod(0o755)
            (photos / "0/00.png").chmod(0)
            write(photos, {"1/04.png": 4})
            assert nonzero_counts(collection.index(photos, prune=True)) == {"unchanged": 11}


def test_a_collection_without_write_permission_is_searchable(anywhere: Path) -> None:
    photos = write(anywhere / "photos", {f"{i}.png": i for i in range(12)})
    attempts: list[Callable[[Collection], Any]] = [
        lambda c: c.index(photos), lambda c: c.add([digits()[0]]), lambda c: c.remove([1])
    ]  # fmt: skip
    with Collection.create(anywhere / "c", hasher()) as collection:
        collection.index(photos)
        expected = collection.query(photos / "0.png")
    for left in ("", "-wal"):  # nothing, or the empty log of an earlier reader
        if left:
            (anywhere / "c/items.db-wal").touch()
        before = sorted(anywhere.rglob("*"))
        for path in (anywhere / "c", *(anywhere / "c").rglob("*")):
            path.chmod(path.stat().st_mode & 0o555)
        with unprivileged():
            with Collection.open(anywhere / "c", read_only=True) as opened:
                assert opened.query(photos / "0.png") == expected
                assert opened.info()["items"] == len(opened) == 12
                assert opened.get(1).id == 1 and len(opened.query_item(1, None, 3)) < 12
            for attempt in attempts:
                refused = pytest.raises(HashretError, match=f"^{anywhere / 'c'}.* cannot be (written to|opened)")
                with refused, Collection.open(anywhere / "c") as opened:
                    attempt(opened)
            with pytest.raises(HashretError, match="cannot be written"):
                Collection.create(anywhere / "c/d", hasher())
        for path in (anywhere / "c", *(anywhere / "c").rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
        assert sorted(anywhere.rglob("*")) == before


def test_every_form_of_source_gives_the_same_codes(tmp_path: Path, photos: Path) -> None:
    files = sorted(path.relative_to(photos) for path in photos.rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(photos / file, str(file))
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as tar:
        tar.add(photos, ".")
    np.save(tmp_path / "photos.npy", np.stack([np.asarray(Image.open(photos / file)) for file in files]))
    found = []
    for source in ("photos", "photos.zip", "photos.tar.gz", "photos.npy"):
        with Collection.create(tmp_path / "c" / source, hasher()) as opened:
            assert nonzero_counts(opened.index(tmp_path / source)) == {"added": 12, "decoded": 12}
            assert nonzero_counts(opened.index(tmp_path / source)) == {"unchanged": 12}
            ids, codes = stored(opened)
            paths = {opened.get(i).paths[0]: code.tobytes() for i, code in zip(ids.tolist(), codes, strict=True)}
            between = {"photos": "/", "photos.npy": "#"}.get(source, "!/")
            names = [str(i) if between == "#" else str(file) for i, file in enumerate(files)]
            found.append([paths[f"{tmp_path / source}{between}{name}"] for name in names])
    assert found[0] == [code.tobytes() for code in hasher().encode([photos / file for file in files])]
    assert found[1:] == found[:1] * 3


def test_a_content_is_one_item_wherever_it_lies(tmp_path: Path, photos: Path, collection: Collection) -> None:
    shutil.make_archive(str(tmp_path / "packed"), "zip", photos)
    collection.index(photos)
    assert nonzero_counts(collection.index(tmp_path / "packed.zip")) == {"added": 12}
    assert len(collection) == 12
    (hit,) = collection.query(photos / "0/00.png", k=1)
    assert hit.paths == [f"{tmp_path}/packed.zip!/0/00.png", f"{photos}/0/00.png"]
    shutil.rmtree(photos / "0")
    shutil.rmtree(photos / "1")
    assert nonzero_counts(collection.index(photos, prune=True, force=True)) == {"unchanged": 4, "removed": 8}
    assert len(collection) == 12
    (tmp_path / "packed.zip").touch()
    assert nonzero_counts(collection.index(tmp_path / "packed.zip")) == {"unchanged": 12}


def test_an_archive_may_contain_a_name_twice(tmp_path: Path, collection: Collection) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, i in (("a.png", 0), ("b.png", 1), ("a.png", 2)):
            member = tarfile.TarInfo(name)
            member.size = len(png(i))
            tar.addfile(member, io.BytesIO(png(i)))
    for _ in range(2):
        collection.index(tmp_path / "a.tar")
        assert len(collection) == 2
        hits = collection.query_codes(hasher().encode(digits()[2:3]), k=9)[0]
        assert {hit.path for hit in hits} == {f"{tmp_path}/a.tar!/{name}" for name in ("a.png", "b.png")}
        check_answers(collection)


def test_the_collection_is_not_indexed_into_itself(tmp_path: Path, photos: Path) -> None:
    with Collection.create(photos / "similar", hasher()) as opened:
        write(opened.path, {"blobs/x.png": 90, "y.png": 91})
        opened.add([digits()[5]])
        assert nonzero_counts(opened.index(photos)) == {"added": 12, "decoded": 12}
        assert nonzero_counts(opened.index(photos, prune=True)) == {"unchanged": 12}
    for hidden in (photos / ".hashret", photos / "0/.hashret"):
        with Collection.create(hidden, hasher()) as opened:
            write(opened.path, {"y.png": 92})
            (photos / "link").symlink_to(hidden)
            assert nonzero_counts(opened.index(photos / "0")) == {"added": 4, "decoded": 4}
            (photos / "link").unlink()


def test_files_with_other_suffixes_are_ignored_and_counted(collection: Collection, photos: Path) -> None:
    write(photos, {"notes.txt": b"", "0/.hidden.png": 1, "x.mp4": b""})
    assert nonzero_counts(collection.index(photos)) == {"added": 12, "decoded": 12, "ignored": 3}


def test_paths_that_are_not_utf8(collection: Collection, tmp_path: Path) -> None:
    names = [os.fsdecode(b"\xff.png"), os.fsdecode(b"caf\xe9/a.png"), "café/b.png"]
    folder = write(tmp_path / os.fsdecode(b"f\xf6"), dict(zip(names, range(3), strict=True)))
    assert nonzero_counts(collection.index(folder)) == {"added": 3, "decoded": 3}
    assert nonzero_counts(collection.index(folder, prune=True)) == {"unchanged": 3}
    for i, name in enumerate(names):
        (hit,) = collection.query(folder / name, k=1)
        assert hit.path == str(folder / name) and Path(hit.path).read_bytes() == png(i)
        assert hit.label == (None if i == 0 else names[i].split("/")[0])
    collection.reindex(hasher("pca", 8))
    check_codes(collection)


@pytest.fixture
def rows_of_pixels(tmp_path: Path) -> Path:
    """2,500 distinct images in one file: more than two batches."""
    pixels = np.random.default_rng(0).integers(0, 256, (2500, 8, 8), np.uint8)
    np.save(tmp_path / "rows.npy", pixels)
    return tmp_path / "rows.npy"


def test_what_is_reported_is_durable(collection: Collection, rows_of_pixels: Path) -> None:
    lines: list[Indexed] = []
    sizes = []

    def committed(batch: list[Indexed]) -> None:
        lines.extend(batch)
        sizes.append(len(batch))
        recorded = {(f"{root}{name}", i) for root, name, i in rows(collection, "SELECT root, name, item_id FROM paths")}
        assert recorded == {(line.path, line.id) for line in lines}
        assert {i for (i,) in rows(collection, "SELECT item_id FROM codes")} == {line.id for line in lines}

    shown: list[Any] = []
    report = collection.index(rows_of_pixels, committed=committed, progress=shown.append)
    assert nonzero_counts(report) == {"added": 2500, "decoded": 2500}
    assert (shown[-1].stage, shown[-1].done, shown[-1].total) == ("indexing", 2500, 2500)
    assert shown[-1].terms == {"added": 2500, "updated": 0, "unchanged": 0, "failed": 0}
    assert len(sizes) >= 3 and max(sizes) <= 1000
    assert [line.path for line in lines] == [f"{rows_of_pixels}#{i}" for i in range(2500)]
    assert {line.status for line in lines} == {"added"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_keeps_what_was_reported(
    collection: Collection, rows_of_pixels: Path, error: type[BaseException]
) -> None:
    reported: list[Indexed] = []

    def committed(batch: list[Indexed]) -> None:
        reported.extend(batch)
        if len(reported) > 1000:
            raise error

    before = threading.active_count()
    try:
        collection.index(rows_of_pixels, committed=committed)
    except error:
        assert threading.active_count() <= before  # no thread outlives the run
    else:
        raise AssertionError("it went on")
    kept = {f"{root}{name}" for root, name in rows(collection, "SELECT root, name FROM paths")}
    assert kept == {line.path for line in reported} and 1000 < len(kept) < 2500
    check_answers(collection)
    left = 2500 - len(kept)
    assert nonzero_counts(collection.index(rows_of_pixels)) == {"added": left, "unchanged": len(kept), "decoded": left}
    check_answers(collection)


def test_a_content_that_moves_within_a_run_stays_an_item(collection: Collection, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1100, 8, 8), np.uint8)
    source = tmp_path / "rows.npy"
    np.save(source, pixels)
    collection.index(source)
    moving = pixels[0].copy()
    pixels[0] = 7
    pixels[1050] = moving  # stored when it is read, removed when its batch is committed
    np.save(source, pixels)
    os.utime(source, (next(dates),) * 2)
    lines: list[Indexed] = []
    report = collection.index(source, committed=lines.extend)
    assert nonzero_counts(report) == {"unchanged": 1098, "updated": 2, "decoded": 2}
    assert sorted(line.path for line in lines) == sorted(f"{source}#{i}" for i in range(1100))
    hits = collection.query(moving, None, 0)  # other images may have the same code
    assert [hit.paths for hit in hits].count([f"{source}#1050"]) == 1
    assert len(collection) == 1100
    assert nonzero_counts(collection.index(source)) == {"unchanged": 1100}
    check_answers(collection)


@pytest.mark.parametrize("sizes", [1, 3])
def test_the_batch_size_does_not_change_the_result(
    collection: Collection, photos: Path, monkeypatch: pytest.MonkeyPatch, sizes: int
) -> None:
    for name in ("FILE_CHUNK", "MODEL_CHUNK", "BATCH_ITEMS"):
        monkeypatch.setattr(ingest, name, sizes)
    write(photos, BROKEN | {"copy.png": 0})
    assert nonzero_counts(collection.index(photos))["added"] == 13
    write(photos, {"0/00.png": 3, "0/03.png": 0, "copy.png": 1, "1/01.png": 80, "2/02.png": 2, "zz.png": 2})
    (photos / "0/06.png").rename(photos / "moved.png")
    lines: list[Indexed] = []
    report = collection.index(photos, prune=True, committed=lines.extend)
    assert {name: report._asdict()[name] for name in ("added", "updated", "unchanged", "removed", "failed")} == {
        "added": 2, "updated": 4, "unchanged": 8, "removed": 1, "failed": 3
    }  # fmt: skip
    assert len(lines) == len({line.path for line in lines}) == 7
    assert len(collection) == 13 and report.failures == []
    check_codes(collection)
    check_answers(collection)


@pytest.mark.parametrize("index", ["bitflip", "faiss", "faiss:BFlat"])
@pytest.mark.parametrize("bits", [8, 64])
def test_results_equal_brute_force(tmp_path: Path, index: str, bits: int) -> None:
    model = hasher("lsh", bits)
    with Collection.create(tmp_path / "c", model, index) as collection:
        queries = model.encode(digits()[:3])
        assert collection.query_codes(queries, 5) == collection.query_codes(queries, None, bits) == [[], [], []]
        collection.add(digits()[:600])
        with Collection.open(tmp_path / "c", read_only=True) as fresh:
            check_answers(collection, fresh)
            assert collection.query(digits()[0], 3, 9) == fresh.query_batch(digits()[:1], 3, 9)[0]
            for k in (None, 4):
                hits = collection.query_item(7, k=k, max_distance=bits // 4)
                ids, codes = stored(collection)
                expected = brute(ids, codes, codes[ids == 7], None, bits // 4)
                assert [hit.distance for hit in hits] == [d for d, i in expected if i != 7][:k]
                assert 7 not in {hit.id for hit in hits}


def test_a_query_is_the_same_alone_and_among_others(collection: Collection) -> None:
    collection.add(digits()[:100])
    together = collection.query_batch(digits()[:1300], k=3)
    assert len(together) == 1300
    assert together[::100] == [collection.query(digits()[i], k=3) for i in range(0, 1300, 100)]
    assert collection.query_batch([], k=3) == []
    assert pairs(collection.query(Image.fromarray(digits()[5]))) == pairs(collection.query(png(5)))


@pytest.mark.parametrize("index", ["bitflip", "faiss:BFlat"])
def test_asymmetric_rank_orders_by_score(tmp_path: Path, index: str) -> None:
    model = hasher("itq", 32)
    with Collection.create(tmp_path / "c", model, index) as collection:
        collection.add(digits()[:300])
        collection.remove([5, 50, 250])
        ids, codes = stored(collection)
        queries, margins = model.margins(digits()[295:305])
        for k, r in ((3, None), (30, None), (None, 9), (4, 6)):
            answers = collection.query_batch(digits()[295:305], k, r, rank="asymmetric")
            for query, margin, hits in zip(queries, margins, answers, strict=True):
                nearest = brute(ids, codes, query[None], k and max(10 * k, 100), r)
                differing = np.unpackbits(codes ^ query, axis=1).astype(bool)
                costs = {i: float(np.abs(margin[d]).sum(dtype=float)) for i, d in zip(ids, differing, strict=True)}
                expected = sorted((round(costs[i], 6), d, i) for d, i in nearest)[:k]
                assert [(round(hit.score or 0, 6), hit.distance, hit.id) for hit in hits] == expected
            assert collection.query(digits()[295], k, r, rank="asymmetric") == answers[0]
        plain = collection.query_batch(digits()[295:305], 30)
        assert {hit.score for hits in plain for hit in hits} == {None}
        assert [pairs(hits) for hits in plain] != [pairs(hits) for hits in answers]
        with pytest.raises(ValueError, match="there is no rank 'sure'; choose distance or asymmetric"):
            collection.query(digits()[0], rank="sure")
    with Collection.create(tmp_path / "empty", model, index) as collection:
        assert collection.query_batch(digits()[:2], rank="asymmetric") == [[], []]
        assert collection.query_batch([], rank="asymmetric") == []


def test_invalid_queries_raise_errors(collection: Collection) -> None:
    collection.add(digits()[:3])
    query = np.zeros((1, 2), np.uint8)
    for ask in (
        lambda: collection.query_codes(query, None, None),
        lambda: collection.query_codes(query, 0),
        lambda: collection.query_codes(query, -1),
        lambda: collection.query_codes(query, 3, -1),
        lambda: collection.query_codes(query, None, -1),
        lambda: collection.query_item(1, 0),
        lambda: collection.query_item(1, None, None),
        lambda: collection.query_codes(np.zeros((1, 3), np.uint8)),
        lambda: collection.query_codes(np.zeros((1, 2), np.int64)),
        lambda: collection.query(digits()[0].astype(float)),
    ):
        with pytest.raises(ValueError, match=r".+"):
            ask()
    with pytest.raises(HashretError, match="no item 4"):
        collection.query_item(4)
    with pytest.raises(HashretError, match="cannot be read"):
        collection.query("no such file.png")


NAMES = ["a.png", "b.png", "c.png", "x/a.png", "x/b.png", "y/c.png"]
POOL = 8  # distinct images
SPECS = ["bitflip", "faiss:BFlat", "faiss"]
Key = tuple[str, int]  # "file" or "array", and the number in the pool


@cache
def digest(key: Key) -> str:
    data = png(key[1]) if key[0] == "file" else content_bytes(digits()[key[1]])
    return hashlib.sha256(data).hexdigest()


class AnySequence(RuleBasedStateMachine):
    """After any sequence of operations a collection has the contents of a dict, and results equal brute force.

    The results are those of the writing object, of one opened before all operations, and of one opened now.
    """

    @initialize(index=st.sampled_from(SPECS), keep_often=st.booleans())
    def create(self, index: str, keep_often: bool) -> None:
        self.patched = pytest.MonkeyPatch()
        if keep_often:  # rewrite the cache after few changes
            self.patched.setattr(index_cache, "FEW_CHANGES", 2)
        self.base = Path(tempfile.mkdtemp())
        self.folder = write(self.base / "photos", {"z.png": 0})
        self.collection = Collection.create(self.base / "c", hasher(), index)
        self.early = Collection.open(self.base / "c", read_only=True)
        self.early.query_codes(np.zeros((1, 2), np.uint8))
        self.disk = {"z.png": 0}
        self.paths: dict[str, int] = {}
        self.arrays: set[int] = set()
        self.ids: dict[str, int] = {}
        self.highest = 0

    def teardown(self) -> None:
        if hasattr(self, "base"):
            self.patched.undo()
            self.collection.close()
            self.early.close()
            shutil.rmtree(self.base)

    @rule(files=st.dictionaries(st.sampled_from(NAMES), st.integers(0, POOL - 1), min_size=1))
    def write_files(self, files: dict[str, int]) -> None:
        write(self.folder, dict(files))
        self.disk |= files

    @precondition(lambda self: len(self.disk) > 1)
    @rule(data=st.data())
    def delete_file(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.disk)))
        (self.folder / name).unlink()
        del self.disk[name]

    @rule(prune=st.booleans(), force=st.booleans())
    def index(self, prune: bool, force: bool) -> None:
        expected = Counter(
            "added" if name not in self.paths else "unchanged" if self.paths[name] == i else "updated"
            for name, i in self.disk.items()
        )
        self.paths |= self.disk
        missing = self.paths.keys() - self.disk.keys()
        if prune and not force and 2 * len(missing) > len(self.paths):
            with pytest.raises(HashretError, match="--force"):
                self.collection.index(self.folder, prune=True)
            return
        report = self.collection.index(self.folder, prune=prune, force=force)
        if prune:
            self.paths = dict(self.disk)
            expected["removed"] = len(missing)
        counts = nonzero_counts(report)
        counts.pop("decoded", None)
        assert counts == {name: count for name, count in expected.items() if count}

    @rule(images=st.lists(st.integers(0, POOL - 1), min_size=1, max_size=6))
    def add(self, images: list[int]) -> None:
        ids = self.collection.add([digits()[i] for i in images])
        self.arrays |= set(images)
        assert [self.collection.get(i).sha256 for i in ids] == [digest(("array", i)) for i in images]

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        keys = data.draw(st.sets(st.tuples(st.sampled_from(["file", "array"]), st.integers(0, POOL - 1)), max_size=4))
        ids = [self.ids[digest(key)] for key in keys if digest(key) in self.ids]
        assert self.collection.remove([*ids, 10**9]) == len(ids)
        self.paths = {name: i for name, i in self.paths.items() if ("file", i) not in keys}
        self.arrays -= {i for origin, i in keys if origin == "array"}

    @rule(model=st.sampled_from([("lsh", 16), ("pca", 16), ("lsh", 8)]))
    def reindex(self, model: tuple[str, int]) -> None:
        found = {i for name, i in self.paths.items() if self.disk.get(name) == i}
        if set(self.paths.values()) <= found or hasher(*model).fingerprint == self.collection.fingerprint:
            self.collection.reindex(hasher(*model))
            assert self.collection.fingerprint == hasher(*model).fingerprint and self.collection.bits == model[1]
            return
        before = self.collection.fingerprint
        missing = {("file", i) for i in set(self.paths.values()) - found}
        coded = {i for (i,) in rows(self.collection, "SELECT item_id FROM codes WHERE fingerprint = "
                                                     f"'{hasher(*model).fingerprint}'")}  # fmt: skip
        if {self.ids[digest(key)] for key in missing} <= coded:  # by an earlier run that missed others
            self.collection.reindex(hasher(*model))
            return
        with pytest.raises(HashretError, match="cannot be read where they were"):
            self.collection.reindex(hasher(*model))
        assert self.collection.fingerprint == before

    @rule(index=st.sampled_from(SPECS))
    def use_index(self, index: str) -> None:
        self.collection.use_index(index)
        assert self.collection.info()["index"] == index

    @rule(damage=st.sampled_from(["delete", "truncate", "overwrite", "stray"]))
    def damage_caches(self, damage: str) -> None:
        for file in [*self.base.glob("c/index/*")]:
            if damage == "delete":
                file.unlink()
            elif damage == "stray":
                (file.parent / "stray").write_bytes(b"stray")
            else:  # in a new file, as the old one may be mapped
                data = file.read_bytes()
                file.unlink()
                file.write_bytes(data[: len(data) // 2] if damage == "truncate" else bytes(len(data)))

    @rule()
    def open_again(self) -> None:
        self.collection.close()
        self.collection = Collection.open(self.base / "c")

    @invariant()
    def holds_what_it_should(self) -> None:
        if not hasattr(self, "ids"):
            return
        found = dict(rows(self.collection, "SELECT sha256, id FROM items"))
        keys = {("file", i) for i in self.paths.values()} | {("array", i) for i in self.arrays}
        assert set(found) == {digest(key) for key in keys}
        assert len(self.collection) == len(self.early) == len(found)
        for sha256, i in found.items():
            assert self.ids.get(sha256, i) == i  # an id stays while the content is stored
            assert sha256 in self.ids or i > self.highest  # and is never reused
        self.ids, self.highest = found, max([self.highest, *found.values()])
        paths = {
            hit.id: hit.paths
            for hit in self.collection.query_codes(np.zeros((1, self.collection.bits // 8), np.uint8), 99)[0]
        }
        expected: dict[int, list[str]] = {found[digest(("array", i))]: [] for i in self.arrays}
        for i in self.arrays:
            expected[found[digest(("array", i))]].append(str(self.base / "c/blobs" / digest(("array", i))))
        for name, i in sorted(self.paths.items()):
            expected.setdefault(found[digest(("file", i))], []).append(str(self.folder / name))
        assert paths == expected
        assert {file.name for file in self.base.glob("c/blobs/*")} == {digest(("array", i)) for i in self.arrays}

    @invariant()
    def answers_as_brute_force_does(self) -> None:
        if hasattr(self, "ids"):
            with Collection.open(self.base / "c", read_only=True) as now:
                check_answers(self.collection, self.early, now, limits=[(3, None), (None, 4), (99, 6)])


AnySequence.TestCase.settings = settings(
    max_examples=1000 if "HASHRET_SOAK" in os.environ else 12,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestAnySequence = AnySequence.TestCase


def caches(collection: Collection) -> list[Path]:
    return sorted((collection.path / "index").iterdir())


def flip(file: Path, date: int | None = None) -> None:
    """Flip one bit in the middle of a file, in place, and optionally set its time."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))
    if date is not None:
        os.utime(file, ns=(date, date))


@pytest.mark.parametrize("index", SPECS[:2])
def test_results_are_right_with_any_damage_to_the_cache(
    tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_cache, "FEW_CHANGES", 50)
    with Collection.create(tmp_path / "c", hasher(), index) as collection:
        collection.add(digits()[:100])
        (older,) = caches(collection)
        kept = older.read_bytes()
        collection.remove(range(1, 40))
        collection.add(digits()[100:200])
        collection.add(digits()[200:210])
        (cache,) = caches(collection)
        assert cache.name != older.name
        with Collection.create(tmp_path / "other", hasher(), index) as other:
            other.add(digits()[300:500])
            others = caches(other)[0].read_bytes()
    good, date = cache.read_bytes(), cache.stat().st_mtime_ns
    for harm in (
        cache.unlink,
        lambda: cache.write_bytes(b""),
        lambda: cache.write_bytes(good[:100]),
        lambda: cache.write_bytes(good[:-64]),
        lambda: cache.write_bytes(good + bytes(64)),
        lambda: cache.write_bytes(bytes(len(good))),
        lambda: cache.write_bytes(kept),  # an older generation
        lambda: cache.write_bytes(others),  # another collection's
        lambda: flip(cache),
        lambda: flip(cache, date + 1),
        lambda: shutil.rmtree(cache.parent),
    ):
        harm()
        with Collection.open(tmp_path / "c", read_only=True) as fresh:
            check_answers(fresh, limits=[(3, None)])
        shutil.rmtree(cache.parent, ignore_errors=True)
        cache.parent.mkdir()
        cache.write_bytes(good)
        os.utime(cache, ns=(date, date))
    with Collection.open(tmp_path / "c", read_only=True) as fresh:  # intact, but with another inode
        check_answers(fresh)


def test_a_damaged_cache_is_replaced_by_the_next_write(collection: Collection) -> None:
    collection.add(digits()[:100])
    (cache,) = caches(collection)
    flip(cache)
    with Collection.open(collection.path) as fresh:
        fresh.remove([1])
        assert len(caches(fresh)) == 1 and caches(fresh) != [cache]
        check_answers(fresh, collection)


def test_a_cache_that_cannot_be_written_loses_nothing(collection: Collection, photos: Path) -> None:
    (collection.path / "index").write_bytes(b"")
    with pytest.raises(HashretError, match=r"index cannot be written \(File exists\): everything is stored"):
        collection.index(photos)
    assert len(collection) == 12
    check_answers(collection)
    (collection.path / "index").unlink()
    (collection.path / "index/stray").mkdir(parents=True)
    assert nonzero_counts(collection.index(photos)) == {"unchanged": 12}
    assert len(caches(collection)) == 2
    check_answers(collection)


def test_caches_are_replaced_and_never_rewritten(collection: Collection) -> None:
    collection.add(digits()[:600])
    (first,) = caches(collection)
    data = first.read_bytes()
    with first.open("rb") as mapped:
        collection.add(digits()[600:])  # more than a thousand changes
        (second,) = caches(collection)
        assert second != first and not first.exists()
        assert mapped.read() == data
    inode, data = second.stat().st_ino, second.read_bytes()
    collection.add(255 - digits()[:10])  # too few to rewrite the cache
    assert caches(collection) == [second] and (second.stat().st_ino, second.read_bytes()) == (inode, data)
    assert rows(collection, "SELECT count(*) FROM changes WHERE op = 'add'")[0][0] >= 10


def test_a_reader_updates_or_rebuilds_its_index(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "FEW_CHANGES", 50)
    with Collection.open(collection.path, read_only=True) as early:
        check_answers(collection, early)
        for start in range(0, 300, 30):
            collection.add(digits()[start : start + 30])
            collection.remove(range(start + 1, start + 30, 3))
            if start % 120 == 0:
                check_answers(collection, early)
        check_answers(collection, early)
        for table in ("changes", "states"):  # older rows are deleted
            assert rows(collection, f"SELECT min(generation) FROM {table}")[0][0] > 1


def test_switching_the_index_applies_to_all_objects(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "FEW_CHANGES", 50)
    collection.add(digits()[:100])
    with Collection.open(collection.path) as other:
        check_answers(other)
        collection.use_index("faiss:BFlat")
        check_starts_at_once(other)
        check_answers(collection, other)
        other.add(digits()[100:200])  # writes a cache for the current index
        (cache,) = caches(other)
        assert cache.name.endswith(".faiss-BFlat")
        with Collection.open(collection.path) as fresh:
            check_answers(fresh, other, collection)
        assert caches(other) == [cache]
    for index in ("nothing", "faiss:Flat", "bitflip:x", ""):
        with pytest.raises(ValueError, match="no index|factory must"):
            collection.use_index(index)
    assert collection.info()["index"] == "faiss:BFlat"


def test_added_contents_are_kept_as_blobs(collection: Collection) -> None:
    image = Image.fromarray(digits()[2])
    ids = collection.add([digits()[0], digits()[1], image, png(3)], metadata=[{"n": 0}, None, {"ü": "1"}, {}])
    assert ids == [1, 2, 3, 4]
    for i in ids:
        (path,) = collection.get(i).paths
        assert Path(path).parent == collection.path / "blobs"
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == Path(path).name == collection.get(i).sha256
    assert Path(collection.get(4).paths[0]).read_bytes() == png(3)
    assert [collection.get(i).metadata for i in ids] == [{"n": 0}, None, {"ü": "1"}, {}]
    hit = collection.query(digits()[2], k=1)[0]
    assert hit == Hit(0, 3, collection.get(3).paths[0], collection.get(3).paths, None, {"ü": "1"})
    assert (stored(collection)[1] == hasher().encode(digits()[:4])).all()
    assert collection.get(1).width == collection.get(1).height == 8
    check_codes(collection)


def test_the_same_content_is_the_same_item(collection: Collection, photos: Path) -> None:
    assert collection.add([digits()[0], digits()[0], digits()[1]], metadata=[{"n": 1}, {"n": 2}, None]) == [1, 1, 2]
    assert collection.add(iter([digits()[1], digits()[0]])) == [2, 1]
    assert collection.get(1).metadata == {"n": 1} and len(collection) == 2
    collection.index(photos)
    (again,) = collection.add(photos / "0/00.png")
    assert len(collection) == 14
    paths = collection.get(again).paths
    assert len(paths) == 2 and str(photos / "0/00.png") in paths
    shutil.rmtree(photos)
    write(photos, {"new.png": 99})
    collection.index(photos, prune=True, force=True)
    (blob,) = collection.get(again).paths
    assert Path(blob).read_bytes() == png(0)


def test_removed_contents_leave_no_blob(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    ids = collection.add(digits()[:3])
    assert collection.remove([ids[0], ids[2], ids[2], 1, 999]) == 3
    assert [path.name for path in (collection.path / "blobs").iterdir()] == [collection.get(ids[1]).sha256]
    assert (photos / "0/00.png").exists()  # the user's files stay
    assert len(collection) == 12
    check_answers(collection)
    assert collection.add(digits()[:1]) == [ids[2] + 1]
    assert collection.remove([]) == 0
    counts = nonzero_counts(collection.index(photos))
    assert counts == {"added": 1, "unchanged": 11, "decoded": 1}  # the file still exists


def test_removing_a_folder_removes_items_without_other_paths(collection: Collection, photos: Path) -> None:
    write(photos, {"0/copy of 1.png": 1, "0.png": 90, "00/x.png": 91, "0/broken.png": b"Dear diary"})
    collection.index(photos)
    collection.index(photos / "0")
    write(photos, {"0/03.png": b"no more"})
    collection.index(photos)
    everything, files = rows(collection, "SELECT * FROM paths ORDER BY root, name"), sorted(photos.rglob("*"))
    generation = collection.info()["generation"]
    would: list[Indexed] = []
    lines: list[Indexed] = []
    assert collection.remove(photos / "0", dry_run=True, committed=would.extend) == 4
    assert rows(collection, "SELECT * FROM paths ORDER BY root, name") == everything
    assert collection.info()["generation"] == generation and len(collection) == 14
    assert collection.remove([photos / "0"], committed=lines.extend) == 4
    names = [f"{i:02d}.png" for i in range(0, 12, 3)]
    assert lines == would and {(line.path, line.status) for line in lines} == {
        (str(photos / "0" / name), "removed") for name in (*names, "broken.png", "copy of 1.png")
    }
    assert {line.id is None for line in lines if "broken" in line.path} == {True}
    assert len(collection) == 10 and not rows(collection, "SELECT * FROM paths WHERE root || name LIKE '%/0/%'")
    assert collection.info()["failures"] == 0 and collection.query(photos / "0.png", k=1)[0].distance == 0
    check_answers(collection)
    generation = collection.info()["generation"]
    assert collection.remove(photos / "0", committed=lines.extend) == 0  # again
    assert lines == would and collection.info()["generation"] == generation
    assert sorted(photos.rglob("*")) == files
    assert nonzero_counts(collection.index(photos))["added"] == 4


def test_paths_of_every_form_can_be_removed(
    tmp_path: Path, photos: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.make_archive(
        str(tmp_path / "packed"), "zip", write(tmp_path / "pack", {"a/p.png": 50, "a/q.png": 51, "r.png": 52})
    )
    shutil.rmtree(tmp_path / "pack")
    write(tmp_path / "packed", {"s.png": 53})
    write(tmp_path / "packed#1", {"t.png": 54})
    np.save(tmp_path / "rows.npy", digits()[60:64])
    odd = os.fsdecode(b"\xff")
    write(photos, {f"{odd}/x.png": 55, f"plain/{odd}.png": 56})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blobs").mkdir()
    for source in ("photos", "packed.zip", "packed", "packed#1", "rows.npy", "digits:test"):
        collection.index(source)
    (blob,) = collection.get(collection.add(digits()[100:101])[0]).paths
    remaining = len(collection)
    for name, count in {
        "photos/0/00.png": 1,
        f"photos/{odd}": 1,
        "photos/plain/": 1,
        "./packed.zip!/a": 2,
        "packed.zip": 1,
        str(tmp_path / "packed"): 1,
        "rows.npy#2": 1,
        "rows.npy": 3,
        "blobs": 0,
        "photos/0/0": 0,
        "nothing": 0,
        "": 0,
        "digits": 0,
        "digits:test#3": 1,
        "digits:test": 359,
        blob: 1,
        "packed#1/t.png": 1,
        str(photos): 11,
    }.items():
        if name:
            assert collection.remove(name) == count, name
            remaining -= count
        assert len(collection) == remaining
    assert remaining == 0 and not Path(blob).exists() and collection.info()["paths"] == 0
    assert (tmp_path / "rows.npy").exists() and (photos / "0/00.png").exists()


def test_items_and_paths_are_removed_together(collection: Collection, photos: Path) -> None:
    write(photos, {"copy.png": 0})
    collection.index(photos)
    (blob,) = collection.add(digits()[200:201])
    lines: list[Indexed] = []
    assert collection.remove([1, blob, photos / "1/01.png", 999, 1], committed=lines.extend) == 3
    assert [line.path for line in lines] == sorted(
        [
            str(photos / "0/00.png"),
            str(photos / "1/01.png"),
            str(photos / "copy.png"),
            *(p.path for p in lines if p.id == blob),
        ]
    )
    assert not any((collection.path / "blobs").iterdir()) and len(collection) == 10
    with pytest.raises(HashretError, match="read-only"):
        Collection.open(collection.path, read_only=True).remove(2)
    check_answers(collection)


def test_removing_the_path_of_a_blob_deletes_it(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    (same,) = collection.add(photos / "0/00.png")
    blob = collection.path / "blobs" / collection.get(same).sha256
    assert blob.exists() and collection.remove(blob) == 0
    assert not blob.exists() and collection.get(same).paths == [str(photos / "0/00.png")]


def test_unreadable_paths_are_listed_and_can_be_retried(collection: Collection, photos: Path, tmp_path: Path) -> None:
    assert collection.failures() == [] == collection.retry()
    write(photos, BROKEN | {"mended.png": b"?" * len(png(81))})
    gone = write(tmp_path / "gone", {"0.png": 80, "1.png": b"Dear diary"})
    collection.index(photos)
    collection.index(gone)
    names = [gone / "1.png", *(photos / name for name in sorted((*BROKEN, "mended.png")))]
    assert [failure.path for failure in collection.failures()] == [str(name) for name in names]
    assert all(failure.reason and failure.seen.startswith("20") for failure in collection.failures())
    seen = (photos / "mended.png").stat()
    (photos / "mended.png").write_bytes(png(81))
    os.utime(photos / "mended.png", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert nonzero_counts(collection.index(photos)) == {"unchanged": 12, "failed": 4}  # no sign of the change
    shutil.rmtree(gone)
    for status in ("added", None):
        found = {line.path: line.status for line in collection.retry()}
        assert found.pop(str(photos / "mended.png"), None) == status
        assert found == {str(photos / name): "failed" for name in BROKEN}
        assert [failure.path for failure in collection.failures()] == [str(name) for name in names[:-1]]
    assert collection.query(photos / "mended.png", k=1)[0].distance == 0
    check_answers(collection)


def test_a_filter_restricts_queries(collection: Collection, photos: Path) -> None:
    write(photos, {f"x/{i}.png": i for i in range(20, 300)})
    collection.index(photos, metadata={f"x/{i}.png": {"i": i} for i in range(20, 300)})
    ids, codes = stored(collection)
    for where, chosen in {
        "label = '1'": [hit.id for hit in collection.query(digits()[0], k=None, max_distance=16) if hit.label == "1"],
        "i % 50 = 7": collection.matching("i % 50 = 7"),
        "i = 299": [hit.id for hit in collection.query(photos / "x/299.png") if str(hit.path).endswith("/299.png")],
        "0": [],
        "id > 5": [i for i in ids.tolist() if i > 5],
    }.items():
        assert collection.matching(where) == sorted(chosen)
        among = np.isin(ids, chosen)
        query = hasher().encode(digits()[:3])
        for k, r in ((10, None), (None, 9), (3, 4), (1000, None)):
            expected = [brute(ids[among], codes[among], code[None], k, r) for code in query]
            assert [pairs(hits) for hits in collection.query_codes(query, k, r, where=where)] == expected
            assert [pairs(hits) for hits in collection.query_batch(digits()[:3], k, r, where=where)] == expected
            assert pairs(collection.query(digits()[0], k, r, where=where)) == expected[0]
    own = collection.query_item(3, k=5, where="id <> 4")
    assert len(own) == 5 and not {3, 4} & {hit.id for hit in own}
    for ask in (
        lambda: collection.query(digits()[0], where="nosuch = 1"),
        lambda: collection.query_codes(codes[:1], where="nosuch = 1"),
        lambda: collection.query_item(1, where="nosuch = 1"),
        lambda: collection.matching("nosuch = 1"),
    ):
        with pytest.raises(HashretError, match="where: no such column: nosuch"):
            ask()
    with pytest.raises(ValueError, match="where must be a text"):
        collection.query(digits()[0], where=3)  # type: ignore[arg-type]


def test_a_filter_sees_every_commit(collection: Collection) -> None:
    with Collection.open(collection.path, read_only=True) as reader:
        for i in range(5):
            collection.add(digits()[i : i + 1], metadata=[{"i": i}])
            for view in (reader, collection):
                found = view.query(digits()[i], k=9, where="i >= 0")
                assert len(found) == i + 1 and found[0].metadata == {"i": i}


def test_adding_an_unreadable_image_adds_nothing_of_its_batch(collection: Collection, tmp_path: Path) -> None:
    for broken, message in ((b"Dear diary", "a bytes: no image"), (tmp_path / "none.png", "none.png: cannot be read")):
        with pytest.raises(HashretError, match=message):
            collection.add([digits()[0], broken])
    for images, metadata in (([digits()[0]], []), ([digits()[0], 5], None), (digits()[0].astype(float)[None], None)):
        with pytest.raises(ValueError, match=r".+"):
            collection.add(images, metadata)
    assert len(collection) == 0 and not list(collection.path.glob("blobs/*"))
    assert collection.add([]) == []
    for image in (png(0), Image.fromarray(digits()[0])):
        assert len(collection.add(image)) == 1


def test_filter_and_search_see_the_same_generation(collection: Collection) -> None:
    """While another thread adds items 1, 2, 3, … and removes the oldest, every result is a contiguous range of them."""
    codes = hasher().encode(digits()[:1])
    collection.add(digits()[:1], metadata=[{"i": 0}])  # so that the key i exists
    done = threading.Event()

    def write_on() -> None:
        try:
            for i in range(1, 60):
                collection.add(digits()[i : i + 1], metadata=[{"i": i}])
                if i > 20:
                    collection.remove(i - 20)
        finally:
            done.set()

    writer = threading.Thread(target=write_on)
    writer.start()
    lengths = set()
    with Collection.open(collection.path, read_only=True) as other:
        while not done.is_set():
            for view in (collection, other):
                (hits,) = view.query_codes(codes, 100, where="i >= 0 AND name <> ''")
                ids = sorted(hit.id for hit in hits)
                assert ids == list(range(ids[0], ids[-1] + 1))
                assert all(hit.metadata == {"i": hit.id - 1} for hit in hits)
                lengths.add(len(ids))
    writer.join()
    assert len(lengths) > 3 and max(lengths) <= 22


def test_get_len_and_info(collection: Collection, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(collection) == 0
    write(photos, BROKEN | {"copy.png": 0})
    collection.index(photos)
    item = collection.get(1)
    assert item.sha256 == hashlib.sha256(png(0)).hexdigest() and item.bytes == len(png(0)) and item.label == "0"
    for missing in (0, -1, 13, 2**62):
        with pytest.raises(HashretError, match=f"no item {missing}:"):
            collection.get(missing)
    info = collection.info()
    size = sum(path.stat().st_size for path in collection.path.rglob("*") if path.is_file())
    assert {name: info[name] for name in ("items", "paths", "failures", "model", "head", "bits", "index")} == {
        "items": 12, "paths": 13, "failures": 3, "model": "lsh", "head": "lsh", "bits": 16, "index": "bitflip"
    }  # fmt: skip
    assert info["health"] == health(stored(collection)[1])._asdict() and info["bytes_per_item"] == size / 12
    monkeypatch.setattr(summary, "MAX_HEALTH_CODES", 5)
    assert collection.info()["health"] == health(stored(collection)[1][::3].copy())._asdict()
    assert info["fingerprint"] == hasher().fingerprint == collection.fingerprint and info["bytes_on_disk"] == size
    assert collection.hasher.fingerprint == collection.fingerprint


def test_reindexing_encodes_all_items(collection: Collection, photos: Path, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "packed"), "gztar", write(tmp_path / "party!", {"p.png": 50, "q.png": 51}))
    np.save(tmp_path / "rows.npy", digits()[60:70])
    for source in (photos, tmp_path / "packed.tar.gz", tmp_path / "rows.npy", "digits", tmp_path / "party!"):
        collection.index(source)
    collection.add(digits()[100:105])
    items, old = len(collection), hasher().encode(digits()[:1])
    ids = stored(collection)[0].tolist()
    shutil.rmtree(tmp_path / "party!" / "p.png", ignore_errors=True)
    with Collection.open(collection.path, read_only=True) as reader:
        reader.query(digits()[0])
        collection.reindex(hasher("pca", 32))
        check_starts_at_once(reader)
        assert len(caches(collection)) == 1
        assert collection.fingerprint == reader.fingerprint == hasher("pca", 32).fingerprint
        assert collection.bits == 32 and len(collection) == items and stored(collection)[0].tolist() == ids
        for view in (reader, collection):
            assert view.query(digits()[0], k=1)[0].distance == 0
            with pytest.raises(ValueError, match="32 bits, not 16"):
                view.query_codes(old)
        check_answers(collection, reader)
    check_codes(collection)
    assert rows(collection, "SELECT DISTINCT fingerprint FROM codes") == [(collection.fingerprint,)]


def test_a_folder_whose_name_looks_like_an_archive_is_found_again(collection: Collection, tmp_path: Path) -> None:
    for name in ("party!", "half#", "x.zip!"):
        collection.index(write(tmp_path / name, {f"{name}.png": len(name)}))
    np.save(tmp_path / "odd#.npy", digits()[20:22])
    collection.index(tmp_path / "odd#.npy")
    collection.reindex(hasher("pca", 16))
    check_answers(collection)


def test_reindexing_finds_a_data_set_where_it_was(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "sets/MNIST/raw"
    raw.mkdir(parents=True)
    for part, images in (("train", digits()[:5]), ("t10k", digits()[5:20])):
        for name, array in (("images-idx3", images), ("labels-idx1", np.zeros(len(images), np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # the folder of downloads
    monkeypatch.chdir(tmp_path)
    assert nonzero_counts(collection.index("mnist:test", data_root="sets")) == {"added": 15, "decoded": 15}
    monkeypatch.chdir("/")
    collection.reindex(hasher("pca", 16))
    assert collection.fingerprint == hasher("pca", 16).fingerprint and not (tmp_path / "cache").exists()
    assert collection.query(digits()[7], k=1)[0].path == "mnist:test#2"


def test_reindexing_without_the_blobs_is_refused(collection: Collection) -> None:
    collection.add(digits()[:3])
    shutil.rmtree(collection.path / "blobs")
    with pytest.raises(HashretError, match="3 items cannot be read where they were"):
        collection.reindex(hasher("pca", 16))
    assert len(collection.query(digits()[0])) == 3


def test_reindexing_stops_for_missing_contents(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    before = collection.query(digits()[0])
    (photos / "0/00.png").rename(photos / "0/away.png")
    write(photos, {"1/01.png": 88})
    with pytest.raises(HashretError, match=r"2 items cannot be read where they were, such as .*png: .*--prune"):
        collection.reindex(hasher("pca", 16))
    assert collection.fingerprint == hasher().fingerprint and collection.query(digits()[0]) == before
    collection.index(photos, prune=True)
    assert collection.reindex(hasher("pca", 16)) == 0
    assert collection.fingerprint == hasher("pca", 16).fingerprint
    check_codes(collection)
    check_answers(collection)


def test_reindexing_drops_missing_contents_on_request(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    collection.add(digits()[100:102])
    (photos / "0/00.png").unlink()
    next((collection.path / "blobs").iterdir()).unlink()
    with pytest.raises(MissingContents) as missing:
        collection.reindex(hasher("pca", 16))
    assert len(missing.value.paths) == 2 and str(photos / "0/00.png") in missing.value.paths
    assert len(collection) == 14 and collection.fingerprint == hasher().fingerprint
    assert collection.reindex(hasher("pca", 16), drop_missing=True) == 2
    assert len(collection) == 12 and collection.fingerprint == hasher("pca", 16).fingerprint
    assert nonzero_counts(collection.index(photos)) == {"unchanged": 11}
    check_codes(collection)
    check_answers(collection)


def test_an_interrupted_reindexing_continues(collection: Collection, rows_of_pixels: Path) -> None:
    collection.index(rows_of_pixels)
    pixels = np.load(rows_of_pixels)
    done: list[int] = []
    with Collection.open(collection.path, read_only=True) as reader:
        expected = reader.query_batch(pixels[:3])

        def interrupt(progress: Any) -> None:
            assert reader.query_batch(pixels[:3]) == expected  # readers use the old model until the switch
            assert progress.total == 2500
            done.append(progress.done)
            if len(done) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            collection.reindex(hasher("pca", 32), progress=interrupt)
        assert done == [1000, 2000] and reader.query_batch(pixels[:3]) == expected == collection.query_batch(pixels[:3])
        collection.remove([1, 2400])
        (new,) = collection.add([digits()[0]])
        left: list[int] = []
        collection.reindex(hasher("pca", 32), progress=lambda progress: left.append(progress.done))
        assert sum(left[-1:]) <= 500 and new in stored(collection)[0]
        check_answers(collection, reader)
        codes = hasher("pca", 32).encode(pixels)
        ids, found = stored(collection)
        names = dict(rows(collection, "SELECT item_id, name FROM paths"))
        for i, code in zip(ids.tolist(), found, strict=True):
            assert i == new or (code == codes[int(names[i])]).all()


def test_a_switch_during_a_query_is_noticed(collection: Collection) -> None:
    collection.add(digits()[:50])
    with Collection.open(collection.path, read_only=True) as reader:
        prepare, real, switched = reader.hasher.prepare, reader.hasher.encode, list[bool]()

        class Slow:  # a model that is replaced while it encodes
            fingerprint = reader.hasher.fingerprint

            def prepare(self, images: Any) -> PreparedImages:
                prepared: PreparedImages = prepare(images)
                return prepared

            def encode(self, images: Any) -> Codes:
                codes = real(images)
                if not switched:
                    collection.reindex(hasher("pca", 16))
                    switched.append(True)
                return codes

        reader._parts.models._loaded = Slow()  # type: ignore[assignment]
        hits = reader.query(digits()[7], k=5)
    assert switched and hits == collection.query(digits()[7], k=5) and hits[0].distance == 0
    ids, codes = stored(collection)
    assert pairs(hits) == brute(ids, codes, hasher("pca", 16).encode(digits()[7:8]), 5, None)


def test_an_index_update_during_a_search_is_noticed(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread updates the shared index to the next generation during the search."""
    (old,) = collection.add([digits()[0]])
    query = hasher().encode(digits()[:1])
    real = IndexCache.index_for
    steps: list[Callable[[], Any]] = [lambda: collection.remove([old]), lambda: collection.add([digits()[1]])]

    def slow(*arguments: Any) -> Any:
        shown = real(*arguments)
        if threading.current_thread() is threading.main_thread() and steps:
            step = steps.pop(0)
            other = threading.Thread(target=lambda: (step(), collection.query_codes(query)))
            other.start()
            other.join()
        return shown

    monkeypatch.setattr(IndexCache, "index_for", slow)
    (hits,) = collection.query_codes(query)
    assert steps == [] and pairs(hits) == brute(*stored(collection), query, None, None)
    assert [hit.id for hit in hits] == [old + 1]


def test_threads_that_write_wait_for_each_other(collection: Collection, photos: Path) -> None:
    write(photos, {f"more/{i}.png": i for i in range(100, 140)})
    errors: list[BaseException] = []

    def work(action: Callable[[Collection], Any]) -> None:
        try:
            with Collection.open(collection.path) as opened:  # one object for each thread, or a shared one
                action(opened)
            action(collection)
        except BaseException as error:
            errors.append(error)

    actions: list[Callable[[Collection], Any]] = [
        lambda c: c.index(photos),
        lambda c: c.add(digits()[:5]),
        lambda c: c.add(digits()[3:8]),
        lambda c: c.index(photos, prune=True),
    ]
    threads = [threading.Thread(target=work, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(collection) == 52 + 8
    check_codes(collection)
    check_answers(collection)


def test_results_during_writes_are_of_one_generation(collection: Collection) -> None:
    """Each result equals brute force over one of the states that were current during the query."""
    model, rng = hasher(), random.Random(0)
    collection.add(digits()[:300])
    states = [stored(collection)]
    visible = [0, 0]  # the states that a reader may see: from the last committed to the pending one
    queries: list[tuple[int, int, Codes, int | None, int | None, list[tuple[int, int]]]] = []
    over = threading.Event()
    errors: list[BaseException] = []

    def read(seed: int, reader: Collection) -> None:
        rng = random.Random(seed)
        try:
            while not over.is_set():
                query = model.encode(digits()[rng.randrange(1700)][None])
                k, r = rng.choice([(3, None), (None, 2), (20, 3)])
                first = visible[0]
                (hits,) = reader.query_codes(query, k, r)
                queries.append((first, visible[1], query, k, r, pairs(hits)))
                assert all(hit.path is not None for hit in hits)
                time.sleep(0.002)  # leaves the interpreter to the writer
        except BaseException as error:
            errors.append(error)

    with Collection.open(collection.path, read_only=True) as other:
        threads = [threading.Thread(target=read, args=(i, (collection, other)[i % 2])) for i in range(4)]
        for thread in threads:
            thread.start()
        for n in range(24):
            visible[1] = n + 1
            if n % 3 == 2:
                collection.remove(rng.sample(states[-1][0].tolist(), 60))
            else:
                collection.add(digits()[rng.randrange(1700) :][:30])
            states.append(stored(collection))
            visible[0] = n + 1
        over.set()
        for thread in threads:
            thread.join()
    assert errors == [] and len(queries) > 20
    for first, last, query, k, r, found in queries:
        assert any(brute(*states[i], query, k, r) == found for i in range(first, last + 1))


def test_a_second_process_is_refused_at_once(collection: Collection, photos: Path) -> None:
    hold = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1], timeout=0), FileLock(sys.argv[2], timeout=0):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    new = photos.parent / "new"
    new.mkdir()
    command = [sys.executable, "-c", hold, str(collection.path / "lock"), str(new / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        for attempt in (
            lambda: collection.index(photos),
            lambda: collection.add(digits()[:1]),
            lambda: collection.remove([1]),
            lambda: collection.reindex(hasher()),
            lambda: collection.use_index("faiss"),
            lambda: Collection.create(new, hasher()),
        ):
            with pytest.raises(HashretError, match="another process is writing to .*: run the command again"):
                attempt()
        assert collection.query(digits()[0]) == [] and len(collection) == 0
        other.communicate()
    assert nonzero_counts(collection.index(photos)) == {"added": 12, "decoded": 12}


def test_a_killed_writer_leaves_what_was_reported(collection: Collection, rows_of_pixels: Path) -> None:
    work = (
        "import os, sys; from hashret.collection import Collection\n"
        "def committed(lines):\n"
        "    print(len(lines), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "Collection.open(sys.argv[1]).index(sys.argv[2], committed=committed)"
    )
    done = subprocess.run([sys.executable, "-c", work, collection.path, rows_of_pixels], capture_output=True, text=True)
    assert done.returncode == -9 and len(collection) == int(done.stdout) > 0
    check_answers(collection)
    assert nonzero_counts(collection.index(rows_of_pixels))["unchanged"] == int(done.stdout)


def test_creating_needs_a_writable_folder_and_a_fitted_model(tmp_path: Path) -> None:
    with pytest.raises(HashretError, match="not fitted"):
        Collection.create(tmp_path / "c", Hasher("lsh"))
    with pytest.raises(ValueError, match="no index 'tree'"):
        Collection.create(tmp_path / "c", hasher(), "tree")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HashretError, match="cannot be written"):
        Collection.create(tmp_path / "file", hasher())
    with Collection.create(tmp_path / "a/b/c", hasher()) as made:
        made.add(digits()[:1])
        with pytest.raises(HashretError, match="a collection at .* already"):
            Collection.create(tmp_path / "a/b/c", hasher("pca", 16))
        assert len(made) == 1 and made.fingerprint == hasher().fingerprint


def test_opening_anything_but_a_collection_raises_an_error(tmp_path: Path, collection: Collection) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(HashretError, match="there is no collection at"):
            Collection.open(path)
    shutil.rmtree(collection.path / "models")
    with Collection.open(collection.path) as opened:
        assert opened.query_codes(np.zeros((1, 2), np.uint8)) == [[]]  # needs no model
        with pytest.raises(HashretError, match="no model folder|damaged"):
            opened.query(digits()[0])


def test_another_model_in_the_folder_of_the_collections_model_is_refused(collection: Collection) -> None:
    folder = collection.path / "models" / collection.fingerprint
    shutil.rmtree(folder)
    hasher("pca", 16).save(folder)
    with pytest.raises(HashretError, match="holds another model"):
        collection.add(digits()[:1])
    assert len(collection) == 0


def test_a_read_only_collection_is_not_written_to(collection: Collection, photos: Path) -> None:
    collection.index(photos)
    with Collection.open(collection.path, read_only=True) as reader:
        for attempt in (
            lambda: reader.index(photos),
            lambda: reader.add([]),
            lambda: reader.remove([1]),
            lambda: reader.reindex(hasher()),
            lambda: reader.use_index("faiss"),
        ):
            with pytest.raises(HashretError, match="opened read-only"):
                attempt()
        check_answers(reader)


def test_damage_is_reported_or_harmless(tmp_path: Path) -> None:
    """Whichever page of the database is damaged, a call returns a result or raises HashretError."""
    with Collection.create(tmp_path / "whole", hasher()) as intact:
        intact.index(write(tmp_path / "photos", {f"{i}.png": i for i in range(60)}))
        intact.add(digits()[:20])
    acts: list[Callable[[Collection], Any]] = [
        lambda c: c.query_codes(np.zeros((1, 2), np.uint8), None, 16),
        lambda c: c.info(),
        lambda c: c.index(tmp_path / "photos", prune=True),
        lambda c: c.remove([3]),
        lambda c: c.reindex(hasher("pca", 16)),
    ]
    pages = (tmp_path / "whole/items.db").stat().st_size // 4096
    named = 0
    for page in range(pages):
        for junk in (bytes(4096), random.Random(page).randbytes(4096)):
            shutil.rmtree(tmp_path / "c", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "c")
            with (tmp_path / "c/items.db").open("r+b") as file:
                file.seek(page * 4096)
                file.write(junk)
            for act in acts:
                try:
                    with Collection.open(tmp_path / "c") as opened:
                        act(opened)
                except HashretError as error:
                    assert re.search("damaged|not the database of|cannot be read", str(error))
                    named += 1
    assert named >= 4 * pages


def test_a_full_disk_is_reported_and_leaves_nothing_half_written(collection: Collection, rows_of_pixels: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    outcomes = set()
    # The maximum size of a file, beyond which the system reports EFBIG.
    for limit in (0, 40_000, 70_000, 120_000, 250_000):
        before = dict(rows(collection, "SELECT sha256, id FROM items"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(HashretError, match="cannot be (read or )?writ|is full") as caught:
                collection.index(rows_of_pixels)
            with suppress(HashretError):
                Collection.create(collection.path.parent / f"c{limit}", hasher()).close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        outcomes.add(str(caught.value))
        after = dict(rows(collection, "SELECT sha256, id FROM items"))
        assert before.items() <= after.items()
        made = collection.path.parent / f"c{limit}"
        assert {file.name for file in made.iterdir()} in ({"lock", "models"}, {"lock", "models", "items.db"})
        assert (made / "items.db").exists() == any((made / "models").iterdir())
        assert not list(collection.path.parent.rglob("*.new*"))
        check_answers(collection, limits=[(3, None)])
    assert outcomes and len(collection) < 2500
    assert nonzero_counts(collection.index(rows_of_pixels))["added"] == 2500 - len(after)
    check_answers(collection)


def test_the_collection_is_found_upwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HASHRET_COLLECTION", raising=False)
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    assert locate() == tmp_path / "a/b/.hashret"
    Collection.create(tmp_path / ".hashret", hasher()).close()
    (tmp_path / "a/.hashret").mkdir()  # not a collection: it has no database
    assert locate() == tmp_path / ".hashret"
    assert locate("else") == tmp_path / "a/b/else"
    monkeypatch.setenv("HASHRET_COLLECTION", str(tmp_path / "named"))
    assert locate() == tmp_path / "named" and locate("else") == tmp_path / "a/b/else"
    with pytest.raises(HashretError, match="ends with the program that creates it: give a folder"):
        locate(":memory:")


def test_a_collection_in_memory_is_deleted_with_its_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with Collection.create(":memory:", hasher()) as collection:
        assert collection.add(digits()[:20]) == [*range(1, 21)]
        assert collection.query(digits()[7], k=1)[0].id == 8
        assert collection.path.parent == tmp_path / "temporary"
    assert not list((tmp_path / "temporary").iterdir())
    collection = Collection.create(":memory:", hasher())
    collection.add(digits()[:1])
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del collection
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir()) and [path.name for path in tmp_path.iterdir()] == ["temporary"]


class Counted:
    """A store that counts its snapshots."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.snapshots = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def snapshot(self) -> Any:
        self.snapshots += 1
        return self._store.snapshot()


def test_a_query_is_one_read_transaction(collection: Collection) -> None:
    collection.add(digits()[:50], [{"n": i} for i in range(50)])
    first, second = (hit.id for hit in collection.query(digits()[7], k=2))
    collection.verdict(first, second, "different")
    store = Counted(SqliteStore(collection.path, read_only=True))
    folder = collection.path
    counted = Collection(
        store, IndexCache(folder / "index", store), Originals(folder), Models(folder / "models", store)
    )
    counted.query(digits()[7])  # loads model and index
    code = hasher().encode(digits()[7:8])
    for ask in (
        lambda: counted.query(digits()[7]),
        lambda: counted.query(digits()[7], 3, 9, rank="asymmetric", where="n < 30"),
        lambda: counted.query_codes(code, where="n > 3"),
        lambda: counted.query_item(first),
        lambda: counted.items(where="n > 3"),
        lambda: counted.matching("n > 3"),
    ):
        store.snapshots = 0
        assert ask() and store.snapshots == 1
    counted.close()


def test_a_query_fails_after_too_many_changes_during_it(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection.add(digits()[:5])
    monkeypatch.setattr(IndexCache, "current", property(lambda cache: object()))  # another one whenever it is read
    with pytest.raises(HashretError, match="changed 100 times during one query: query again"):
        collection.query(digits()[0])


def test_pruning_walks_the_source_once(collection: Collection, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection.index(photos)
    (photos / "0/00.png").unlink()
    listed, real = list[str](), os.scandir

    def scandir(path: str) -> Any:
        listed.append(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert collection.index(photos, prune=True).removed == 1
    listed = [path for path in listed if Path(path).is_relative_to(photos)]
    assert len(listed) == len(set(listed)) > 1


def test_a_clock_that_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are compared for equality alone, whether they lie before the last run, before 1970 or far ahead."""
    pixels = np.random.default_rng(1).integers(0, 256, (9, 6, 6), np.uint8)
    photos = [tmp_path / f"photos/{i}.png" for i in range(3)]
    photos[0].parent.mkdir()
    for photo, image in zip(photos, pixels, strict=False):
        Image.fromarray(image).save(photo, compress_level=0)  # all of one size
    with Collection.create(tmp_path / "c", Hasher("lsh", 16).fit(pixels)) as collection:
        collection.index(photos[0].parent)
        for i, seconds in enumerate((1e9, -1e9, 7e9), 3):
            monkeypatch.setattr("time.gmtime", lambda seconds=seconds, now=time.gmtime: now(seconds))
            Image.fromarray(pixels[i]).save(photos[0], compress_level=0)
            os.utime(photos[0], (seconds, seconds))
            for cache in (tmp_path / "c/index").iterdir():
                os.utime(cache, (seconds, seconds))
            report = collection.index(photos[0].parent)
            assert (report.updated, report.unchanged, report.failed) == (1, 2, 0)
            with Collection.open(tmp_path / "c") as opened:
                (hit,) = opened.query(photos[0], 1)
                assert (hit.distance, hit.path) == (0, str(photos[0]))
                assert opened.get(hit.id).added == time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                assert opened.index(photos[0].parent).unchanged == 3
