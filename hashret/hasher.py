"""`Hasher`: preprocessing, a member of the family and a head; image in, code out."""

import copy
import hashlib
import inspect
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import hashret
from hashret.codes import Codes, check_bits, pack
from hashret.errors import HashretError
from hashret.files import put_in_place
from hashret.images import Preprocessing, to_content
from hashret.models import MODELS
from hashret.models.base import Member, choose
from hashret.models.heads import HEADS, Head, check_head
from hashret.sources import in_order, open_source, sample
from hashret.training import Progress, Training, device, to_input, train

FORMAT = 1  # of the model folder and of what its codes mean
DEFAULT_MODEL = "contrastive"
BATCH = 256  # images in one forward pass

# An image with an output nearer to its threshold than this many training standard deviations is computed again in
# float64, because float32 sums differ in their last places from batch to batch.
DOUBT = 1e-4
# In float64 a bit is 1 above the threshold and this much more: an output placed on the threshold itself, where even
# float64 sums may fall to either side, is 0 in every batch.
SNAP = 1e-9


class Hasher:
    """Turns images into codes. Make one, `fit` it to images without labels, then `encode`.

    `model` is a name of `hashret.models.MODELS`, `bits` the width of a code (a multiple of 8 from 8 to 1024), `head`
    a name of `hashret.models.heads.HEADS` or None for the member's own, and `settings` are the member's keyword
    arguments, such as `network="mlp"` or `width=64`. Raises ValueError for a name or a value that does not exist.
    """

    def __init__(self, model: str = DEFAULT_MODEL, bits: int = 64, head: str | None = None, **settings: Any) -> None:
        member = choose(MODELS, model, "model")
        self.model, self.bits, self.head = model, check_bits(bits), head or member.head
        choose(HEADS, self.head, "head")
        self.settings = _check_settings(model, settings)
        self._fitted: tuple[Preprocessing, Member, Head] | None = None
        self._training: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        return f"Hasher(model={self.model!r}, bits={self.bits}, head={self.head!r}{settings})"

    def fit(
        self,
        source: Any,
        *,
        budget: str | float | None = None,
        steps: int | None = None,
        epochs: int | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        limit: int = 100_000,
        data_root: str | os.PathLike[str] | None = None,
        exclude: Path | None = None,
        checkpoint: Path | None = None,
        resume: bool = False,
        progress: Callable[[Progress], None] | None = None,
        **rates: Any,
    ) -> Self:
        """Learn from a SOURCE (folder, archive, array file, name of a data set, or uint8 array) and return self.

        One of `budget` (seconds, or text such as "90s", "2m", "1h"; default "2m"), `steps` and `epochs` says how long.
        `size` (height, width) is what images are resized to, chosen from the images if None; at most `limit` images,
        drawn with `seed`, are held in memory. `rates` (`batch`, `learning_rate`, `weight_decay`), `checkpoint` and
        `resume` are those of `hashret.training.train`. Labels are never read. Raises HashretError when the images are
        too few, and ValueError for impossible values.
        """
        if sum(value is not None for value in (budget, steps, epochs)) > 1:
            raise ValueError("give one of budget, steps and epochs")
        opened = open_source(source, data_root=data_root, exclude=exclude)

        def reading(done: int) -> None:
            if progress is not None:
                progress(Progress("reading", done, opened.length, {}))

        sampled = sample(opened, size=size, limit=limit, seed=seed, progress=reading)
        preprocessing, images = sampled.preprocessing, sampled.images
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            member = self._build(preprocessing)
            check_head(self.head, len(images), member.latent, self.bits)
            trained = None
            if member.trainable:
                trained = train(
                    member,
                    images,
                    steps=steps,
                    epochs=epochs,
                    budget=None if budget is None else parse_duration(budget),
                    seed=seed,
                    checkpoint=checkpoint,
                    resume=resume,
                    progress=progress,
                    **rates,
                )
        member.eval().requires_grad_(False).to(device())
        # A head is fitted on at most 2²⁸ numbers: a gigabyte.
        values = _values(member, images[: max(self.bits, 2**28 // member.latent)])
        self._fitted = preprocessing, member, HEADS[self.head](values, self.bits, seed)
        self.__dict__.pop("fingerprint", None)
        self.__dict__.pop("_exact", None)
        self._training = {
            "source": opened.root,
            "images": len(images),
            "images_seen": sampled.seen,
            "unreadable": len(sampled.failures),
            "seed": seed,
            "hashret": hashret.__version__,
            "torch": torch.__version__,
        } | (_told(trained) if trained else {})
        codes = self.encode_pixels(images)
        self._training["distinct_codes"] = len(np.unique(codes, axis=0))
        return self

    def encode(self, images: Any) -> Codes:
        """Codes, uint8 (n, bits // 8), of a batch of images: a uint8 array (n, h, w) or (n, h, w, c), or a sequence of
        uint8 arrays (h, w) or (h, w, c), PIL images and paths; a single path or PIL image is a batch of one.

        A code depends on the image and the model alone, not on the batch. Raises HashretError for a file that cannot
        be read, ValueError for anything else that is no image.
        """
        preprocessing = self.preprocessing
        if isinstance(images, str | os.PathLike | Image.Image):
            images = [images]
        if isinstance(images, np.ndarray) and images.ndim not in (3, 4):
            raise ValueError(f"an array of images has shape (n, h, w) or (n, h, w, c), not {images.shape}")
        prepared = in_order(lambda image: preprocessing(to_content(image)).pixels, images)
        codes = [self.encode_pixels(np.stack(batch)) for batch in _batches(prepared, 4 * BATCH)]
        return np.concatenate(codes) if codes else np.empty((0, self.bits // 8), np.uint8)

    def encode_pixels(self, pixels: NDArray[np.uint8]) -> Codes:
        """Codes, uint8 (n, bits // 8), of what `preprocessing` gives: uint8 (n, height, width, channels)."""
        preprocessing, member, head = self._parts()
        expected = (preprocessing.height, preprocessing.width, preprocessing.channels)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != expected:
            raise ValueError(f"pixels must be uint8 (n, {expected}), not {pixels.dtype} {pixels.shape}")
        out = np.empty((len(pixels), self.bits), np.bool_)
        for start in range(0, len(pixels), BATCH):
            x = to_input(pixels[start : start + BATCH], next(iter(member.buffers()), head.threshold).device)
            with torch.inference_mode(), _full_float32():
                margins = head.margins(member.outputs(x))
                bits = margins > 0
                for i in (margins.abs() < DOUBT).any(1).nonzero()[:, 0].tolist():
                    bits[i] = head.margins(self._exact.outputs(x[i : i + 1].double()))[0] > SNAP
            out[start : start + BATCH] = bits.cpu().numpy()
        return pack(out)

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the pixels that the member sees."""
        return self._parts()[0]

    @property
    def training(self) -> dict[str, Any]:
        """What the model was trained on, how long, and what was measured."""
        return dict(self._training)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over weights, head, preprocessing and code format: models of one give the same codes."""
        digest = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model folder, `config.json`, `model.safetensors` and a model card, whole or not at all."""
        target = Path(path)
        if target.exists() and not (target.is_dir() and _holds_only_a_model(target)):
            raise HashretError(f"{target} exists and is no model folder: choose another place")
        target.parent.mkdir(parents=True, exist_ok=True)
        written, old = (target.with_name(f"{target.name}.{os.getpid()}.{what}") for what in ("new", "old"))
        try:
            written.mkdir()
            save_file(self._tensors(), written / "model.safetensors")
            config = self._description() | {"fingerprint": self.fingerprint, "training": self._training}
            (written / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            (written / "README.md").write_text(_card(config))
            if target.exists():
                target.replace(old)
            put_in_place(written, target)
        finally:
            shutil.rmtree(written, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The hasher saved at `path`; raises HashretError if there is none, or it is damaged or too new."""
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise HashretError(f"{folder} is no model folder: make one with hashret train SOURCE -o {folder}")
        try:
            config = json.loads((folder / "config.json").read_text())
            if config["format"] > FORMAT:
                raise HashretError(f"{folder} was made by a newer hashret: upgrade hashret to read it")
            hasher = cls(config["model"], config["bits"], config["head"], **config["settings"])
            preprocessing = Preprocessing.from_dict(config["preprocessing"])
            tensors = load_file(folder / "model.safetensors")
            with torch.device("meta"):
                member = hasher._build(preprocessing)
            member.load_state_dict(_below("member.", tensors), assign=True)
            head = Head(**_below("head.", tensors))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise HashretError(f"the model in {folder} is damaged ({reason}): restore it or train again") from None
        hasher._fitted = preprocessing, member.eval().requires_grad_(False), head
        hasher._training = config.get("training", {})
        if hasher.fingerprint != config.get("fingerprint"):
            raise HashretError(f"the model in {folder} was changed since it was saved: restore it or train again")
        member.to(device())
        return hasher

    def _parts(self) -> tuple[Preprocessing, Member, Head]:
        if self._fitted is None:
            raise HashretError("this hasher has learned nothing yet: call fit, or Hasher.load")
        return self._fitted

    def _build(self, preprocessing: Preprocessing) -> Member:
        shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
        return MODELS[self.model](shape, self.bits, **self.settings)

    @cached_property
    def _exact(self) -> Member:
        with self._lock:
            return copy.deepcopy(self._parts()[1]).double()

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
        _, member, head = self._parts()
        named = {f"member.{name}": tensor for name, tensor in member.state_dict().items()}
        named |= {f"head.{name}": tensor for name, tensor in head.tensors().items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


def parse_duration(text: str | float) -> float:
    """Seconds from a number of seconds or a text such as "90", "90s", "2m", "1.5h"; raises ValueError for others."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text).strip())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"a budget is a time such as 90s, 2m or 1h, not {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _check_settings(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of the member, with those given, which it must have, of the right kinds, in place of defaults."""
    defaults = MODELS[model].defaults()
    known = ", ".join(f"{key}={value}" for key, value in defaults.items()) or "none"
    for name, value in settings.items():
        if name not in defaults:
            raise ValueError(f"model {model!r} has no setting {name!r}; it has {known}")
        kind = type(defaults[name])
        if kind is float and type(value) is int:
            settings[name] = float(value)
        elif type(value) is not kind:
            raise ValueError(f"setting {name!r} is a {kind.__name__} such as {defaults[name]!r}, not {value!r}")
    settings = defaults | settings  # so that a stored model does not change when a default does
    with torch.device("meta"):  # whatever else is wrong with a value shows when the member is built
        MODELS[model]((1, 8, 8), 8, **settings)
    return settings


def _values(member: Member, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The member's outputs, float32 (n, latent), for images in the preprocessing's format."""
    out = np.empty((len(images), member.latent), np.float32)
    with torch.inference_mode(), _full_float32():
        for start in range(0, len(images), BATCH):
            x = to_input(images[start : start + BATCH], device())
            out[start : start + BATCH] = member.outputs(x).cpu().numpy()
    return out


def _full_float32() -> Any:
    """Convolutions without TF32, which PyTorch allows by default; matrix products have full precision anyway."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _told(training: Training) -> dict[str, Any]:
    told = training._asdict()
    return {name: round(v, 3) if isinstance(v, float) else v for name, v in told.items()}


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _holds_only_a_model(folder: Path) -> bool:
    return {file.name for file in folder.iterdir()} <= {"config.json", "model.safetensors", "README.md"}


def _card(config: dict[str, Any]) -> str:
    """The model card that lies beside the weights."""

    def table(rows: dict[str, Any]) -> str:
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])

    shape = "{height} × {width} × {channels}".format(**config["preprocessing"])
    return inspect.cleandoc(
        f"""
        # {config["model"]}, {config["bits"]} bits

        A [hashret](https://pypi.org/project/hashret/) model: it turns an image of {shape} (others are cropped and
        resized) into a binary code of {config["bits"]} bits, through the member `{config["model"]}` and the head
        `{config["head"]}`. It knows only the kind of image it was trained on. No labels were used.

            hashret reindex .       # code a collection with this model
        """
    ) + (
        f"\n\n## Settings\n\n{table(config['settings'])}\n\n"
        f"## Training and measurements\n\n{table(config['training'])}\n\n"
        f"Fingerprint `{config['fingerprint']}`\n"
    )
