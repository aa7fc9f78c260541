"""Make the pictures of the documentation: python docs/figures.py

They show the handwritten digits that come with scikit-learn, or are drawn. The number of steps is fixed, so that the
same machine draws the same pictures.
"""

import tempfile
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hashret import Collection, Hasher, plots
from hashret.codes import unpack
from hashret.data.images import decode
from hashret.data.sources import open_source
from hashret.tasks import generation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUT = Path(__file__).parent / "img"
INK, GREY, BLUE, ORANGE, PALE = "#1c2430", "#6b7684", "#2f6fdb", "#e07a3f", "#dfe5ee"
N_QUERIES = 200  # images that no model is trained on
SHOWN = 3  # of these, the query of the contact sheet
N_CODES = 1_000_000  # of the plot that compares numbers of probes


def main() -> None:
    OUT.mkdir(exist_ok=True)
    records = list(open_source("digits"))
    images = np.stack([decode(record.read()).pixels for record in records])
    labels = [record.label for record in records]
    queries, database = images[:N_QUERIES], images[N_QUERIES:]
    hasher = Hasher(bits=64).fit(database, steps=2000)
    draw_contact_sheet(hasher, images, labels, OUT / "neighbours.png")
    draw_codes(hasher, queries, labels[:N_QUERIES], OUT / "codes.png")
    plots.distances(hasher.encode(queries), labels[:N_QUERIES], OUT / "distances.png")
    draw_substrings(OUT / "substrings.png")
    draw_probes(OUT / "probes.png")
    draw_family(OUT / "family.png")
    autoencoder = Hasher("ae", bits=16).fit(database, steps=3000)
    examples = queries[[labels.index(str(digit)) for digit in range(10)]]
    errors = [f"{error:.2f}" for error in autoencoder.errors(examples)]
    reconstructions = generation.reconstruct(autoencoder, examples)
    plots.pairs(examples, reconstructions, OUT / "reconstructions.png", errors, ("image", "decoded"))


def draw_contact_sheet(hasher: Hasher, images: Any, labels: list[Any], path: Path) -> None:
    """Draw a digit that was not in the training set, and its ten nearest neighbours."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            files.append(Path(folder) / ("queries" if i < N_QUERIES else "photos") / str(label) / f"{i:04d}.png")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(files[-1])
        with Collection.create(":memory:", hasher) as collection:
            collection.index(f"{folder}/photos")
            query = files[SHOWN]
            plots.contact_sheet(query, collection.query(query, k=10), path)


def draw_codes(hasher: Hasher, images: Any, labels: list[Any], path: Path) -> None:
    """Draw digits above their codes, and mark the bits that differ from the first digit's code."""
    chosen = [labels.index("3"), *(i for i in range(labels.index("3") + 1, 200) if labels[i] == "3")][:4]
    chosen += [labels.index("8"), labels.index("1")]
    codes = unpack(hasher.encode(images[chosen]))
    figure = new_figure(8.4, 3.1)
    grid = figure.subplots(2, len(chosen))
    for column, (i, code) in enumerate(zip(chosen, codes, strict=True)):
        above, below = grid[:, column]
        above.imshow(images[i], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        differs = code != codes[0]
        for bit, (value, different) in enumerate(zip(code, differs, strict=True)):
            colour = (ORANGE if value else "#f6d9c8") if different else (INK if value else PALE)
            below.add_patch(rectangle(bit % 8, 7 - bit // 8, 0.9, 0.9, colour))
        below.set(xlim=(-0.1, 8), ylim=(-0.1, 8), aspect="equal")
        below.set_xlabel("query" if column == 0 else f"{differs.sum()} bits", color=GREY, fontsize=9)
        for axes in (above, below):
            bare(axes)
    save(figure, path)


def draw_substrings(path: Path) -> None:
    """Draw how a query's code is split into substrings, with one table for each."""
    query = np.random.default_rng(3).integers(0, 2, 16)
    figure = new_figure(8.4, 3.6)
    axes = figure.subplots()
    colours = (BLUE, ORANGE, "#5aa39a", "#b287b8")
    for bit, value in enumerate(query):
        axes.add_patch(rectangle(bit * 1.1 + (bit // 4) * 0.8, 6, 1, 1, colours[bit // 4]))
        axes.text(bit * 1.1 + (bit // 4) * 0.8 + 0.5, 6.5, str(value), color="white", ha="center", va="center")
    axes.text(-0.4, 6.5, "query", color=INK, ha="right", va="center")
    for table in range(4):
        x = table * 5.2
        own = query[4 * table : 4 * table + 4]
        flips = [own, *(np.where(np.arange(4) == bit, 1 - own, own) for bit in range(4))]
        axes.annotate("", (x + 2.15, 4.9), (x + 2.15, 5.9), arrowprops={"arrowstyle": "->", "color": GREY})
        for row, flipped in enumerate(flips):
            y = 4.1 - row * 0.85
            axes.add_patch(rectangle(x, y, 4.3, 0.75, "#eef2f8"))
            axes.text(x + 0.3, y + 0.36, "table " + str(table) + ":", color=GREY, fontsize=8, va="center")
            for bit, value in enumerate(flipped):
                changed = row > 0 and bit == row - 1
                text = {"color": colours[table] if changed else INK, "weight": "bold" if changed else "normal"}
                axes.text(x + 2.1 + bit * 0.5, y + 0.36, str(value), family="monospace", va="center", **text)
    axes.text(-0.4, 4.47, "0 bits flipped", color=INK, ha="right", va="center")
    axes.text(-0.4, 2.35, "1 bit flipped", color=INK, ha="right", va="center")
    axes.set(xlim=(-4.2, 20.4), ylim=(0.5, 7.2))
    bare(axes)
    save(figure, path)


def draw_probes(path: Path) -> None:
    """Plot the number of buckets that one table, and four tables of substrings, probe for all codes within a radius."""
    radii = np.arange(0, 17)
    single = [sum(comb(64, bits) for bits in range(radius + 1)) for radius in radii]
    four_tables = [sum(comb(16, level // 4) for level in range(radius + 1)) for radius in radii]
    figure = new_figure(6.6, 3.5)
    axes = figure.subplots()
    axes.plot(
        radii[:11], single[:11], color=ORANGE, linewidth=2, marker="o", markersize=3.5, label="one table of 64 bits"
    )
    axes.plot(radii, four_tables, color=BLUE, linewidth=2, marker="o", markersize=3.5, label="four tables of 16 bits")
    axes.axhline(N_CODES, color=GREY, linewidth=1, linestyle=":")
    axes.text(16.2, N_CODES * 1.5, "a scan of 1 M codes", color=GREY, fontsize=9, ha="right")
    axes.set(yscale="log", ylim=(0.7, 1e11), xlim=(-0.3, 16.3), xlabel="radius, bits", ylabel="buckets to look up")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save(figure, path)


def draw_family(path: Path) -> None:
    """From an image through encoder, bottleneck and decoder to its reconstruction, and through a head to its code."""
    figure = new_figure(8.4, 2.7)
    axes = figure.subplots()
    boxes = [
        ("image", 0, 1.6, PALE, INK),
        ("encoder", 2.6, 2.2, BLUE, "white"),
        ("bottleneck", 5.8, 2.2, INK, "white"),
        ("decoder", 9.0, 2.2, BLUE, "white"),
        ("reconstruction", 12.2, 2.6, PALE, INK),
    ]
    for text, x, width, colour, ink in boxes:
        axes.add_patch(rectangle(x, 2, width, 1, colour))
        axes.text(x + width / 2, 2.5, text, color=ink, ha="center", va="center")
    arrow = {"arrowstyle": "->", "color": GREY}
    for (_, x, width, *_), (_, following, *_) in pairwise(boxes):
        axes.annotate("", (following - 0.05, 2.5), (x + width + 0.05, 2.5), arrowprops=arrow)
    axes.annotate("", (6.9, 1.05), (6.9, 1.95), arrowprops=arrow)
    axes.add_patch(rectangle(5.8, 0, 2.2, 1, ORANGE))
    axes.text(6.9, 0.5, "head", color="white", ha="center", va="center")
    axes.annotate("", (8.95, 0.5), (8.05, 0.5), arrowprops=arrow)
    axes.text(9.1, 0.5, "0110 1001 … code", color=INK, va="center", family="monospace")
    axes.annotate("", (1.0, 3.05), (13.4, 3.05), arrowprops=arrow | {"connectionstyle": "arc3,rad=0.12"})
    axes.text(7.2, 4.05, "likelihood: how well the reconstruction explains the image", color=GREY, ha="center")
    axes.set(xlim=(-0.2, 15), ylim=(-0.2, 4.5))
    bare(axes)
    save(figure, path)


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", layout="constrained", dpi=110)


def save(figure: "Figure", path: Path) -> None:
    figure.savefig(path, metadata={"Software": "hashret"})


def rectangle(x: float, y: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, linewidth=0)


def bare(axes: "Axes") -> None:
    """Leave out ticks and frame."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


if __name__ == "__main__":
    main()
