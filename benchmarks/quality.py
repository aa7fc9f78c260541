"""Measure the retrieval quality of codes under the named protocols, and write docs/quality.md. All rows take days.

    python benchmarks/quality.py --list                                  # list rows, finished and not
    python benchmarks/quality.py --data DIR --rows 'mnist/*/32/*'        # measure the unfinished rows of a pattern
    python benchmarks/quality.py --write                                 # write docs/quality.md from finished rows

A row is DATA/MODEL/HEAD/BITS/BUDGET/SEED. Finished rows are stored in benchmarks/quality.json and not measured again.
A model is trained on the training images of the protocol (see `hashret.evaluation.protocols`), with default settings,
and evaluated after the last step. Only models named -labels are trained with labels. DIR has mnist/ and fashion-mnist/
with the four original files, cifar10/cifar10-jpeg.tar.gz of train/CLASS/NAME.jpg and test/CLASS/NAME.jpg, and
photos/photos.tar.gz of photos/CLASS/NAME.jpg. Without DIR, torchvision downloads all data sets except the photos.

The file is longer than 300 lines because it has the measurement and the page that reports it.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance

import hashret
from hashret import Hasher, HashretError
from hashret.codes import Codes, pack
from hashret.data.images import decode
from hashret.data.preprocessing import ImagePreprocessing
from hashret.data.sources import open_source
from hashret.durable import write_durably
from hashret.evaluation.measures import count_neighbours, recall_at
from hashret.evaluation.protocols import (
    CHOICES,
    PROTOCOLS,
    Protocol,
    ProtocolImages,
    choose_protocol,
    read_images,
    score,
    training_images,
)
from hashret.models import DEFAULT_MODEL, MODELS
from hashret.models.contrastive import MIN_LATENT
from hashret.runtime.inputs import default_device

HERE = Path(__file__).parent
BASELINES = ("lsh", "pca", "itq", "anchor-graph")
HEADS = ("anchor-itq", "itq", "anchor-graph")  # heads of the default model that are compared
PERCEPTUAL = ("phash", "dhash")
DATA = {  # time budget, and bits
    "digits": ("20s", (64,)),
    "mnist": ("2m", (16, 32, 64)),
    "fashion-mnist": ("2m", (32, 64)),
    "cifar10": ("20m", (64,)),
    "cifar10-1k-59k": ("20m", (64,)),
    "photos": ("10m", (64,)),
}
# Twice and four times the budget, to detect overtraining.
LONGER = {"mnist": ("4m", "8m"), "fashion-mnist": ("4m", "8m")}
SEEDS = (0, 1, 2)
GPU = "-gpu"  # suffix of budgets in GPU time; a machine with a GPU measures only these, others only budgets in CPU time


class Row(NamedTuple):
    data: str
    model: str
    head: str
    bits: int
    budget: str
    seed: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


def plan(budget: str | None) -> list[Row]:
    """Return all planned rows; `budget`, if given, replaces their own."""
    own, rows = MODELS[DEFAULT_MODEL].head, []
    trainable = {name: member for name, member in MODELS.items() if member.trainable}
    for data, (default_budget, widths) in DATA.items():
        seeds = SEEDS[:1] if data == "digits" else SEEDS
        for bits in widths:
            rows += [Row(data, DEFAULT_MODEL, own, bits, default_budget, seed) for seed in seeds]
            rows += [Row(data, DEFAULT_MODEL, head, bits, default_budget, 0) for head in HEADS if head != own]
            for name in BASELINES:  # pca is deterministic
                rows += [Row(data, name, name, bits, "none", seed) for seed in seeds[: 1 if name == "pca" else None]]
        if data == "photos":
            rows += [Row(data, name, "none", 64, "none", 0) for name in PERCEPTUAL]
        if data in LONGER:
            rows += [
                Row(data, DEFAULT_MODEL, own, bits, longer, seed)
                for bits, longer, seed in product(widths, LONGER[data], SEEDS)
            ]
            for name, member in trainable.items():
                if not member.labelled and name != DEFAULT_MODEL:
                    rows.append(Row(data, name, member.head, 32, default_budget, 0))
                if member.labelled or name == "stacked":
                    rows.append(Row(data, f"{name}-labels", member.head, 32, default_budget, 0))
        if data == "cifar10":
            rows += [Row(data, DEFAULT_MODEL, own, 64, f"25m{GPU}", seed) for seed in SEEDS]
    if budget:
        rows = [row if row.budget == "none" else row._replace(budget=budget + device_suffix(row)) for row in rows]
    # Rows that share a network are consecutive.
    return sorted(dict.fromkeys(rows), key=lambda row: (list(DATA).index(row.data), row.model, row.seed, row.budget))


def device_suffix(row: Row) -> str:
    """Return the suffix of the budget that names the device: `GPU`, or nothing for the CPU."""
    return GPU if row.budget.endswith(GPU) else ""


class DataSets:
    """Images of all data sets, from files in `folder` or torchvision's downloads; `scratch` is for temporary files."""

    def __init__(self, folder: Path | None, root: Path | None, scratch: Path) -> None:
        self.folder, self.root, self._scratch = folder, root, scratch
        self._images: dict[tuple[str, ImagePreprocessing], ProtocolImages] = {}
        self.trained: dict[Row, Hasher] = {}  # the last trained network of the default model, by its row

    def protocol(self, data: str) -> Protocol:
        if data == "digits" or (self.folder is None and data != "photos"):
            return PROTOCOLS[data]
        if self.folder is None:
            raise HashretError("the photos cannot be downloaded: give --data DIR with photos/photos.tar.gz in it")
        if data == "photos":
            return choose_protocol(str(self.folder / "photos" / "photos.tar.gz"))
        if data.startswith("cifar10"):
            return choose_protocol(data, *self._unpacked)
        files = (str(self.folder / data / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k"))
        return choose_protocol(data, *files)

    @cached_property
    def _unpacked(self) -> list[str]:
        """Convert the archive of CIFAR-10 to files of arrays, and return the paths of its two parts."""
        parts: dict[str, list[Any]] = {"train": [], "test": []}
        for record in open_source(f"{self.folder}/cifar10/cifar10-jpeg.tar.gz"):
            pixels = np.broadcast_to(decode(record.read()).pixels, (32, 32, 3))
            parts[record.name.split("/")[0]].append((pixels, record.label))
        for name, images in parts.items():
            arrays = {"images": np.stack([pixels for pixels, _ in images]), "labels": [label for _, label in images]}
            np.savez(self._scratch / f"{name}.npz", **arrays)
        return [str(self._scratch / f"{name}.npz") for name in parts]

    def images(self, data: str, preprocessing: ImagePreprocessing) -> ProtocolImages:
        key = data, preprocessing
        if key not in self._images:
            self._images = {key: read_images(self.protocol(data), preprocessing, data_root=self.root)}
        return self._images[key]

    def training(self, data: str) -> Any:
        """Return the training set of a data set, for `Hasher.fit`."""
        protocol = self.protocol(data)
        return training_images(protocol, self.root) if protocol.n_queries else protocol.sources[0]


def measure(row: Row, data_sets: DataSets) -> dict[str, Any]:
    """Return the fields of a row and its measurements."""
    start = time.monotonic()
    record: dict[str, Any] = {}
    encode: Callable[[Iterable[Any]], Codes]
    if row.model in PERCEPTUAL:
        encode, images = perceptual(row.model), data_sets.images(row.data, ImagePreprocessing(32, 32, 3))
        codes = encode(photos(data_sets))
    else:
        hasher, trained = fit(row, data_sets)
        encode, images = hasher.encode, data_sets.images(row.data, hasher.preprocessing)
        codes = hasher.encode_pixels(images.pixels)
        record |= {name: trained.training.get(name) for name in ("images", "steps", "seconds")}
    result = score(data_sets.protocol(row.data), images, codes)
    record |= {"measures": result.measures, "health": result.health._asdict(), "queries": result.queries}
    record |= {"left_out": result.left_out, "unreadable": result.unreadable}
    if row.data.startswith("cifar10") and data_sets.folder:
        record["copy"] = " (JPEG copy)"
    if row.data == "photos":
        record["near_duplicates"] = find_copies(encode, codes, data_sets)
    record |= {"hashret": hashret.__version__, "device": default_device().type, "threads": torch.get_num_threads()}
    return row._asdict() | record | {"seconds_in_all": round(time.monotonic() - start, 1)}


def fit(row: Row, data_sets: DataSets) -> tuple[Hasher, Hasher]:
    """Return the hasher of a row, and the hasher whose training made its network.

    Rows of the default model that differ in the head, or in bits up to `MIN_LATENT`, share a network, trained once.
    """
    model = row.model.removesuffix("-labels")
    labels = model != row.model
    settings = {"fine_tune": True} if row.model == "stacked-labels" else {}
    options: dict[str, Any] = {"seed": row.seed, "labels": labels, "data_root": data_sets.root}
    source = data_sets.training(row.data)
    if row.model != DEFAULT_MODEL or row.bits > MIN_LATENT:
        hasher = Hasher(model, row.bits, row.head, **settings).fit(source, **options, **length(row))
        return hasher, hasher
    shared = row._replace(head=MODELS[DEFAULT_MODEL].head, bits=MIN_LATENT)
    if shared not in data_sets.trained:
        data_sets.trained = {shared: Hasher(model, shared.bits, shared.head).fit(source, **options, **length(row))}
    trained = data_sets.trained[shared]
    if row == shared:
        return trained, trained
    return Hasher(model, row.bits, row.head).fit(source, **options, init=trained, steps=0), trained


def length(row: Row) -> dict[str, Any]:
    """Return the training length of a row, as an argument of `Hasher.fit`."""
    budget = row.budget.removesuffix(GPU)
    if budget.endswith("steps"):
        return {"steps": int(budget.removesuffix("steps"))}
    return {} if budget == "none" else {"budget": budget}


def perceptual(name: str) -> Callable[[Iterable[Image.Image]], Codes]:
    """Return a function that encodes images by a 64-bit perceptual hash of imagehash."""
    import imagehash

    function = getattr(imagehash, name)
    return lambda images: pack(np.stack([function(image).hash.ravel() for image in images]))


def photos(data_sets: DataSets) -> Iterator[Image.Image]:
    for record in open_source(data_sets.protocol("photos").sources[0]):
        pixels = decode(record.read()).pixels
        yield Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = (round(0.8 * side) for side in photo.size)
    left, top = (int(rng.integers(side - kept + 1)) for side, kept in zip(photo.size, (width, height), strict=True))
    return photo.crop((left, top, left + width, top + height))


def compress(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=40)
    return Image.open(file)


COPIES: dict[str, tuple[Callable[[Image.Image, np.random.Generator], Image.Image], str]] = {
    "crop": (crop, "a random crop of 80 % of each side (seed 0)"),
    "resize": (lambda photo, _: photo.resize((photo.width // 2, photo.height // 2)), "half the width and height"),
    "JPEG 40": (compress, "recompressed with quality 40"),
    "brightness": (lambda photo, _: ImageEnhance.Brightness(photo).enhance(1.3), "brightness scaled by 1.3"),
    "rotation": (lambda photo, _: photo.rotate(5, Image.Resampling.BILINEAR), "by 5°, with black corners"),
}


def find_copies(encode: Callable[[Iterable[Any]], Codes], codes: Codes, data_sets: DataSets) -> dict[str, float]:
    """Return, by transform, the share of augmented copies whose original ranks first; n ties for it count 1/n each."""
    originals, found = np.arange(len(codes))[:, None], {}
    for name, (copy, _) in COPIES.items():
        rng = np.random.default_rng(0)
        counts = count_neighbours(encode(copy(photo, rng) for photo in photos(data_sets)), originals, codes)
        found[name] = float(np.concatenate([recall_at(*counted, 1) for counted in counts]).mean())
    return found | {"all": statistics.fmean(found.values())}


def page(finished: list[dict[str, Any]], missing: list[Row]) -> str:
    """Return the text of docs/quality.md."""
    names = "\n".join(
        f"- `{name}`: {protocol.description}." for name, protocol in PROTOCOLS.items() if protocol.sources
    )
    choices = "\n".join(f"- {name}: {text}." for name, text in CHOICES.items())
    copies = "\n".join(f"- {name}: {text}." for name, (_, text) in COPIES.items())
    parts = [
        "# Retrieval quality",
        "`python benchmarks/quality.py --write` writes this page from the rows in `benchmarks/quality.json`; do not "
        "edit it. [Results](results.md) has the summary.",
        "All models are trained from raw pixels and evaluated after the last step, without early stopping. Only models "
        "whose name ends in `-labels` are trained with labels. "
        f"`{DEFAULT_MODEL}` with head `{MODELS[DEFAULT_MODEL].head}` is what `hashret train` trains without options. "
        "A cell is the mean over the seeds; ± is half of the range over the seeds. Rows marked “JPEG copy” use "
        "CIFAR-10 re-encoded as JPEG files, which is slightly lossy.",
        f"## Protocols\n\n{names}\n- `photos`: leave-one-out over photos whose labels are their folders.",
        f"## Measures\n\n{choices}",
        "Near-duplicate retrieval: for each transform below, one augmented copy of each photo is a query, all photos "
        "are the database, and the only relevant item is the original. The measure is the share of copies whose "
        f"original ranks first; an original that ties with n − 1 others for the first rank counts 1/n.\n\n{copies}",
    ]
    for data in DATA:
        rows = [row for row in finished if row["data"] == data]
        with_copies = [row for row in rows if "near_duplicates" in row]
        parts += [f"## {data}", table(rows, retrieval_figures)] if rows else []
        parts += (
            [
                "Near-duplicate retrieval: share of copies whose original ranks first.",
                table(with_copies, itemgetter("near_duplicates")),
            ]
            if with_copies
            else []
        )
    parts += [
        "## Regret of the default head\n\nThe regret of a head on one data set and code length is the difference "
        "between the best of the three heads of `contrastive` and this one. Each line gives its maximum over the "
        "combinations of data set and code length for which all three heads are measured (seed 0, the default "
        "budget), and the number of these combinations.",
        regret(finished),
        "## Rows not measured",
        "\n".join(missing_lines(missing)) or "None.",
        "## Reproduce a row",
        "A row is DATA/MODEL/HEAD/BITS/BUDGET/SEED. `python benchmarks/quality.py --data DIR --rows 'mnist/itq/*' "
        "--file again.json` measures the rows that match a pattern; `--help` describes the contents of DIR. Without "
        "`--file`, only rows missing from `benchmarks/quality.json` are measured. The number of steps in a time budget "
        "depends on the machine. `benchmarks/quality.json` records the steps, device and threads of each row, and "
        "`--steps N` repeats a training exactly.",
    ]
    return "\n\n".join(parts) + "\n"


def retrieval_figures(row: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a row in the table of retrieval, by column."""
    health = row["health"]
    share = {"distinct codes, %": 100 * health["distinct_codes"] / health["codes"]}
    codes = {name.replace("_", " "): health[name] for name in ("largest_bucket", "dead_bits", "correlation")}
    return row["measures"] | share | codes | {"steps": row.get("steps") or 0, "threads": row["threads"]}


def table(rows: list[dict[str, Any]], figures: Callable[[dict[str, Any]], dict[str, float]]) -> str:
    """Return a table with a line per model, the means over its seeds, sorted by bits and then by the first figure."""

    def table_key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["bits"], row["model"] + row.get("copy", ""), row["head"], row["budget"]

    lines = []
    for key, group in groupby(sorted(rows, key=table_key), table_key):
        by_seed = [figures(row) for row in group]
        columns = [[values[name] for values in by_seed] for name in by_seed[0]]
        lines.append((key, len(by_seed), columns))
    lines.sort(key=lambda line: (line[0][0], -statistics.fmean(line[2][0])))
    names = ["bits", "model", "head", "budget", "seeds", *figures(rows[0])]
    cells = [[*map(str, key), str(seeds), *map(spread, columns)] for key, seeds, columns in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *cells])


def spread(values: list[float]) -> str:
    """Return the mean and, unless it is 0, half the range as text."""
    mean, half = statistics.fmean(values), (max(values) - min(values)) / 2
    digits = 0 if all(isinstance(value, int) for value in values) else 1 if mean >= 10 else 3
    return f"{mean:,.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")


def regret(finished: list[dict[str, Any]]) -> str:
    """Return lines of Markdown with the maximum regret of each head of the default model."""
    regrets: dict[tuple[str, str], list[float]] = {}
    own = [row for row in finished if row["model"] == DEFAULT_MODEL and row["seed"] == 0 and row["head"] in HEADS]
    own = sorted(
        (row for row in own if row["budget"] == DATA[row["data"]][0]), key=lambda row: (row["data"], row["bits"])
    )
    groups = [list(group) for _, group in groupby(own, lambda row: (row["data"], row["bits"]))]
    groups = [group for group in groups if len(group) == len(HEADS)]
    for group, name in product(groups, ("mAP@all", "mAP@1000")):
        best = max(row["measures"][name] for row in group)
        for row in group:
            regrets.setdefault((row["head"], name), []).append(best - row["measures"][name])
    lines = [f"- `{head}`, {name}: {max(values):.3f} over {len(values)}" for (head, name), values in regrets.items()]
    return "\n".join(lines) or "Not measured yet."


def missing_lines(missing: list[Row]) -> Iterator[str]:
    """Yield a line of Markdown with the missing rows of each data set and model."""
    for (data, model), group in groupby(sorted(missing), itemgetter(0, 1)):
        names = {"/".join(map(str, row[2:5])): [r.seed for r in missing if r[:5] == row[:5]] for row in group}
        items = (f"{name} ({', '.join(f'seed {seed}' for seed in seeds)})" for name, seeds in names.items())
        yield f"- {data}, `{model}`: {'; '.join(items)}"


def load(file: Path) -> dict[str, dict[str, Any]]:
    """Return the finished rows by name; none if the file is missing."""
    return json.loads(file.read_text()) if file.exists() else {}


def show(row: dict[str, Any], first: bool) -> None:
    if first:
        print(
            f"{'row':44}{'steps':>8}{'seconds':>9}{'mAP@all':>9}{'@1000':>8}{'prec@10':>9}{'distinct':>10}{'dead':>6}"
        )
    measured, health, name = row["measures"], row["health"], str(Row(*(row[field] for field in Row._fields)))
    print(
        f"{name:44}{row.get('steps') or 0:>8,}{row['seconds_in_all']:>9.0f}"
        f"{measured['mAP@all']:>9.4f}{measured['mAP@1000']:>8.4f}{measured['precision@10']:>9.4f}"
        f"{health['distinct_codes']:>10,}{health['dead_bits']:>6}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", action="append", metavar="PATTERN", help="measure only these rows, such as 'mnist/*/32/*'"
    )
    parser.add_argument("--list", action="store_true", help="list the rows, finished or not, and measure nothing")
    parser.add_argument("--write", action="store_true", help="write the page, and measure nothing")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder of data files, instead of downloads")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the folder of torchvision's downloads")
    parser.add_argument(
        "--file", type=Path, metavar="JSON", default=HERE / "quality.json", help="the file of finished rows"
    )
    parser.add_argument("--page", type=Path, metavar="MD", default=HERE.parent / "docs" / "quality.md")
    trial = parser.add_mutually_exclusive_group()
    trial.add_argument("--budget", help="time of each training, such as 30s, for trials")
    trial.add_argument("--steps", type=int, help="steps of each training, for trials")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    done = load(args.file)
    rows = plan(f"{args.steps}steps" if args.steps else args.budget)
    if args.write:
        args.page.write_text(page(list(done.values()), [row for row in rows if str(row) not in done]))
        return
    rows = [row for row in rows if any(fnmatchcase(str(row), pattern) for pattern in args.rows or ["*"])]
    if args.list:
        print(*(f"{'done' if str(row) in done else 'not done':10}{row}" for row in rows), sep="\n")
        return
    device = GPU if default_device().type == "cuda" else ""
    rows = [row for row in rows if str(row) in done or row.budget == "none" or device_suffix(row) == device]
    with tempfile.TemporaryDirectory() as scratch:
        data_sets = DataSets(args.data, args.root, Path(scratch))
        for i, row in enumerate(rows):
            if str(row) not in done:
                measured = measure(row, data_sets)
                done = load(args.file) | {str(row): measured}  # another process may have measured other rows
                args.file.parent.mkdir(parents=True, exist_ok=True)
                write_durably(args.file, (json.dumps(done, indent=1) + "\n").encode())
            if not args.json:
                show(done[str(row)], first=i == 0)
    if args.json:
        print(json.dumps([done[str(row)] for row in rows]))


if __name__ == "__main__":
    main()
