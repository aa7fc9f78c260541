"""The options of a training, which are the same in Python and on the command line."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

DEFAULT_BUDGET = 120.0  # seconds


@dataclass(frozen=True)
class TrainingOptions:
    """The options of a training run. Raise ValueError for invalid values.

    At most one of `steps`, `epochs` and `budget` (seconds, or text such as "90s", "2m" or "1h") sets the length; the
    default is a budget of two minutes. `batch` (images per step), `learning_rate` (at its peak) and `weight_decay` are
    the member's defaults if None. `compiled` compiles the forward pass before training, which takes a minute and pays
    off in long trainings on a GPU. `size` is the (height, width) that images are resized to, chosen from the images if
    None. At most `limit` images, drawn with `seed`, are held in memory. The training is saved to `checkpoint` every 30
    seconds and when it is interrupted; with `resume` it continues from there.
    """

    steps: int | None = None
    epochs: int | None = None
    budget: str | float | None = None
    seed: int = 0
    batch: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    compiled: bool = False
    size: tuple[int, int] | None = None
    limit: int = 100_000
    checkpoint: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.budget, self.steps, self.epochs)) > 1:
            raise ValueError("give one of budget, steps and epochs")
        for name, minimum in (("steps", 0), ("epochs", 1), ("batch", 2), ("seed", 0)):
            value = getattr(self, name)
            if (value is not None or name == "seed") and (type(value) is not int or not minimum <= value < 2**32):
                raise ValueError(f"{name} must be a whole number from {minimum} to 2³² − 1, not {value!r}")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number from 0, not {value!r}")
        if self.budget is not None:
            parse_duration(self.budget)
        if self.resume and self.checkpoint is None:
            raise ValueError("resume needs a checkpoint to resume from")

    @property
    def seconds(self) -> float:
        """The time budget of a training whose number of steps or epochs is not set."""
        return DEFAULT_BUDGET if self.budget is None else parse_duration(self.budget)


def parse_duration(text: str | float) -> float:
    """Return the seconds of a number of seconds or a text such as "90", "90s", "2m" or "1.5h". Raise ValueError for any
    other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text).strip())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"a budget is a time such as 90s, 2m or 1h, not {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
