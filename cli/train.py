"""hashret train: learn a model from images."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashret.cli.common import CollectionFolder, DataRoot, Quiet, Source, check_writable, progress, say, usage
from hashret.errors import HashretError
from hashret.models import DEFAULT_MODEL, MODELS

if TYPE_CHECKING:
    from hashret.data import records
    from hashret.hasher import Hasher
    from hashret.training.options import TrainingOptions


def train(
    source: Source,
    model: Annotated[str, typer.Option(help="A member of the family, or a baseline such as itq.")] = DEFAULT_MODEL,
    head: Annotated[str | None, typer.Option(help="How real numbers become bits: default the member's own.")] = None,
    bits: Annotated[int, typer.Option(help="Bits of a code: a multiple of 8 from 8 to 1024.")] = 64,
    budget: Annotated[str | None, typer.Option(help="How long to train, such as 90s, 2m or 1h. [default: 2m]")] = None,
    epochs: Annotated[int | None, typer.Option(help="Instead: passes over the images.", min=1)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Instead: steps; repeats exactly. 0 with --init: only the head.", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all randomness.", min=0, max=2**31 - 1)] = 0,
    labels: Annotated[
        bool, typer.Option("--labels", help="Learn from the labels too, with a member that does.")
    ] = False,
    verdicts: Annotated[
        bool, typer.Option("--verdicts", help="Learn from the collection's verdicts too: hashret verdict.")
    ] = False,
    init: Annotated[
        Path | None,
        typer.Option("--init", metavar="MODEL_DIR", help="Begin with this model: its weights and settings."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH that images are resized to.")] = None,
    limit: Annotated[int, typer.Option(help="Images held in memory to learn from, drawn at random.", min=1)] = 100_000,
    setting: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images in a step, if not the model's own.", min=2)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its peak, if not the model's own.", min=0.0, max=10.0)
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", metavar="MODEL_DIR", help="Write the model here.")] = None,
    collection: CollectionFolder = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile it first: for long trainings on a GPU.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted training stopped.")] = False,
    root: DataRoot = None,
    quiet: Quiet = False,
) -> int:
    """Learn a model from the images of SOURCE, without labels unless --labels says so.

    The model goes into the collection, which must have no items yet, or with -o into a folder of its own.
    """
    from hashret.collection import locate
    from hashret.data.preprocessing import ImagePreprocessing
    from hashret.data.sources import open_source

    with usage("model, head, bits or settings"):
        settings = MODELS.check(model, bits, head, parse_settings(setting or []))

    from hashret.hasher import Hasher  # late: PyTorch takes seconds
    from hashret.model_folder import FILES
    from hashret.training.options import TrainingOptions

    with usage("model, head, bits or settings"):
        hasher = Hasher(model, bits, head, **settings)
    shape = parse_size(size)
    with usage("--size"):
        if shape is not None:
            ImagePreprocessing(*shape, channels=1)
    place = locate(collection)
    output = None if output is None else output.resolve()
    checkpoint = place / "training.checkpoint" if output is None else Path(f"{output}.checkpoint")
    if sum(value is not None for value in (budget, epochs, steps)) > 1:
        raise typer.BadParameter("give one of --budget, --epochs and --steps")
    with usage("--budget"):
        options = TrainingOptions(
            budget=budget,
            epochs=epochs,
            steps=steps,
            seed=seed,
            size=shape,
            limit=limit,
            batch=batch,
            learning_rate=learning_rate,
            compiled=compiled,
            checkpoint=checkpoint,
            resume=resume,
        )
    if output is None:
        refuse_items(place)
    elif output.is_dir() and not {file.name for file in output.iterdir()} <= FILES:
        raise HashretError(f"{output} holds something else than a model: choose another folder")
    check_writable(output or place)
    pairs = judged_pairs(place) if verdicts else None
    begun = None if init is None else Hasher.load(init)
    opened = open_source(source, data_root=root, exclude=place)
    interrupted = fit(hasher, opened, options, quiet, labels=labels, pairs=pairs, init=begun)
    if output is not None:
        hasher.save(output)
        say(f"model in {output}: hashret reindex {output} codes a collection with it", quiet)
    else:
        refuse_items(place)  # which another process may have put there meanwhile
        put_model(place, hasher)
        say(f"model in {place}: next, hashret index {source}", quiet)
    if interrupted:
        say(f"hashret: interrupted at {interrupted}; the model is usable, and --resume goes on from there")
        return 130
    checkpoint.unlink(missing_ok=True)
    return 0


def fit(
    hasher: "Hasher", source: "records.Source", options: "TrainingOptions", quiet: bool, **learning: Any
) -> str | None:
    """Train with a progress bar; where it was interrupted, if it was."""
    with progress(quiet) as show:
        hasher.fit(source, options, progress=show, **learning)
    told = hasher.training
    of = f"{told['images']:,} of {told['images_seen']:,} images" if told["images"] < told["images_seen"] else ""
    of = of or f"{told['images']:,} images"
    how = f" in {told['seconds']:.0f} s, {told['steps']:,} steps" if "steps" in told else ""
    lost = f", {told['unreadable']:,} unreadable" if told["unreadable"] else ""
    say(f"learned {hasher.bits}-bit codes with {hasher.model} from {of}{how}{lost}", quiet)
    return f"step {told['steps']:,} of {told['planned']:,}" if told.get("interrupted") else None


def judged_pairs(place: Path) -> "list[tuple[Any, Any, bool]]":
    """What was judged in the collection at `place`, of what can still be read; HashretError if that is nothing."""
    from hashret.collection import Collection

    with Collection.open(place, read_only=True) as there:
        pairs = there.judged()
    if not pairs:
        raise HashretError(f"there are no verdicts in {place} to learn from: say some with hashret verdict")
    return list(pairs)


def refuse_items(place: Path) -> None:
    """Raises HashretError if the collection at `place` has items, which a new model would not fit."""
    from hashret.collection import Collection

    if Collection.exists(place):
        with Collection.open(place, read_only=True) as there:
            if len(there):
                raise HashretError(
                    f"the collection at {place} has {len(there):,} items of another model: train with -o MODEL_DIR, "
                    f"then run hashret reindex MODEL_DIR"
                )


def put_model(place: Path, hasher: "Hasher", index: str | None = None) -> None:
    """Make the collection at `place`, or give the one there, which has no items, this model."""
    from hashret.collection import Collection

    if not Collection.exists(place):
        Collection.create(place, hasher, index or "bitflip").close()
        return
    with Collection.open(place) as there:
        there.reindex(hasher)


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """Settings from KEY=VALUE texts; a value that is no JSON is taken as text."""
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
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdigit() and (width or height).isdigit() and int(height) and int(width or height)):
        raise typer.BadParameter(f"a size is HEIGHTxWIDTH such as 64x64, not {text!r}", param_hint="--size")
    return int(height), int(width or height)
