"""The stages of `Hasher.fit`: check the request, read the training data, train the member, fit the head, and record."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hashret.data.contents import Inputs
from hashret.data.images import to_content
from hashret.data.preprocessing import Preprocessing
from hashret.data.records import Source
from hashret.data.sample import Sample, sample
from hashret.errors import HashretError, format_count
from hashret.heads import HEADS, Head, check_head
from hashret.models import MODELS, Member
from hashret.models.base import VECTOR_DEFAULTS, build
from hashret.models.networks import Shape
from hashret.parallel import Progress
from hashret.process import version
from hashret.runtime import batch_slices
from hashret.runtime.inputs import default_device
from hashret.runtime.rescue import AMBIGUOUS_MARGIN, rounding_errors
from hashret.runtime.torch_runtime import TorchRuntime
from hashret.training.loop import LabelledPairs, Labels, Training, split, train
from hashret.training.options import TrainingOptions

MAX_HEAD_VALUES = 2**28  # outputs that a head is fitted to: 1 GiB

PairList = list[tuple[Any, Any, bool]]  # two images, and whether they are the same


class Request(NamedTuple):
    """The model to fit."""

    model: str
    bits: int
    head: str
    settings: dict[str, Any]  # set explicitly
    init_settings: dict[str, Any]  # of the model to initialise from, if it is the same model

    def is_labelled(self) -> bool:
        """Return whether the member learns from labels with these settings."""
        with torch.device("meta"):
            return MODELS[self.model]((1, 8, 8), 8, **(self.init_settings | self.settings)).labelled


class TrainingData(NamedTuple):
    """The images, labels and pairs to learn from, and the complete settings of the member."""

    sampled: Sample
    images: Inputs  # preprocessed
    settings: dict[str, Any]
    classes: list[str]  # names of the labels; empty if labels are not used
    pairs: LabelledPairs | None

    @property
    def preprocessing(self) -> Preprocessing:
        return self.sampled.preprocessing

    @property
    def labels(self) -> Labels | None:
        """The class index of each image, int64 (n,), −1 for an image without a label; None if labels are not used."""
        if not self.classes:
            return None
        indices = {name: index for index, name in enumerate(self.classes)}
        return np.array([-1 if label is None else indices[label] for label in self.sampled.labels], np.int64)


class TrainedMember(NamedTuple):
    """A member in evaluation mode."""

    member: Member
    rows: NDArray[np.int64]  # of the images that it was trained on
    training: Training | None  # None for a member without a network


def check_request(request: Request, labels: bool, pairs: PairList | None) -> None:
    """Raise HashretError if the member requires labels and there are none, or cannot use the labels or pairs."""
    if request.is_labelled() != labels:
        advice = "without labels: leave --labels out" if labels else "from labels: add --labels"
        raise HashretError(f"model {request.model!r} learns {advice}")
    if pairs is not None and not (pairs and MODELS[request.model].trainable):
        reason = f"model {request.model!r} has no network that they could train" if pairs else "there are none"
        raise HashretError(f"labelled pairs cannot be learned from: {reason}")


def read_training_data(
    request: Request,
    source: Source,
    options: TrainingOptions,
    pairs: PairList | None,
    progress: Callable[[Progress], None] | None,
) -> TrainingData:
    """Return the training data of a source. Settings that the request lacks come from the model to initialise from, or
    else are the recommended ones for the images."""
    report = progress or (lambda progress: None)
    sampled = sample(
        source,
        size=options.size,
        limit=options.limit,
        seed=options.seed,
        progress=lambda done: report(Progress("reading", done, source.length, {})),
    )
    preprocessing = sampled.preprocessing
    images = preprocessing.batch(sampled.images)
    memory = {"MB in memory": float(math.ceil(images.nbytes / 1e6))}
    report(Progress("reading", sampled.seen, sampled.seen, memory))
    member = MODELS[request.model]
    settings = member.defaults()
    if len(preprocessing.shape) == 1:  # vectors
        settings |= {name: value for name, value in VECTOR_DEFAULTS.items() if name in settings}
    settings |= request.init_settings or member.recommended_settings(input_shape(preprocessing), len(images))
    settings |= request.settings
    classes = list[str]()
    if request.is_labelled():
        classes = _class_names(sampled.labels, source.root)
        settings |= {"classes": len(classes)}
    arrays = None if pairs is None else _pair_arrays(preprocessing, pairs)
    return TrainingData(sampled, images, settings, classes, arrays)


def train_member(
    request: Request,
    data: TrainingData,
    options: TrainingOptions,
    init: Member | None,
    progress: Callable[[Progress], None] | None,
) -> TrainedMember:
    """Return the member, trained if it has a network, from random weights or those of `init`."""
    images, training = data.images, None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(options.seed)
        shape = input_shape(data.preprocessing)
        member = build(MODELS[request.model], shape, request.bits, data.settings)
        if init is not None:
            member.init_from(init)
        rows = split(len(images), options.seed)[0] if member.trainable else np.arange(len(images))
        check_head(request.head, len(rows), member.latent, request.bits)
        if member.trainable:
            training = train(
                member,
                images,
                options,
                labels=data.labels,
                pairs=data.pairs,
                settings=data.settings,
                progress=progress,
            )
    return TrainedMember(member.eval().requires_grad_(False).to(default_device()), rows, training)


def fit_head(request: Request, trained: TrainedMember, images: Inputs, seed: int) -> Head:
    """Return the head, fitted to the member's outputs for its training images, at most `MAX_HEAD_VALUES` of them."""
    member, rows, _ = trained
    max_rows = max(request.bits, MAX_HEAD_VALUES // member.latent)
    if len(rows) > max_rows:  # at random, because the source may be sorted
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_rows, replace=False))
    runtime, values = TorchRuntime(member), np.empty((len(rows), member.latent), np.float32)
    for part in batch_slices(images, len(rows)):
        values[part] = runtime.outputs(images[rows[part]])
    if not np.isfinite(values).all():
        raise HashretError("the model's outputs are not finite numbers: train with a lower learning rate")
    head = HEADS[request.head](values, request.bits, seed)
    first_batch = images[rows[: next(batch_slices(images)).stop]]
    return head.stabilised(rounding_errors(runtime, head, first_batch), AMBIGUOUS_MARGIN)


def training_record(source: Source, data: TrainingData, trained: TrainedMember, seed: int) -> dict[str, Any]:
    """Return the record of the training for `config.json`: data, versions, steps, losses and automatic settings."""
    record: dict[str, Any] = {
        "source": source.root,
        "images": len(data.images),
        "images_seen": data.sampled.seen,
        "unreadable": len(data.sampled.failures),
        "seed": seed,
        "hashret": version(),
        "torch": torch.__version__,
    }
    training = {} if trained.training is None else trained.training.to_record()
    record |= {name: round(value, 3) if isinstance(value, float) else value for name, value in training.items()}
    record |= {"classes": data.classes} if data.classes else {}
    record |= {"pairs": len(data.pairs.same)} if data.pairs is not None else {}
    return record | (trained.member.auto_settings() if trained.member.trainable else {})


def input_shape(preprocessing: Preprocessing) -> Shape:
    """Return the shape of a network's input: (c, h, w), or (d,) for vectors."""
    *size, last = preprocessing.shape
    return (last, *size)


def _class_names(labels: list[str | None], root: str) -> list[str]:
    """Return the distinct labels, sorted. Raise HashretError for fewer than two."""
    names = sorted({label for label in labels if label is not None})
    if len(names) < 2:
        raise HashretError(
            f"{root.rstrip('/#!')} has {format_count(len(names), 'different label')}, and training needs at least two: "
            "put the images of each class into a folder of its own"
        )
    return names


def _pair_arrays(preprocessing: Preprocessing, pairs: PairList) -> LabelledPairs:
    """Return labelled pairs as preprocessed arrays."""
    a, b = (np.stack([preprocessing(to_content(pair[side])).pixels for pair in pairs]) for side in (0, 1))
    return LabelledPairs(a, b, np.array([same for _, _, same in pairs], np.bool_))
