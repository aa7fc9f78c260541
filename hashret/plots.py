"""Pictures of codes, latents and results."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hashret.images import decode, to_content

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hashret.collection import Hit

INK, QUIET, ACCENT = "#1c2430", "#6b7684", "#2f6fdb"


def contact_sheet(query: str | os.PathLike[str], hits: "Sequence[Hit]", path: str | os.PathLike[str]) -> None:
    """Write a picture of a query image beside its neighbours, nearest first, each under its distance and label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(5, max(1, len(hits)))
    rows = max(2, -(-len(hits) // columns))
    figure = Figure(figsize=(1.45 * (columns + 2.2), 1.75 * rows + 0.5), facecolor="white", layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[2.2, columns], wspace=0.04)[0]

    axes = left.subplots()
    _picture(axes, query)
    axes.set_title("query", color=ACCENT, fontsize=12, fontweight="bold", loc="left")
    for spine in axes.spines.values():
        spine.set(visible=True, color=ACCENT, linewidth=2)
    axes.set_xlabel(Path(query).name, color=QUIET, fontsize=9)

    grid = right.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(hits) :]:
        axes.axis("off")
    for axes, hit in zip(grid, hits, strict=False):
        _picture(axes, hit.path)
        bits = "1 bit" if hit.distance == 1 else f"{hit.distance} bits"
        axes.set_title(bits, color=INK, fontsize=10, loc="left")
        if hit.label is not None:
            axes.set_title(hit.label, color=QUIET, fontsize=10, loc="right")
    FigureCanvasAgg(figure)
    figure.savefig(path, metadata={"Software": "hashret"})


def _picture(axes: "Axes", image: str | os.PathLike[str] | None) -> None:
    assert image is not None
    pixels = decode(to_content(image)).pixels
    small = max(pixels.shape[:2]) < 100
    axes.imshow(
        np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels,
        interpolation="nearest" if small else "antialiased",
    )
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=False)
