"""Pictures of codes, latents and results."""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, hamming
from hashret.data.images import decode, to_content
from hashret.durable import Replacement
from hashret.errors import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hashret.results import Hit

INK, QUIET, ACCENT, OTHER = "#1c2430", "#6b7684", "#2f6fdb", "#e07a3f"
MINOR_COLOURS = ("#5aa39a", "#b287b8", "#c2a13a", "#8a97a6", "#c97b84")  # of several less important curves
MAX_LEGEND_ROWS, MAX_LABEL = 20, 40  # of a column, and characters
PathLike = str | os.PathLike[str]
ImageBatch = NDArray[np.uint8]  # (n, height, width, 1 | 3)


def contact_sheet(query: PathLike, hits: "Sequence[Hit]", path: PathLike) -> None:
    """Write a picture of a query image beside its neighbours, nearest first, each below its distance and label."""
    columns = min(5, max(1, len(hits)))
    rows = max(2, -(-len(hits) // columns))
    figure = _figure(1.45 * (columns + 2.2), 1.75 * rows + 0.5)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[2.2, columns], wspace=0.04)[0]

    axes = left.subplots()
    _picture(axes, query)
    axes.set_title("query", color=ACCENT, fontsize=12, fontweight="bold", loc="left")
    for spine in axes.spines.values():
        spine.set(visible=True, color=ACCENT, linewidth=2)
    axes.set_xlabel(_plain(Path(query).name), color=QUIET, fontsize=9)

    grid = right.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(hits) :]:
        axes.axis("off")
    for axes, hit in zip(grid, hits, strict=False):
        _picture(axes, hit.path)
        axes.set_title(format_count(hit.distance, "bit"), color=INK, fontsize=10, loc="left")
        if hit.label is not None:
            axes.set_title(_plain(hit.label), color=QUIET, fontsize=10, loc="right")
    _save(figure, path)


def grid(
    images: ImageBatch, columns: int, path: PathLike, titles: Sequence[str] | None = None, title: str = ""
) -> None:
    """Write a picture of images, `columns` in a row, each below its title, if there are titles."""
    rows = -(-len(images) // columns)
    height = 0.9 if titles is None else 1.15
    figure = _figure(0.9 * columns, height * rows + 0.5 * bool(title))
    if title:
        figure.suptitle(title, color=INK, fontsize=11)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).ravel()):
        if i >= len(images):
            axes.axis("off")
            continue
        _show(axes, images[i])
        if titles is not None:
            axes.set_title(_plain(titles[i]), color=QUIET, fontsize=8, pad=2)
    _save(figure, path)


def pairs(above: ImageBatch, below: ImageBatch, path: PathLike, titles: Sequence[str], names: tuple[str, str]) -> None:
    """Write a picture of images above their counterparts, ten pairs in a row, each pair above its title."""
    columns = min(10, len(above))
    bands = -(-len(above) // columns)
    figure = _figure(1.05 * columns + 0.9, 2.35 * bands)
    subfigures = figure.subfigures(bands, 1, squeeze=False)[:, 0]
    for band, subfigure in enumerate(subfigures):
        for row, (images, name) in enumerate(zip((above, below), names, strict=True)):
            for column in range(columns):
                axes = subfigure.add_subplot(2, columns, row * columns + column + 1)
                i = band * columns + column
                if i >= len(images):
                    axes.axis("off")
                    continue
                _show(axes, images[i])
                if column == 0:
                    axes.set_ylabel(name, color=ACCENT if row else INK, fontsize=9)
                if row == 1:
                    axes.set_xlabel(_plain(titles[i]), color=QUIET, fontsize=8)
    _save(figure, path)


def curves(curve: Sequence[Mapping[str, float]], path: PathLike) -> None:
    """Write a picture of each loss term over the steps of a training (`hasher.training["curve"]`)."""
    terms = list(dict.fromkeys(name for point in curve for name in point if name != "step"))
    figure = _figure(4.2 * len(terms), 3)
    for axes, term in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms, strict=True):
        points = [(point["step"], point[term]) for point in curve if term in point]
        axes.plot(*zip(*points, strict=True), color=ACCENT, linewidth=1.8)
        _frame(axes, term, "step", "nats per image" if len(terms) > 1 else "loss")
    _save(figure, path)


def scatter(points: NDArray[Any], labels: Sequence[str | None] | None, path: PathLike, title: str) -> None:
    """Write a picture of points (n, 2), coloured by label if there are labels, with a legend for at most 40 of them."""
    import matplotlib as mpl

    figure = _figure(6.6, 5.4)
    axes = figure.subplots()
    classes = sorted({label for label in labels or [] if label is not None})
    palette = mpl.colormaps["tab10" if len(classes) <= 10 else "turbo"]
    class_of = np.array([label or "" for label in labels or [""] * len(points)])
    x, y = points.T
    unlabelled = ~np.isin(class_of, classes)
    axes.scatter(x[unlabelled], y[unlabelled], s=5, linewidths=0, alpha=0.6, color=QUIET)
    handles = []
    for i, name in enumerate(classes):
        colour = palette(i if len(classes) <= 10 else i / (len(classes) - 1))
        own = class_of == name
        handles.append(axes.scatter(x[own], y[own], s=5, linewidths=0, alpha=0.7, color=colour))
    _frame(axes, title, "", "")
    axes.set(xticks=[], yticks=[])
    if 0 < len(classes) <= MAX_LEGEND_ROWS * 2:
        _legend_beside(figure, handles, classes)
    _save(figure, path)


def bits(codes: Codes, path: PathLike) -> None:
    """Write a picture of the share of ones of each bit, and of the correlations between bits."""
    values = np.unpackbits(codes, axis=1)
    shares = values.mean(axis=0)
    varying = values.std(axis=0) > 0
    correlation = np.zeros((len(shares), len(shares)))
    correlation[np.ix_(varying, varying)] = np.corrcoef(values[:, varying].T) if varying.any() else 0
    np.fill_diagonal(correlation, 0)
    figure = _figure(9.5, 3.8)
    balance, square = figure.subplots(1, 2, width_ratios=[1.5, 1])
    balance.bar(np.arange(len(shares)), shares, width=0.8, color=np.where(varying, ACCENT, OTHER))
    balance.axhline(0.5, color=QUIET, linewidth=1, linestyle=":")
    balance.set_ylim(0, 1)
    _frame(balance, f"share of ones ({int((~varying).sum())} of {len(shares)} bits are constant)", "bit", "")
    matrix = square.imshow(np.abs(correlation), vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(matrix, ax=square, shrink=0.85)
    mean = np.abs(correlation).sum() / max(1, correlation.size - len(shares))
    _frame(square, f"|correlation|, {mean:.3f} on average", "bit", "bit")
    _save(figure, path)


def distances(codes: Codes, labels: Sequence[str | None] | None, path: PathLike) -> None:
    """Write a picture of the Hamming distances of all pairs of codes; with labels, within and between these."""
    width = codes.shape[1] * 8
    rows, columns = np.triu_indices(len(codes), 1)
    pair_distances = hamming(codes, codes)[rows, columns]
    figure = _figure(6, 3.4)
    axes = figure.subplots()
    groups = {"all pairs": np.ones(len(pair_distances), np.bool_)}
    if labels is not None and any(label is not None for label in labels):
        class_of = np.array([label or "" for label in labels])
        same, labelled = class_of[rows] == class_of[columns], (class_of[rows] != "") & (class_of[columns] != "")
        groups = {"of one label": same & labelled, "of different labels": ~same & labelled}
    for (name, members), colour in zip(groups.items(), (ACCENT, OTHER), strict=False):
        share = np.bincount(pair_distances[members], minlength=width + 1) / max(1, members.sum())
        axes.fill_between(np.arange(width + 1), share, step="mid", alpha=0.35, color=colour)
        axes.step(np.arange(width + 1), share, where="mid", color=colour, linewidth=1.4, label=name)
    axes.legend(frameon=False, fontsize=9)
    _frame(axes, f"distances of pairs among {len(codes):,} codes of {width} bits", "bits", "share of pairs")
    _save(figure, path)


def radii(
    precision: NDArray[np.float64],
    recall: NDArray[np.float64],
    by_transform: Mapping[str, NDArray[np.float64]],
    path: PathLike,
    *,
    radius: int | None,
    title: str,
) -> None:
    """Write a picture of precision and recall over the radius, and of the recall by transform if there are several.

    `radius` is marked. The axis ends soon after the recall reaches 1, or the precision falls below 0.02.
    """
    last = min(np.argmax(recall >= 0.999) if recall[-1] >= 0.999 else len(recall), len(recall) - 1)
    useless = np.flatnonzero(precision < 0.02)
    last = max(8, radius or 0, min(last, useless[0] if len(useless) else last)) + 2
    x = np.arange(len(recall))[: last + 1]
    figure = _figure(6.6, 3.9)
    axes = figure.subplots()
    for name, shares, colour in (("precision", precision, OTHER), ("recall", recall, ACCENT)):
        axes.plot(x, shares[: len(x)], color=colour, linewidth=2.2, marker="o", markersize=3.5, label=name)
    for (name, shares), colour in zip(by_transform.items() if len(by_transform) > 1 else (), cycle(MINOR_COLOURS)):
        axes.plot(x, shares[: len(x)], color=colour, linewidth=1.1, label=f"recall: {name}", zorder=1)
    if radius is not None:
        axes.axvline(radius, color=INK, linewidth=0.9)
        axes.annotate(f" -r auto: {radius}", (radius, 1.03), color=INK, fontsize=9, annotation_clip=False)
    axes.set(ylim=(0, 1.1), xlim=(0, x[-1]), yticks=np.linspace(0, 1, 6))
    axes.grid(axis="y", color=QUIET, alpha=0.2, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5), labelcolor=INK)
    _frame(axes, title, "radius, bits", "share")
    _save(figure, path)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", layout="constrained", dpi=130)


def _legend_beside(figure: "Figure", handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Add a legend to the right of the axes, and widen the figure by its width.

    The layout reserves its place and warns if the axes would vanish, so that the figure must grow with the legend.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    columns = -(-len(labels) // MAX_LEGEND_ROWS)
    names = [str(i) for i in range(len(labels))]  # matplotlib leaves out labels that begin with "_"
    legend = figure.legend(
        handles, names, loc="outside right center", ncols=columns, markerscale=3, fontsize=8, frameon=False
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(_plain(label, MAX_LABEL))
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    width = legend.get_window_extent(renderer).width / figure.dpi
    figure.set_figwidth(figure.get_figwidth() + width)


def _plain(text: str, length: int = 200) -> str:
    """Return a text that matplotlib draws literally and without warnings: on one line, shortened in the middle to
    `length` characters, with "$" escaped, and with "�" for characters that the font lacks."""
    text = " ".join(text.split())
    if len(text) > length:
        text = f"{text[: length // 2]}…{text[length // 2 + 1 - length :]}"
    glyphs = _glyphs()
    return "".join(c if ord(c) in glyphs else "\N{REPLACEMENT CHARACTER}" for c in text).replace("$", r"\$")


@cache
def _glyphs() -> frozenset[int]:
    """Return the code points of the default font."""
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont(FontProperties())).get_charmap())


def _save(figure: "Figure", path: PathLike) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with Replacement(Path(path)) as new:
        figure.savefig(new.path, format=Path(path).suffix[1:] or "png", metadata={"Software": "hashret"})
        new.commit()


def _frame(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    axes.set_xlabel(x, color=QUIET, fontsize=9)
    axes.set_ylabel(y, color=QUIET, fontsize=9)
    axes.tick_params(colors=QUIET, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=QUIET)


def _picture(axes: "Axes", image: PathLike | None) -> None:
    assert image is not None
    _show(axes, decode(to_content(image)).pixels)


def _show(axes: "Axes", pixels: NDArray[np.uint8]) -> None:
    small = max(pixels.shape[:2]) < 100
    axes.imshow(
        np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels,
        interpolation="nearest" if small else "antialiased",
    )
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=False)
