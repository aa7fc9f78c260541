"""Named retrieval protocols: the training set, the database, the queries, and the measures.

Figures are comparable only if all of these are equal, so this module alone states every choice.
"""

import os
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes
from hashret.data.contents import Content, Inputs
from hashret.data.images import decode
from hashret.data.preprocessing import Preprocessing
from hashret.data.records import Source, read
from hashret.data.sources import open_source
from hashret.errors import HashretError, format_count
from hashret.evaluation.measures import (
    Health,
    Measures,
    RowIndices,
    count_labels,
    count_neighbours,
    health,
    nearest,
    recall_at,
    retrieval,
)
from hashret.parallel import Progress, batches, ordered_map

if TYPE_CHECKING:
    from hashret.hasher import Hasher

RECALL_QUERIES = 1000  # queries for which the nearest neighbours in pixels are computed
RECALL_NEIGHBOURS = 10

CHOICES = {
    "relevant": "an image with the label of the query; labels are used for scoring only",
    "ties": "images at equal distance have no order: each measure is averaged exactly over all orders of tied images",
    "mAP@all": "average precision over the whole database, normalised by the relevant images in it",
    "mAP@1000": "average precision over the first 1,000, normalised by the relevant images among them (0 if none)",
    "@k": "precision over the whole database if it has fewer than k images",
    "within 2": "a query with an empty result within 2 bits has precision 0",
    "recall@10": f"share of the {RECALL_NEIGHBOURS} nearest neighbours by Euclidean distance of the preprocessed "
    f"pixels that are among the first {RECALL_NEIGHBOURS} results, for at most {RECALL_QUERIES:,} queries drawn with "
    "seed 0; within labels, the database is restricted to the images with the label of the query",
    "codes": "health of the codes of the database: the largest bucket is the largest number of equal codes, dead bits "
    "are equal in more than 99 % of the codes, and correlation is the mean absolute correlation of two bits",
}


class Protocol(NamedTuple):
    """The split of the images of one or two sources into training set, database and queries.

    With two sources, the first is the training set and the database, and the second contains the queries. With one
    source, each image is a query against all others. If `n_queries` is not 0, that many queries are drawn from the
    images of all sources; the other images are the database, and `n_training` of these are the training set.
    """

    description: str
    sources: tuple[str, ...]
    n_queries: int = 0
    n_training: int = 0

    def rows(self, lengths: list[int]) -> tuple[RowIndices, RowIndices, RowIndices]:
        """Return the rows of the training set, of the database and of the queries, in the concatenation of sources of
        these lengths."""
        rows = np.arange(sum(lengths))
        if self.n_queries:
            rows = np.random.default_rng(0).permutation(rows)
            training = rows[self.n_queries :][: self.n_training]
            return np.sort(training), np.sort(rows[self.n_queries :]), np.sort(rows[: self.n_queries])
        if len(lengths) == 1:
            return rows, rows, rows
        return rows[: lengths[0]], rows[: lengths[0]], rows[lengths[0] :]


_SPLIT = "the queries are the test split; the training split is the database and the training set"
PROTOCOLS = {
    "mnist": Protocol(
        f"the official split into 60,000 training and 10,000 test images: {_SPLIT}", ("mnist:train", "mnist:test")
    ),
    "fashion-mnist": Protocol(
        f"the official split into 60,000 training and 10,000 test images: {_SPLIT}",
        ("fashion-mnist:train", "fashion-mnist:test"),
    ),
    "cifar10": Protocol(
        f"the official split into 50,000 training and 10,000 test images: {_SPLIT}", ("cifar10:train", "cifar10:test")
    ),
    "cifar10-1k-59k": Protocol(
        "1,000 queries drawn with seed 0 from all 60,000 images, regardless of their labels; the other 59,000 are the "
        "database, and 5,000 drawn from these are the training set",
        ("cifar10:train", "cifar10:test"),
        n_queries=1000,
        n_training=5000,
    ),
    "digits": Protocol(
        f"the first 1,437 images for training and the other 360 for testing: {_SPLIT}", ("digits:train", "digits:test")
    ),
    "split": Protocol(_SPLIT, ()),  # needs --train and --test
}


def choose_protocol(name: str, train: str | None = None, test: str | None = None) -> Protocol:
    """Return the protocol called `name`, or leave-one-out over the source `name`.

    `train` and `test` replace the sources of a protocol. Raise ValueError for only one of them, or if `name` is a
    source.
    """
    sources = tuple(source for source in (train, test) if source)
    if len(sources) == 1 or (sources and name not in PROTOCOLS) or (not sources and name == "split"):
        raise ValueError(f"--train SOURCE and --test SOURCE go together, with one of {', '.join(PROTOCOLS)}")
    if name not in PROTOCOLS:
        return Protocol("leave-one-out: each image is a query against all others; all are in the training set", (name,))
    return PROTOCOLS[name]._replace(sources=sources or PROTOCOLS[name].sources)


class ProtocolImages(NamedTuple):
    """The preprocessed images of a protocol's sources, concatenated.

    `lengths` are the numbers of images per source, `roots` the full names of the sources, and `unreadable` is the
    number of images that could not be read.
    """

    pixels: NDArray[np.uint8]
    labels: list[str | None]
    roots: list[str]
    lengths: list[int]
    unreadable: int


class Evaluation(NamedTuple):
    """The retrieval measures by name and the health of the codes, with the sources and the numbers of images."""

    measures: Measures
    health: Health
    roots: list[str]
    queries: int
    left_out: int  # queries that were excluded: they have no label, or no other image has it
    unreadable: int


def read_images(
    protocol: Protocol,
    preprocessing: Preprocessing,
    *,
    data_root: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ProtocolImages:
    """Return the preprocessed images of a protocol. Raise HashretError for a source without readable images."""
    blocks: list[NDArray[np.uint8]] = []
    labels: list[str | None] = []
    lengths, unreadable = [], 0
    opened = [open_source(source, data_root=data_root) for source in protocol.sources]
    total = None if any(source.length is None for source in opened) else sum(source.length or 0 for source in opened)
    for source in opened:
        preprocessing.check_source(source, "give a SOURCE of those")
        start = len(labels)
        for batch in batches(_preprocessed(source, preprocessing), 1024):
            readable = [(label, pixels) for label, pixels in batch if pixels is not None]
            blocks += [np.stack([pixels for _, pixels in readable])] if readable else []
            labels += [label for label, _ in readable]
            unreadable += len(batch) - len(readable)
            if progress is not None:
                progress(Progress("reading", len(labels), total, {}))
        lengths.append(len(labels) - start)
        if not lengths[-1]:
            raise HashretError(f"{source.root.location} has no images that can be read")
    return ProtocolImages(np.concatenate(blocks), labels, [source.root for source in opened], lengths, unreadable)


def _preprocessed(source: Source, preprocessing: Preprocessing) -> Iterator[tuple[str | None, Inputs | None]]:
    """Yield the label and the preprocessed image of each record, or None for one that cannot be read."""

    def preprocess(item: tuple[str | None, Content | HashretError]) -> tuple[str | None, Inputs | None]:
        label, content = item
        if isinstance(content, HashretError):
            return label, None
        try:
            return label, preprocessing(content).pixels
        except HashretError:
            return label, None

    return ordered_map(preprocess, ((record.label, read(record)) for record in source))


def training_images(protocol: Protocol, data_root: str | os.PathLike[str] | None = None) -> NDArray[np.uint8]:
    """Return the training set of a protocol whose images have one size, uint8 (n, h, w, c), for `Hasher.fit`."""
    parts = [
        [decode(record.read()).pixels for record in open_source(source, data_root=data_root)]
        for source in protocol.sources
    ]
    images = list(chain(*parts))
    return np.stack([images[row] for row in protocol.rows([len(part) for part in parts])[0]])


def score(protocol: Protocol, images: ProtocolImages, codes: Codes) -> Evaluation:
    """Measure the codes, (n), of a protocol's images. Raise HashretError if their labels do not allow it."""
    classes = {label: i for i, label in enumerate(sorted({label for label in images.labels if label}))}
    if len(classes) < 2:
        raise HashretError(
            f"{', '.join(protocol.sources)} has {format_count(len(classes), 'different label')}, and scoring needs at "
            "least two: put the images of each class into a folder of its own"
        )
    labels = np.array([classes.get(label or "", -1) for label in images.labels])
    _, database, queries = protocol.rows(images.lengths)
    leave_one_out = np.array_equal(database, queries)
    relevant = np.bincount(labels[database] + 1, minlength=len(classes) + 1)[labels[queries] + 1] - leave_one_out
    is_scored = (labels[queries] >= 0) & (relevant > 0)
    if not is_scored.any():
        raise HashretError(f"{', '.join(protocol.sources)}: no label of a query is that of another image")
    excluded = np.flatnonzero(is_scored) if leave_one_out else None
    scored = queries[is_scored]
    measures = retrieval(count_labels(codes[scored], labels[scored], codes[database], labels[database], excluded))
    drawn = np.sort(np.random.default_rng(0).permutation(scored)[:RECALL_QUERIES])
    measures |= {
        "recall@10 of neighbours": _recall(images.pixels, codes, drawn, database, leave_one_out),
        "recall@10 within labels": _recall(images.pixels, codes, drawn, database, leave_one_out, labels),
    }
    left_out = len(queries) - len(scored)
    return Evaluation(measures, health(codes[database]), images.roots, len(scored), left_out, images.unreadable)


def _recall(
    pixels: NDArray[np.uint8],
    codes: Codes,
    queries: RowIndices,
    database: RowIndices,
    leave_one_out: bool,
    labels: RowIndices | None = None,
) -> float:
    """Return the share of a query's nearest neighbours in pixels that are nearest in codes, the mean over queries; with
    labels, among the images of the query's label."""
    parts = []
    for label in [None] if labels is None else np.unique(labels[queries]):
        own, others = (rows if labels is None else rows[labels[rows] == label] for rows in (queries, database))
        excluded = others.searchsorted(own) if leave_one_out else None
        neighbours = nearest(pixels[own], pixels[others], RECALL_NEIGHBOURS, excluded)
        counts = count_neighbours(codes[own], neighbours, codes[others], excluded)
        parts += [recall_at(*block, neighbours.shape[1]) for block in counts]
    return float(np.concatenate(parts).mean())


def evaluate(
    hasher: "Hasher",
    protocol: Protocol,
    *,
    data_root: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Read and encode the images of a protocol, and return the retrieval measures. Raise HashretError if the labels of
    the sources do not allow scoring."""
    images = read_images(protocol, hasher.preprocessing, data_root=data_root, progress=progress)
    return score(protocol, images, hasher.encode_pixels(images.pixels))
