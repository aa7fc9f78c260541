"""`Hasher`: preprocessing, a member of the family and a head; image, or vector, in, code out."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from hashret.codes import Codes, pack
from hashret.data.batch import iter_images, map_images
from hashret.data.contents import Inputs, PreparedImages, sha256
from hashret.data.images import to_content
from hashret.data.preprocessing import Preprocessing, stored_preprocessing
from hashret.data.records import LabelledSource
from hashret.data.sources import open_source
from hashret.errors import HashretError
from hashret.heads import Head
from hashret.heads.stored import POSITIVE, head_shapes, stored_head
from hashret.model_folder import (
    FORMAT,
    UNREADABLE,
    Kind,
    StoredTensors,
    below,
    check_numbers,
    damaged_model,
    fingerprint_of,
    read_config,
    write_model,
)
from hashret.models import DEFAULT_MODEL, MODELS
from hashret.models.base import Member, build
from hashret.parallel import Progress, batches
from hashret.runtime import PASS
from hashret.runtime.inputs import device
from hashret.runtime.rescue import bits_of, margins_of
from hashret.runtime.torch_runtime import TorchRuntime
from hashret.training.fitting import (
    Request,
    check_request,
    fit_head,
    input_shape,
    read_material,
    record_of,
    train_member,
)
from hashret.training.options import TrainingOptions

SMALL_BATCH = 2**16  # bytes of a batch that a single thread codes: more of them spend their time waiting for each other
MEASURED = 5000  # training images whose reconstruction error is measured


class Hasher:
    """Turns images into codes. Make one, `fit` it to images without labels, then `encode`.

    `model` is a name of `hashret.models.MODELS`, `bits` the width of a code (a multiple of 8 from 8 to 1024), `head`
    a name of `hashret.heads.HEADS` or None for the member's own, and `settings` are the member's keyword
    arguments, such as `network="mlp"` or `width=64`. Raises ValueError for a name or a value that does not exist.
    """

    def __init__(self, model: str = DEFAULT_MODEL, bits: int = 64, head: str | None = None, **settings: Any) -> None:
        self._asked = MODELS.check(model, bits, head, settings)
        member = MODELS[model]
        with torch.device("meta"):  # raises ValueError for what else is wrong with a value
            member((1, 8, 8), 8, **self._asked)
        self.model, self.bits, self.head = model, bits, member.head if head is None else head
        self.settings = member.defaults() | self._asked  # a stored model does not change when a default does
        self._fitted: tuple[Preprocessing, Member, Head] | None = None
        self._training: dict[str, Any] = {}

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
        judged = None if pairs is None else list(pairs)
        begun = init.settings if init is not None and init.model == self.model else {}
        request = Request(self.model, self.bits, self.head, self._asked, begun)
        check_request(request, labels is not False, judged)
        opened = open_source(source, data_root=data_root)
        if not isinstance(labels, bool):
            opened = LabelledSource(opened, labels)
        material = read_material(request, opened, options, judged, progress)
        learned = train_member(request, material, options, None if init is None else init.member, progress)
        head = fit_head(request, learned, material.images, options.seed)
        self._fitted, self.settings = (material.preprocessing, learned.member, head), material.settings
        for derived in ("fingerprint", "_runtime"):
            self.__dict__.pop(derived, None)
        self._training = record_of(opened, material, learned, options.seed)
        if learned.member.trainable:
            self._training["largest_error"] = float(self.errors(material.images[learned.rows[:MEASURED]]).max())
        self._training["distinct_codes"] = len(np.unique(self.encode_pixels(material.images), axis=0))
        return self

    def prepare(self, images: Any) -> PreparedImages:
        """A batch of images, as `encode` takes them, decoded once for several uses: as this hasher's `encode`,
        `margins` and `unusual` take them in place of images, with the SHA-256 of each content. Raises as `encode`."""
        preprocessing = self.preprocessing

        def prepare(image: Any) -> tuple[Inputs, str]:
            content = to_content(image)
            return preprocessing(content).pixels, sha256(content)

        prepared = list(map_images(prepare, images))
        pixels = np.empty((len(prepared), *preprocessing.shape), preprocessing.dtype)
        for row, (image, _) in zip(pixels, prepared, strict=True):
            row[...] = image
        return PreparedImages(pixels, [digest for _, digest in prepared], self.fingerprint)

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

    def encode_pixels(self, pixels: Inputs, *, single_thread: bool = False) -> Codes:
        """Codes, uint8 (n, bits // 8), of what `preprocessing` gives: uint8 (n, height, width, channels), or float32
        (n, d) for vectors.

        With `alone` the calling thread does all the work, for callers with other work for the other cores.
        """
        preprocessing, _, head = self._parts()
        if pixels.dtype != preprocessing.dtype or pixels.shape[1:] != preprocessing.shape:
            expected = f"{preprocessing.dtype} {('n', *preprocessing.shape)}"
            raise ValueError(f"pixels must be {expected}, not {pixels.dtype} {pixels.shape}")
        return pack(bits_of(self._runtime, head, pixels, single_thread or pixels.nbytes <= SMALL_BATCH))

    def margins(self, images: Any) -> tuple[Codes, NDArray[np.float32]]:
        """Codes of a batch of images, as `encode` takes them and gives them, and how sure the model is of every bit:
        how far its number lies from the threshold, float32 (n, bits), in training standard deviations, above it for a
        bit of 1. They are computed in float64, so that they depend on the batch no more than codes do."""
        codes, margins = [np.empty((0, self.bits // 8), np.uint8)], [np.empty((0, self.bits), np.float32)]
        for pixels in self._batches(images):
            codes.append(self.encode_pixels(pixels))
            margins.append(margins_of(self._runtime, self._parts()[2], pixels))
        return np.concatenate(codes), np.concatenate(margins)

    def errors(self, pixels: Inputs) -> NDArray[np.float32]:
        """How badly the model remembers images, in the format of `preprocessing`: the squared error of each, (n,),
        summed over its values in [0, 1], or over a vector's. Raises HashretError for a model without a network."""
        if not self.member.trainable:
            raise HashretError(f"model {self.model!r} has no network to remember images with: train one, such as ae")
        return self._runtime.errors(pixels)

    def outliers(self, images: Any) -> list[bool]:
        """Which of a batch of images, as `encode` takes them, are remembered worse than any of those that the model was
        trained on. It knows only images of their kind; of others its codes say little. Without a network, none."""
        largest = self._training.get("largest_error")
        if largest is None:
            return [False] * (
                len(images) if isinstance(images, PreparedImages) else sum(1 for _ in iter_images(images))
            )
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
        return fingerprint_of(self._description(), self._tensors())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model folder, `config.json`, `model.safetensors` and a model card, whole or not at all."""
        config = self._description() | {"fingerprint": self.fingerprint, "training": self._training}
        write_model(path, config, self._tensors())

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
            hasher._fitted = hasher._stored_parts(StoredTensors(folder), config["preprocessing"])
        except (*UNREADABLE, RuntimeError) as error:
            raise damaged_model(folder, error) from None
        if hasher.fingerprint != config.get("fingerprint"):
            raise HashretError(f"the model in {folder} was changed since it was saved: restore it or train again")
        hasher.member.to(device())
        return hasher

    def _batches(self, images: Any) -> Iterator[Inputs]:
        """A batch of images as the model sees them, a few at a time."""
        if isinstance(images, PreparedImages):
            if images.fingerprint != self.fingerprint:
                raise HashretError("the images were prepared for another model: prepare them again")
            yield images.pixels
            return
        preprocessing = self.preprocessing
        prepared = map_images(lambda image: preprocessing(to_content(image)).pixels, images)
        yield from map(np.stack, batches(prepared, PASS))

    def _parts(self) -> tuple[Preprocessing, Member, Head]:
        if self._fitted is None:
            raise HashretError("this hasher has learned nothing yet: call fit, or Hasher.load")
        return self._fitted

    @cached_property
    def _runtime(self) -> TorchRuntime:
        return TorchRuntime(self.member)

    def _stored_parts(self, stored: StoredTensors, description: dict[str, Any]) -> tuple[Preprocessing, Member, Head]:
        """What a model folder holds; raises ValueError for tensors that are not of this model."""
        preprocessing = stored_preprocessing(description, stored.read("preprocessing."))
        with torch.device("meta"):
            member = build(MODELS[self.model], input_shape(preprocessing), self.bits, self.settings)
        expected = {f"member.{name}": _kind(tensor) for name, tensor in member.state_dict().items()}
        shapes = head_shapes(below("head.", stored.kinds), member.latent, self.bits)
        expected |= {f"head.{name}": Kind(shape, "float64") for name, shape in shapes.items()}
        stored.check(
            expected | {name: kind for name, kind in stored.kinds.items() if name.startswith("preprocessing.")}
        )
        weights, head = stored.read("member."), stored.read("head.")
        check_numbers({f"head.{name}": array for name, array in head.items()}, {f"head.{name}" for name in POSITIVE})
        check_numbers({f"member.{name}": array for name, array in weights.items()}, ())
        member.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, assign=True)
        return preprocessing, member.eval().requires_grad_(False), stored_head(head)

    def _description(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model,
            "bits": self.bits,
            "head": self.head,
            "settings": self.settings,
            "preprocessing": self.preprocessing.to_dict(),
        }

    def _tensors(self) -> dict[str, NDArray[Any]]:
        preprocessing, member, head = self._parts()
        named = {f"member.{name}": _array(tensor) for name, tensor in member.state_dict().items()}
        named |= {f"head.{name}": array for name, array in head.tensors().items()}
        return named | {f"preprocessing.{name}": array for name, array in preprocessing.tensors().items()}


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return np.asarray(tensor.detach().cpu().contiguous().numpy())


def _kind(tensor: torch.Tensor) -> Kind:
    return Kind(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
