import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hashret.collection import Collection
from hashret.data.metadata import check_metadata, open_metadata
from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.results import Root


@cache
def hasher() -> Hasher:
    return Hasher("lsh", 16).fit(np.random.default_rng(0).integers(0, 256, (50, 8, 8), np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of twelve photos and a copy of the first."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "sub/copy.png").write_bytes((folder / "0.png").read_bytes())
    return folder


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    with Collection.create(tmp_path / "c", hasher()) as made:
        yield made


def stored_metadata(collection: Collection) -> dict[str, Any]:
    """Return the metadata of each image that has any, by the name of its first path."""
    items = (
        collection.get(hit.id) for hit in collection.query_codes(hasher().encode(np.zeros((1, 8, 8), np.uint8)), 99)[0]
    )
    return {Path(item.paths[0]).name: item.metadata for item in items if item.metadata is not None}


def rows(text: str, path: Path, root: str = "/p/") -> list[tuple[str, dict[str, Any]]]:
    path.write_text(text)
    return list(open_metadata(path, Root(root)))


def test_csv_cells_are_numbers_strings_or_empty(tmp_path: Path) -> None:
    text = 'path,price,shop,zip\n./a.png,3,"Zürich, am See",007\n/p/b/c.png,-2.5e1,,12\nd.png,1e2,true,1_0\n'
    found = rows(text, tmp_path / "m.csv")
    assert found == [
        ("a.png", {"price": 3, "shop": "Zürich, am See", "zip": "007"}),
        ("b/c.png", {"price": -25.0, "zip": 12}),
        ("d.png", {"price": 100.0, "shop": "true", "zip": "1_0"}),
    ]
    assert [type(row["price"]) for _, row in found] == [int, float, float]
    assert rows("\ufeffname,x\r\na.png,1\r\n", tmp_path / "m.CSV") == [("a.png", {"x": 1})]
    assert rows("path,name\na.png,12\n", tmp_path / "m.csv") == [("a.png", {"name": "12"})]
    assert rows("", tmp_path / "m.csv") == [] == rows("path,x\n", tmp_path / "m.csv")


def test_json_lines_keep_their_types(tmp_path: Path) -> None:
    text = '{"file_name": "a.png", "x": 1, "y": "1", "z": null, "w": true}\n\n{"path": "b", "name": "c", "x": 1.0}\n'
    assert rows(text, tmp_path / "m.jsonl") == [
        ("a.png", {"x": 1, "y": "1", "z": None, "w": True}),
        ("b", {"name": "c", "x": 1.0}),
    ]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("m.csv", "price\n3\n", "line 2: it names no image: add a column path or file_name or name"),
        ("m.csv", "path,x\na,1\n,2\n", "line 3: it names no image"),
        ("m.csv", "path,x\na\n", "line 2: it has another number of cells than the first line"),
        ("m.csv", "path,x\na,1\nb,2,3\n", "line 3: it has another number of cells"),
        ("m.csv", 'path,x\na,"1\n', "line 1: unexpected end of data"),
        ("m.csv", "path,x\na,1e999\n", "line 2: metadata cannot be stored: Out of range"),
        ("m.csv", "path,\na,1\n", "line 2: '' cannot be a key"),
        ("m.jsonl", '{"path": "a"}\n{"path": 3}\n', "line 2: it names no image"),
        ("m.jsonl", "[1]\n", "line 1: it is not a JSON object"),
        ("m.jsonl", '{"path": "a"}\n{"path"', "line 2: "),
        ("m.jsonl", '{"path": "a", "x": [1]}\n', r"line 1: metadata 'x' must be text, a number.*not \[1\]"),
        ("m.jsonl", '{"path": "a", "x": NaN}\n', "line 1: metadata cannot be stored"),
        ("m.jsonl", '{"path": "a", "x": "\\ud800"}\n', "line 1: metadata cannot be stored: .*surrogates"),
        ("m.jsonl", '{"path": "a", "x\\"": 1}\n', "line 1: 'x\"' cannot be a key"),
        (
            "m.jsonl",
            '{"path": "a", "x": "' + "ü" * 25_000 + '"}\n',
            "line 1: metadata of an image may have 50,000 bytes",
        ),
        ("m.txt", "", "m.txt is not a metadata file: give a .csv or .jsonl file"),
    ],
)
def test_a_faulty_file_is_refused_before_anything_is_stored(
    tmp_path: Path, photos: Path, collection: Collection, name: str, text: str, reason: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(HashretError, match=reason) as caught:
        collection.index(photos, metadata=tmp_path / name)
    assert "\n" not in str(caught.value) and len(collection) == 0


def test_unreadable_files_are_refused(tmp_path: Path, photos: Path, collection: Collection) -> None:
    with pytest.raises(HashretError, match=r"none.csv cannot be read: No such file"):
        collection.index(photos, metadata=tmp_path / "none.csv")
    (tmp_path / "m.csv").write_bytes(b"path,x\na,\xff\n")
    with pytest.raises(HashretError, match=r"m.csv, line 1: 'utf-8' codec can't decode"):
        collection.index(photos, metadata=tmp_path / "m.csv")


def test_only_scalars_under_valid_keys_are_metadata() -> None:
    good = {"x": 1, "y": -0.5, "z": "", "größe": None, "a b": False, "it's": 10**30}
    assert check_metadata(good) == good
    invalid: tuple[Any, ...] = (
        {"": 1},
        {1: 1},
        {"x": b""},
        {"x": float("nan")},
        {"x": {}},
        {"x": np.int64(1)},
        {"\n": 1},
        [],
        "x",
    )
    for metadata in invalid:
        with pytest.raises(ValueError, match="metadata"):
            check_metadata(metadata)


def test_metadata_are_read_from_the_source_folder(photos: Path, collection: Collection) -> None:
    (photos / "metadata.csv").write_text("path,price\n3.png,3\nsub/copy.png,7\nnone.png,1\n0.png,8\n")
    report = collection.index(photos)
    assert (report.added, report.described, report.unmatched) == (13, 2, 1)
    # Of rows for equal images, the first applies.
    assert stored_metadata(collection) == {"0.png": {"price": 7}, "3.png": {"price": 3}}
    generation = collection.info()["generation"]
    report = collection.index(photos)
    assert (report.unchanged, report.described, report.unmatched) == (13, 0, 1)
    assert collection.info()["generation"] == generation
    assert [hit.metadata for hit in collection.query(photos / "3.png", k=1)] == [{"price": 3}]


def test_metadata_changes_without_decoding(photos: Path, collection: Collection) -> None:
    collection.index(photos, metadata={"1.png": {"x": 1}, "2.png": {"x": 2}, "3.png": {"x": 3}})
    (photos / "metadata.jsonl").write_text('{"name": "1.png", "x": 1}\n{"name": "2.png", "y": 2}\n')
    report = collection.index(photos)
    assert (report.unchanged, report.decoded, report.described) == (13, 0, 1)
    # Images without a row keep their metadata.
    assert stored_metadata(collection) == {"1.png": {"x": 1}, "2.png": {"y": 2}, "3.png": {"x": 3}}
    assert collection.index(photos, metadata={}).described == 0
    other = Collection.open(collection.path, read_only=True)  # keeps its own snapshot
    assert stored_metadata(other)["2.png"] == {"y": 2}
    collection.index(photos, metadata={"2.png": {}})
    assert stored_metadata(other)["2.png"] == {}
    other.close()


@pytest.mark.parametrize(("before", "after"), [(1, True), (1, 1.0), (0, False), ("1", 1), (None, 0)])
def test_equal_values_of_different_types_are_different(
    photos: Path, collection: Collection, before: Any, after: Any
) -> None:
    name = next(iter(sorted(path.name for path in photos.iterdir())))
    collection.index(photos, metadata={name: {"n": before}})
    assert collection.index(photos, metadata={name: {"n": before}}).described == 0
    assert collection.index(photos, metadata={name: {"n": after}}).described == 1
    (found,) = (item.metadata for item in collection.items() if item.metadata is not None)
    assert type(found["n"]) is type(after)


def test_metadata_are_read_beside_an_array_file(tmp_path: Path, collection: Collection) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8))
    (tmp_path / "rows.npy.metadata.jsonl").write_text('{"name": "2", "x": 1}\n')
    report = collection.index(tmp_path / "rows.npy")
    assert (report.added, report.described) == (3, 1)
    assert stored_metadata(collection) == {"rows.npy#2": {"x": 1}}


def test_two_metadata_files_of_a_source_are_refused(photos: Path, collection: Collection) -> None:
    for suffix in ("csv", "jsonl"):
        (photos / f"metadata.{suffix}").write_text("")
    with pytest.raises(HashretError, match=r"metadata.csv and metadata.jsonl both exist: .* --meta"):
        collection.index(photos)
    assert collection.index(photos, metadata=photos / "metadata.csv").added == 13


def test_names_need_not_be_utf8(tmp_path: Path, collection: Collection) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    name = os.fsdecode(b"\xff.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / name)
    assert collection.index(folder, metadata={name: {"x": 1}}).described == 1


def test_thousands_of_rows_are_matched(tmp_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2500, 8, 8), np.uint8)
    np.save(tmp_path / "rows.npy", pixels)
    lines = (json.dumps({"name": str(i), "i": i}) for i in range(3000))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    report = collection.index(tmp_path / "rows.npy", metadata=tmp_path / "m.jsonl")
    assert (report.described, report.unmatched) == (2500, 500)
    assert collection.get(2500).metadata == {"i": 2499}
    assert collection.matching("i >= 2490 AND i % 2") == list(range(2492, 2501, 2))
