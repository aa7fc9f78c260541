"""The stages of `Hasher.fit`: what is asked for, the images, the member, the head, and the record of it all."""

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
from hashret.models.base import FOR_VECTORS, build
from hashret.models.networks import Shape
from hashret.parallel import Progress
from hashret.process import version
from hashret.runtime import batch_slices
from hashret.runtime.inputs import device
from hashret.runtime.rescue import AMBIGUOUS_MARGIN, rounding
from hashret.runtime.torch_runtime import TorchRuntime
from hashret.training.loop import Labels, Pairs, Training, split, train
from hashret.training.options import TrainingOptions

MOST_NUMBERS = 2**28  # that a head is fitted on: a gigabyte

Judged = list[tuple[Any, Any, bool]]  # images two by two, and whether they are the same


class Request(NamedTuple):
    """The model that is asked for."""

    model: str
    bits: int
    head: str
    settings: dict[str, Any]  # those given
    begun: dict[str, Any]  # those of a model of the same name to begin with

    def is_labelled(self) -> bool:
        """Whether the member, with these settings, learns from labels."""
        with torch.device("meta"):
            return MODELS[self.model]((1, 8, 8), 8, **(self.begun | self.settings)).labelled


class Material(NamedTuple):
    """What a member learns from, and with which settings."""

    sampled: Sample
    images: Inputs  # as the model sees them
    settings: dict[str, Any]
    classes: list[str]  # the labels to learn from, none where it learns without
    pairs: Pairs | None

    @property
    def preprocessing(self) -> Preprocessing:
        return self.sampled.preprocessing

    @property
    def labels(self) -> Labels | None:
        """The number of each image's class, int64 (n,), -1 where its label is unknown."""
        if not self.classes:
            return None
        numbers = {name: number for number, name in enumerate(self.classes)}
        return np.array([-1 if label is None else numbers[label] for label in self.sampled.labels], np.int64)


class Learned(NamedTuple):
    member: Member
    rows: NDArray[np.int64]  # of the images that it learned from
    training: Training | None  # None where there is nothing to train


def check_request(request: Request, labels: bool, judged: Judged | None) -> None:
    """Raises HashretError where the member lacks labels, or could not learn from what is given."""
    if request.is_labelled() != labels:
        how = "without labels: leave --labels out" if labels else "from labels: add --labels"
        raise HashretError(f"model {request.model!r} learns {how}")
    if judged is not None and not (judged and MODELS[request.model].trainable):
        why = f"model {request.model!r} has no network that they could train" if judged else "there are none"
        raise HashretError(f"judged pairs cannot be learned from: {why}")


def read_material(
    request: Request,
    source: Source,
    options: TrainingOptions,
    judged: Judged | None,
    progress: Callable[[Progress], None] | None,
) -> Material:
    """The images of a source, and the settings: those given, and for all others those of the model that is begun with,
    or those that suit the images."""
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
    held = {"MB in memory": float(math.ceil(images.nbytes / 1e6))}
    report(Progress("reading", sampled.seen, sampled.seen, held))
    member = MODELS[request.model]
    settings = member.defaults()
    if len(preprocessing.shape) == 1:  # of vectors
        settings |= {name: value for name, value in FOR_VECTORS.items() if name in settings}
    settings |= request.begun or member.recommended_settings(input_shape(preprocessing), len(images))
    settings |= request.settings
    classes = list[str]()
    if request.is_labelled():
        classes = _classes(sampled.labels, source.root)
        settings |= {"classes": len(classes)}
    return Material(sampled, images, settings, classes, None if judged is None else _pairs(preprocessing, judged))


def train_member(
    request: Request,
    material: Material,
    options: TrainingOptions,
    init: Member | None,
    progress: Callable[[Progress], None] | None,
) -> Learned:
    """The member, in evaluation mode, trained if it can be, from the weights of `init` if there are any."""
    images, training = material.images, None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(options.seed)
        shape = input_shape(material.preprocessing)
        member = build(MODELS[request.model], shape, request.bits, material.settings)
        if init is not None:
            member.init_from(init)
        rows = split(len(images), options.seed)[0] if member.trainable else np.arange(len(images))
        check_head(request.head, len(rows), member.latent, request.bits)
        if member.trainable:
            training = train(
                member,
                images,
                options,
                labels=material.labels,
                pairs=material.pairs,
                settings=material.settings,
                progress=progress,
            )
    return Learned(member.eval().requires_grad_(False).to(device()), rows, training)


def fit_head(request: Request, learned: Learned, images: Inputs, seed: int) -> Head:
    """The head, fitted to the member's outputs for the images that it learned from, or as many as are enough."""
    member, rows, _ = learned
    most = max(request.bits, MOST_NUMBERS // member.latent)
    if len(rows) > most:  # drawn from all over the source, which may be sorted
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    runtime, values = TorchRuntime(member), np.empty((len(rows), member.latent), np.float32)
    for part in batch_slices(images, len(rows)):
        values[part] = runtime.outputs(images[rows[part]])
    if not np.isfinite(values).all():
        raise HashretError("the model's outputs are not finite numbers: train with a lower learning rate")
    head = HEADS[request.head](values, request.bits, seed)
    return head.stabilised(rounding(runtime, head, images[rows[: next(batch_slices(images)).stop]]), AMBIGUOUS_MARGIN)


def record_of(source: Source, material: Material, learned: Learned, seed: int) -> dict[str, Any]:
    """What the model was trained on, by what, how long, and what it chose by itself."""
    record: dict[str, Any] = {
        "source": source.root,
        "images": len(material.images),
        "images_seen": material.sampled.seen,
        "unreadable": len(material.sampled.failures),
        "seed": seed,
        "hashret": version(),
        "torch": torch.__version__,
    }
    training = {} if learned.training is None else learned.training.to_record()
    record |= {name: round(value, 3) if isinstance(value, float) else value for name, value in training.items()}
    record |= {"classes": material.classes} if material.classes else {}
    record |= {"pairs": len(material.pairs.same)} if material.pairs is not None else {}
    return record | (learned.member.auto_settings() if learned.member.trainable else {})


def input_shape(preprocessing: Preprocessing) -> Shape:
    """The shape of a network's input, (c, h, w), or (d,) for vectors."""
    *size, last = preprocessing.shape
    return (last, *size)


def _classes(labels: list[str | None], root: str) -> list[str]:
    """The labels that there are, in order; raises HashretError for fewer than two."""
    names = sorted({label for label in labels if label is not None})
    if len(names) < 2:
        raise HashretError(
            f"{root.rstrip('/#!')} has labels of {format_count(len(names), 'kind')}, and two are the least to learn "
            f"from: put the images into a folder for each kind"
        )
    return names


def _pairs(preprocessing: Preprocessing, judged: Judged) -> Pairs:
    """Judged pairs as the training takes them."""
    a, b = (np.stack([preprocessing(to_content(pair[side])).pixels for pair in judged]) for side in (0, 1))
    return Pairs(a, b, np.array([same for _, _, same in judged], np.bool_))
