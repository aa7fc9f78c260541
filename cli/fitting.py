"""Train a hasher with a progress bar, and print its options and the settings that it chose, for `train` and `index`."""

from typing import TYPE_CHECKING, Any

from hashret.cli.common import progress, say
from hashret.errors import format_count
from hashret.models import MODELS

if TYPE_CHECKING:
    from hashret.data import records
    from hashret.hasher import Hasher
    from hashret.parallel import Progress
    from hashret.training.options import TrainingOptions


def fit(
    hasher: "Hasher",
    source: "records.Source",
    name: str,
    options: "TrainingOptions",
    quiet: bool,
    **learning: Any,
) -> str | None:
    """Train on a source called `name` with a progress bar, and print the options and settings. Return the step at
    which the training was interrupted, or None."""
    announced = False
    with progress(quiet) as show:

        def report(update: "Progress") -> None:
            nonlocal announced
            if update.stage == "training" and not announced:  # images and options are known to be sound by then
                say(_describe_request(hasher, name, options), quiet)
                announced = True
            show(update)

        hasher.fit(source, options, progress=report, **learning)
    if not announced:  # as a model without a network has no training stage
        say(_describe_request(hasher, name, options), quiet)
    say(_describe_training(hasher), quiet)
    if choices := _describe_choices(hasher):
        say(choices, quiet)
    record = hasher.training
    return f"step {record['steps']:,} of {record['planned']:,}" if record.get("interrupted") else None


def _describe_request(hasher: "Hasher", source: str, options: "TrainingOptions") -> str:
    """Describe a requested training."""
    length = ""
    if MODELS[hasher.model].trainable:
        if options.steps is not None:
            length = f", {format_count(options.steps, 'step')}"
        elif options.epochs is not None:
            length = f", {format_count(options.epochs, 'epoch')}"
        else:
            length = f", budget {options.seconds:g} s"
    codes = f"{hasher.bits}-bit codes, head {hasher.head}"
    return f"training {hasher.model} on {source}: {codes}{length}, seed {options.seed}"


def _describe_training(hasher: "Hasher") -> str:
    """Describe the training images of a finished training, and its length."""
    record = hasher.training
    sampled = f"{record['images']:,} of " if record["images"] < record["images_seen"] else ""
    inputs = f"{sampled}{record['images_seen']:,} {hasher.preprocessing.describe()}"  # "1,597 images of 8 × 8 × 1"
    length = ""
    if "steps" in record:
        steps = format_count(record["steps"], "step")
        length = f" in {record['seconds']:.0f} s: {steps} of {format_count(record['batch'], 'image')}"
    unreadable = f"; {record['unreadable']:,} unreadable" if record["unreadable"] else ""
    return f"trained on {inputs}{length}{unreadable}"


def _describe_choices(hasher: "Hasher") -> str:
    """Describe the network, the views of the augmentation, and the settings that are not the defaults; "" if none."""
    settings, defaults = dict(hasher.settings), MODELS.settings(hasher.model)
    network = settings.pop("network", None)
    views = {key.removeprefix("view_"): value for key, value in hasher.training.items() if key.startswith("view_")}
    changed = {key: value for key, value in settings.items() if value != defaults.get(key) and key not in views}
    parts = {
        "network": network or "",
        "views": ", ".join(f"{key} {value:g}" for key, value in views.items()),
        "settings": ", ".join(f"{key}={value}" for key, value in changed.items()),
    }
    return "; ".join(f"{name} {text}" for name, text in parts.items() if text)
