"""How long, and how, a model is trained: the same options in Python and on the command line."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

DEFAULT_BUDGET = 120.0  # seconds, where neither steps nor epochs nor a budget are given


@dataclass(frozen=True)
class TrainingOptions:
    """The options of one training. At most one of `steps`, `epochs` and `budget` (seconds, or text such as "90s", "2m"
    or "1h") sets its length; without any, it takes two minutes. Raises ValueError for impossible values.

    `batch` images a step, `learning_rate` at its peak and `weight_decay` are the member's own where they are None.
    `compiled` compiles the forward pass first, which takes a minute and pays off in long trainings on a GPU. `size` is
    the (height, width) that images are resized to, chosen from the images if None; at most `limit` images, drawn with
    `seed`, are held in memory. With `resume` the training continues from `checkpoint`, where it is saved from time to
    time and when it is interrupted.
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
        for name, least in (("steps", 0), ("epochs", 1), ("batch", 2), ("seed", 0)):
            value = getattr(self, name)
            if (value is not None or name == "seed") and (type(value) is not int or not least <= value < 2**32):
                raise ValueError(f"{name} must be a whole number from {least} to 2³² − 1, not {value!r}")
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
        """The time that a training without a number of steps or epochs may take."""
        return DEFAULT_BUDGET if self.budget is None else parse_duration(self.budget)


def parse_duration(text: str | float) -> float:
    """Seconds from a number of seconds or a text such as "90", "90s", "2m", "1.5h"; raises ValueError for others."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text).strip())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"a budget is a time such as 90s, 2m or 1h, not {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
