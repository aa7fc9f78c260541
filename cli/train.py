"""hashret train: train a model on images."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashret.cli.common import (
    Bits,
    CollectionFolder,
    DataRoot,
    Quiet,
    Seed,
    Source,
    UsageError,
    check_writable,
    command_line,
    say,
    usage,
)
from hashret.cli.fitting import fit
from hashret.errors import HashretError, format_count
from hashret.models import DEFAULT_MODEL, MODELS

if TYPE_CHECKING:
    from hashret.hasher import Hasher
    from hashret.training.options import TrainingOptions

CHECKPOINT = "training.checkpoint"  # in the collection, until it has items


def _model_names() -> list[str]:
    return list(MODELS)


def _head_names() -> list[str]:
    from hashret.heads import HEADS

    return list(HEADS)


def train(
    source: Source,
    model: Annotated[
        str,
        typer.Option(help="The model: a member of the family, or a baseline such as itq.", autocompletion=_model_names),
    ] = DEFAULT_MODEL,
    head: Annotated[
        str | None,
        typer.Option(
            help="How real-valued outputs become bits, such as itq. [default: the model's own]",
            autocompletion=_head_names,
        ),
    ] = None,
    bits: Bits = 64,
    budget: Annotated[str | None, typer.Option(help="Training time, such as 90s, 2m or 1h. [default: 2m]")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images, instead of --budget.", min=1)] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Training steps, instead of --budget: repeats exactly. 0 with --init fits the head alone.", min=0
        ),
    ] = None,
    seed: Seed = 0,
    labels: Annotated[
        bool, typer.Option("--labels", help="Use the labels of the images, for models that learn from labels.")
    ] = False,
    verdicts: Annotated[
        bool, typer.Option("--verdicts", help="Learn from the collection's verdicts too (hashret verdict).")
    ] = False,
    init: Annotated[
        Path | None,
        typer.Option("--init", metavar="MODEL_DIR", help="Start from the weights and settings of this model."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH to resize images to. [default: chosen from the images]")
    ] = None,
    limit: Annotated[int, typer.Option(help="Images to train on at most, drawn at random.", min=1)] = 100_000,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the model, such as network=mlp; repeatable."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step. [default: the model's own]", min=2)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate. [default: the model's own]", min=0.0, max=10.0)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", metavar="MODEL_DIR", help="Write the model to this folder instead of the collection."),
    ] = None,
    collection: CollectionFolder = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the network first: for long trainings on a GPU.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted training from its checkpoint.")
    ] = False,
    root: DataRoot = None,
    quiet: Quiet = False,
) -> int:
    """Train a model on the images of SOURCE.

    Labels are not used without --labels. The model goes into the collection, which must not have items yet, or with -o
    into a folder of its own.
    """
    from hashret.cli.model import load
    from hashret.collection import locate
    from hashret.data.sources import open_source

    if sum(value is not None for value in (budget, epochs, steps)) > 1:
        raise UsageError("give one of --budget, --epochs and --steps")
    hasher = _new_hasher(model, bits, head, setting or [])
    folder = locate(collection)
    output = None if output is None else output.resolve()
    checkpoint = folder / CHECKPOINT if output is None else Path(f"{output}.checkpoint")
    options = _training_options(
        budget=budget,
        epochs=epochs,
        steps=steps,
        seed=seed,
        size=parse_size(size),
        limit=limit,
        batch=batch,
        learning_rate=learning_rate,
        compiled=compiled,
        checkpoint=checkpoint,
        resume=resume,
    )
    _check_target(output, folder)
    pairs = labelled_pairs(folder) if verdicts else None
    initial = None if init is None else load(init, None)
    opened = open_source(source, data_root=root, exclude=folder)
    interrupted = fit(hasher, opened, source, options, quiet, labels=labels, pairs=pairs, init=initial)
    if output is not None:
        hasher.save(output)
        say(f"model in {output}; to encode a collection with it: {command_line('reindex', output)}", quiet)
    else:
        check_no_items(folder)  # another process may have added some meanwhile
        store_model(folder, hasher)
        say(f"model in {folder}; next: {command_line('index', source, collection=collection)}", quiet)
    if interrupted:
        say(f"hashret: interrupted at {interrupted}; the model is usable, and --resume continues from there")
        return 130
    checkpoint.unlink(missing_ok=True)
    return 0


def _new_hasher(model: str, bits: int, head: str | None, settings: list[str]) -> "Hasher":
    """Return an untrained hasher; raise a usage error for a wrong name or value."""
    with usage():
        checked = MODELS.check(model, bits, head, parse_settings(settings))

        from hashret.hasher import Hasher  # after the check, as importing PyTorch takes seconds

        return Hasher(model, bits, head, **checked)


def _training_options(size: tuple[int, int] | None, **options: Any) -> "TrainingOptions":
    """Return the options of a training; raise a usage error for impossible values."""
    from hashret.data.preprocessing import ImagePreprocessing
    from hashret.training.options import TrainingOptions

    with usage("--size"):
        if size is not None:
            ImagePreprocessing(*size, channels=1)
    with usage():
        return TrainingOptions(size=size, **options)


def _check_target(output: Path | None, folder: Path) -> None:
    """Raise HashretError unless the model can be written: to `output`, or else to the collection at `folder`."""
    from hashret.model_folder import FILES

    if output is None:
        check_no_items(folder)
    elif output.is_dir() and not {file.name for file in output.iterdir()} <= FILES:
        raise HashretError(f"{output} holds other files than a model: choose another folder")
    check_writable(output or folder)


def labelled_pairs(folder: Path) -> "list[tuple[Any, Any, bool]]":
    """Return the labelled pairs of the collection at `folder` whose images can still be read; raise HashretError if
    there are none."""
    from hashret.collection import Collection

    with Collection.open(folder, read_only=True) as collection:
        pairs = collection.judged()
    if not pairs:
        raise HashretError(f"{folder} has no verdicts to learn from: record some with hashret verdict")
    return list(pairs)


def check_no_items(folder: Path) -> None:
    """Raise HashretError if the collection at `folder` has items, whose codes would not be those of a new model."""
    from hashret.collection import Collection

    if Collection.exists(folder):
        with Collection.open(folder, read_only=True) as collection:
            if len(collection):
                items = format_count(len(collection), "item")
                raise HashretError(
                    f"the collection at {folder} has {items} of another model: train with -o MODEL_DIR, then run "
                    f"hashret reindex MODEL_DIR"
                )


def store_model(folder: Path, hasher: "Hasher", index: str | None = None) -> None:
    """Create a collection at `folder` with this model, or switch the one there, which has no items, to it."""
    from hashret.collection import Collection

    if not Collection.exists(folder):
        Collection.create(folder, hasher, index or "bitflip").close()
        return
    with Collection.open(folder) as collection:
        collection.reindex(hasher)


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE texts; a value that is not JSON is a string."""
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"a setting is KEY=VALUE, not {text!r}")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse HEIGHTxWIDTH, or one number for both; raise a usage error for anything else."""
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdigit() and (width or height).isdigit() and int(height) and int(width or height)):
        raise UsageError(f"--size: a size is HEIGHTxWIDTH such as 64x64, not {text!r}")
    return int(height), int(width or height)
