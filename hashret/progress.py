"""How far long work has come: what training, indexing and the rest tell whoever watches."""

from typing import NamedTuple


class Progress(NamedTuple):
    """How far long work has come."""

    stage: str  # "reading", "training", "indexing"
    done: int
    total: int | None  # None when it is not known
    terms: dict[str, float]  # numbers worth watching, such as the running mean of each loss term
