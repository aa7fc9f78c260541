"""The benchmarks of quality and of duplicates run from end to end, on small data and for a few steps."""

import gzip
import io
import json
import runpy
import sys
import tarfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hashret.errors import HashretError
from hashret.evaluation.measures import mean_average_precision
from hashret.hasher import Hasher
from hashret.indexes.threads import get_threads

FAMILY = Path(__file__).parent.parent / "benchmarks" / "family.py"
QUALITY = FAMILY.with_name("quality.py")
Row = Callable[..., dict[str, Any]]
Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Row:
    """Return a function that runs the command with --json for a row, and returns the printed results."""

    def run(name: str, *options: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [str(FAMILY), name, "--json", *options])
        runpy.run_path(str(FAMILY), run_name="__main__")
        results: dict[str, Any] = json.loads(capsys.readouterr().out)
        return results

    return run


def test_groups_of_duplicates_are_checked_and_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(FAMILY.with_name("dupes.py"))
    options = ["--items", "9000", "--sample", "9", "--threads", str(get_threads()), "--json"]
    monkeypatch.setattr(sys, "argv", [script, *options])
    runpy.run_path(script, run_name="__main__")
    results = json.loads(capsys.readouterr().out)
    assert [line["by"] for line in results["results"]] == ["connected", "star"] and results["naive_seconds"] > 0


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
    results = row(name, "--data", "digits", *options)
    assert results["row"] == name and len(results["trainings"]) == trainings
    assert all(np.isfinite(line["ours"]) and line["ours"] > 0 for line in results["lines"])


def test_settings_of_a_row_can_be_overridden(row: Row) -> None:
    (training,) = row("ae6", "--data", "digits", "--steps", "2", "--set", "network=mlp", "--set", "batch=50")[
        "trainings"
    ]
    assert "network=mlp" in training and "batch=50" in training and "2 steps" in training


def test_super_resolution_measures_held_out_photos(row: Row, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        blocks = rng.integers(0, 256, (8, 8 + i, 3), dtype=np.uint8)
        Image.fromarray(np.kron(blocks, np.ones((7, 7, 1), np.uint8))).save(tmp_path / f"{i:02}.png")
    results = row("super-resolution", "--train", str(tmp_path), "--steps", "3")
    (line,) = results["lines"]
    assert "2 photos" in line["what"] and 15 < line["outside"]["bicubic"] < 40
    assert np.isfinite(line["ours"])


def test_pca_errors_on_mnist_equal_the_published_ones(row: Row, shared_data: Path) -> None:
    files = (shared_data / "mnist" / f"{part}-images-idx3-ubyte.gz" for part in ("train", "t10k"))
    train, test = map(str, files)
    lines = row("pca", "--train", train, "--test", test)["lines"]
    assert [line["ours"] for line in lines] == pytest.approx([32.65, 19.69, 13.87], abs=0.01)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Rows:
    """Return a function that measures rows with --json into a file of the test, and returns the printed rows."""

    def run(*options: str) -> list[dict[str, Any]]:
        command = [
            str(QUALITY),
            "--file",
            str(tmp_path / "quality.json"),
            "--page",
            str(tmp_path / "page.md"),
            *options,
        ]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        runpy.run_path(str(QUALITY), run_name="__main__")
        results: list[dict[str, Any]] = json.loads(capsys.readouterr().out) if "--json" in options else []
        return results

    return run


def test_a_row_is_measured_once(rows: Rows, tmp_path: Path) -> None:
    results = rows("--rows", "digits/*/64/*", "--steps", "3", "--json")
    assert [row["model"] for row in results] == ["anchor-graph"] + ["contrastive"] * 3 + ["itq", "lsh", "pca"]
    assert [row["head"] for row in results[1:4]] == ["anchor-itq", "itq", "anchor-graph"]
    assert [row["steps"] for row in results] == [None, 3, 3, 3, None, None, None]
    digits = ((load_digits().images.astype(int) * 255 + 8) // 16).astype(np.uint8)
    codes = Hasher("itq", 64).fit(digits[:1437]).encode(digits)
    labels = load_digits().target
    itq = results[4]
    expected = mean_average_precision(codes[1437:], labels[1437:], codes[:1437], labels[:1437])
    assert itq["measures"]["mAP@all"] == expected and itq["queries"] == 360 and itq["health"]["codes"] == 1437

    file = tmp_path / "quality.json"
    done = json.loads(file.read_text())
    assert list(done.values()) == results and "digits/contrastive/anchor-itq/64/3steps/0" in done
    again = done.pop("digits/contrastive/itq/64/3steps/0")
    done["digits/lsh/lsh/64/none/0"]["measures"]["mAP@all"] = 0.125
    file.write_text(json.dumps(done))
    second = rows("--rows", "digits/*", "--steps", "3", "--json")
    assert second[2]["measures"] == again["measures"] and second[2]["health"] == again["health"]
    assert second[5]["measures"]["mAP@all"] == 0.125


def test_the_list_shows_finished_rows(rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    rows("--rows", "digits/lsh/*", "--json")
    rows("--rows", "digits/*", "--rows", "cifar10/contrastive/anchor-itq/*", "--list")
    assert capsys.readouterr().out.splitlines() == [
        "not done  digits/anchor-graph/anchor-graph/64/none/0",
        "not done  digits/contrastive/anchor-itq/64/20s/0",
        "not done  digits/contrastive/itq/64/20s/0",
        "not done  digits/contrastive/anchor-graph/64/20s/0",
        "not done  digits/itq/itq/64/none/0",
        "done      digits/lsh/lsh/64/none/0",
        "not done  digits/pca/pca/64/none/0",
        *(
            f"not done  cifar10/contrastive/anchor-itq/64/{budget}/{seed}"
            for seed, budget in product(range(3), ("20m", "25m-gpu"))
        ),
    ]


def test_the_page_is_written_from_the_rows(rows: Rows, tmp_path: Path) -> None:
    (row,) = rows("--rows", "digits/itq/*", "--json")
    done = {}
    for seed, best in enumerate((0.91, 0.92, 0.96)):
        for head, regret in (("anchor-itq", 0.0), ("itq", 0.25), ("anchor-graph", 0.125)):
            variant = row | {
                "data": "mnist",
                "model": "contrastive",
                "head": head,
                "bits": 32,
                "budget": "2m",
                "seed": seed,
            }
            variant |= {"measures": row["measures"] | {"mAP@all": best - regret}}
            if head == "anchor-itq" or not seed:
                done["/".join(str(variant[name]) for name in ("data", "model", "head", "bits", "budget", "seed"))] = (
                    variant
                )
    (tmp_path / "quality.json").write_text(json.dumps(done))
    rows("--write")
    page = (tmp_path / "page.md").read_text()
    assert "| 32 | contrastive | anchor-itq | 2m | 3 | 0.930 ± 0.025 |" in page
    assert "| 32 | contrastive | itq | 2m | 1 | 0.660 |" in page
    assert "- `itq`, mAP@all: 0.250 over 1\n" in page and "- `anchor-itq`, mAP@all: 0.000 over 1\n" in page
    assert "- mnist, `itq`: itq/16/none (seed 0, seed 1, seed 2);" in page and "## mnist\n" in page
    (lacking,) = (line for line in page.splitlines() if line.startswith("- mnist, `contrastive`: "))
    assert (
        "/32/2m" not in lacking and "anchor-itq/32/4m (seed 0, seed 1, seed 2)" in lacking and "## digits" not in page
    )


def put_images(folder: Path, sizes: list[tuple[str, int, int]], archive: str) -> None:
    """Write an archive of images of coloured blocks, with these names, widths and heights."""
    rng = np.random.default_rng(0)
    (folder / archive).parent.mkdir(parents=True)
    with tarfile.open(folder / archive, "w:gz") as tar:
        for name, width, height in sizes:
            blocks = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
            file = io.BytesIO()
            blocks.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
            entry = tarfile.TarInfo(name)
            entry.size = len(file.getvalue())
            tar.addfile(entry, io.BytesIO(file.getvalue()))


def test_local_files_are_measured(rows: Rows, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "mnist").mkdir(parents=True)
    digits, labels = (load_digits().images * 15).astype(np.uint8), load_digits().target.astype(np.uint8)
    for part, chosen in (("train", slice(0, 100)), ("t10k", slice(100, 130))):
        for name, array in ((f"{part}-images-idx3", digits[chosen]), (f"{part}-labels-idx1", labels[chosen])):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (data / f"mnist/{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    names = [f"{part}/{i % 4}/{i:04}.jpg" for part, n in (("train", 1000), ("test", 100)) for i in range(n)]
    put_images(data, [(name, 32, 32) for name in names], "cifar10/cifar10-jpeg.tar.gz")
    names = [f"photos/{i % 3}/{i:02}.jpg" for i in range(20)]
    put_images(data, [(name, 90 + i, 80) for i, name in enumerate(names)], "photos/photos.tar.gz")

    results = {row["data"]: row for row in rows("--data", str(data), "--rows", "[mcp]*/lsh/lsh/64/none/0", "--json")}
    assert list(results) == ["mnist", "cifar10", "cifar10-1k-59k", "photos"]
    assert [row["queries"] for row in results.values()] == [30, 100, 1000, 20]
    assert [row["health"]["codes"] for row in results.values()] == [100, 1000, 100, 20]
    assert [row["images"] for row in results.values()] == [100, 1000, 100, 20]
    copies = results["photos"]["near_duplicates"]
    assert list(copies) == ["crop", "resize", "JPEG 40", "brightness", "rotation", "all"]
    assert copies["resize"] > 0.9 > copies["crop"] > 0.1 and copies["all"] == pytest.approx(
        np.mean(list(copies.values()))
    )
    rows("--write")
    page = (tmp_path / "page.md").read_text()
    assert "| 64 | lsh (JPEG copy) | lsh | none | 1 |" in page and f"| {copies['resize']:.3f} |" in page


def test_perceptual_hashes_are_measured(rows: Rows, tmp_path: Path) -> None:
    pytest.importorskip("imagehash", reason="imagehash comes with the extra bench")
    put_images(tmp_path, [(f"photos/{i % 3}/{i:02}.jpg", 90, 80) for i in range(20)], "photos/photos.tar.gz")
    results = rows("--data", str(tmp_path), "--rows", "photos/?hash/*", "--json")
    assert [row["model"] for row in results] == ["dhash", "phash"]
    assert all(row["near_duplicates"]["JPEG 40"] == 1 and row["health"]["distinct_codes"] == 20 for row in results)


def test_photos_must_be_files(rows: Rows) -> None:
    with pytest.raises(HashretError, match="give --data DIR"):
        rows("--rows", "photos/*")
