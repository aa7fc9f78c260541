import json
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import Command
from PIL import Image
from sklearn.datasets import load_digits

from hashret.cli.eval import NAMES
from hashret.collection import Collection
from hashret.evaluation.protocols import CHOICES, PROTOCOLS, choose_protocol, evaluate
from hashret.hasher import Hasher


@pytest.fixture(scope="module")
def filled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with photos of digits, a collection of them, and another model."""
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
def folder(filled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, which no test changes."""
    monkeypatch.delenv("HASHRET_COLLECTION", raising=False)
    monkeypatch.chdir(filled_folder)
    return filled_folder


def test_the_model_of_the_collection_is_evaluated_on_a_source(folder: Path, hashret: Command) -> None:
    code, out, err = hashret("eval", "photos")
    assert code == 0 and not err
    expected = evaluate(Hasher("lsh", 32).fit("photos"), choose_protocol("photos"))
    origin, measures = out.split("\n\n")
    rows = dict(re.split("  +", line, maxsplit=1) for line in origin.splitlines())
    assert rows["model"] == "lsh, 32 bits, head lsh" and rows["sources"] == f"{folder}/photos/"
    assert rows["learned from"] == f"60 images from {folder}/photos/"
    assert (
        rows["protocol"]
        == "photos: leave-one-out: each image is a query against all others; all are in the training set"
    )
    assert rows["queries"].startswith("60; 0 left out that have no label") and rows.keys() > CHOICES.keys()
    values = dict(re.split("  +", line) for line in measures.splitlines())
    assert values == {
        **{name: f"{value:.4f}" for name, value in expected.measures.items()},
        **{
            name.replace("_", " "): str(value) if isinstance(value, int) else f"{value:.4f}"
            for name, value in expected.health._asdict().items()
        },
    }


def test_a_model_is_evaluated_by_a_protocol_as_json(folder: Path, hashret: Command) -> None:
    hasher = Hasher.load("other")
    for arguments, name, sources in (
        (["other", "digits"], "digits", PROTOCOLS["digits"].sources),
        (["other", "mnist", "--train", "digits:train", "--test", "photos"], "mnist", ("digits:train", "photos")),
        (["other", "split", "--train", "photos", "--test", "digits:test"], "split", ("photos", "digits:test")),
    ):
        code, out, err = hashret("eval", *arguments, "--json")
        document = json.loads(out)
        expected = evaluate(hasher, PROTOCOLS[name]._replace(sources=sources))
        assert code == 0 and document["measures"] == expected.measures and document["queries"] == expected.queries
        assert document["health"]["distinct codes"] == expected.health.distinct_codes and document["choices"] == CHOICES
        assert (
            document["sources"] == expected.roots and document["protocol"] == f"{name}: {PROTOCOLS[name].description}"
        )
        assert document["fingerprint"] == hasher.fingerprint
        assert bool(err) == (sources[0] != "photos")
        assert not err or err == (
            f"hashret: this model was trained on {folder}/photos/, the models of this protocol on "
            f"{expected.roots[0]}: report that with the results\n"
        )


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["photos/1"], 1, "0 different labels, and scoring needs at least two: put the images"),
        (["nowhere"], 1, "there is no 'nowhere'"),
        (["nowhere", "photos"], 1, "nowhere is no model folder"),
        (["-c", "empty", "photos"], 1, "no collection"),
        (["other", "other", "photos"], 2, "one model at most"),
        (["mnist", "--train", "photos"], 2, "--train SOURCE and --test SOURCE go together"),
        (["split"], 2, "--train SOURCE and --test SOURCE go together"),
        ([], 2, "Missing argument"),
    ],
)
def test_evaluations_that_are_impossible_are_refused_in_one_line(
    folder: Path, hashret: Command, arguments: list[str], code: int, reason: str
) -> None:
    failed, out, err = hashret("eval", *arguments)
    assert failed == code and not out
    assert re.fullmatch(f"hashret: .*{re.escape(reason)}.*\n", err), err


def test_the_help_names_every_protocol() -> None:
    assert set(re.findall("[a-z][a-z0-9-]+", NAMES)) - {"or"} == PROTOCOLS.keys()
