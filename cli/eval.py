"""hashret eval: what the codes of a model are worth, by a named protocol."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hashret.cli.common import CollectionFolder, DataRoot, Json, Quiet, progress, say, usage

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
        done = protocols.evaluate(hasher, protocol, data_root=root, progress=show)
    learned = hasher.training["source"]
    if not protocol.drawn and learned != done.roots[0]:
        asked = f"the protocol's do from {done.roots[0]}: say so with the figures"
        say(f"hashret: this model learned from {learned}, {asked}", quiet)
    told: dict[str, Any] = {
        "model": f"{hasher.model}, {hasher.bits} bits, head {hasher.head}",
        "learned from": f"{hasher.training['images']:,} images from {learned}",
        "protocol": f"{name}: {protocol.text}",
        "sources": done.roots,
    }
    health = {field.replace("_", " "): value for field, value in done.health._asdict().items()}
    if as_json:
        told |= {"queries": done.queries, "left out": done.left_out, "unreadable": done.unreadable}
        told |= {"fingerprint": hasher.fingerprint, "choices": protocols.CHOICES}
        print(json.dumps(told | {"measures": done.measures, "health": health}))
        return 0
    told["sources"] = ", ".join(done.roots)
    told["queries"] = (
        f"{done.queries:,}; {done.left_out:,} images left out that have no label, or one that no other has; "
        f"{done.unreadable:,} unreadable"
    )
    for key, value in (told | protocols.CHOICES).items():
        print(f"{key:<14}{value}")
    print()
    for key, value in (done.measures | health).items():
        print(f"{key:<26}{value:>12,}" if isinstance(value, int) else f"{key:<26}{value:>12.4f}")
    return 0
