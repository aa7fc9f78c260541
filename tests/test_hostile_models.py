"""Hostile model folders are refused with a one-line error, before memory of the size that they claim is allocated."""

import copy
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from hashret.cli.app import run
from hashret.collection import Collection
from hashret.errors import HashretError
from hashret.hasher import Hasher

SOAK = "HASHRET_SOAK" in os.environ
PIXELS = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)


@cache
def small() -> Hasher:
    return Hasher("vae", 16, network="mlp", width=1).fit(PIXELS, steps=3, batch=20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small().save(tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path) -> str:
    with pytest.raises(HashretError) as caught:
        Hasher.load(folder)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000 and str(folder) in text
    return text


VALUES: list[Any] = [None, True, -1, 0, 1, 3, 10**6, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 9999,
                     "../..", "/dev/zero", [], [1], {}, {"a": 1}, [[[]]], "\ud800"]  # fmt: skip


def key_paths(config: dict[str, Any], parent: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the key paths of all values, but not of those within the training record, which codes do not depend on."""
    paths = []
    for key, value in config.items():
        paths.append((*parent, key))
        if isinstance(value, dict) and key != "training":
            paths += key_paths(value, (*parent, key))
    return paths


def test_any_value_in_the_config_is_accepted_or_refused_in_one_line(folder: Path) -> None:
    """A changed value is refused unless it is equivalent to the original."""
    config = json.loads((folder / "config.json").read_text())
    equivalent = 0
    for *parents, key in key_paths(config):
        for value in [*VALUES, "missing", "twice"]:
            changed = copy.deepcopy(config)
            fields = changed
            for parent in parents:
                fields = fields[parent]
            if value == "missing":
                del fields[key]
            elif value == "twice":
                fields[key + "2"] = fields[key]
            else:
                fields[key] = value
            (folder / "config.json").write_text(json.dumps(changed))
            try:
                equivalent += Hasher.load(folder).fingerprint == config["fingerprint"]
            except HashretError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
    assert equivalent < 20


def test_the_weights_file_of_a_backbone_is_not_opened(folder: Path) -> None:
    """A stored model has its own weights; the file with the initial ones could be a pipe, which blocks its reader."""
    os.mkfifo(folder.parent / "pipe")
    config = json.loads((folder / "config.json").read_text())
    for weights in (str(folder.parent / "pipe"), "/dev/zero", ""):
        config["settings"] |= {"network": "backbone:resnet18", "weights": weights}
        (folder / "config.json").write_text(json.dumps(config))
        refusal(folder)


def test_a_config_of_gigabytes_is_not_read(folder: Path) -> None:
    os.truncate(folder / "config.json", 2**34)  # a hole: it takes no space
    assert "config.json of 17179869184 bytes" in refusal(folder)


def write(folder: Path, header: object, size: int) -> None:
    """Write a file of weights with this header, followed by `size` bytes that take no space on the disk."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + size)


def giant(name: str, shape: list[int], dtype: str = "F32") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        size = int(np.prod(shape, dtype=object)) * (8 if dtype == "F64" else 4)
        write(folder, {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, size)

    return damage


def rename(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder / "elsewhere")
        os.mkfifo(folder / name)

    return damage


def replace_by_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


CONTRADICTIONS: dict[str, Callable[[Path], object]] = {
    "a header of 2⁶³ bytes": lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}"),
    "a header of 100 MB": lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 10**8) + b"{}"),
    "a deep header": lambda f: write(f, b'{"a":' * 50_000, 0),
    "no header": lambda f: write(f, b"", 100),
    "a list": lambda f: write(f, [], 100),
    "offsets beyond the end": lambda f: write(f, {"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 2**63]}}, 20),
    "offsets below zero": lambda f: write(f, {"a": {"dtype": "F32", "shape": [5], "data_offsets": [-20, 0]}}, 20),
    "a shape that overflows": lambda f: write(
        f, {"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}, 0
    ),
    "an unknown type": lambda f: write(f, {"a": {"dtype": "F1", "shape": [5], "data_offsets": [0, 20]}}, 20),
    "overlapping tensors": lambda f: write(
        f, {n: {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]} for n in "ab"}, 20
    ),
    "a tensor of 32 GB": giant("member.other", [8_000_000_000]),
    "a weight of 32 GB": giant("member.encoder.1.weight", [16, 500_000_000]),
    "20,000 tensors": lambda f: write(
        f, {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}, 0
    ),
    "a pipe for weights": rename("model.safetensors"),
    "a pipe for a config": rename("config.json"),
    "a folder for weights": replace_by_folder,
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_tensors_that_contradict_their_header_are_refused(folder: Path, name: str) -> None:
    CONTRADICTIONS[name](folder)
    assert "is damaged (" in refusal(folder) or "is no model folder" in refusal(folder)


def test_no_memory_of_a_claimed_size_is_allocated(folder: Path) -> None:
    giant("member.encoder.1.weight", [16, 500_000_000])(folder)
    code = (
        "import resource, sys; from hashret.hasher import Hasher; from hashret.errors import HashretError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    Hasher.load(sys.argv[1])\n"
        "except HashretError:\n    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    process = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert int(process.stdout) < 200  # MB; the header claims 32,000


def test_flipped_bits_are_detected(folder: Path) -> None:
    """A changed file is refused, or only its training record or white space changed and the fingerprint is the same."""
    rng = random.Random(0)
    for name in ("model.safetensors", "config.json"):
        whole = (folder / name).read_bytes()
        for _ in range(1000 if SOAK else 60):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 3, 30))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            if rng.random() < 0.2:
                del data[rng.randrange(len(data)) :]
            (folder / name).write_bytes(data)
            try:
                assert Hasher.load(folder).fingerprint == small().fingerprint
            except HashretError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
        (folder / name).write_bytes(whole)


def put_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["head.threshold"] = tensors["head.threshold"] * float("nan")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("damage", [giant("a", [10**9]), rename("model.safetensors"), rename("config.json"), put_nan])
def test_every_command_reports_a_damaged_model_in_one_line(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", PIXELS)
    np.save("more.npy", PIXELS[::-1] ^ 1)
    small().save("other")
    damage(tmp_path / "other")
    with Collection.create(".hashret", Hasher("lsh", 16).fit(PIXELS)) as collection:
        collection.index("rows.npy")
        inner = tmp_path / ".hashret/models" / collection.fingerprint
    for line in ("reindex other", "train rows.npy --model vae --steps 1 --init other -o new"):
        assert exit_code(line, capsys) == 1
    assert run(["query", "id:1", "--json"]) == 0  # the collection is unchanged
    damage(inner)
    for line in ("index more.npy", "query rows.npy --json", "info", "model plot --out x.png"):
        expected = 0 if line == "info" and (inner / "config.json").is_file() else 1
        assert exit_code(line, capsys) == expected or "model" in line
    assert run(["query", "id:1", "--json", "-q"]) == 0  # needs no model
    with Collection.open(".hashret", read_only=True) as collection:
        assert len(collection) == 60


def exit_code(command: str, capsys: pytest.CaptureFixture[str]) -> int:
    """Run a command and return its exit code; check that a failure prints one line of error and nothing else."""
    capsys.readouterr()
    code = run(command.split())
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert code == 0 or (
        out == "" and err.count("\n") == len([x for x in err.splitlines() if x.startswith("hashret: ")])
    )
    return code
