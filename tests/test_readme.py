"""The README is tested: its commands and its example run."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from hashret.cli.app import run
from hashret.heads import HEADS
from hashret.models import MODELS
from hashret.models.likelihoods import LIKELIHOODS

README = Path(__file__).parent.parent / "README.md"
FAMILY, COLLECTION = (README.parent / "docs" / name for name in ("family.md", "collection.md"))


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where `hashret demo` has been, and where the photos lie that the examples speak of."""
    monkeypatch.chdir(tmp_path)
    assert run(["demo", "--quiet", "--budget", "1s"]) == 0
    (tmp_path / "photos").symlink_to("hashret-demo/photos")
    (tmp_path / "cat.png").symlink_to("hashret-demo/queries/3/0003.png")
    return tmp_path


def test_every_command_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"^\$ (hashret .*)$", "\n".join(blocks("console")), re.MULTILINE)
    assert [shlex.split(command)[1] for command in commands] == ["train", "index", "query", "info"]
    capsys.readouterr()
    for command in commands:
        assert run(shlex.split(command.replace("--budget 20s", "--steps 3"))[1:]) == 0, command
        told = capsys.readouterr()
        assert told.err if "train" in command or "index" in command else told.out, command


def test_the_python_example_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python")
    assert 'budget="2m"' in example
    exec(example.replace('budget="2m"', "steps=3"), {})
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_every_command_of_the_family_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("noisy.png", "small.png"):
        (home / name).symlink_to("cat.png")
    np.save(home / "embeddings.npy", np.random.default_rng(0).normal(size=(300, 32)))
    np.save(home / "new.npy", np.random.default_rng(1).normal(size=32))
    for line in "".join(blocks("", FAMILY)).splitlines():
        words = shlex.split(line, comments=True)[1:]
        quick = ["--steps", "2", "--set", "width=2"] if words[0] == "train" else []
        assert run([*words, *quick]) == 0, (line, capsys.readouterr().err)
    assert {path.name for path in home.glob("*.png")} > {"reconstructions.png", "samples.png"}
    assert {path.name for path in home.glob("*.*.png")} == {"noisy.denoised.png", "small.upscaled.png"}


def test_every_command_of_a_collection_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"3/{path.name},{i}" for i, path in enumerate((home / "photos/3").iterdir())]
    (home / "about.csv").write_text("\n".join(["path,price", *names]))
    assert run(["train", "photos", "--steps", "3"]) == 0
    (block,) = blocks("", COLLECTION)
    for line in block.replace("--target 0.8", "--target 0.01").splitlines():  # so little was learned
        assert run(shlex.split(line, comments=True)[1:]) == 0, (line, capsys.readouterr().err)
    assert {path.name for path in home.glob("*.*")} >= {"radius.png", "judged.csv", "items.jsonl"}


def test_every_member_and_part_is_in_the_table() -> None:
    told = set(re.findall(r"`([^`\s]+)`", FAMILY.read_text("utf-8")))
    assert told >= {*MODELS, *LIKELIHOODS, *HEADS, "mlp", "conv"}


def test_make_knows_every_target_that_is_named() -> None:
    targets = set(re.findall(r"`?make (\w+)`?", README.read_text()))
    makefile = (README.parent / "Makefile").read_text()
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
