import json
import os
import pty
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from command_line import MAIN, Command, check_failed, files_in, start

from hashret.hasher import Hasher


def test_train_then_index(folder: Path, hashret: Command) -> None:
    result = hashret("train", "photos", "--model", "pca", "--bits", 16, "-c", "new")
    assert result.code == 0 and result.out == ""
    assert result.err.splitlines() == [
        "training pca on photos: 16-bit codes, head pca, seed 0",
        "trained on 40 images of 8 × 8 × 1",
        f"model in {folder}/new; next: hashret index photos -c new",
    ]
    assert hashret("train", "photos", "--model", "lsh", "--bits", 8, "-c", "new", "-q") == (0, "", "")  # no items yet
    result = hashret("index", "photos", "-c", "new")
    assert result == (0, "", f"40 added; 40 items in {folder}/new\n")
    assert hashret("index", "photos", "-c", "new").err == f"0 added, 40 unchanged; 40 items in {folder}/new\n"
    assert json.loads(hashret("info", "-c", "new", "--json").out)["model"] == "lsh"
    assert {file.name for file in (folder / "new").iterdir()} <= {
        "items.db", "items.db-wal", "items.db-shm", "models", "index", "lock"
    }  # fmt: skip


def test_train_prints_what_it_chose(folder: Path, hashret: Command) -> None:
    wide = ["--bits", 16, "--set", "width=2", "--set", "flip=0", "--size", "12x10", "--limit", 30, "--seed", 3]
    result = hashret("train", "photos", "--epochs", 2, "--batch", 10, *wide, "-o", "my model")
    first, second, third, last = result.err.splitlines()
    assert first == "training contrastive on photos: 16-bit codes, head anchor-itq, 2 epochs, seed 3"
    assert re.fullmatch(r"trained on 30 of 40 images of 12 × 10 × 1 in \d+ s: 4 steps of 10 images", second)
    assert re.fullmatch(r"network conv; views crop [\d.]+, flip 0, light [\d.]+, grey 0; settings width=2", third)
    assert last == (f"model in {folder}/my model; to encode a collection with it: hashret reindex '{folder}/my model'")
    result = hashret("train", "photos", "--model", "ae", "--budget", "1s", *wide[:4], "-o", "ae")
    assert result.err.startswith("training ae on photos: 16-bit codes, head median, budget 1 s, seed 0\n")
    assert "\nnetwork conv; settings width=2\n" in result.err


def test_training_into_a_collection_with_items_is_refused(folder: Path, hashret: Command) -> None:
    before = files_in(folder)
    advice = "has 40 items of another model: train with -o MODEL_DIR, then run hashret reindex MODEL_DIR"
    check_failed(hashret("train", "photos", "--model", "pca", "--bits", 16), 1, advice)
    assert files_in(folder) == before


def test_a_training_begins_with_another_model(folder: Path, hashret: Command) -> None:
    small = ["--steps", 2, "--bits", 16, "--set", "network=mlp", "--set", "width=1", "-q"]
    assert hashret("train", "photos", "--model", "stacked", "-o", "first", *small).code == 0
    assert hashret("train", "photos", "--model", "ae", "--init", "first", "-o", "second", *small).code == 0
    result = hashret("train", "photos", "--model", "ae", "--init", "first", "-o", "third", "--steps", 2, "--bits", 32)
    assert result.code == 1 and "the model to begin with has another network" in result.err


def test_vectors_from_end_to_end(folder: Path, hashret: Command) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(90, 24))
    np.save("all.npy", vectors)
    np.savez("some.npz", vectors=vectors[:2].astype(np.float32))
    np.save("one.npy", vectors[3])
    np.save("narrow.npy", vectors[:, :5])
    result = hashret("train", "all.npy", "--steps", 3, "--bits", 16, "--set", "width=2", "-c", "v")
    assert result.code == 0 and "trained on 90 vectors of 24 numbers in" in result.err
    assert hashret("index", "all.npy", "-c", "v").err.startswith("90 added; 90 items in ")
    assert "of vectors of 24 numbers\n" in hashret("info", "-c", "v").out
    documents = json.loads(hashret("query", "some.npz", "-r", 0, "-c", "v", "--json", "-q").out)
    assert [document["query"] for document in documents] == [f"{folder}/some.npz#{i}" for i in range(2)]
    for i, document in enumerate(documents):
        assert f"{folder}/all.npy#{i}" in [hit["path"] for hit in document["hits"]]
    assert f"{folder}/all.npy#3\n" in hashret("query", "one.npy", "-r", 0, "-c", "v", "--paths", "-q").out
    assert hashret("model", "plot", "all.npy", "-o", "plots", "-c", "v").code == 0
    for line, text in (
        ("query photos/0/00.png", "photos/0/00.png: no vector: give floats"),
        ("query narrow.npy", "narrow.npy#0: vectors of 5 numbers, and the model takes vectors of 24 numbers"),
        ("index narrow.npy", "narrow.npy has vectors of 5 numbers, and the model takes vectors of 24 numbers"),
        ("index photos", "photos has images, and the model takes vectors of 24 numbers"),
        ("model reconstruct all.npy", "this model takes vectors, which have no pictures"),
        ("model plot photos", "images, and the model takes vectors of 24 numbers"),
    ):
        result = hashret(*line.split(), "-c", "v")
        assert result.code == 1 and text in result.err.splitlines()[0], result.err
    check_failed(
        hashret("index", "all.npy"), 1, "all.npy has vectors of 24 numbers, and the model takes images of 8 × 8"
    )
    check_failed(
        hashret("model", "plot", "all.npy"), 1, "all.npy has vectors of 24 numbers, and the model takes images of 8 × 8"
    )
    conv = ("train", "all.npy", "--model", "ae", "--steps", 2, "-o", "new", "--set")
    check_failed(hashret(*conv, "network=conv"), 1, "network 'conv' is for images: choose mlp or deep for vectors")
    check_failed(hashret(*conv[:-1], "--size", "8x8"), 1, "all.npy has vectors, which have no size in pixels: leave")


def test_a_training_learns_from_verdicts(folder: Path, hashret: Command) -> None:
    small = ["--model", "binary", "--steps", 3, "--bits", 16, "--set", "network=mlp", "--set", "width=4", "-o", "model"]
    check_failed(
        hashret("train", "photos", "--verdicts", *small),
        1,
        f"{folder}/.hashret has no verdicts to learn from: record some with hashret verdict",
    )
    assert hashret("verdict", "id:1", "id:2", "same").code == 0
    assert hashret("train", "photos", "--verdicts", *small).code == 0
    assert Hasher.load("model").training["pairs"] == 1
    check_failed(
        hashret("train", "photos", "--verdicts", "--model", "pca", "--bits", 16, "-o", "linear"),
        1,
        "labelled pairs cannot be learned from: model 'pca' has no network that they could train",
    )


def test_threads_of_pytorch_spin_briefly(folder: Path) -> None:
    """Otherwise one other busy process on the machine makes a training ten times as slow.

    Warnings are printed in one line, as messages are.
    """
    command = [*MAIN, "train", "photos", "--model", "ae", "--steps", "1", "-o", "new"]
    for variables, expected in (({}, "5000"), ({"OMP_WAIT_POLICY": "passive"}, "0")):
        environment = os.environ | {"OMP_DISPLAY_ENV": "verbose"} | variables
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "\nhashret: a bottleneck of 64 numbers" in done.stderr and "RuntimeWarning" not in done.stderr
        counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
        if not counts:
            pytest.skip("this PyTorch's threads are not those of GCC")
        assert set(counts) == {expected}


def test_interrupting_train_leaves_a_usable_model(folder: Path) -> None:
    """A terminal also gets a progress bar with every term of the loss by name."""
    screen, terminal = pty.openpty()
    wide = os.environ | {"COLUMNS": "160", "TERM": "xterm"}
    command = ["train", "photos", "--model", "vae", "--set", "network=mlp", "--steps", "1000000", "--bits", "16"]
    with start([*MAIN, *command, "-o", "half"], stdout=subprocess.PIPE, stderr=terminal, env=wide) as running:
        os.close(terminal)
        shown = b""
        while b"kl " not in shown:
            shown += os.read(screen, 4096)
        running.send_signal(signal.SIGINT)
        try:
            while more := os.read(screen, 4096):
                shown += more
        except OSError:  # Linux raises this when no process has the terminal open any more
            pass
        assert running.stdout is not None and running.stdout.read() == ""
    os.close(screen)
    text = " ".join(shown.decode().split())
    assert running.returncode == 130, text
    assert re.search(r"interrupted at step [\d,]+ of 1,000,000; the model is usable, and --resume continues", text)
    assert "training" in text and re.search(r"reconstruction [\d.,]+ kl [\d.,]+", text)
    assert Hasher.load("half").encode("photos/0/00.png").shape == (1, 2)
    assert Path("half.checkpoint").is_file()
