import functools
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from hashret.cli import app, train
from hashret.cli.app import run
from hashret.cli.demo import NOTE
from hashret.codes import to_hex
from hashret.collection import Collection
from hashret.hasher import Hasher

MAIN = [sys.executable, "-c", "from hashret.cli import main; main()"]
COMMANDS = [
    *("train", "index", "query", "eval", "dupes", "verdict", "calibrate", "info", "reindex", "remove", "failures"),
    *("doctor", "estimate", "export", "import", "serve", "demo"),
]
PHOTOS = 40


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Ran]


@functools.cache
def photos() -> dict[str, bytes]:
    """Digits as files, in folders named by their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    files = {}
    for i in range(PHOTOS):
        file = io.BytesIO()
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(file, "PNG")
        files[f"{digits.target[i]}/{i:02d}.png"] = file.getvalue()
    return files


@functools.cache
def hasher(model: str = "lsh", bits: int = 32) -> Hasher:
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in photos().values()])
    return Hasher(model, bits).fit(pixels)


def settle(place: Path) -> Path:
    """Photos, things that are none, a model of another kind, and a collection of the photos."""
    for name, data in photos().items():
        (place / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "photos" / name).write_bytes(data)
    (place / "broken.png").write_bytes(b"Dear diary, this is no photo.")
    (place / "empty").mkdir()
    (place / "notes").mkdir()
    (place / "notes/a.txt").write_text("nothing to see")
    hasher("pca", 16).save(place / "other")
    with Collection.create(place / ".hashret", hasher()) as collection:
        collection.index(place / "photos")
    return place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with photos and a collection."""
    monkeypatch.delenv("HASHRET_COLLECTION", raising=False)
    monkeypatch.chdir(tmp_path)
    return settle(tmp_path)


@pytest.fixture
def hashret(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process. What it prints is never decorated, as there is no terminal."""

    def command(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "Traceback" not in err
        return Ran(code, out, err)

    return command


def check_failed(ran: Ran, code: int, text: str) -> None:
    """It said this in one line on stderr, and nothing on stdout."""
    assert ran.code == code and ran.out == ""
    assert re.fullmatch(f"hashret: .*{text}.*\n", ran.err), ran.err


def listing(folder: Path) -> dict[str, bytes]:
    """All files there but SQLite's log and its index, which a reader leaves, and their contents."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(("-wal", "-shm"))
    }


# train and index


def test_train_then_index(place: Path, hashret: Command) -> None:
    ran = hashret("train", "photos", "--model", "pca", "--bits", 16, "-c", "new")
    assert ran.code == 0 and ran.out == ""
    assert (
        ran.err == f"learned 16-bit codes with pca from 40 images\nmodel in {place}/new: next, hashret index photos\n"
    )
    assert hashret("train", "photos", "--model", "lsh", "--bits", 8, "-c", "new", "-q") == (0, "", "")  # no items yet
    ran = hashret("index", "photos", "-c", "new")
    assert ran == (0, "", f"40 added; 40 items in {place}/new\n")
    assert hashret("index", "photos", "-c", "new").err == f"0 added, 40 unchanged; 40 items in {place}/new\n"
    assert json.loads(hashret("info", "-c", "new", "--json").out)["model"] == "lsh"
    assert {file.name for file in (place / "new").iterdir()} <= {
        "items.db", "items.db-wal", "items.db-shm", "models", "index", "lock"
    }  # fmt: skip


def test_index_without_a_model_learns_one(place: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "fit", functools.partial(train.fit, steps=2))  # instead of two minutes
    ran = hashret("index", "photos", "-c", "new", "--index", "faiss:BFlat")
    assert ran.code == 0 and ran.out == ""
    first, *_, last = ran.err.splitlines()
    assert "no model yet: learning 64-bit codes with contrastive from photos" in first
    assert last == f"40 added; 40 items in {place}/new"
    told = json.loads(hashret("info", "-c", "new", "--json").out)
    assert (told["model"], told["bits"], told["index"]) == ("contrastive", 64, "faiss:BFlat")
    assert not (place / "new/training.checkpoint").exists()
    (hit,) = json.loads(hashret("query", "photos/0/00.png", "-c", "new", "-k", 1, "--json").out)["hits"]
    assert hit["path"] == f"{place}/photos/0/00.png" and hit["distance"] == 0


def test_index_tells_what_it_did(place: Path, hashret: Command) -> None:
    (place / "photos/0/00.png").unlink()
    (place / "photos/1/01.png").write_bytes((place / "photos/2/02.png").read_bytes())
    shutil.copy(place / "photos/3/03.png", place / "photos/new.png")
    shutil.copy(place / "broken.png", place / "photos/broken.png")
    (place / "photos/notes.txt").write_text("")
    ran = hashret("index", "photos", "--prune", "--json", "--jsonl")
    *lines, report = map(json.loads, ran.out.splitlines())
    assert sorted(lines, key=lambda line: str(line["path"])) == [
        {"path": f"{place}/photos/1/01.png", "status": "updated", "id": lines[1]["id"]},
        {"path": f"{place}/photos/broken.png", "status": "failed", "reason": lines[0]["reason"]},
        {"path": f"{place}/photos/new.png", "status": "added", "id": lines[2]["id"]},
    ]
    reason = lines[0]["reason"]
    assert reason.startswith("no image: ")
    assert list(report.items()) == [
        ("items", 38), ("added", 1), ("unchanged", 38), ("updated", 1), ("removed", 1), ("failed", 1), ("decoded", 0),
        ("ignored", 1), ("failures", [[f"{place}/photos/broken.png", reason]]), ("described", 0), ("unmatched", 0),
    ]  # fmt: skip
    assert ran.code == 0 and ran.err.splitlines() == [
        f"hashret: skipped {place}/photos/broken.png: {reason}",
        f"1 added, 1 updated, 38 unchanged, 1 removed, 1 failed; 38 items in {place}/.hashret; "
        "1 files that are no images by name passed over",
    ]
    ran = hashret("index", "photos", "--jsonl", "--strict", "--quiet")
    assert ran == (1, "", "")  # known to be broken: reported before, and still a failure to --strict
    (place / "photos/broken.png").unlink()
    assert hashret("index", "photos", "--prune", "--strict", "-q") == (0, "", "")


def test_pruning_most_needs_force(place: Path, hashret: Command) -> None:
    shutil.rmtree(place / "photos")
    check_failed(hashret("index", "photos", "--prune", "--force"), 1, "there is no 'photos': give a folder")
    (place / "photos").mkdir()
    check_failed(hashret("index", "photos", "--prune"), 1, "40 of 40 paths .* would be forgotten: .* --force")
    assert json.loads(hashret("info", "--json").out)["items"] == 40
    assert hashret("index", "photos", "--prune", "--force").err == f"0 added, 40 removed; 0 items in {place}/.hashret\n"


def test_training_into_a_collection_with_items_is_refused(place: Path, hashret: Command) -> None:
    before = listing(place)
    told = r"has 40 items of another model: train with -o MODEL_DIR, then run hashret reindex MODEL_DIR"
    check_failed(hashret("train", "photos", "--model", "pca", "--bits", 16), 1, told)
    assert listing(place) == before


def test_train_elsewhere_then_reindex(place: Path, hashret: Command) -> None:
    ran = hashret("train", "photos", "--model", "itq", "--bits", 16, "-o", "models/mine")
    assert ran.code == 0 and ran.out == ""
    assert ran.err.splitlines()[-1].endswith("models/mine codes a collection with it")
    assert set(listing(place / "models")) == {
        f"mine/{file}" for file in ("config.json", "model.safetensors", "README.md")
    }
    before = hashret("query", "id:3", "--json").out
    ran = hashret("reindex", "models/mine")
    mine = Hasher.load("models/mine")
    assert ran == (0, "", f"40 items coded with itq, 16 bits, {mine.fingerprint[:16]}\n")
    assert json.loads(hashret("info", "--json").out)["fingerprint"] == mine.fingerprint
    assert hashret("query", "id:3", "--json").out != before
    code = to_hex(mine.encode("photos/0/00.png"))[0]
    assert hashret("query", f"hex:{code}", "-k", 1).out == f"   0  {place}/photos/0/00.png\n"
    check_failed(hashret("query", "hex:00000000"), 1, "hex:00000000: codes must have 16 bits, not 32")
    (place / "photos/0/00.png").unlink()
    ran = hashret("reindex", "other")
    missing, said = ran.err.splitlines()
    assert ran.code == 1 and missing == f"hashret: missing {place}/photos/0/00.png"
    assert said.startswith("hashret: 1 items cannot be read where they were, such as ") and "--drop-missing" in said
    assert json.loads(hashret("info", "--json").out)["fingerprint"] == mine.fingerprint
    told = Hasher.load("other").fingerprint[:16]
    assert hashret("reindex", "other", "--drop-missing").err == (
        f"39 items coded with pca, 16 bits, {told}; 1 forgotten\n"
    )


def test_info(place: Path, hashret: Command) -> None:
    ran = hashret("info", "--json", "-q")
    told = json.loads(ran.out)
    assert list(told) == [
        "path", "items", "paths", "failures", "model", "head", "bits", "fingerprint", "preprocessing", "training",
        "index", "generation", "bytes_on_disk", "bytes_per_item", "health",
    ]  # fmt: skip
    assert ran.err == "" and told["path"] == str(place / ".hashret")
    assert (told["items"], told["paths"], told["failures"], told["bits"]) == (40, 40, 0, 32)
    ran = hashret("info")
    assert ran.code == 0 and ran.err == ""
    assert f"collection  {place}/.hashret\nitems       40 under 40 paths; 0 files" in ran.out
    assert re.search(
        r"\nhealth +\d+ distinct codes, \d+ items with the commonest; \d+ dead bits, rarer values \d+%\n",
        ran.out,
    )
    assert re.search(r"\non disk +\d+\.\d MB, [\d,]+ bytes an item\n", ran.out)


def test_remove(place: Path, hashret: Command) -> None:
    folder = sorted((place / "photos/0").iterdir())
    paths = "".join(f"{path}\n" for path in folder)
    count = f"{len(folder)} paths and {len(folder)} items"
    before = listing(place)
    assert hashret("remove", "photos/0", "--dry-run") == (
        0, paths, f"{count} would be forgotten; your files are as they were\n"
    )  # fmt: skip
    assert hashret("remove", "--where", "label = '0'", "--dry-run", "-q") == (0, paths, "")
    assert listing(place) == before
    assert hashret("remove", "photos/0") == (0, paths, f"{count} forgotten; your files are as they were\n")
    assert hashret("remove", "photos/0") == (0, "", "0 paths and 0 items forgotten; your files are as they were\n")
    last = hashret("query", "id:20", "--where", "id = 40", "--paths").out.strip()
    ran = hashret("remove", "id:40", "photos/3/03.png", "id:40", "none", "--json", "-q")
    assert json.loads(ran.out) == {"items": 2, "paths": [f"{place}/photos/3/03.png", last], "dry_run": False}
    assert ran.err == ""
    assert json.loads(hashret("info", "--json").out)["items"] == 40 - len(folder) - 2
    assert all((place / "photos" / name).read_bytes() == data for name, data in photos().items())


def test_what_could_not_be_read(place: Path, hashret: Command) -> None:
    assert hashret("failures") == (0, "", "")
    shutil.copy(place / "broken.png", place / "photos/broken.png")
    hashret("index", "photos")
    ran = hashret("failures")
    assert re.fullmatch(f"{place}/photos/broken.png: no image: .*\n", ran.out) and ran.err == ""
    (told,) = json.loads(hashret("failures", "--json").out)
    assert list(told) == ["path", "reason", "seen"] and told["path"] == f"{place}/photos/broken.png"
    assert hashret("failures", "--retry").err == "tried 1 again: 0 could be read\n"
    shutil.copy(place / "photos/0/00.png", place / "photos/broken.png")
    assert hashret("failures", "--retry") == (0, "", "tried 1 again: 1 could be read\n")
    assert hashret("failures", "--json") == (0, "[]\n", "")


def test_metadata_and_filters(place: Path, hashret: Command) -> None:
    names = sorted(photos())
    (place / "m.csv").write_text("path,price\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names)) + "none,1\n")
    ran = hashret("index", "photos", "--meta", "m.csv")
    assert ran.err.splitlines()[-1] == "metadata of 40 items changed; 1 rows name no image here"
    assert hashret("index", "photos", "--meta", "m.csv", "--json").out.endswith('"described": 0, "unmatched": 1}\n')
    for asked in ("photos/0/00.png", "id:1", "hex:00000000"):
        ran = hashret("query", asked, "--where", "price < 10 AND label <> '0'", "-k", 99, "--paths")
        expected = {f"{place}/photos/{name}" for name in names[:10] if not name.startswith("0/")}
        assert set(ran.out.splitlines()) == expected and ran.code == 0
    check_failed(hashret("query", "photos", "--where", "nosuch = 1"), 1, "where: no such column: nosuch")
    check_failed(hashret("index", "photos", "--meta", "none.csv"), 1, "none.csv cannot be read")
    (place / "photos/metadata.jsonl").write_text('{"path": "0/00.png", "price": [1]}')
    check_failed(hashret("index", "photos", "-c", "new"), 1, "metadata.jsonl, line 1: metadata 'price' must be")
    assert not (place / "new").exists()


def test_export_then_import(place: Path, hashret: Command) -> None:
    ran = hashret("export", "out.jsonl")
    model = f"{place}/.hashret/models/{hasher().fingerprint}"
    assert ran == (0, "", f"40 items in out.jsonl; their model is {model}\n")
    assert hashret("export", "out", "--format", "numpy", "-q") == (0, "", "")
    check_failed(hashret("import", "out.jsonl", "-c", "new"), 1, f"no collection at {place}/new: add --model MODEL_DIR")
    check_failed(
        hashret("import", "out.jsonl", "-c", "new", "--model", "other"),
        1,
        "codes of another model, [0-9a-f]{16}: give that",
    )
    assert not (place / "new").exists()
    ran = hashret("import", "out.jsonl", "-c", "new", "--model", model)
    assert ran == (0, "", f"40 added; 40 items in {place}/new\n")
    assert hashret("query", "id:7", "-c", "new").out == hashret("query", "id:7").out
    assert hashret("import", "out.jsonl").err == f"0 added; 40 items in {place}/.hashret\n"
    hashret("train", "photos", "--model", "pca", "--bits", 16, "-c", "third")
    check_failed(hashret("import", "out.jsonl", "-c", "third"), 1, "out.jsonl holds codes of another model")


def test_demo(tmp_path: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/.hashret").mkdir(parents=True)
    (tmp_path / "mine/.hashret/items.db").write_bytes(b"precious")
    check_failed(hashret("demo", "--out", "mine"), 1, "mine holds files that hashret demo did not make: choose another")
    assert listing(tmp_path) == {"mine/.hashret/items.db": b"precious"}
    (tmp_path / "here/.hashret").mkdir(parents=True)  # an earlier one was interrupted
    (tmp_path / "here/README.txt").write_text(NOTE)
    (tmp_path / "here/.hashret/items.db").write_bytes(b"")
    ran = hashret("demo", "--budget", "1s", "--out", "here")
    assert ran.code == 0 and [line[:2] for line in ran.err.splitlines() if line[:1].isdigit()] == [
        "1.",
        "2.",
        "3.",
        "4.",
    ]
    assert "1,597 images indexed. Precision of 10 neighbours: " in ran.out
    assert len(re.findall(r"^ *\d+  here/photos/\d/\d+\.png$", ran.out.replace(f"{tmp_path}/", ""), re.MULTILINE)) == 10
    with Image.open("here/neighbours.png") as sheet:
        sheet.verify()
    assert json.loads(hashret("info", "-c", "here/.hashret", "--json").out)["items"] > 1500


# query


def hits(k: int | None, radius: int | None = None, image: str = "0/00.png", collection: str = ".hashret") -> list[Any]:
    """What the library gives, as the JSON documents have it."""
    with Collection.open(collection, read_only=True) as there:
        found = there.query(io_path(image), k, radius)
    return [
        {"rank": rank, "distance": hit.distance, "id": hit.id, "path": hit.path, "label": hit.label}
        for rank, hit in enumerate(found, 1)
    ]


def io_path(image: str) -> str:
    return f"photos/{image}"


def test_what_a_model_can_do_besides_codes(place: Path, hashret: Command) -> None:
    small = ["--steps", 3, "--bits", 16, "--set", "network=mlp", "--set", "width=1", "-q"]
    assert hashret("train", "photos", "--model", "cvae", "--labels", "-o", "cvae", *small).code == 0
    for to, *corruption in (["clean"], ["wide", "--set", "corruption=downscaling"]):
        assert hashret("train", "photos", "--model", "denoising", *corruption, "-o", to, *small).code == 0
    one, other = sorted((place / "photos").rglob("*.png"))[:2]
    ran = hashret("model", "reconstruct", "photos", "-m", "cvae", "-n", 5)
    assert ran.code == 0 and float(ran.out) > 0 and "of 5 images; picture: reconstructions.png" in ran.err
    for line in (
        ["sample", "-o", "a.png", "--label", one.parent.name],
        ["sample", "-o", "b.png", "--between", one, other],
        ["sample", "-o", "c.png", "--traverse", one, "-n", 20],
    ):
        assert hashret("model", *line, "-m", "cvae") == (0, "", f"picture: {line[2]}\n")
    ran = hashret("model", "plot", "photos", "-m", "cvae", "-o", "plots/here")
    assert ran.out.split() == [f"plots/here/{name}.png" for name in ("latents", "bits", "distances", "losses")]
    assert hashret("model", "denoise", one, "-m", "clean", "-q") == (0, f"{one.with_suffix('.denoised.png')}\n", "")
    ran = hashret("model", "upscale", one, "-m", "wide", "-o", "large.png")
    assert ran == (0, "large.png\n", "from 8 × 8 to 16 × 16 pixels\n")
    for picture in ("reconstructions.png", "a.png", "b.png", "c.png", *ran.out.split(), "plots/here/bits.png"):
        with Image.open(picture) as image:
            image.load()
    for arguments, text in (
        (["sample", "-m", "cvae", "--label", "cat"], "there is no label 'cat'; the model knows"),
        (["sample", "-m", "cvae", "--manifold"], "a manifold has two latent numbers and a normal prior"),
        (["denoise", "broken.png", "-m", "clean"], "broken.png: no image"),
        (["denoise", one, "-m", "cvae"], "this takes a model that was trained for it"),
        (["reconstruct", "photos"], "model 'lsh' has no network to decode with"),
        (["reconstruct", "empty", "-m", "cvae"], "empty has no images"),
    ):
        ran = hashret("model", *arguments)
        assert (ran.code, ran.out) == (1, "") and text in ran.err and ran.err.count("\n") == 1
    assert hashret("model", "sample", "-m", "cvae", "--manifold", "--between", one, other).code == 2
    assert hashret("train", "photos", "--model", "ortho", "-o", "x", *small).err == (
        "hashret: model 'ortho' learns from labels: add --labels\n"
    )


def test_a_training_begins_with_another_model(place: Path, hashret: Command) -> None:
    small = ["--steps", 2, "--bits", 16, "--set", "network=mlp", "--set", "width=1", "-q"]
    assert hashret("train", "photos", "--model", "stacked", "-o", "first", *small).code == 0
    assert hashret("train", "photos", "--model", "ae", "--init", "first", "-o", "second", *small).code == 0
    ran = hashret("train", "photos", "--model", "ae", "--init", "first", "-o", "third", "--steps", 2, "--bits", 32)
    assert ran.code == 1 and "the model to begin with has another network" in ran.err


def test_query_prints_distance_and_path(place: Path, hashret: Command) -> None:
    expected = "".join(f"{hit['distance']:4d}  {hit['path']}\n" for hit in hits(10))
    assert hashret("query", "photos/0/00.png") == (0, expected, "")
    assert hashret("query", "photos/0/00.png", "--paths").out == "".join(f"{hit['path']}\n" for hit in hits(10))
    assert expected.startswith(f"   0  {place}/photos/0/00.png\n")


@pytest.mark.parametrize(
    ("options", "k", "radius"),
    [([], 10, None), (["-k", 3], 3, None), (["-k", 999], 999, None), (["-r", 12], None, 12), (["-r", 0], None, 0),
     (["-k", 4, "-r", 12], 4, 12)],
)  # fmt: skip
def test_query_as_json(place: Path, hashret: Command, options: list[object], k: int | None, radius: int | None) -> None:
    ran = hashret("query", "photos/0/00.png", "--json", *options)
    document = json.loads(ran.out)
    assert ran.err == "" and list(document) == ["query", "k", "hits"]
    assert document == {"query": "photos/0/00.png", "k": k, "hits": hits(k, radius)}
    assert [list(hit) for hit in document["hits"]] == [["rank", "distance", "id", "path", "label"]] * len(
        hits(k, radius)
    )
    assert len(document["hits"]) == (min(k, PHOTOS) if k and not radius else len(hits(k, radius)))
    assert hashret("query", "photos/0/00.png", "--jsonl", *options).out == ran.out


def test_a_query_by_certainty(place: Path, hashret: Command) -> None:
    document = json.loads(hashret("query", "photos/0/00.png", "--rank", "asymmetric", "--json").out)
    with Collection.open(place / ".hashret") as collection:
        expected = collection.query(place / "photos/0/00.png", rank="asymmetric")
    assert [(hit["distance"], hit["id"], hit["score"]) for hit in document["hits"]] == [
        (hit.distance, hit.id, hit.score) for hit in expected
    ]
    assert list(document["hits"][0]) == ["rank", "distance", "id", "path", "label", "score"]
    plain = hashret("query", "photos/0/00.png", "--rank", "asymmetric")
    assert plain.out == "".join(f"{hit.distance:4d}  {hit.path}\n" for hit in expected)
    (code,) = to_hex(hasher().encode("photos/0/00.png"))
    for text in (f"hex:{code}", "id:1"):
        ran = hashret("query", text, "--rank", "asymmetric")
        check_failed(ran, 1, f"{text}: --rank asymmetric is for images: a code does not tell how sure its bits are")
    check_failed(hashret("query", "id:1", "--rank", "sure"), 2, "Invalid value for --rank: there is no rank 'sure'")


def test_vectors_from_end_to_end(place: Path, hashret: Command) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(90, 24))
    np.save("all.npy", vectors)
    np.savez("some.npz", vectors=vectors[:2].astype(np.float32))
    np.save("one.npy", vectors[3])
    np.save("narrow.npy", vectors[:, :5])
    ran = hashret("train", "all.npy", "--steps", 3, "--bits", 16, "--set", "width=2", "-c", "v")
    assert ran.code == 0 and "learned 16-bit codes with contrastive from 90 images" in ran.err
    assert hashret("index", "all.npy", "-c", "v").err.startswith("90 added; 90 items in ")
    assert "of vectors of 24 numbers\n" in hashret("info", "-c", "v").out
    found = json.loads(hashret("query", "some.npz", "-r", 0, "-c", "v", "--json", "-q").out)
    assert [query["query"] for query in found] == [f"{place}/some.npz#{i}" for i in range(2)]
    for i, query in enumerate(found):
        assert f"{place}/all.npy#{i}" in [hit["path"] for hit in query["hits"]]
    assert f"{place}/all.npy#3\n" in hashret("query", "one.npy", "-r", 0, "-c", "v", "--paths", "-q").out
    assert hashret("model", "plot", "all.npy", "-o", "plots", "-c", "v").code == 0
    for line, text in (
        ("query photos/0/00.png", "photos/0/00.png: no vector: give floats"),
        ("query narrow.npy", "narrow.npy#0: vectors of 5 numbers, and the model takes vectors of 24 numbers"),
        ("index narrow.npy", "narrow.npy has vectors of 5 numbers, and the model takes vectors of 24 numbers"),
        ("index photos", "photos has images, and the model takes vectors of 24 numbers"),
        ("model reconstruct all.npy", "this model takes vectors, which have no pictures"),
        ("model plot photos", "images, and the model takes vectors of 24 numbers"),
    ):
        ran = hashret(*line.split(), "-c", "v")
        assert ran.code == 1 and text in ran.err.splitlines()[0], ran.err
    check_failed(
        hashret("index", "all.npy"), 1, "all.npy has vectors of 24 numbers, and the model takes images of 8 × 8"
    )
    check_failed(
        hashret("model", "plot", "all.npy"), 1, "all.npy has vectors of 24 numbers, and the model takes images of 8 × 8"
    )
    conv = ("train", "all.npy", "--model", "ae", "--steps", 2, "-o", "new", "--set")
    check_failed(hashret(*conv, "network=conv"), 1, "network 'conv' is for images: choose mlp or deep for vectors")
    check_failed(hashret(*conv[:-1], "--size", "8x8"), 1, "all.npy has vectors, which have no size in pixels: leave")


def test_several_queries(place: Path, hashret: Command) -> None:
    asked = ["photos/0/00.png", "id:2", "photos/1/01.png"]
    ran = hashret("query", *asked, "-k", 2, "--json")
    documents = json.loads(ran.out)
    assert [document["query"] for document in documents] == asked and ran.code == 0
    assert documents[0]["hits"] == hits(2) and documents[2]["hits"] == hits(2, image="1/01.png")
    lines = hashret("query", *asked, "-k", 2, "--jsonl").out.splitlines()
    assert [json.loads(line) for line in lines] == documents
    plain = hashret("query", *asked, "-k", 2).out.splitlines()
    assert plain[::3] == asked and plain[1].endswith(documents[0]["hits"][0]["path"])
    paths = hashret("query", *asked, "-k", 2, "--paths").out.splitlines()
    assert paths == [hit["path"] for document in documents for hit in document["hits"]]


def test_sources_as_queries(place: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hashret.cli.query.TOGETHER", 13)  # so that the last is answered by itself
    ran = hashret("query", "photos", "-k", 1)
    lines = ran.out.splitlines()
    assert lines[::2] == [f"{place}/photos/{name}" for name in sorted(photos())]
    assert [line.strip().split("  ")[0] for line in lines[1::2]] == ["0"] * PHOTOS and ran.err == ""
    documents = json.loads(hashret("query", "photos", "-k", 1, "--json").out)
    assert len(documents) == PHOTOS


def test_a_query_from_stdin(place: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for data, code in ((photos()["0/00.png"], 0), (b"Dear diary", 1), (b"", 1)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        ran = hashret("query", "-", "-k", 3, "--jsonl")
        assert ran.code == code
        if code:
            check_failed(ran, 1, "-: no image: ")
        else:
            assert json.loads(ran.out) == {"query": "-", "k": 3, "hits": hits(3)}


def test_a_query_by_code(place: Path, hashret: Command) -> None:
    (code,) = to_hex(hasher().encode("photos/0/00.png"))
    for text in (f"hex:{code}", f"hex:{code.upper()}"):
        document = json.loads(hashret("query", text, "-k", 5, "--json").out)
        assert document == {"query": text, "k": 5, "hits": hits(5)}


def test_a_query_by_item_leaves_the_item_out(place: Path, hashret: Command) -> None:
    (first,) = hits(1)
    document = json.loads(hashret("query", f"id:{first['id']}", "-k", 5, "--json").out)
    expected = [hit | {"rank": hit["rank"] - 1} for hit in hits(6)[1:]]
    assert document == {"query": f"id:{first['id']}", "k": 5, "hits": expected}
    within = json.loads(hashret("query", f"id:{first['id']}", "-r", 12, "--json").out)["hits"]
    assert [hit["id"] for hit in within] == [hit["id"] for hit in hits(None, 12)[1:]]


def test_a_query_unlike_the_training_is_told(place: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--steps", 150, "--bits", 16, "--set", "network=mlp", "--set", "width=4", "-c", "c", "-q"]
    assert hashret("train", "photos", "--model", "vae", *small).code == 0
    assert hashret("index", "photos", "-c", "c").code == 0
    known = sorted((place / "photos").rglob("*.png"))
    for name in ("strange.png", "other.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).save(name)
    assert hashret("query", *known, "-c", "c").err.count("\n") <= 1  # of the two that were held out, perhaps
    ran = hashret("query", "strange.png", known[0], "-k", 1, "-c", "c")
    assert ran.code == 0 and str(known[0]) in ran.out
    assert ran.err == "hashret: strange.png: unlike all images of the training, so neighbours may mean little\n"
    ran = hashret("query", "strange.png", "other.png", "-c", "c")
    assert ran.code == 0 and "strange.png and 1 more: unlike all images" in ran.err
    assert hashret("query", "strange.png", "-c", "c", "-q").err == ""
    opened, real = list[Any](), Image.open

    def count(file: Any, **options: Any) -> Any:
        opened.append(file)
        return real(file, **options)

    monkeypatch.setattr(Image, "open", count)
    assert "unlike all images" in hashret("query", "strange.png", known[0], "-c", "c").err
    assert len(opened) == 2  # each is decoded once, for the search and for the warning


def test_what_cannot_be_read_does_not_keep_the_rest(place: Path, hashret: Command) -> None:
    asked = ["photos/0/00.png", "broken.png", "none.png", "id:999", "hex:zz", "photos/1/01.png"]
    ran = hashret("query", *asked, "--json", "-k", 1)
    assert ran.code == 1
    assert [document["query"] for document in json.loads(ran.out)] == [asked[0], asked[-1]]
    assert [line.split(": ")[:2] for line in ran.err.splitlines()] == [["hashret", text] for text in asked[1:-1]]
    assert hashret("query", "broken.png", "--json").out == "[]\n"


# Copies


ODD_NAMES = ["-rf.png", "a\nrm -- kept.png", 'it\'s $(touch pwned) `x` "q".png', "🐈.png", "~.png"]


@pytest.fixture
def copies(place: Path, hashret: Command) -> Path:
    """A folder of equal files with odd names, and one of another content with the same code; indexed."""
    folder = place / "copies"
    folder.mkdir()
    for name in ODD_NAMES:
        (folder / name).write_bytes(photos()["0/00.png"])
    Image.open(place / "photos/0/00.png").save(folder / "other.bmp")
    assert hashret("index", "copies", "-q").code == 0
    return folder


def test_dupes_are_printed_in_groups(place: Path, hashret: Command, copies: Path) -> None:
    equal = sorted(f"{place}/{name}" for name in ("photos/0/00.png", *(f"copies/{name}" for name in ODD_NAMES)))
    ran = hashret("dupes", "-r", 0, "--keep", "photos")
    kept = f"{place}/photos/0/00.png"
    equal.remove(kept)
    paths = [kept, *equal, f"{copies}/other.bmp"]
    assert ran.code == 0 and ran.out == "".join(f"   0  {path}\n" for path in paths)
    assert ran.err == "1 group of 7 images within 0 bits: 6 could go\n"
    told = json.loads(hashret("dupes", "-r", 0, "--keep", "photos", "--by", "star", "--json").out)
    assert told.keys() == {"radius", "by", "keep", "groups"} and told["by"] == "star"
    first, second = told["groups"][0]
    assert first["paths"] == paths[:-1] and second["paths"] == paths[-1:] and first["distance"] == 0
    several = hashret("dupes", "-r", 12, "--by", "star", "-q")
    assert several.err == "" and "\n\n   0  " in several.out and several.out.endswith(".png\n")


def test_the_script_removes_all_but_what_is_kept(place: Path, hashret: Command, copies: Path) -> None:
    names = [*ODD_NAMES, os.fsdecode(b"\xff.png")]
    (copies / names[-1]).write_bytes(photos()["0/00.png"])
    assert hashret("index", "copies", "-q").code == 0
    before = listing(place)
    script = subprocess.run([*MAIN, "dupes", "-r", "0", "--keep", "photos", "--script"], capture_output=True).stdout
    assert listing(place) == before and script.startswith(b"#!/bin/sh\n")
    assert os.fsencode(f'\n# keep "{place}/photos/0/00.png"\n') in script
    subprocess.run(["sh", "-eu"], input=script, check=True, cwd=copies)
    assert before.keys() - listing(place).keys() == {f"copies/{name}" for name in (*names, "other.bmp")}
    again = subprocess.run([*MAIN, "dupes", "-r", "0", "--script"], capture_output=True).stdout
    assert b"\nrm " not in again  # the last copy is there, though it is not the one to keep


def test_the_script_leaves_what_is_far(place: Path, hashret: Command) -> None:
    with Collection.open(place / ".hashret") as there:
        groups = there.dupes(12)
    lines = hashret("dupes", "-r", 12, "--script").out.splitlines()
    removed = {line.removeprefix("rm -- ") for line in lines if line.startswith("rm -- ")}
    others = [(group.items[i].paths[0], d) for group in groups for i, d in enumerate(group.distances) if i]
    far = {path for path, distance in others if distance > 12}
    assert far and removed == {path for path, distance in others if distance <= 12}
    assert all(any(line.startswith("# ") and path in line for line in lines) for path in far)
    assert [line for line in lines if line.startswith("# keep ")] == [f'# keep "{g.items[0].paths[0]}"' for g in groups]


def script(hashret: Command, *options: object) -> tuple[list[str], str]:
    """What the script removes, and the whole of it."""
    text = hashret("dupes", "-r", 0, "--script", *options).out
    return [line.removeprefix("rm -- ") for line in text.splitlines() if line.startswith("rm ")], text


def test_the_script_never_removes_the_last_copy(place: Path, hashret: Command, tmp_path: Path) -> None:
    kept, other = place / "photos/0/00.png", place / "copies/00.png"
    other.parent.mkdir()
    other.symlink_to(kept)
    assert hashret("index", "copies", "-q").code == 0
    for folder in ("copies", "photos"):
        removed, text = script(hashret, "--keep", folder)
        assert removed == [] and "# the same file: " in text
    other.unlink()
    shutil.copy(kept, other)
    assert script(hashret, "--keep", "photos")[0] == [str(other)]
    kept.unlink()
    removed, text = script(hashret, "--keep", "photos")
    assert removed == [] and f'# keep "{other}"' in text and f'indexed: "{kept}"' in text
    kept.write_bytes(b"something else")
    assert script(hashret, "--keep", "photos")[0] == []
    os.truncate(other, 1)
    assert "# nothing to do: the one to keep is no file, or not the one that was indexed" in script(hashret)[1]


def test_the_script_leaves_contents_without_files(place: Path, hashret: Command) -> None:
    with Collection.open(place / ".hashret") as there:
        there.add([np.asarray(Image.open("photos/0/00.png"))])
    removed, text = script(hashret)
    assert removed == [] and "# nothing to do: the one to keep is no file" in text  # it is the largest, in bytes
    removed, text = script(hashret, "--keep", "photos")
    assert removed == [] and "# no file, or not the one that was indexed: " in text


def test_verdicts_are_remembered_and_exported(place: Path, hashret: Command) -> None:
    first, second, third = sorted(photos())[:3]
    assert hashret("verdict", f"photos/{first}", "id:2", "different") == (0, "", "")
    assert hashret("verdict", f"photos/{third}", f"photos/{first}", "same").code == 0
    assert hashret("verdict", "--export", "pairs.csv").err == "2 verdicts in pairs.csv\n"
    paths = [f"{place}/photos/{name}" for name in (first, second, third)]
    assert Path("pairs.csv").read_text().splitlines() == [
        "path_a,path_b,verdict",
        f"{paths[0]},{paths[1]},different",
        f"{paths[0]},{paths[2]},same",
    ]
    asked = hashret("query", f"photos/{first}", "-k", PHOTOS, "--paths").out.splitlines()
    assert len(asked) == PHOTOS - 1 and paths[1] not in asked
    found = json.loads(hashret("dupes", "-r", 0, "--json").out)["groups"]
    assert [{copy["id"] for copy in group} for group in found] == [{1, 3}]


def test_calibrate_chooses_the_radius(place: Path, hashret: Command) -> None:
    check_failed(
        hashret("query", "id:1", "-r", "auto"), 1, "not known: run hashret calibrate, or give a number of bits"
    )
    check_failed(hashret("dupes", "-r", "auto"), 1, "run hashret calibrate")
    ran = hashret("calibrate", "--target", 0.2, "--plot", "plot.png")
    assert ran.out.startswith("radius  precision  recall\n") and Path("plot.png").read_bytes().startswith(b"\x89PNG")
    assert "measured with 200 copies (altered copies) among 40 items\n-r auto is " in ran.err
    told = json.loads(hashret("calibrate", "--target", 0.2, "--json").out)
    radius = told["radius"]
    assert told["precision"][radius] >= 0.2 and len(told["recall"]) == 33 and told["items"] == 40
    ran = hashret("query", "id:1", "-r", "auto", "--target", 0.2)
    assert ran == (0, hashret("query", "id:1", "-r", radius).out, f"within {radius} bits, for a precision of 0.2\n")
    assert hashret("dupes", "-r", "auto", "--target", 0.2, "--json").out == hashret("dupes", "-r", radius, "--json").out
    for verdict, other in (("same", 2), ("different", 3)):
        assert hashret("verdict", "id:1", f"id:{other}", verdict).code == 0
    assert hashret("verdict", "--export", "pairs.csv", "-q").err == ""
    judged = json.loads(hashret("calibrate", "pairs.csv", "--json").out)
    assert judged == json.loads(hashret("calibrate", "--verdicts", "--json").out) | {"source": "pairs.csv"}
    assert judged["items"] is None and sorted(set(judged["recall"])) == [0, 1]


def test_a_training_learns_from_verdicts(place: Path, hashret: Command) -> None:
    small = ["--model", "binary", "--steps", 3, "--bits", 16, "--set", "network=mlp", "--set", "width=4", "-o", "model"]
    check_failed(hashret("train", "photos", "--verdicts", *small), 1, "there are no verdicts in .* to learn from")
    assert hashret("verdict", "id:1", "id:2", "same").code == 0
    assert hashret("train", "photos", "--verdicts", *small).code == 0
    assert Hasher.load("model").training["pairs"] == 1
    check_failed(
        hashret("train", "photos", "--verdicts", "--model", "pca", "--bits", 16, "-o", "linear"),
        1,
        "judged pairs cannot be learned from: model 'pca' has no network that they could train",
    )


# Where the collection is


def test_the_collection_is_found_from_a_folder_below(
    place: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hashret("query", "id:1").out
    monkeypatch.chdir(place / "photos/0")
    assert hashret("query", "id:1").out == expected
    monkeypatch.chdir("/")
    check_failed(hashret("query", "id:1"), 1, "there is no collection at /.hashret: make one with hashret index SOURCE")
    assert hashret("query", "id:1", "-c", place / ".hashret").out == expected
    monkeypatch.setenv("HASHRET_COLLECTION", str(place / ".hashret"))
    assert hashret("query", "id:1").out == expected
    check_failed(hashret("query", "id:1", "-c", place / "empty"), 1, f"no collection at {place}/empty")


# What is wrong is said in one line


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("index none", 1, "there is no 'none': give a folder, an archive"),
        ("index none -c new", 1, "there is no 'none': give a folder, an archive"),
        ("index empty", 1, r"empty has no images \(0 other files"),
        ("index notes", 1, r"notes has no images \(1 other files"),
        ("index broken.png", 1, "broken.png is a single image: give the folder"),
        ("index notes/a.txt", 1, "notes/a.txt is not a source of images: give"),
        ("index photos -c broken.png", 1, "broken.png cannot be written to: choose another folder"),
        ("index photos --index tree", 2, "Invalid value for --index: there is no index 'tree'"),
        ("index photos --index faiss:Tree", 2, "Invalid value for --index: factory must be"),
        ("index", 2, "Missing argument 'SOURCE': see hashret index --help"),
        ("index photos --nonsense", 2, "No such option.*: see hashret index --help"),
        ("train none -o new", 1, "there is no 'none'"),
        ("train none --model nosuch -o new", 2, "there is no model 'nosuch'; choose one of ae, "),
        ("train photos --model lsh --bits 12 -o new", 2, "bits must be a multiple of 8 from 8 to 1024, not 12"),
        ("train photos --model lsh --bits 2048 -o new", 2, "bits must be a multiple of 8"),
        ("train photos --model lsh --bits many -o new", 2, "Invalid value for '--bits'"),
        ("train photos --model lsh --head none -o new", 2, "there is no head 'none'; choose"),
        ("train photos --model lsh --set width=3 -o new", 2, "model 'lsh' has no setting 'width'"),
        ("train photos --model lsh --set width -o new", 2, "a setting is KEY=VALUE, not 'width'"),
        ("train photos --model lsh --size big -o new", 2, "a size is HEIGHTxWIDTH such as 64x64, not 'big'"),
        ("train photos --model lsh --size 99999x99999 -o new", 2, "height × width must be at most"),
        ("train photos --model lsh --budget soon -o new", 2, "a budget is a time such as 90s, 2m or 1h, not 'soon'"),
        ("train photos --model lsh --steps 2 --epochs 3 -o new", 2, "give one of --budget, --epochs and --steps"),
        ("train photos --model ae --steps 2 --learning-rate 1e300 -o new", 2, "Invalid value for '--learning-rate'"),
        ("train photos --model pca --bits 128 -o new", 1, "head 'pca' needs at least as many images"),
        ("train empty --model lsh -o new", 1, "empty has no images"),
        ("train notes --model lsh -c new", 1, "notes has no images"),
        ("train photos --model lsh -o photos", 1, "photos holds something else than a model: choose another folder"),
        ("train photos --model lsh -o .", 1, "holds something else than a model"),
        ("train photos --model lsh -o /", 1, "holds something else than a model"),
        ("train photos --model lsh -o broken.png", 1, "broken.png cannot be written to"),
        ("query none.png", 1, "none.png: cannot be read: No such file or directory"),
        ("query none", 1, "none: there is no 'none': give"),
        ("query empty", 1, r"empty: no images \(0 other"),
        ("query broken.png", 1, "broken.png: no image: "),
        ("query notes/a.txt", 1, "notes/a.txt: no image: "),
        ("query id:0", 1, "id:0: there is no item 0"),
        ("query id:x", 1, "id:x: an item is named by its number"),
        ("query id:²", 1, "id:²: an item is named by its number"),
        ("query id:99999999999999999999", 1, "an item is named by its number"),
        ("query hex:12", 1, "hex:12: codes must have 32 bits, not 8"),
        ("query hex:xyz", 1, "'xyz' is not a code"),
        ("query id:1 -k 0", 2, "Invalid value for '-k'"),
        ("query id:1 -r -1", 2, "a distance is a whole number of bits, or auto, not '-1'"),
        ("query id:1 -r ½", 2, "a distance is a whole number of bits, or auto, not '½'"),
        ("query id:1 -r 3 --target 0.5", 2, "--target goes with -r auto"),
        ("dupes -r -1", 2, "a distance is a whole number of bits, or auto, not '-1'"),
        ("dupes --by size", 2, "by is 'connected' or 'star', not 'size'"),
        (
            "dupes --keep bigest",
            1,
            "nothing indexed lies under .*/bigest: keep the largest, the oldest, or another folder",
        ),
        ("dupes --json --script", 2, "give one of --json and --script"),
        ("verdict id:1 id:2", 2, "give two images and same or different, or --export FILE"),
        ("verdict id:1 id:2 similar", 2, "a verdict is 'same' or 'different', not 'similar'"),
        ("verdict id:1 id:1 same", 1, "both are item 1, one content: a verdict is of two"),
        ("verdict id:1 id:999 same", 1, "there is no item 999"),
        ("verdict id:1 broken.png same", 1, "broken.png is not in the collection: hashret index its folder first"),
        ("verdict id:1 id:2 same --export x.csv", 2, "give two images and same or different, or --export FILE"),
        ("calibrate none.csv", 1, "none.csv cannot be read: No such file"),
        ("calibrate notes/a.txt", 1, "notes/a.txt, line 1: a line is path_a,path_b,same or"),
        ("calibrate --verdicts", 1, "verdicts: 0 pairs are the same and 0 different: judge some of both kinds"),
        ("calibrate --target 2", 2, "Invalid value for '--target'"),
        ("calibrate pairs.csv --verdicts", 2, "give one of PAIRS.csv and --verdicts"),
        ("query id:1 --json --paths", 2, "give one of --json, --jsonl and --paths"),
        ("query", 2, "Missing argument"),
        ("query id:1 -c empty", 1, "there is no collection at .*/empty: make one with hashret index SOURCE"),
        ("info -c new", 1, "there is no collection at .*/new"),
        ("query id:1 --where width>", 1, "where: .*syntax error: give an SQLite expression such as"),
        ("remove", 2, "give a PATH, id:N or --where"),
        ("remove id:x", 1, "an item is named by its number"),
        ("remove photos --where )", 1, "where: a bracket"),
        ("failures -c new", 1, "there is no collection at .*/new"),
        ("estimate 0", 2, "Invalid value for 'N'"),
        ("estimate 9 --bits 12", 2, "bits must be a multiple of 8"),
        ("estimate 9 --source none", 1, "there is no 'none'"),
        ("export out.txt", 2, "Invalid value for --format: 'out.txt' is no format: choose jsonl, numpy, parquet"),
        ("export nowhere/out.jsonl", 1, "nowhere"),
        ("import none.jsonl -c new", 1, "none.jsonl cannot be read"),
        ("import notes/a.txt", 2, "is no format"),
        ("reindex none", 1, "none is no model folder: make one with hashret train"),
        ("reindex photos", 1, "photos is no model folder"),
        ("reindex other -c new", 1, "there is no collection at .*/new"),
        ("demo --out broken.png", 1, "broken.png"),
        ("demo --budget soon --out new", 2, "a budget is a time"),
        ("nonsense", 2, "No such command 'nonsense'"),
    ],
)
def test_bad_input(place: Path, hashret: Command, line: str, code: int, text: str) -> None:
    before = listing(place)
    check_failed(hashret(*line.split()), code, text)
    assert listing(place) == before and not (place / "new").exists()


def test_an_empty_folder_cannot_be_learned_from(place: Path, hashret: Command) -> None:
    ran = hashret("index", "empty", "-c", "new", "--quiet")
    check_failed(ran, 1, r"empty has no images \(0 other files were passed over\)")
    assert not (place / "new").exists()


@pytest.mark.parametrize("data", [b"", b"no database", bytes(4096)])
def test_a_collection_that_is_none(place: Path, hashret: Command, data: bytes) -> None:
    (place / ".hashret/items.db").write_bytes(data)
    for line in ("info", "query id:1", "index photos", "reindex other", "train photos --model lsh"):
        check_failed(hashret(*line.split()), 1, r"items.db is (damaged|no database)")
    assert (place / ".hashret/items.db").read_bytes() == data


def test_no_command_shows_the_help(hashret: Command) -> None:
    ran = hashret()
    assert ran.code == 2 and ran.out == "" and all(f"\n  {command} " in ran.err for command in COMMANDS)
    assert hashret("--help") == (0, ran.err, "")
    assert hashret("--version").out.strip().count(".") == 2


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom permissions bind, as they do not bind root."""
    if os.geteuid() != 0:
        yield
        return
    os.setresgid(65534, 65534, 0)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


def test_a_folder_that_may_only_be_read(hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:  # unlike pytest's own, one that another user may be let into
        place = settle(Path(name).resolve())
        monkeypatch.chdir(place)
        expected = hashret("query", "photos/0/00.png", "--json").out
        within = hashret("query", "id:1", "-r", 9).out
        (place / ".hashret/items.db-wal").unlink()
        (place / ".hashret/items.db-shm").unlink()
        for path in (place, *place.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = listing(place)
        with unprivileged():
            assert hashret("query", "photos/0/00.png", "--json") == (0, expected, "")
            assert hashret("query", "id:1", "-r", 9).out == within
            assert hashret("query", "id:1", "-r", 9, "--where", "id > 0 AND label <> ''").out == within
            assert hashret("info").code == 0
            for line in (
                "index photos",
                "index photos -c .hashret/new",
                "reindex other",
                "train photos --model lsh -o new",
                "train photos --model lsh -c new",
                "demo",
            ):
                check_failed(hashret(*line.split()), 1, "(cannot be (written to|opened)|Permission denied: check)")
            monkeypatch.chdir("/")
        assert listing(place) == before
        for path in (place, *place.rglob("*")):
            path.chmod(0o755)


# In a process of its own


def test_help_and_codes_load_little(place: Path) -> None:
    """--help, and a query by code, import neither torch nor torchvision, and --help not even NumPy."""
    lines = [*([command, "--help"] for command in (*COMMANDS, "model")), ["--help"], ["--version"]]
    check = (
        "import json, sys\n"
        "from hashret.cli.app import run\n"
        "lines = json.loads(sys.argv[1])\n"
        "assert all(run(line) == 0 for line in lines)\n"
        "assert not {'torch', 'torchvision', 'numpy', 'PIL', 'sqlite_utils', 'faiss', 'numba'} & sys.modules.keys()\n"
        "assert run(['query', 'hex:00000000']) == 0 and run(['query', 'id:1', '--json']) == 0\n"
        "assert run(['info']) == 0 and run(['index', 'photos']) == 0\n"
        "assert not {'torch', 'torchvision', 'sklearn', 'matplotlib', 'faiss'} & sys.modules.keys()\n"
        "assert 'numba' in sys.modules and 'cli' not in sys.modules and 'indexes' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", check, json.dumps(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: hashret query" in done.stdout and "0 added, 40 unchanged" in done.stderr


def test_stdout_may_be_full_closed_or_bytes(place: Path) -> None:
    odd = place / os.fsdecode(b"photos/0/\xff.png")
    odd.write_bytes(photos()["0/00.png"])
    (place / "photos/0/00.png").unlink()
    assert run(["index", "photos", "--prune", "-q"]) == 0
    (code,) = to_hex(hasher().encode(odd))
    found = subprocess.run([*MAIN, "query", f"hex:{code}", "--paths", "-k", "1"], capture_output=True)
    assert found.stdout == os.fsencode(odd) + b"\n"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*MAIN, "info"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"No space left on device" in done.stderr
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*MAIN, "info", "--json"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1 and done.stderr == b""


def test_threads_of_pytorch_do_not_wait_in_a_loop_for_long(place: Path) -> None:
    """Else one other process on the machine makes a training ten times as slow."""
    command = [*MAIN, "train", "photos", "--model", "binary", "--steps", "1", "-o", "new"]
    for chosen, expected in (({}, "5000"), ({"OMP_WAIT_POLICY": "passive"}, "0")):
        environment = os.environ | {"OMP_DISPLAY_ENV": "verbose"} | chosen
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        told = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
        if not told:
            pytest.skip("this PyTorch's threads are not those of GCC")
        assert set(told) == {expected}


def test_interrupting_index_keeps_what_was_reported(place: Path) -> None:
    np.save("rows.npy", np.random.default_rng(0).integers(0, 256, (60_000, 8, 8), np.uint8))
    with subprocess.Popen(
        [*MAIN, "index", "rows.npy", "--jsonl"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        first = running.stdout.readline()
        running.send_signal(signal.SIGINT)
        assert running.stderr is not None
        out, err = running.stdout.read(), running.stderr.read()
    assert running.returncode == 130 and err == "hashret: interrupted: run the same command to go on\n"
    lines = [json.loads(line) for line in (first + out).splitlines()]
    with Collection.open(".hashret") as collection:
        kept = len(collection) - PHOTOS
        assert 0 < len(lines) <= kept <= len(lines) + 1000 < 60_000
        for line in lines[:: len(lines) // 20 + 1]:
            assert collection.get(line["id"]).paths == [line["path"]]
        assert not list(Path(".hashret").rglob("*.new*"))


def test_interrupting_train_leaves_a_usable_model(place: Path) -> None:
    """Also: a terminal gets a bar with every term of the loss by name."""
    screen, terminal = pty.openpty()
    wide = os.environ | {"COLUMNS": "160", "TERM": "xterm"}
    command = ["train", "photos", "--model", "vae", "--set", "network=mlp", "--steps", "1000000", "--bits", "16"]
    with subprocess.Popen(
        [*MAIN, *command, "-o", "half"], stdout=subprocess.PIPE, stderr=terminal, env=wide
    ) as running:
        os.close(terminal)
        shown = b""
        while b"kl " not in shown:
            shown += os.read(screen, 4096)
        running.send_signal(signal.SIGINT)
        try:
            while more := os.read(screen, 4096):
                shown += more
        except OSError:  # how Linux says that nobody has the terminal open any more
            pass
        assert running.stdout is not None and running.stdout.read() == b""
    os.close(screen)
    text = " ".join(shown.decode().split())
    assert running.returncode == 130, text
    assert re.search(r"interrupted at step [\d,]+ of 1,000,000; the model is usable, and --resume goes on", text)
    assert "training" in text and re.search(r"reconstruction [\d.,]+ kl [\d.,]+", text)
    assert Hasher.load("half").encode("photos/0/00.png").shape == (1, 2)
    assert Path("half.checkpoint").is_file()


def test_an_interrupted_command_says_so(place: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Collection, "index", interrupt)
    check_failed(hashret("index", "photos"), 130, "interrupted: run the same command to go on")
    monkeypatch.setattr(Collection, "query_codes", interrupt)
    check_failed(hashret("query", "hex:00000000"), 130, "interrupted")
    assert {command.name for command in app.app.registered_commands} <= {None, *COMMANDS}
    assert len(app.app.registered_commands) == len(COMMANDS)
