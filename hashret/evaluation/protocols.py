"""Named protocols: which images are learned from, searched and asked for, and what of the answers is measured.

Figures can be compared only where all of this is the same, so every choice is written out here, and nowhere else.
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

ASKED = 1000  # queries whose nearest images by pixels are found
NEAREST = 10  # of those

CHOICES = {
    "relevant": "an image with the label of the query; labels are used for scoring only",
    "ties": "images at equal distance have no order: each measure is its exact mean over all orders of the ties",
    "mAP@all": "average precision over the whole database, normalised by the relevant images in it",
    "mAP@1000": "average precision over the first 1,000, normalised by the relevant images among them (0 if none)",
    "@k": "over the whole database if it has fewer than k images",
    "within 2": "a query with an empty result within 2 bits has precision 0",
    "recall@10": f"share of the {NEAREST} nearest neighbours in the pixels that the model sees (Euclidean distance), "
    f"for at most {ASKED:,} queries drawn with seed 0; also among the images with the query's label only",
    "codes": "health of the codes of the database",
}


class Protocol(NamedTuple):
    """Which images of which sources are learned from, searched and asked for.

    Of two sources, the first is learned from and searched, and the second asked for. Where `drawn` is given, so many
    queries are drawn from all images of the sources instead, and `learned` of the others, which are all searched. Of
    one source, each image is asked for among all others.
    """

    description: str
    sources: tuple[str, ...]
    n_queries: int = 0
    n_training: int = 0

    def rows(self, lengths: list[int]) -> tuple[RowIndices, RowIndices, RowIndices]:
        """The images that are learned from, searched and asked for, of all images of the sources in a row."""
        every = np.arange(sum(lengths))
        if self.n_queries:
            every = np.random.default_rng(0).permutation(every)
            learned = every[self.n_queries :][: self.n_training]
            return np.sort(learned), np.sort(every[self.n_queries :]), np.sort(every[: self.n_queries])
        if len(lengths) == 1:
            return every, every, every
        return every[: lengths[0]], every[: lengths[0]], every[lengths[0] :]


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
    "split": Protocol(_SPLIT, ()),  # of the sources that are given
}


def choose_protocol(name: str, train: str | None = None, test: str | None = None) -> Protocol:
    """The protocol of that name, or leave-one-out over the source that it is; `train` and `test` are sources in place
    of its own. Raises ValueError for one of them without the other, or without a protocol that has two."""
    given = tuple(source for source in (train, test) if source)
    if len(given) == 1 or (given and name not in PROTOCOLS) or (not given and name == "split"):
        raise ValueError(f"--train SOURCE and --test SOURCE go together, with one of {', '.join(PROTOCOLS)}")
    if name not in PROTOCOLS:
        return Protocol("leave-one-out: each image is a query against all others; all are in the training set", (name,))
    return PROTOCOLS[name]._replace(sources=given or PROTOCOLS[name].sources)


class ProtocolImages(NamedTuple):
    """The images of a protocol's sources that can be read, as a model sees them, in a row.

    `lengths` are their numbers in each source, `roots` the sources' full names, `unreadable` counts those left out.
    """

    pixels: NDArray[np.uint8]
    labels: list[str | None]
    roots: list[str]
    lengths: list[int]
    unreadable: int


class Evaluation(NamedTuple):
    """What was measured: retrieval by name, and the health of the codes; and from which and how many images."""

    measures: Measures
    health: Health
    roots: list[str]
    queries: int
    left_out: int  # images that are no queries, because they have no label, or nothing else has theirs
    unreadable: int


def read_images(
    protocol: Protocol,
    preprocessing: Preprocessing,
    *,
    data_root: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ProtocolImages:
    """The images of a protocol as the model sees them; raises HashretError for a source without any."""
    blocks: list[NDArray[np.uint8]] = []
    labels: list[str | None] = []
    lengths, unreadable = [], 0
    opened = [open_source(source, data_root=data_root) for source in protocol.sources]
    total = None if any(source.length is None for source in opened) else sum(source.length or 0 for source in opened)
    for source in opened:
        preprocessing.check_source(source, "give a SOURCE of those")
        begin = len(labels)
        for batch in batches(_prepared(source, preprocessing), 1024):
            fine = [(label, pixels) for label, pixels in batch if pixels is not None]
            blocks += [np.stack([pixels for _, pixels in fine])] if fine else []
            labels += [label for label, _ in fine]
            unreadable += len(batch) - len(fine)
            if progress is not None:
                progress(Progress("reading", len(labels), total, {}))
        lengths.append(len(labels) - begin)
        if not lengths[-1]:
            raise HashretError(f"{source.root.location} has no images that can be read")
    return ProtocolImages(np.concatenate(blocks), labels, [source.root for source in opened], lengths, unreadable)


def _prepared(source: Source, preprocessing: Preprocessing) -> Iterator[tuple[str | None, Inputs | None]]:
    def prepare(found: tuple[str | None, Content | HashretError]) -> tuple[str | None, Inputs | None]:
        label, content = found
        if isinstance(content, HashretError):
            return label, None
        try:
            return label, preprocessing(content).pixels
        except HashretError:
            return label, None

    return ordered_map(prepare, ((record.label, read(record)) for record in source))


def training_images(protocol: Protocol, data_root: str | os.PathLike[str] | None = None) -> NDArray[np.uint8]:
    """The images that a protocol learns from, uint8 (n, h, w, c), for `Hasher.fit`: for sources of one size."""
    parts = [
        [decode(record.read()).pixels for record in open_source(source, data_root=data_root)]
        for source in protocol.sources
    ]
    images = list(chain(*parts))
    return np.stack([images[row] for row in protocol.rows([len(part) for part in parts])[0]])


def score(protocol: Protocol, images: ProtocolImages, codes: Codes) -> Evaluation:
    """What the codes, (n), of a protocol's images are worth; raises HashretError where labels say nothing."""
    known = {label: number for number, label in enumerate(sorted({label for label in images.labels if label}))}
    if len(known) < 2:
        raise HashretError(
            f"{', '.join(protocol.sources)} has labels of {format_count(len(known), 'kind')}, and two are the least to "
            "score by: put the images into a folder for each kind"
        )
    labels = np.array([known.get(label or "", -1) for label in images.labels])
    _, searched, asked = protocol.rows(images.lengths)
    own = np.array_equal(searched, asked)  # then row i is searched for row i
    others = np.bincount(labels[searched] + 1, minlength=len(known) + 1)[labels[asked] + 1] - own
    scored = (labels[asked] >= 0) & (others > 0)
    if not scored.any():
        raise HashretError(f"{', '.join(protocol.sources)}: no label of a query is that of another image")
    left_out = np.flatnonzero(scored) if own else None
    queries = asked[scored]
    measures = retrieval(count_labels(codes[queries], labels[queries], codes[searched], labels[searched], left_out))
    drawn = np.sort(np.random.default_rng(0).permutation(queries)[:ASKED])
    measures |= {
        "recall@10 of neighbours": _recall(images.pixels, codes, drawn, searched, own),
        "recall@10 within labels": _recall(images.pixels, codes, drawn, searched, own, labels),
    }
    left = len(asked) - len(queries)
    return Evaluation(measures, health(codes[searched]), images.roots, len(queries), left, images.unreadable)


def _recall(
    pixels: NDArray[np.uint8],
    codes: Codes,
    asked: RowIndices,
    searched: RowIndices,
    own: bool,
    labels: RowIndices | None = None,
) -> float:
    """The share of the images nearest in pixels that are nearest in codes; with labels, among those of one label."""
    parts = []
    for label in [None] if labels is None else np.unique(labels[asked]):
        some, among = (rows if labels is None else rows[labels[rows] == label] for rows in (asked, searched))
        left_out = among.searchsorted(some) if own else None
        neighbours = nearest(pixels[some], pixels[among], NEAREST, left_out)
        counts = count_neighbours(codes[some], neighbours, codes[among], left_out)
        parts += [recall_at(*counted, neighbours.shape[1]) for counted in counts]
    return float(np.concatenate(parts).mean())


def evaluate(
    hasher: "Hasher",
    protocol: Protocol,
    *,
    data_root: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Read the images of a protocol, code them, and measure; raises HashretError for sources that cannot be scored."""
    images = read_images(protocol, hasher.preprocessing, data_root=data_root, progress=progress)
    return score(protocol, images, hasher.encode_pixels(images.pixels))
