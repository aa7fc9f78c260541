import json
import os
import sqlite3
import sys
import zipfile
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hashret.collection import Collection
from hashret.collection.export import format_of
from hashret.errors import HashretError
from hashret.hasher import Hasher


@pytest.fixture(params=["jsonl", "npz", "parquet"])
def suffix(request: pytest.FixtureRequest) -> str:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    found: str = request.param
    return found


def pixels(i: int) -> NDArray[np.uint8]:
    return np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)


@cache
def hasher(bits: int = 16) -> Hasher:
    return Hasher("lsh", bits).fit(np.stack([pixels(i) for i in range(50)]))


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    """Return a collection of files (one twice, one with an odd name), array rows, contents without files, and metadata.

    Some ids are unused.
    """
    folder_of_all = tmp_path_factory.mktemp("transfer")
    folder = folder_of_all / "photos"
    for i, name in enumerate(("a/0.png", "a/1.png", "b/2.png", os.fsdecode(b"\xff/\xfe.png"), "größe\n.png", "3.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(folder / name)
    (folder / "b/copy.png").write_bytes((folder / "a/0.png").read_bytes())
    np.save(folder_of_all / "rows.npy", np.stack([pixels(i) for i in range(20, 1320)]))
    with Collection.create(folder_of_all / "c", hasher()) as collection:
        metadata = {"a/0.png": {"x": 1, "y": 1.0, "z": "ü", "w": None, "v": True, "big": 10**30}, "3.png": {}}
        collection.index(folder, metadata=metadata)
        collection.index(folder_of_all / "rows.npy")
        collection.add([pixels(10_000)], metadata=[{"blob": True}])
        collection.remove([3, *range(100, 110)])
        yield collection


def tables(collection: Collection) -> dict[str, list[tuple[Any, ...]]]:
    with closing(sqlite3.connect(f"file:{collection.path / 'items.db'}?mode=ro", uri=True)) as conn:
        return {
            table: conn.execute(f"SELECT * FROM {table} ORDER BY 1, 2, 3").fetchall()
            for table in ("items", "paths", "codes")
        }


def test_import_restores_all_items(collection: Collection, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"out.{suffix}"
    count = collection.export(file)
    assert count == len(collection) and not list(tmp_path.glob("*.new"))
    with Collection.create(tmp_path / "new", hasher()) as new:
        assert new.import_items(file) == count
        assert tables(new) == tables(collection)
        queries = np.random.default_rng(0).integers(0, 256, (5, 2), np.uint8)
        for mine, yours in zip(new.query_codes(queries, 50), collection.query_codes(queries, 50), strict=True):
            assert [(hit.distance, hit.id, hit.metadata) for hit in mine] == [
                (hit.distance, hit.id, hit.metadata) for hit in yours
            ]
        generation = new.info()["generation"]
        assert new.import_items(file) == 0 and tables(new) == tables(collection)  # again
        assert new.export(tmp_path / f"again.{suffix}") == count
        assert new.info()["generation"] == generation + 1
        (added,) = new.add([pixels(77_777)])
        assert added == max(row[0] for row in tables(collection)["items"]) + 1
    if suffix == "jsonl":
        assert file.read_bytes() == (tmp_path / "again.jsonl").read_bytes()


def test_import_merges_with_existing_items(collection: Collection, tmp_path: Path) -> None:
    collection.export(tmp_path / "out.jsonl")
    with Collection.create(tmp_path / "new", hasher()) as new:
        new.index(collection.path.parent / "photos", metadata={"a/1.png": {"mine": 1}})
        mine = {new.get(i).sha256: i for i in range(1, 7)}
        assert new.import_items(tmp_path / "out.jsonl") == len(collection) - 5  # item 3 was removed there
        items = {sha256: (i, metadata) for i, sha256, *_, metadata in tables(new)["items"]}
        assert all(items[sha256][0] == i for sha256, i in mine.items())
        assert items[new.get(3).sha256][1] == '{"mine": 1}'
        theirs = {sha256: i for i, sha256, *_ in tables(collection)["items"]}
        assert all(i == theirs[sha256] for sha256, (i, _) in items.items() if sha256 not in mine)
        ids = [i for i, *_ in tables(new)["items"]]
        assert len(set(ids)) == len(ids) == len(collection) + 1


def test_json_lines_have_the_documented_keys(collection: Collection, tmp_path: Path) -> None:
    collection.export(tmp_path / "out.jsonl")
    first, *lines = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first == {"hashret": 1, "fingerprint": hasher().fingerprint, "bits": 16}
    item = collection.get(1)
    photos = collection.path.parent / "photos"
    status = (photos / "3.png").stat()
    assert lines[0] == {
        "id": 1,
        "sha256": item.sha256,
        "code": hasher().encode(pixels(5)[None]).tobytes().hex(),
        "width": 8,
        "height": 8,
        "bytes": item.bytes,
        "added": item.added,
        "metadata": {},
        "paths": [
            {
                "root": f"{photos}/",
                "name": "3.png",
                "label": None,
                "size": status.st_size,
                "mtime_ns": status.st_mtime_ns,
            }
        ],
    }
    assert [line["id"] for line in lines] == sorted(line["id"] for line in lines)


def test_arrays_for_numpy(collection: Collection, tmp_path: Path) -> None:
    assert collection.export(tmp_path / "out", "numpy") == len(collection)
    with np.load(tmp_path / "out") as out:
        assert sorted(out) == ["codes", "fingerprint", "ids", "items.jsonl", "paths"]
        assert out["fingerprint"] == hasher().fingerprint
        assert out["codes"].dtype == np.uint8 and out["codes"].shape == (len(collection), 2)
        for i, code, path in zip(out["ids"].tolist(), out["codes"], out["paths"].tolist(), strict=True):
            if "blobs/" not in path:
                assert path in collection.get(i).paths
            assert collection.query_codes(code[None], where=f"id = {i}")[0][0].distance == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"items.jsonl": None}, "it has no items.jsonl, as hashret export writes it now: export again"),
        ({"codes.npy": None}, "no item named 'codes.npy'"),
        ({"codes.npy": b"\x93NUMPY"}, "EOF"),
        ({"codes.npy": np.zeros((3, 2), np.uint8)}, "shorter"),
        ({"codes.npy": np.zeros((9999, 2), np.uint8)}, "longer"),
        ({"codes.npy": np.zeros((9999, 3), np.uint8)}, "a code of as many bits as the first line says"),
        ({"codes.npy": np.zeros(5, np.int64)}, r"codes are int64 \(5,\), not uint8"),
        ({"codes.npy": np.array([{}, {}])}, "Object arrays cannot be loaded"),
        ({"items.jsonl": b""}, "was not written by hashret export"),
        ({"items.jsonl": b'{"hashret": 2}'}, "was not written by hashret export, or by a newer one"),
    ],
)
def test_invalid_arrays_are_refused(
    collection: Collection, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    collection.export(tmp_path / "out.npz")
    with zipfile.ZipFile(tmp_path / "out.npz") as exported, zipfile.ZipFile(tmp_path / "in.npz", "w") as file:
        for name in exported.namelist():
            data = change.get(name, exported.read(name))
            if isinstance(data, np.ndarray):
                with file.open(name, "w") as member:
                    np.lib.format.write_array(member, data)
            elif data is not None:
                file.writestr(name, data)
    before = tables(collection)
    with pytest.raises(HashretError, match=reason) as caught:
        collection.import_items(tmp_path / "in.npz")
    assert "\n" not in str(caught.value) and tables(collection) == before


def test_an_empty_collection(tmp_path: Path) -> None:
    with Collection.create(tmp_path / "c", hasher()) as collection:
        for name in ("out.jsonl", "out.npz"):
            assert collection.export(tmp_path / name) == 0 and collection.import_items(tmp_path / name) == 0


def test_formats() -> None:
    assert [format_of(Path(name)) for name in ("a.JSONL", "a.npz", "a.parquet")] == ["jsonl", "numpy", "parquet"]
    assert format_of(Path("a.txt"), "parquet") == "parquet"
    with pytest.raises(ValueError, match="^'csv' is not a format: choose jsonl, numpy, parquet$"):
        format_of(Path("a.jsonl"), "csv")
    for name in ("a.txt", "jsonl"):
        with pytest.raises(ValueError, match=f"^{name}: the suffix must be .jsonl, .npz, .parquet$"):
            format_of(Path(name))


def test_parquet_needs_pyarrow(collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    for step in (collection.export, collection.import_items):
        with pytest.raises(HashretError, match=r"Parquet needs pyarrow: pip install 'hashret\[parquet\]'"):
            step(tmp_path / "in.parquet")
    assert (tmp_path / "in.parquet").read_bytes() == b"PAR1" and not list(tmp_path.glob("*.new"))


HEADER = {"hashret": 1, "fingerprint": "F", "bits": 16}
PATH = {"root": "/p/", "name": "x.png", "label": None, "size": 1, "mtime_ns": 1}
ITEM = {
    "id": 5, "sha256": "0" * 64, "code": "abcd", "width": 1, "height": 1, "bytes": 1, "added": "2026-11-20T12:00:00Z",
    "metadata": None, "paths": [PATH],
}  # fmt: skip


@pytest.mark.parametrize(
    ("header", "item", "reason"),
    [
        ({"hashret": 2}, {}, "was not written by hashret export, or by a newer one"),
        ({"bits": 12}, {}, "bits must be a multiple of 8"),
        ({"bits": 24}, {}, "item 1: it needs a SHA-256, a code of as many bits"),
        ({"fingerprint": "b" * 64}, {}, "holds codes of another model, bbbbbbbbbbbbbbbb: import it into"),
        ({}, {"code": "abc"}, "hexadecimal"),
        ({}, {"code": "xy"}, "hexadecimal"),
        ({}, {"code": None}, "cannot be imported"),
        ({}, {"sha256": "../../etc/passwd"}, "item 5: it needs a SHA-256"),
        ({}, {"sha256": "A" * 64}, "item 5: it needs a SHA-256"),
        ({}, {"sha256": 3}, "item 5: expected string"),
        ({}, {"id": 0}, "item 0: its id is not between 1 and"),
        ({}, {"id": 2**63 - 1}, "its id is not between 1 and 9007199254740991"),
        ({}, {"id": "5"}, "item 5: "),
        ({}, {"id": True}, "item True: "),
        ({}, {"width": 2**63}, "9223372036854775808 is not a 64-bit integer"),
        ({}, {"bytes": 1.5}, "1.5 is not a 64-bit integer"),
        ({}, {"added": None}, "item 5: "),
        ({}, {"metadata": [1]}, "item 5: metadata of an image must be a dict"),
        ({}, {"metadata": {"x": {}}}, "item 5: metadata 'x' must be"),
        ({}, {"paths": []}, "and a path"),
        ({}, {"paths": [{}]}, "item 5: 'root'"),
        ({}, {"paths": [PATH | {"root": ""}]}, "item 5: it has an empty path, or a text with a zero"),
        ({}, {"paths": [PATH | {"name": "x\0"}]}, "item 5: it has an empty path, or a text with a zero"),
        ({}, {"paths": [PATH | {"name": "\ud800"}]}, "item 5: .*surrogates"),
        ({}, {"paths": [PATH | {"name": 3}]}, "item 5: "),
        ({}, {"paths": [PATH | {"label": 3}]}, "item 5: "),
        ({}, {"paths": [PATH | {"size": None}]}, "None is not a 64-bit integer"),
        ({}, {"paths": [PATH | {"root": "blobs/", "name": "../../photo.png"}]}, "is not its SHA-256"),
    ],
)
def test_an_invalid_item_is_refused_and_nothing_is_stored(
    tmp_path: Path, header: dict[str, Any], item: dict[str, Any], reason: str
) -> None:
    with Collection.create(tmp_path / "c", hasher()) as collection:
        header_line = HEADER | {"fingerprint": hasher().fingerprint} | header
        file = tmp_path / "in.jsonl"
        lines = [header_line, *(ITEM | {"id": i, "sha256": f"{i:064x}"} for i in range(1, 1100)), ITEM | item]
        file.write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(HashretError, match=reason) as caught:
            collection.import_items(file)
        assert "\n" not in str(caught.value) and len(collection) == 0 and collection.info()["paths"] == 0
        file.write_text(json.dumps(HEADER | {"fingerprint": hasher().fingerprint}) + "\n" + json.dumps(ITEM))
        assert collection.import_items(file) == 1 and collection.get(5).paths == ["/p/x.png"]


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"[]", b"{}", b"3", b"\xff\xfe", b"PAR1", b"[" * 100_000, b'{"hashret": 1}']
)
def test_other_files_are_refused(collection: Collection, tmp_path: Path, data: bytes, suffix: str) -> None:
    (tmp_path / f"in.{suffix}").write_bytes(data)
    before = tables(collection)
    with pytest.raises(HashretError, match=f"in.{suffix} cannot be imported: ") as caught:
        collection.import_items(tmp_path / f"in.{suffix}")
    assert "\n" not in str(caught.value) and tables(collection) == before
    with pytest.raises(HashretError, match=f"none.{suffix} cannot be read: No such file"):
        collection.import_items(tmp_path / f"none.{suffix}")
