"""Each row of `benchmarks/family.py` runs from end to end, on small data and for a few steps."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

FAMILY = Path(__file__).parent.parent / "benchmarks" / "family.py"
Row = Callable[..., dict[str, Any]]


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Row:
    """Runs a row as the command does, and gives what it prints with --json."""

    def run(name: str, *options: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [str(FAMILY), name, "--json", *options])
        runpy.run_path(str(FAMILY), run_name="__main__")
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        return told

    return run


@pytest.mark.parametrize(
    ("name", "options", "trainings"),
    [
        ("pca", [], 0),
        ("ae30-2006", ["--steps", "3"], 1),
        ("ae30", ["--steps", "3"], 1),
        ("ae6", ["--epochs", "1"], 1),
        ("vae", ["--steps", "3", "--samples", "2"], 1),
        ("denoise", ["--steps", "3"], 2),
        ("stacked", ["--steps", "4", "--labelled", "40"], 9),
        ("ortho", ["--steps", "3"], 1),
        ("speed", ["--steps", "3"], 0),
    ],
)
def test_a_row_measures_the_test_images(row: Row, name: str, options: list[str], trainings: int) -> None:
    told = row(name, "--data", "digits", *options)
    assert told["row"] == name and len(told["trainings"]) == trainings
    assert all(np.isfinite(line["ours"]) and line["ours"] > 0 for line in told["lines"])


def test_a_row_can_be_had_with_other_settings(row: Row) -> None:
    (training,) = row("ae6", "--data", "digits", "--steps", "2", "--set", "network=mlp", "--set", "batch=50")[
        "trainings"
    ]
    assert "network=mlp" in training and "batch=50" in training and "2 steps" in training


def test_photos_are_learned_from_and_others_are_measured(row: Row, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        blocks = rng.integers(0, 256, (8, 8 + i, 3), dtype=np.uint8)
        Image.fromarray(np.kron(blocks, np.ones((7, 7, 1), np.uint8))).save(tmp_path / f"{i:02}.png")
    told = row("super-resolution", "--train", str(tmp_path), "--steps", "3")
    (line,) = told["lines"]
    assert "2 photos" in line["what"] and 15 < line["outside"]["bicubic"] < 40
    assert np.isfinite(line["ours"])


def test_components_of_the_official_images_have_the_errors_that_are_known(row: Row, shared_data: Path) -> None:
    files = (shared_data / "mnist" / f"{part}-images-idx3-ubyte.gz" for part in ("train", "t10k"))
    train, test = map(str, files)
    lines = row("pca", "--train", train, "--test", test)["lines"]
    assert [line["ours"] for line in lines] == pytest.approx([32.65, 19.69, 13.87], abs=0.01)
