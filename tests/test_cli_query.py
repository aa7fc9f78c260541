import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import PHOTOS, Command, check_failed, hasher, photos
from PIL import Image

from hashret.codes import to_hex
from hashret.collection import Collection


def hits(k: int | None, radius: int | None = None, image: str = "0/00.png", collection: str = ".hashret") -> list[Any]:
    """Return the hits of `Collection.query` for a photo, as in the JSON documents."""
    with Collection.open(collection, read_only=True) as images:
        found = images.query(f"photos/{image}", k, radius)
    return [
        {"rank": rank, "distance": hit.distance, "id": hit.id, "path": hit.path, "label": hit.label}
        for rank, hit in enumerate(found, 1)
    ]


def test_query_prints_distance_and_path(folder: Path, hashret: Command) -> None:
    expected = "".join(f"{hit['distance']:4d}  {hit['path']}\n" for hit in hits(10))
    assert hashret("query", "photos/0/00.png") == (0, expected, "")
    assert hashret("query", "photos/0/00.png", "--paths").out == "".join(f"{hit['path']}\n" for hit in hits(10))
    assert expected.startswith(f"   0  {folder}/photos/0/00.png\n")


@pytest.mark.parametrize(
    ("options", "k", "radius"),
    [([], 10, None), (["-k", 3], 3, None), (["-k", 999], 999, None), (["-r", 12], None, 12), (["-r", 0], None, 0),
     (["-k", 4, "-r", 12], 4, 12)],
)  # fmt: skip
def test_query_as_json(
    folder: Path, hashret: Command, options: list[object], k: int | None, radius: int | None
) -> None:
    result = hashret("query", "photos/0/00.png", "--json", *options)
    document = json.loads(result.out)
    assert result.err == "" and list(document) == ["query", "k", "hits"]
    assert document == {"query": "photos/0/00.png", "k": k, "hits": hits(k, radius)}
    assert [list(hit) for hit in document["hits"]] == [["rank", "distance", "id", "path", "label"]] * len(
        hits(k, radius)
    )
    assert len(document["hits"]) == (min(k, PHOTOS) if k and not radius else len(hits(k, radius)))
    assert hashret("query", "photos/0/00.png", "--jsonl", *options).out == result.out


def test_a_query_by_asymmetric_distance(folder: Path, hashret: Command) -> None:
    document = json.loads(hashret("query", "photos/0/00.png", "--rank", "asymmetric", "--json").out)
    with Collection.open(folder / ".hashret") as collection:
        expected = collection.query(folder / "photos/0/00.png", rank="asymmetric")
    assert [(hit["distance"], hit["id"], hit["score"]) for hit in document["hits"]] == [
        (hit.distance, hit.id, hit.score) for hit in expected
    ]
    assert list(document["hits"][0]) == ["rank", "distance", "id", "path", "label", "score"]
    plain = hashret("query", "photos/0/00.png", "--rank", "asymmetric")
    assert plain.out == "".join(f"{hit.distance:4d}  {hit.path}\n" for hit in expected)
    (code,) = to_hex(hasher().encode("photos/0/00.png"))
    for text in (f"hex:{code}", "id:1"):
        result = hashret("query", text, "--rank", "asymmetric")
        check_failed(result, 1, f"{text}: --rank asymmetric is for images: a code has no margins")
    check_failed(hashret("query", "id:1", "--rank", "sure"), 2, "there is no rank 'sure'")


def test_a_list_of_queries(folder: Path, hashret: Command) -> None:
    queries = ["photos/0/00.png", "id:2", "photos/1/01.png"]
    result = hashret("query", *queries, "-k", 2, "--json")
    documents = json.loads(result.out)
    assert [document["query"] for document in documents] == queries and result.code == 0
    assert documents[0]["hits"] == hits(2) and documents[2]["hits"] == hits(2, image="1/01.png")
    lines = hashret("query", *queries, "-k", 2, "--jsonl").out.splitlines()
    assert [json.loads(line) for line in lines] == documents
    plain = hashret("query", *queries, "-k", 2).out.splitlines()
    assert plain[::3] == queries and plain[1].endswith(documents[0]["hits"][0]["path"])
    paths = hashret("query", *queries, "-k", 2, "--paths").out.splitlines()
    assert paths == [hit["path"] for document in documents for hit in document["hits"]]


def test_sources_as_queries(folder: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hashret.cli.query.BATCH", 13)  # so that the last is a batch of its own
    result = hashret("query", "photos", "-k", 1)
    lines = result.out.splitlines()
    assert lines[::2] == [f"{folder}/photos/{name}" for name in sorted(photos())]
    assert [line.strip().split("  ")[0] for line in lines[1::2]] == ["0"] * PHOTOS and result.err == ""
    documents = json.loads(hashret("query", "photos", "-k", 1, "--json").out)
    assert len(documents) == PHOTOS


def test_a_query_from_stdin(folder: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for data, code in ((photos()["0/00.png"], 0), (b"Dear diary", 1), (b"", 1)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        result = hashret("query", "-", "-k", 3, "--jsonl")
        assert result.code == code
        if code:
            check_failed(result, 1, "-: no image: ")
        else:
            assert json.loads(result.out) == {"query": "-", "k": 3, "hits": hits(3)}


def test_a_query_by_code(folder: Path, hashret: Command) -> None:
    (code,) = to_hex(hasher().encode("photos/0/00.png"))
    for text in (f"hex:{code}", f"hex:{code.upper()}"):
        document = json.loads(hashret("query", text, "-k", 5, "--json").out)
        assert document == {"query": text, "k": 5, "hits": hits(5)}


def test_a_query_by_item_leaves_the_item_out(folder: Path, hashret: Command) -> None:
    (first,) = hits(1)
    document = json.loads(hashret("query", f"id:{first['id']}", "-k", 5, "--json").out)
    expected = [hit | {"rank": hit["rank"] - 1} for hit in hits(6)[1:]]
    assert document == {"query": f"id:{first['id']}", "k": 5, "hits": expected}
    within = json.loads(hashret("query", f"id:{first['id']}", "-r", 12, "--json").out)["hits"]
    assert [hit["id"] for hit in within] == [hit["id"] for hit in hits(None, 12)[1:]]


def test_a_query_unlike_the_training_images_is_warned_of(
    folder: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--steps", 150, "--bits", 16, "--set", "network=mlp", "--set", "width=4", "-c", "c", "-q"]
    assert hashret("train", "photos", "--model", "vae", *small).code == 0
    assert hashret("index", "photos", "-c", "c").code == 0
    trained = sorted((folder / "photos").rglob("*.png"))
    for name in ("strange.png", "other.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).save(name)
    assert hashret("query", *trained, "-c", "c").err.count("\n") <= 1  # perhaps of one of the two that were held out
    result = hashret("query", "strange.png", trained[0], "-k", 1, "-c", "c")
    assert result.code == 0 and str(trained[0]) in result.out
    assert result.err == "hashret: strange.png: unlike all training images, so neighbours may mean little\n"
    result = hashret("query", "strange.png", "other.png", "-c", "c")
    assert result.code == 0 and "strange.png and 1 more: unlike all training images" in result.err
    assert hashret("query", "strange.png", "-c", "c", "-q").err == ""
    opened, real = list[Any](), Image.open

    def count(file: Any, **options: Any) -> Any:
        opened.append(file)
        return real(file, **options)

    monkeypatch.setattr(Image, "open", count)
    assert "unlike all training images" in hashret("query", "strange.png", trained[0], "-c", "c").err
    assert len(opened) == 2  # each is decoded once, for the search and for the warning


def test_unreadable_queries_do_not_stop_the_others(folder: Path, hashret: Command) -> None:
    queries = ["photos/0/00.png", "broken.png", "none.png", "id:999", "hex:zz", "photos/1/01.png"]
    result = hashret("query", *queries, "--json", "-k", 1)
    assert result.code == 1
    assert [document["query"] for document in json.loads(result.out)] == [queries[0], queries[-1]]
    assert [line.split(": ")[:2] for line in result.err.splitlines()] == [["hashret", text] for text in queries[1:-1]]
    assert hashret("query", "broken.png", "--json").out == "[]\n"
