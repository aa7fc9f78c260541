"""`Hasher`: preprocessing, a member of the family and a head; image, or vector, in, code out.

The file is longer than most because the model folder is a format: whatever writes or checks it is in this one place.
"""

import copy
import hashlib
import inspect
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from hashret.codes import Codes, check_bits, pack
from hashret.data.arrays import numbers_of
from hashret.data.contents import Inputs, PreparedImages, sha256
from hashret.data.images import as_batch, to_content
from hashret.data.preprocessing import Preprocessing, describe, stored_preprocessing
from hashret.data.records import Labelled
from hashret.data.sample import sample
from hashret.data.sources import open_source
from hashret.durable import make_folder, put_in_place
from hashret.errors import HashretError, choose
from hashret.heads.heads import HEADS, Head, check_head
from hashret.model_folder import FORMAT, damaged_model, read_config
from hashret.models import MODELS
from hashret.models.base import FOR_VECTORS, Member
from hashret.models.networks import Shape, folded
from hashret.parallel import Progress, batches, in_order
from hashret.process import full_float32, one_torch_thread, short_turns, version
from hashret.training.digest import tensor_bytes
from hashret.training.loop import Pairs, Training, device, split, to_input, train
from hashret.training.options import TrainingOptions

R = TypeVar("R")

DEFAULT_MODEL = "contrastive"
PASS, PASS_NUMBERS = 1000, 2**21  # images in one forward pass, at most, and the numbers that they have together
SMALL_FILE, SMALL_ARRAY = 2**12, 2**14  # bytes of images that are decoded one after the other
SMALL_BATCH = 2**16  # bytes of a batch that a single thread codes: more of them spend their time waiting for each other
MAX_WEIGHTS = 2**30  # of a member: four gigabytes, and training needs as much again three times
REMEMBERED = 5000  # training images of which it is measured how badly they are remembered
MOST_NUMBERS = 2**28  # that a head is fitted on: a gigabyte
FILES = {"config.json", "model.safetensors", "README.md"}  # of a model folder

# An image with an output nearer to its threshold than this many training standard deviations is computed again in
# float64, because float32 sums differ in their last places from batch to batch. `fit` sees to it that they never differ
# by as much.
DOUBT = 1e-4
# In float64 a bit is 1 above the threshold and this much more: an output placed on the threshold itself, where even
# float64 sums may fall to either side, is 0 in every batch.
SNAP = 1e-9


class Hasher:
    """Turns images into codes. Make one, `fit` it to images without labels, then `encode`.

    `model` is a name of `hashret.models.MODELS`, `bits` the width of a code (a multiple of 8 from 8 to 1024), `head`
    a name of `hashret.heads.heads.HEADS` or None for the member's own, and `settings` are the member's keyword
    arguments, such as `network="mlp"` or `width=64`. Raises ValueError for a name or a value that does not exist.
    """

    def __init__(self, model: str = DEFAULT_MODEL, bits: int = 64, head: str | None = None, **settings: Any) -> None:
        member = choose(MODELS, model, "model")
        self.model, self.bits, self.head = model, check_bits(bits), member.head if head is None else head
        choose(HEADS, self.head, "head")
        self._asked = _check_settings(model, settings)
        self.settings = MODELS[model].defaults() | self._asked  # a stored model does not change when a default does
        self._fitted: tuple[Preprocessing, Member, Head] | None = None
        self._training: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        return f"Hasher(model={self.model!r}, bits={self.bits}, head={self.head!r}{settings})"

    def fit(
        self,
        source: Any,
        options: TrainingOptions | None = None,
        *,
        labels: bool | Sequence[object] = False,
        pairs: Iterable[tuple[Any, Any, bool]] | None = None,
        init: "Hasher | None" = None,
        data_root: str | os.PathLike[str] | None = None,
        progress: Callable[[Progress], None] | None = None,
        **changes: Any,
    ) -> Self:
        """Learn from a SOURCE (folder, archive, array file, name of a data set, array, or an opened `Source`) and
        return self.

        `changes` are fields of `TrainingOptions`, such as `budget="2m"`, `steps=1000` or `seed=1`, which say how long
        and how to train; they go before those of `options`. A SOURCE of vectors has no `size`, and the network "mlp"
        and the likelihood "gaussian" unless the settings say otherwise. `labels` lets a member that learns from labels
        read those of the images, or gives one for each image of the source, None for unknown; it refuses to go without,
        and the others refuse it. `pairs` are images that were judged two by two, and whether they are the same: the
        codes of those that are come together, those of others go apart. `init` is a hasher whose encoder, which must be
        alike, and decoder, as far as it is, are begun with; if it is of the same model, its settings hold where none
        are given; with `steps` of 0 only the head is learned anew.
        Raises HashretError when the images are too few or lack labels that are needed, and ValueError for impossible
        values.
        """
        options = replace(options or TrainingOptions(), **changes)
        seed = options.seed
        begun = init.settings if init is not None and init.model == self.model else {}
        with torch.device("meta"):
            labelled = MODELS[self.model]((1, 8, 8), 8, **(self.settings | begun | self._asked)).labelled
        if labelled != (labels is not False):
            how = "from labels: add --labels" if labelled else "without labels: leave --labels out"
            raise HashretError(f"model {self.model!r} learns {how}")
        judged = None if pairs is None else list(pairs)
        if judged is not None and not (judged and MODELS[self.model].trainable):
            why = f"model {self.model!r} has no network that they could train" if judged else "there are none"
            raise HashretError(f"judged pairs cannot be learned from: {why}")
        opened = open_source(source, data_root=data_root)
        if not isinstance(labels, bool):
            opened = Labelled(opened, labels)

        def reading(done: int) -> None:
            if progress is not None:
                progress(Progress("reading", done, opened.length, {}))

        sampled = sample(opened, size=options.size, limit=options.limit, seed=seed, progress=reading)
        preprocessing = sampled.preprocessing
        images: Inputs = preprocessing.batch(sampled.images)
        if progress is not None:
            held = {"MB in memory": float(math.ceil(images.nbytes / 1e6))}
            progress(Progress("reading", sampled.seen, sampled.seen, held))
        settings, classes = MODELS[self.model].defaults(), dict[str, int]()
        if len(preprocessing.shape) == 1:
            settings |= {name: value for name, value in FOR_VECTORS.items() if name in settings}
        settings |= begun or MODELS[self.model].suited(_channels_first(preprocessing), len(images))
        settings |= self._asked
        if labelled:
            classes = _classes(sampled.labels, opened.root)
            settings = settings | {"classes": len(classes)}
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            member = self._build(preprocessing, settings)
            if init is not None:
                _begin_with(member, init._parts()[1])
            rows = split(len(images), seed)[0] if member.trainable else np.arange(len(images))
            check_head(self.head, len(rows), member.latent, self.bits)
            trained = None
            if member.trainable:
                trained = train(
                    member,
                    images,
                    options,
                    labels=_numbers_of(sampled.labels, classes) if labelled else None,
                    pairs=None if judged is None else _pairs(preprocessing, judged),
                    settings=settings,
                    progress=progress,
                )
        member.eval().requires_grad_(False).to(device())
        most = max(self.bits, MOST_NUMBERS // member.latent)
        if len(rows) > most:  # drawn from all over the source, which may be sorted
            rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
        values = _values(member, images, rows)
        if not np.isfinite(values).all():
            raise HashretError("the model's outputs are not finite numbers: train with a lower learning rate")
        head = HEADS[self.head](values, self.bits, seed)
        some = images[rows[: next(passes(images)).stop]]
        self._fitted = preprocessing, member, head.steadied(_rounding(member, head, some), DOUBT)
        self.settings = settings
        for derived in ("fingerprint", "_fast", "_exact"):
            self.__dict__.pop(derived, None)
        self._training = {
            "source": opened.root,
            "images": len(images),
            "images_seen": sampled.seen,
            "unreadable": len(sampled.failures),
            "seed": seed,
            "hashret": version(),
            "torch": torch.__version__,
        }
        self._training |= (_told(trained) if trained else {}) | ({"classes": list(classes)} if labelled else {})
        self._training |= {"pairs": len(judged)} if judged is not None else {}
        if member.trainable:
            self._training |= member.chosen()
            self._training["largest_error"] = float(self.errors(images[rows[:REMEMBERED]]).max())
        codes = self.encode_pixels(images)
        self._training["distinct_codes"] = len(np.unique(codes, axis=0))
        return self

    def prepare(self, images: Any) -> PreparedImages:
        """A batch of images, as `encode` takes them, decoded once for several uses: as this hasher's `encode`,
        `margins` and `unusual` take them in place of images, with the SHA-256 of each content. Raises as `encode`."""
        preprocessing = self.preprocessing

        def prepare(image: Any) -> tuple[Inputs, str]:
            content = to_content(image)
            return preprocessing(content).pixels, sha256(content)

        prepared = list(_in_order(prepare, images))
        pixels = np.empty((len(prepared), *preprocessing.shape), preprocessing.dtype)
        for row, (image, _) in zip(pixels, prepared, strict=True):
            row[...] = image
        return PreparedImages(pixels, [digest for _, digest in prepared])

    def encode(self, images: Any) -> Codes:
        """Codes, uint8 (n, bits // 8), of a batch of images: a uint8 array (n, h, w) or (n, h, w, c), or a sequence of
        uint8 arrays (h, w) or (h, w, c), PIL images, paths and bytes of files; a single one of the last three is a
        batch of one. A batch of vectors is an array of floats (n, d), or a sequence of arrays (d,). What `prepare`
        gives is a batch of either.

        A code depends on the image and the model alone, not on the batch. Raises HashretError for a file that cannot
        be read, ValueError for anything else that is no image.
        """
        codes = [self.encode_pixels(pixels) for pixels in self._batches(images)]
        return np.concatenate([np.empty((0, self.bits // 8), np.uint8), *codes])

    def encode_pixels(self, pixels: Inputs, *, alone: bool = False) -> Codes:
        """Codes, uint8 (n, bits // 8), of what `preprocessing` gives: uint8 (n, height, width, channels), or float32
        (n, d) for vectors.

        With `alone` the calling thread does all the work, for callers with other work for the other cores.
        """
        preprocessing, member, head = self._parts()[0], self._fast, self._parts()[2]
        if pixels.dtype != preprocessing.dtype or pixels.shape[1:] != preprocessing.shape:
            expected = f"{preprocessing.dtype} {('n', *preprocessing.shape)}"
            raise ValueError(f"pixels must be {expected}, not {pixels.dtype} {pixels.shape}")
        where = next(chain(member.parameters(), member.buffers(), [head.threshold])).device
        alone |= pixels.nbytes <= SMALL_BATCH
        out = np.empty((len(pixels), self.bits), np.bool_)
        doubtful = np.empty(len(pixels), np.bool_)
        with _full_float32(where, alone):
            for rows in passes(pixels):
                margins = head.margins(member.outputs(to_input(pixels[rows], where)))
                out[rows] = (margins > 0).cpu().numpy()
                doubtful[rows] = (margins.abs() < DOUBT).any(1).cpu().numpy()
            again = np.flatnonzero(doubtful)
            for rows in passes(pixels, len(again)):  # together, for a pass over one or two costs as much
                margins = head.margins(self._exact.outputs(to_input(pixels[again[rows]], where).double()))
                out[again[rows]] = (margins > SNAP).cpu().numpy()
        return pack(out)

    def margins(self, images: Any) -> tuple[Codes, NDArray[np.float32]]:
        """Codes of a batch of images, as `encode` takes them and gives them, and how sure the model is of every bit:
        how far its number lies from the threshold, float32 (n, bits), in training standard deviations, above it for a
        bit of 1. They are computed in float64, so that they depend on the batch no more than codes do."""
        member, head, codes, margins = self._exact, self._parts()[2], [], [np.empty((0, self.bits), np.float32)]
        for pixels in self._batches(images):
            codes.append(self.encode_pixels(pixels))
            for rows in passes(pixels):
                with _full_float32(device()):
                    found = head.margins(member.outputs(to_input(pixels[rows], device()).double()))
                margins.append(found.float().cpu().numpy())
        return np.concatenate([np.empty((0, self.bits // 8), np.uint8), *codes]), np.concatenate(margins)

    def errors(self, pixels: Inputs) -> NDArray[np.float32]:
        """How badly the model remembers images, in the format of `preprocessing`: the squared error of each, (n,),
        summed over its values in [0, 1], or over a vector's. Raises HashretError for a model without a network."""
        member = self.member
        if not member.trainable:
            raise HashretError(f"model {self.model!r} has no network to remember images with: train one, such as ae")
        parts = []
        with torch.inference_mode():
            for rows in passes(pixels):
                x = to_input(pixels[rows], device())
                parts.append((member.reconstruct(x) - x).square().flatten(1).sum(1).cpu())
        return np.asarray(torch.cat([torch.empty(0), *parts]).numpy())

    def unusual(self, images: Any) -> list[bool]:
        """Which of a batch of images, as `encode` takes them, are remembered worse than any of those that the model was
        trained on. It knows only images of their kind; of others its codes say little. Without a network, none."""
        largest = self._training.get("largest_error")
        if largest is None:
            return [False] * (len(images) if isinstance(images, PreparedImages) else sum(1 for _ in _each(images)))
        parts = [self.errors(pixels) > largest for pixels in self._batches(images)]
        return [bool(worse) for part in parts for worse in part]

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the pixels that the member sees, or a vector the numbers."""
        return self._parts()[0]

    @property
    def member(self) -> Member:
        """The member of the family, in evaluation mode: a PyTorch module over float32 (n, c, h, w) in [0, 1]."""
        return self._parts()[1]

    @property
    def training(self) -> dict[str, Any]:
        """What the model was trained on, how long, and what was measured."""
        return dict(self._training)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over weights, head, preprocessing and code format: models of one give the same codes."""
        digest = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        for part in tensor_bytes({name: tensor.numpy() for name, tensor in self._tensors().items()}):
            digest.update(part)
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model folder, `config.json`, `model.safetensors` and a model card, whole or not at all."""
        target = Path(os.path.abspath(path))  # noqa: PTH100  # unlike Path.absolute it takes "." and ".."
        if target.exists() and not (target.is_dir() and _holds_only_a_model(target)):
            raise HashretError(f"{target} exists and is no model folder: choose another place")
        config = self._description() | {"fingerprint": self.fingerprint, "training": self._training}
        make_folder(target.parent)
        written, old = (target.with_name(f"{target.name}.{os.getpid()}.{what}") for what in ("new", "old"))
        shutil.rmtree(written, ignore_errors=True)  # of a process that was killed, and had the same number
        try:
            written.mkdir()
            (written / "model.safetensors").write_bytes(save(self._tensors()))
            (written / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            (written / "README.md").write_text(_card(config), "utf-8", "surrogateescape")
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
                target.replace(old)
            put_in_place(written, target)
        finally:
            if old.exists() and not target.exists():
                old.replace(target)
            shutil.rmtree(written, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The hasher saved at `path`; raises HashretError if there is none, or it is damaged or too new."""
        folder = Path(path)
        config = read_config(folder)
        try:
            hasher = cls(config["model"], config["bits"], config["head"], **config["settings"])
            # Without those that members did not have yet when it was made:
            hasher.settings = hasher._asked = config["settings"]
            hasher._training = dict(config["training"])
            weights = folder / "model.safetensors"
            if weights.exists() and not weights.is_file():  # a pipe, which would keep us waiting
                raise ValueError("model.safetensors is no file")
            utf8 = os.fsencode(weights).decode(errors="ignore") == str(weights)  # the only paths that safetensors takes
            tensors = load_file(weights) if utf8 else load(weights.read_bytes())
            means = {name: tensor.numpy() for name, tensor in _below("preprocessing.", tensors).items()}
            preprocessing = stored_preprocessing(config["preprocessing"], means)
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("preprocessing.")}
            with torch.device("meta"):
                member = hasher._build(preprocessing, hasher.settings)
            _check_tensors(tensors, member, hasher.bits)
            member.load_state_dict(_below("member.", tensors), assign=True)
            head = Head(**_below("head.", tensors))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise damaged_model(folder, error) from None
        hasher._fitted = preprocessing, member.eval().requires_grad_(False), head
        if hasher.fingerprint != config.get("fingerprint"):
            raise HashretError(f"the model in {folder} was changed since it was saved: restore it or train again")
        member.to(device())
        return hasher

    def _batches(self, images: Any) -> Iterator[Inputs]:
        """A batch of images as the model sees them, a few at a time."""
        if isinstance(images, PreparedImages):
            yield images.pixels
            return
        preprocessing = self.preprocessing
        prepared = _in_order(lambda image: preprocessing(to_content(image)).pixels, images)
        yield from map(np.stack, batches(prepared, PASS))

    def _parts(self) -> tuple[Preprocessing, Member, Head]:
        if self._fitted is None:
            raise HashretError("this hasher has learned nothing yet: call fit, or Hasher.load")
        return self._fitted

    def _build(self, preprocessing: Preprocessing, settings: dict[str, Any]) -> Member:
        shape = _channels_first(preprocessing)
        with torch.device("meta"):  # takes no memory
            weights = sum(p.numel() for p in MODELS[self.model](shape, self.bits, **settings).parameters())
        if weights > MAX_WEIGHTS:
            raise HashretError(f"a network of {weights:,} weights is too large: choose smaller settings or images")
        return MODELS[self.model](shape, self.bits, **settings)

    @cached_property
    def _fast(self) -> Member:
        with self._lock:
            return folded(self._parts()[1]).to(memory_format=torch.channels_last)

    @cached_property
    def _exact(self) -> Member:
        with self._lock:
            return folded(copy.deepcopy(self._parts()[1]).double())

    def _description(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model,
            "bits": self.bits,
            "head": self.head,
            "settings": self.settings,
            "preprocessing": self.preprocessing.to_dict(),
        }

    def _tensors(self) -> dict[str, Tensor]:
        preprocessing, member, head = self._parts()
        named = {f"member.{name}": tensor for name, tensor in member.state_dict().items()}
        named |= {f"head.{name}": tensor for name, tensor in head.tensors().items()}
        named |= {f"preprocessing.{name}": torch.from_numpy(a) for name, a in preprocessing.tensors().items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


def _in_order(prepare: Callable[[Any], R], images: Any) -> Iterator[R]:
    """`prepare` of each of a batch of images, in their order."""
    for small, group in groupby(_each(images), _is_small):
        if small:  # threads would take longer to take turns than to decode
            yield from map(prepare, group)
        else:
            yield from in_order(prepare, group)


def _is_small(image: Any) -> bool:
    """Whether an image is in memory and decoded in a fraction of a millisecond, beyond doubt or nearly so."""
    return (isinstance(image, bytes) and len(image) <= SMALL_FILE) or (
        isinstance(image, np.ndarray) and image.nbytes <= SMALL_ARRAY
    )


def _each(images: Any) -> Iterable[Any]:
    """The images of a batch; raises ValueError for what is none."""
    images = as_batch(images)
    if isinstance(images, np.ndarray) and numbers_of(images.shape, images.dtype) is None and images.ndim not in (3, 4):
        raise ValueError(
            f"an array of images has shape (n, h, w) or (n, h, w, c), not {images.shape}, and one of vectors has "
            f"floats (n, d)"
        )
    if not isinstance(images, Iterable):
        raise ValueError(f"images are an array, a path, or a sequence of images, not {type(images).__name__}")
    return images


def _check_settings(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings given, of the right kinds: those that the member has."""
    defaults = MODELS[model].defaults()
    known = ", ".join(f"{key}={value}" for key, value in defaults.items()) or "none"
    for name, value in settings.items():
        if name not in defaults:
            raise ValueError(f"model {model!r} has no setting {name!r}; it has {known}")
        kind = type(defaults[name])
        if kind is float and type(value) is int and abs(value) < 2**53:
            settings[name] = float(value)
        elif type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise ValueError(f"setting {name!r} is a {kind.__name__} such as {defaults[name]!r}, not {value!r}")
        elif kind is int and abs(value) >= 2**24:  # sizes that PyTorch could not even count the weights of
            raise ValueError(f"setting {name!r} must be less than 2²⁴, not {value}")
    with torch.device("meta"):  # whatever else is wrong with a value shows when the member is built
        MODELS[model]((1, 8, 8), 8, **settings)
    return settings


def _channels_first(preprocessing: Preprocessing) -> Shape:
    *size, last = preprocessing.shape
    return (last, *size)


def _begin_with(member: Member, other: Member) -> None:
    """Copy the weights of another member's encoder, which must be of the same shapes, and of what else is alike."""
    mine, theirs = member.state_dict(), other.state_dict()
    alike = {name: tensor for name, tensor in theirs.items() if name in mine and mine[name].shape == tensor.shape}
    weights = [name for name, _ in member.named_parameters() if name.startswith("encoder.")]
    lacking = [name for name in weights if name not in alike]
    if lacking:
        raise HashretError(
            "the model to begin with has another network: train both with the same bits, size, and settings of the "
            f"network ({', '.join(lacking[:3])} differ)"
        )
    member.load_state_dict(mine | alike)


def _classes(labels: list[str | None], root: str) -> dict[str, int]:
    """The number of each label that there is."""
    names = sorted({label for label in labels if label is not None})
    if len(names) < 2:
        raise HashretError(
            f"{root.rstrip('/#!')} has labels of {len(names)} kinds, and two are the least to learn from: put the "
            f"images into a folder for each kind"
        )
    return {name: number for number, name in enumerate(names)}


def _numbers_of(labels: list[str | None], classes: dict[str, int]) -> NDArray[np.int64]:
    """The number of each image's class, -1 where its label is unknown."""
    return np.array([classes.get(label or "", -1) for label in labels])


def _pairs(preprocessing: Preprocessing, judged: list[tuple[Any, Any, bool]]) -> Pairs:
    """Judged pairs as the training takes them."""
    a, b = (np.stack([preprocessing(to_content(pair[side])).pixels for pair in judged]) for side in (0, 1))
    return Pairs(a, b, np.array([same for _, _, same in judged], np.bool_))


def _check_tensors(tensors: dict[str, Tensor], member: Member, bits: int) -> None:
    """Raises ValueError unless these are the tensors of such a member and of a head for it, all of finite numbers."""
    expected = {f"member.{name}": (tuple(t.shape), t.dtype) for name, t in member.state_dict().items()}
    heads = Head.shapes(_below("head.", tensors), member.latent, bits)
    expected |= {f"head.{name}": (shape, torch.float64) for name, shape in heads.items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    for name in sorted(expected | found):
        if found.get(name) != expected.get(name):
            raise ValueError(f"{name} is {found.get(name)}, not {expected.get(name)}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
    for name in {"head.scale", "head.reach", "head.length"} & tensors.keys():
        if not (tensors[name] > 0).all():
            raise ValueError(f"{name} has numbers that are not positive")


def passes(images: Inputs, length: int | None = None) -> Iterator[slice]:
    """The rows of images, or of so many like them, that go through a network together."""
    length = len(images) if length is None else length
    size = max(1, min(PASS, PASS_NUMBERS // math.prod(images.shape[1:])))
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _values(member: Member, images: Inputs, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The member's outputs, float32 (n, latent), for some of the images, which are in the preprocessing's format."""
    out = np.empty((len(rows), member.latent), np.float32)
    with _full_float32(device()):
        for some in passes(images, len(rows)):
            out[some] = member.outputs(to_input(images[rows[some]], device())).cpu().numpy()
    return out


def _rounding(member: Member, head: Head, images: Inputs) -> Tensor:
    """By how much, (bits), the margins of these images differ at most between float32 and float64."""
    x = to_input(images, device())
    with _full_float32(x.device):
        exact = head.margins(copy.deepcopy(member).double().outputs(x.double()))
        return (head.margins(folded(member).outputs(x)) - exact).abs().amax(0).cpu()


@contextmanager
def _full_float32(where: torch.device, alone: bool = False) -> Iterator[None]:
    """Inference in float32 as it is, without TF32, bf16 or autocast, whatever this process has chosen; its threads hand
    the interpreter on sooner meanwhile."""
    with (
        short_turns(),
        full_float32() as threads,
        one_torch_thread(threads) if alone else nullcontext(),
        torch.inference_mode(),
        torch.autocast(where.type, enabled=False),
    ):
        yield


def _told(training: Training) -> dict[str, Any]:
    told = training._asdict()
    return {name: round(v, 3) if isinstance(v, float) else v for name, v in told.items()}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _holds_only_a_model(folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()}
    return not names or {"config.json", "model.safetensors"} <= names <= FILES


def _card(config: dict[str, Any]) -> str:
    """The model card that lies beside the weights."""

    def table(rows: dict[str, Any]) -> str:
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])

    takes = describe(config["preprocessing"])
    others = "others cannot be coded" if "numbers" in config["preprocessing"] else "others are cropped and resized"
    measured = {name: value for name, value in config["training"].items() if name != "curve"}
    labels = "The" if "classes" in config["training"] else "No"
    return inspect.cleandoc(
        f"""
        # {config["model"]}, {config["bits"]} bits

        A [hashret](https://pypi.org/project/hashret/) model: it turns {takes} ({others}) into binary codes of
        {config["bits"]} bits, through the member `{config["model"]}` and the head `{config["head"]}`. It knows only
        what is like its training data. {labels} labels were used.

            hashret reindex .       # code a collection with this model
        """
    ) + (
        f"\n\n## Settings\n\n{table(config['settings'])}\n\n"
        f"## Training and measurements\n\n{table(measured)}\n\n"
        f"Fingerprint `{config['fingerprint']}`\n"
    )
