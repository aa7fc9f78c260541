"""Retrieval measures."""

from typing import Any

import numpy as np


def precision(relevant: Any) -> float:
    """Precision of k neighbours: the mean share of relevant ones, from a Boolean array-like (queries, k)."""
    return float(np.asarray(relevant, np.bool_).mean())
