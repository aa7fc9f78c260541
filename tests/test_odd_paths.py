"""Files with any name that a file system allows, through the commands that print and take names."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from hashret.cli.app import run
from hashret.collection import Collection
from hashret.hasher import Hasher

NAMES = [
    b"plain.png",
    b"line\nfeed.png",
    b"\r\n.png",
    b"tab\there.png",
    b"\x1b]0;owned\x07\x1b[2J.png",
    b"--force.png",
    b"-c.png",
    b"-.png",
    b"two  words.png",
    b" .png",
    b"quo'te\"s`$(touch x).png",
    b"back\\slash.png",
    b"*?[a].png",
    b"id:1.png",
    b"hex:00.png",
    b"a!.png",
    b"a#1.png",
    b"%41.png",
    b"\xff\xfe\x80.png",
    b"caf\xe9.png",
    "café.png".encode(),
    "cafe\u0301.png".encode(),
    "🦊👩‍👩‍👧.png".encode(),
    "\u202egnp.exe.png".encode(),
    "\ufeff\u200b.png".encode(),
    b"a" * 251 + b".png",
    ("é" * 125).encode() + b"x.png",
    b"-r/\n/--/" + b"\xff" * 255 + b"/x.png",
    b"/".join([b"d" * 250] * 6) + b"/deep.png",
]  # fmt: skip


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(file, "PNG")
    return file.getvalue()


def path(folder: Path, name: bytes) -> Path:
    return folder / os.fsdecode(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with an empty collection, and a folder with an odd name that contains files of all odd names."""
    folder = tmp_path_factory.mktemp("odd")
    for i, name in enumerate(NAMES):
        file = path(folder / "-\n\U0001f98a", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))
    broken = path(folder / "-\n\U0001f98a", b"bro\nken\x1b[2J\xff.png")
    broken.write_bytes(b"Dear diary, this is no photo.")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 8, 8), np.uint8)
    Collection.create(folder / ".hashret", Hasher("lsh", 64).fit(pixels)).close()
    yield folder


class Ran(NamedTuple):
    code: int
    out: bytes
    err: bytes


Command = Callable[..., Ran]


@pytest.fixture
def hashret(capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command line in this process; return the output of `main`."""
    monkeypatch.delenv("HASHRET_COLLECTION", raising=False)

    def command(*arguments: str) -> Ran:
        capsysbinary.readouterr()
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        code = run(list(arguments))
        return Ran(code, *capsysbinary.readouterr())

    return command


def test_any_name_is_read_and_printed(folder: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    root = folder / "-\n\U0001f98a"
    files = [path(root, name) for name in NAMES]
    ran = hashret("index", "--jsonl", "--", str(root.relative_to(folder)))
    assert ran.code == 0, ran.err
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert {line["path"] for line in lines if line["status"] == "added"} == {str(file) for file in files}
    skipped, counted = ran.err.decode().splitlines()
    assert (
        r"bro\nken\x1b[2J\udcff.png: no image: no format begins with b'Dear dia'" in skipped and skipped.isprintable()
    )
    assert counted.startswith(f"{len(NAMES)} added, 1 failed")

    queries = [str(file.relative_to(folder)) for file in files]
    ran = hashret("query", "--json", "-k", "1", "--", *queries)
    assert ran.code == 0, ran.err
    documents = json.loads(ran.out)
    assert [document["query"] for document in documents] == queries
    for document, file in zip(documents, files, strict=True):
        (hit,) = document["hits"]
        assert (hit["distance"], hit["path"]) == (0, str(file)) and Path(hit["path"]).read_bytes() == file.read_bytes()
    ran = hashret("query", "--jsonl", "-k", "1", "--", *queries)
    assert [json.loads(line) for line in ran.out.splitlines()] == documents
    ran = hashret("query", "--paths", "-k", "1", "--", *queries)
    assert ran.out == b"".join(os.fsencode(file) + b"\n" for file in files)  # as the original bytes

    ran = hashret("query", "--", str(path(root, b"bro\nken\x1b[2J\xff.png")), "-no\nfile\x1b.png")
    assert ran.code == 1 and ran.out == b"" and ran.err.count(b"\n") == 2
    assert all(line.isprintable() for line in ran.err.decode().splitlines())

    for file in files[::2]:
        file.unlink()
    ran = hashret("index", "--prune", "--json", "--", str(root))
    report = json.loads(ran.out)
    assert ran.code == 0 and report["removed"] == len(files[::2]) and report["unchanged"] == len(files[1::2])
    with Collection.open(folder / ".hashret", read_only=True) as collection:
        for i, file in enumerate(files):
            (hit,) = collection.query(png(i), 1)
            assert (hit.path == str(file)) == (i % 2 == 1)


def test_the_path_of_a_collection_may_have_any_characters(
    tmp_path: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 256, (50, 8, 8), np.uint8))
    for name in ("line\nfeed", "-c", "🦊" * 63, os.fsdecode(b"\xff?%41#")):
        ran = hashret("train", "rows.npy", "--model", "lsh", "--collection", f"./{name}")
        assert ran.code == 0, ran.err
        for line in (["index", "rows.npy"], ["query", "id:1", "-k", "1", "--json"], ["info"]):
            ran = hashret(*line, "--collection", f"./{name}")
            assert ran.code == 0, ran.err
    ran = hashret("info", "-c", "./line\n\x1b[2J")
    assert ran.code == 1 and ran.err.count(b"\n") == 1 and b"\x1b" not in ran.err
    ran = hashret("info", "-c", "n" * 256)
    assert ran.code == 1 and ran.err.count(b"\n") == 1 and b"Traceback" not in ran.err
