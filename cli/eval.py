"""hashret eval: the retrieval quality of a model's codes, by a named protocol."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashret.cli.common import CollectionFolder, DataRoot, Json, Quiet, UsageError, progress, say, usage
from hashret.errors import format_count

if TYPE_CHECKING:
    from hashret.evaluation.protocols import Evaluation

NAMES = "mnist, fashion-mnist, cifar10, cifar10-1k-59k, digits or split"


def evaluate(
    target: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL_DIR] PROTOCOL|SOURCE",
            help=f"A model, by default the collection's, and a protocol ({NAMES}) or a labelled source, each image of "
            "which is a query among the others.",
        ),
    ],
    train: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="The training images, in place of the protocol's.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="The test images, in place of the protocol's.")
    ] = None,
    root: DataRoot = None,
    collection: CollectionFolder = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Evaluate the retrieval quality of a model's codes.

    Images with the label of the query are relevant. Prints mean average precision and other measures, and the health of
    the codes.
    """
    from hashret.cli.model import load
    from hashret.evaluation import protocols

    *model_dir, name = target
    if len(model_dir) > 1:
        raise UsageError("give one model at most, and one protocol or source")
    with usage():
        protocol = protocols.choose_protocol(name, train, test)
    hasher = load(Path(model_dir[0]) if model_dir else None, collection)
    with progress(quiet) as show:
        evaluation = protocols.evaluate(hasher, protocol, data_root=root, progress=show)
    trained_on = hasher.training["source"]
    if not protocol.n_queries and trained_on != evaluation.roots[0]:
        expected = f"the models of this protocol on {evaluation.roots[0]}"
        say(f"hashret: this model was trained on {trained_on}, {expected}: report that with the results", quiet)
    origin = {
        "model": f"{hasher.model}, {hasher.bits} bits, head {hasher.head}",
        "learned from": f"{format_count(hasher.training['images'], 'image')} from {trained_on}",
        "protocol": f"{name}: {protocol.description}",
    }
    if as_json:
        more = {"fingerprint": hasher.fingerprint, "choices": protocols.CHOICES}
        print(json.dumps(origin | more | as_document(evaluation)))
    else:
        print_table(origin, evaluation, protocols.CHOICES)
    return 0


def as_document(evaluation: "Evaluation") -> dict[str, Any]:
    """Return the measures, the health of the codes and the sources, for JSON."""
    return {
        "sources": evaluation.roots,
        "queries": evaluation.queries,
        "left out": evaluation.left_out,
        "unreadable": evaluation.unreadable,
        "measures": evaluation.measures,
        "health": health(evaluation),
    }


def print_table(origin: dict[str, str], evaluation: "Evaluation", choices: dict[str, str]) -> None:
    """Print the model, the protocol and its choices, then the measures."""
    queries = (
        f"{evaluation.queries:,}; {evaluation.left_out:,} left out that have no label, or are the only image with "
        f"theirs; {evaluation.unreadable:,} unreadable"
    )
    for key, text in (origin | {"sources": ", ".join(evaluation.roots), "queries": queries} | choices).items():
        print(f"{key:<14}{text}")
    print()
    for key, value in (evaluation.measures | health(evaluation)).items():
        print(f"{key:<26}{value:>12,}" if isinstance(value, int) else f"{key:<26}{value:>12.4f}")


def health(evaluation: "Evaluation") -> dict[str, float]:
    """Return the health of the codes by names with spaces."""
    return {field.replace("_", " "): value for field, value in evaluation.health._asdict().items()}
