import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hashret.cli.app import run
from hashret.cli.eval import NAMES
from hashret.collection import Collection
from hashret.evaluation.protocols import CHOICES, PROTOCOLS, choose_protocol, evaluate
from hashret.hasher import Hasher

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of digits in folders, a collection of them, and another model."""
    folder, digits = tmp_path_factory.mktemp("eval"), load_digits()
    for i in range(60):
        path = folder / f"photos/{digits.target[i]}/{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(path)
    Hasher("pca", 16).fit(folder / "photos").save(folder / "other")
    with Collection.create(folder / ".hashret", Hasher("lsh", 32).fit(folder / "photos")) as collection:
        collection.index(folder / "photos")
    return folder


@pytest.fixture
def place(settled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.delenv("HASHRET_COLLECTION", raising=False)
    monkeypatch.chdir(settled)
    return settled


@pytest.fixture
def hashret(capsys: pytest.CaptureFixture[str]) -> Command:
    def command(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return command


def test_a_source_is_measured_with_the_collections_model(place: Path, hashret: Command) -> None:
    code, out, err = hashret("eval", "photos")
    assert code == 0 and not err
    done = evaluate(Hasher("lsh", 32).fit("photos"), choose_protocol("photos"))
    choices, figures = out.split("\n\n")
    told = dict(re.split("  +", line, maxsplit=1) for line in choices.splitlines())
    assert told["model"] == "lsh, 32 bits, head lsh" and told["sources"] == f"{place}/photos/"
    assert told["learned from"] == f"60 images from {place}/photos/"
    assert (
        told["protocol"]
        == "photos: leave-one-out: each image is a query against all others; all are in the training set"
    )
    assert told["queries"].startswith("60; 0 images left out") and told.keys() > CHOICES.keys()
    numbers = dict(re.split("  +", line) for line in figures.splitlines())
    assert numbers == {
        **{name: f"{value:.4f}" for name, value in done.measures.items()},
        **{
            name.replace("_", " "): str(value) if isinstance(value, int) else f"{value:.4f}"
            for name, value in done.health._asdict().items()
        },
    }


def test_a_model_is_measured_by_a_protocol_as_json(place: Path, hashret: Command) -> None:
    hasher = Hasher.load("other")
    for arguments, name, sources in (
        (["other", "digits"], "digits", PROTOCOLS["digits"].sources),
        (["other", "mnist", "--train", "digits:train", "--test", "photos"], "mnist", ("digits:train", "photos")),
        (["other", "split", "--train", "photos", "--test", "digits:test"], "split", ("photos", "digits:test")),
    ):
        code, out, err = hashret("eval", *arguments, "--json")
        told = json.loads(out)
        done = evaluate(hasher, PROTOCOLS[name]._replace(sources=sources))
        assert code == 0 and told["measures"] == done.measures and told["queries"] == done.queries
        assert told["health"]["distinct codes"] == done.health.distinct_codes and told["choices"] == CHOICES
        assert told["sources"] == done.roots and told["protocol"] == f"{name}: {PROTOCOLS[name].description}"
        assert told["fingerprint"] == hasher.fingerprint
        assert bool(err) == (sources[0] != "photos")
        assert not err or f"this model learned from {place}/photos/, the protocol's do from {done.roots[0]}:" in err


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["photos/1"], 1, "labels of 0 kinds, and two are the least to score by: put the images into a folder"),
        (["nowhere"], 1, "there is no 'nowhere'"),
        (["nowhere", "photos"], 1, "nowhere is no model folder"),
        (["-c", "empty", "photos"], 1, "no collection"),
        (["other", "other", "photos"], 2, "one model at most"),
        (["mnist", "--train", "photos"], 2, "--train SOURCE and --test SOURCE go together"),
        (["split"], 2, "--train SOURCE and --test SOURCE go together"),
        ([], 2, "Missing argument"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    place: Path, hashret: Command, arguments: list[str], code: int, reason: str
) -> None:
    failed, out, err = hashret("eval", *arguments)
    assert failed == code and not out
    assert re.fullmatch(f"hashret: .*{re.escape(reason)}.*\n", err), err


def test_the_help_names_every_protocol() -> None:
    assert set(re.findall("[a-z][a-z0-9-]+", NAMES)) - {"or"} == PROTOCOLS.keys()
