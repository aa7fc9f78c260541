import functools
import json
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from command_line import MAIN, PHOTOS, Command, check_failed, files_in, photos, start

from hashret.cli import fitting
from hashret.codes import to_hex
from hashret.collection import Collection
from hashret.hasher import Hasher


def test_index_without_a_model_trains_the_default(
    folder: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "fit", functools.partial(fitting.fit, steps=2))  # instead of two minutes
    result = hashret("index", "photos", "-c", "new", "--index", "faiss:BFlat")
    assert result.code == 0 and result.out == ""
    first, second, *_, last = result.err.splitlines()
    assert first == f"no model in {folder}/new yet: training the default one first"
    assert second == "training contrastive on photos: 64-bit codes, head anchor-itq, budget 120 s, seed 0"
    assert last == f"40 added; 40 items in {folder}/new"
    info = json.loads(hashret("info", "-c", "new", "--json").out)
    assert (info["model"], info["bits"], info["index"]) == ("contrastive", 64, "faiss:BFlat")
    assert not (folder / "new/training.checkpoint").exists()
    (hit,) = json.loads(hashret("query", "photos/0/00.png", "-c", "new", "-k", 1, "--json").out)["hits"]
    assert hit["path"] == f"{folder}/photos/0/00.png" and hit["distance"] == 0


def test_index_reports_what_it_did(folder: Path, hashret: Command) -> None:
    (folder / "photos/0/00.png").unlink()
    (folder / "photos/1/01.png").write_bytes((folder / "photos/2/02.png").read_bytes())
    shutil.copy(folder / "photos/3/03.png", folder / "photos/new.png")
    shutil.copy(folder / "broken.png", folder / "photos/broken.png")
    (folder / "photos/notes.txt").write_text("")
    result = hashret("index", "photos", "--prune", "--json", "--jsonl")
    *lines, report = map(json.loads, result.out.splitlines())
    assert sorted(lines, key=lambda line: str(line["path"])) == [
        {"path": f"{folder}/photos/1/01.png", "status": "updated", "id": lines[1]["id"]},
        {"path": f"{folder}/photos/broken.png", "status": "failed", "reason": lines[0]["reason"]},
        {"path": f"{folder}/photos/new.png", "status": "added", "id": lines[2]["id"]},
    ]
    reason = lines[0]["reason"]
    assert reason.startswith("no image: ")
    assert list(report.items()) == [
        ("items", 38), ("added", 1), ("unchanged", 38), ("updated", 1), ("removed", 1), ("failed", 1), ("decoded", 0),
        ("ignored", 1), ("failures", [[f"{folder}/photos/broken.png", reason]]), ("described", 0), ("unmatched", 0),
    ]  # fmt: skip
    assert result.code == 0 and result.err.splitlines() == [
        f"hashret: skipped {folder}/photos/broken.png: {reason}",
        f"1 added, 1 updated, 38 unchanged, 1 removed, 1 failed; 38 items in {folder}/.hashret; 1 other file ignored",
    ]
    result = hashret("index", "photos", "--jsonl", "--strict", "--quiet")
    assert result == (1, "", "")  # reported before, and still a failure for --strict
    (folder / "photos/broken.png").unlink()
    assert hashret("index", "photos", "--prune", "--strict", "-q") == (0, "", "")


def test_pruning_more_than_half_needs_force(folder: Path, hashret: Command) -> None:
    shutil.rmtree(folder / "photos")
    check_failed(hashret("index", "photos", "--prune", "--force"), 1, "there is no 'photos': give a folder")
    (folder / "photos").mkdir()
    check_failed(hashret("index", "photos", "--prune"), 1, "40 of 40 paths .* would be removed: .* --force")
    assert json.loads(hashret("info", "--json").out)["items"] == 40
    assert (
        hashret("index", "photos", "--prune", "--force").err == f"0 added, 40 removed; 0 items in {folder}/.hashret\n"
    )


def test_metadata_and_filters(folder: Path, hashret: Command) -> None:
    names = sorted(photos())
    (folder / "m.csv").write_text(
        "path,price\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names)) + "none,1\n"
    )
    result = hashret("index", "photos", "--meta", "m.csv")
    assert result.err.splitlines()[-1] == "changed the metadata of 40 items; no image here for 1 row"
    assert hashret("index", "photos", "--meta", "m.csv", "--json").out.endswith('"described": 0, "unmatched": 1}\n')
    for query in ("photos/0/00.png", "id:1", "hex:00000000"):
        result = hashret("query", query, "--where", "price < 10 AND label <> '0'", "-k", 99, "--paths")
        expected = {f"{folder}/photos/{name}" for name in names[:10] if not name.startswith("0/")}
        assert set(result.out.splitlines()) == expected and result.code == 0
    check_failed(hashret("query", "photos", "--where", "nosuch = 1"), 1, "where: no such column: nosuch")
    check_failed(hashret("index", "photos", "--meta", "none.csv"), 1, "none.csv cannot be read")
    (folder / "photos/metadata.jsonl").write_text('{"path": "0/00.png", "price": [1]}')
    check_failed(hashret("index", "photos", "-c", "new"), 1, "metadata.jsonl, line 1: metadata 'price' must be")
    assert not (folder / "new").exists()


def test_train_to_a_folder_then_reindex(folder: Path, hashret: Command) -> None:
    result = hashret("train", "photos", "--model", "itq", "--bits", 16, "-o", "models/mine")
    assert result.code == 0 and result.out == ""
    assert result.err.splitlines()[-1].endswith(f"to encode a collection with it: hashret reindex {folder}/models/mine")
    assert set(files_in(folder / "models")) == {
        f"mine/{file}" for file in ("config.json", "model.safetensors", "README.md")
    }
    before = hashret("query", "id:3", "--json").out
    result = hashret("reindex", "models/mine")
    mine = Hasher.load("models/mine")
    assert result == (0, "", f"encoded 40 items with itq, 16 bits, {mine.fingerprint[:16]}\n")
    assert json.loads(hashret("info", "--json").out)["fingerprint"] == mine.fingerprint
    assert hashret("query", "id:3", "--json").out != before
    code = to_hex(mine.encode("photos/0/00.png"))[0]
    assert hashret("query", f"hex:{code}", "-k", 1).out == f"   0  {folder}/photos/0/00.png\n"
    check_failed(hashret("query", "hex:00000000"), 1, "hex:00000000: codes must have 16 bits, not 32")
    (folder / "photos/0/00.png").unlink()
    result = hashret("reindex", "other")
    missing, error = result.err.splitlines()
    assert result.code == 1 and missing == f"hashret: missing {folder}/photos/0/00.png"
    assert error.startswith("hashret: 1 item cannot be read ") and "--drop-missing" in error
    assert json.loads(hashret("info", "--json").out)["fingerprint"] == mine.fingerprint
    fingerprint = Hasher.load("other").fingerprint[:16]
    assert hashret("reindex", "other", "--drop-missing").err == (
        f"encoded 39 items with pca, 16 bits, {fingerprint}; 1 removed\n"
    )


def test_an_empty_folder_cannot_be_trained_on(folder: Path, hashret: Command) -> None:
    result = hashret("index", "empty", "-c", "new", "--quiet")
    check_failed(result, 1, r"empty has no images \(0 other files ignored\)")
    assert not (folder / "new").exists()


def test_interrupting_index_keeps_what_was_reported(folder: Path) -> None:
    np.save("rows.npy", np.random.default_rng(0).integers(0, 256, (60_000, 8, 8), np.uint8))
    command = [*MAIN, "index", "rows.npy", "--jsonl"]
    with start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        first = running.stdout.readline()
        running.send_signal(signal.SIGINT)
        assert running.stderr is not None
        out, err = running.stdout.read(), running.stderr.read()
    assert running.returncode == 130 and err == "hashret: interrupted: run the same command to continue\n"
    lines = [json.loads(line) for line in (first + out).splitlines()]
    with Collection.open(".hashret") as collection:
        kept = len(collection) - PHOTOS
        assert 0 < len(lines) <= kept <= len(lines) + 1000 < 60_000
        for line in lines[:: len(lines) // 20 + 1]:
            assert collection.get(line["id"]).paths == [line["path"]]
        assert not list(Path(".hashret").rglob("*.new*"))
