"""hashret eval: what the codes of a model are worth, by a named protocol."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashret.cli.common import CollectionFolder, DataRoot, Json, Quiet, progress, say, usage

if TYPE_CHECKING:
    from hashret.evaluation.protocols import Evaluation

NAMES = "mnist, fashion-mnist, cifar10, cifar10-1k-59k, digits or split"


def evaluate(
    target: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL_DIR] PROTOCOL|SOURCE",
            help=f"A model (default: the collection's); and {NAMES}, or a labelled source, each image of which is "
            "asked for among the others.",
        ),
    ],
    train: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="The training images of the protocol, from here.")
    ] = None,
    test: Annotated[str | None, typer.Option(metavar="SOURCE", help="Its test images, from here.")] = None,
    root: DataRoot = None,
    collection: CollectionFolder = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure how well codes find the images that have the label of a query, and how healthy the codes are."""
    from hashret.cli.model import load
    from hashret.evaluation import protocols

    *model_dir, name = target
    if len(model_dir) > 1:
        raise typer.BadParameter("give one model at most, and one protocol or source")
    with usage("--train and --test"):
        protocol = protocols.choose_protocol(name, train, test)
    hasher = load(Path(model_dir[0]) if model_dir else None, collection)
    with progress(quiet) as show:
        evaluation = protocols.evaluate(hasher, protocol, data_root=root, progress=show)
    learned = hasher.training["source"]
    if not protocol.n_queries and learned != evaluation.roots[0]:
        asked = f"the protocol's do from {evaluation.roots[0]}: say so with the figures"
        say(f"hashret: this model learned from {learned}, {asked}", quiet)
    origin = {
        "model": f"{hasher.model}, {hasher.bits} bits, head {hasher.head}",
        "learned from": f"{hasher.training['images']:,} images from {learned}",
        "protocol": f"{name}: {protocol.description}",
    }
    if as_json:
        more = {"fingerprint": hasher.fingerprint, "choices": protocols.CHOICES}
        print(json.dumps(origin | more | as_document(evaluation)))
    else:
        print_table(origin, evaluation, protocols.CHOICES)
    return 0


def as_document(evaluation: "Evaluation") -> dict[str, Any]:
    """What was measured, and of what, as JSON has it."""
    return {
        "sources": evaluation.roots,
        "queries": evaluation.queries,
        "left out": evaluation.left_out,
        "unreadable": evaluation.unreadable,
        "measures": evaluation.measures,
        "health": health(evaluation),
    }


def print_table(origin: dict[str, str], evaluation: "Evaluation", choices: dict[str, str]) -> None:
    """What was measured under what it was measured of, and how, for people."""
    queries = (
        f"{evaluation.queries:,}; {evaluation.left_out:,} images left out that have no label, or one that no other "
        f"has; {evaluation.unreadable:,} unreadable"
    )
    for key, text in (origin | {"sources": ", ".join(evaluation.roots), "queries": queries} | choices).items():
        print(f"{key:<14}{text}")
    print()
    for key, value in (evaluation.measures | health(evaluation)).items():
        print(f"{key:<26}{value:>12,}" if isinstance(value, int) else f"{key:<26}{value:>12.4f}")


def health(evaluation: "Evaluation") -> dict[str, float]:
    """The health of the codes by names with spaces."""
    return {field.replace("_", " "): value for field, value in evaluation.health._asdict().items()}
