"""`Hasher`: preprocessing, a member of the family and a head, from images or vectors to codes."""

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
    StoredTensors,
    TensorSpec,
    check_values,
    damaged_model,
    fingerprint_of,
    read_config,
    strip_prefix,
    write_model,
)
from hashret.models import DEFAULT_MODEL, MODELS
from hashret.models.base import Member, build
from hashret.parallel import Progress, batches
from hashret.runtime import BATCH_SIZE
from hashret.runtime.inputs import default_device
from hashret.runtime.rescue import compute_bits, compute_margins
from hashret.runtime.torch_runtime import TorchRuntime
from hashret.training.fitting import (
    Request,
    check_request,
    fit_head,
    input_shape,
    read_training_data,
    train_member,
    training_record,
)
from hashret.training.options import TrainingOptions

SMALL_BATCH = 2**16  # bytes of a batch that one thread encodes: more threads would wait for each other
ERROR_IMAGES = 5000  # training images whose reconstruction errors are measured


class Hasher:
    """A model that turns images, or vectors, into binary codes.

    Create one, `fit` it to images, then `encode`. `model` is a name in `hashret.models.MODELS`, `bits` the width of a
    code (a multiple of 8 from 8 to 1024), `head` a name in `hashret.heads.HEADS`, or None for the model's default head.
    `settings` are the model's keyword arguments, such as `network="mlp"` or `width=64`. Raise ValueError for an
    unknown name or an invalid value.
    """

    def __init__(self, model: str = DEFAULT_MODEL, bits: int = 64, head: str | None = None, **settings: Any) -> None:
        self._explicit_settings = MODELS.check(model, bits, head, settings)
        member = MODELS[model]
        with torch.device("meta"):  # raises ValueError for values out of range
            member((1, 8, 8), 8, **self._explicit_settings)
        self.model, self.bits, self.head = model, bits, member.head if head is None else head
        self.settings = member.defaults() | self._explicit_settings  # stored, so that new defaults change no model
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
        """Fit the model to a SOURCE (a folder, an archive, an array file, the name of a data set, an array, or an open
        `Source`) and return self.

        `changes` are fields of `TrainingOptions`, such as `budget="2m"`, `steps=1000` or `seed=1`; they override those
        of `options`. For a SOURCE of vectors, the default network is "mlp" and the default likelihood "gaussian", and
        `size` is not allowed.

        `labels` is True to use the labels of the source, or a sequence of one label per image, None for unknown. Models
        that learn from labels require it, and others refuse it. `pairs` are labelled pairs, (image, image, whether they
        are the same): training reduces the Hamming distance of pairs that are the same, and increases that of the
        others.

        `init` is a hasher whose weights training starts from. The encoders must have the same architecture; of the
        decoder, weights of equal shape are copied. If `init` has the same `model`, its settings are the defaults. With
        `steps=0`, only the head is fitted.

        `data_root` is the folder of data sets, and `progress` is called with a `Progress` several times a second.

        Raise HashretError if there are too few images or required labels are missing, and ValueError for impossible
        values.
        """
        options = replace(options or TrainingOptions(), **changes)
        pair_list = None if pairs is None else list(pairs)
        init_settings = init.settings if init is not None and init.model == self.model else {}
        request = Request(self.model, self.bits, self.head, self._explicit_settings, init_settings)
        check_request(request, labels is not False, pair_list)
        opened = open_source(source, data_root=data_root)
        if not isinstance(labels, bool):
            opened = LabelledSource(opened, labels)
        data = read_training_data(request, opened, options, pair_list, progress)
        trained = train_member(request, data, options, None if init is None else init.member, progress)
        head = fit_head(request, trained, data.images, options.seed)
        self._fitted, self.settings = (data.preprocessing, trained.member, head), data.settings
        for derived in ("fingerprint", "_runtime"):
            self.__dict__.pop(derived, None)
        self._training = training_record(opened, data, trained, options.seed)
        if trained.member.trainable:
            self._training["largest_error"] = float(self.errors(data.images[trained.rows[:ERROR_IMAGES]]).max())
        self._training["distinct_codes"] = len(np.unique(self.encode_pixels(data.images), axis=0))
        return self

    def prepare(self, images: Any) -> PreparedImages:
        """Return a batch of images, as `encode` takes them, decoded and preprocessed, with the SHA-256 of each.

        This hasher's `encode`, `margins` and `outliers` accept the result in place of images, so that several of them
        decode only once. Raises the errors of `encode`.
        """
        preprocessing = self.preprocessing

        def preprocess(image: Any) -> tuple[Inputs, str]:
            content = to_content(image)
            return preprocessing(content).pixels, sha256(content)

        prepared = list(map_images(preprocess, images))
        pixels = np.empty((len(prepared), *preprocessing.shape), preprocessing.dtype)
        for row, (image, _) in zip(pixels, prepared, strict=True):
            row[...] = image
        return PreparedImages(pixels, [digest for _, digest in prepared], self.fingerprint)

    def encode(self, images: Any) -> Codes:
        """Return the codes, uint8 (n, bits // 8), of a batch of images or vectors.

        A batch of images is a uint8 array (n, h, w) or (n, h, w, c), or a sequence of uint8 arrays (h, w) or (h, w, c),
        PIL images, paths, and bytes of image files; a single PIL image, path or bytes object is a batch of one. A batch
        of vectors is an array of floats (n, d), or a sequence of arrays (d,). The result of `prepare` is a batch too.

        A code depends only on the image and the model, not on the batch. Raise HashretError for a file that cannot be
        read, and ValueError for any other invalid image.
        """
        codes = [self.encode_pixels(pixels) for pixels in self._batches(images)]
        return np.concatenate([np.empty((0, self.bits // 8), np.uint8), *codes])

    def encode_pixels(self, pixels: Inputs, *, single_thread: bool = False) -> Codes:
        """Return the codes, uint8 (n, bits // 8), of preprocessed inputs.

        `pixels` has the dtype and shape that `preprocessing` returns: uint8 (n, height, width, channels), or float32
        (n, d) for vectors; others raise ValueError. With `single_thread` only the calling thread computes, for callers
        that use the other cores themselves.
        """
        preprocessing, _, head = self._parts()
        if pixels.dtype != preprocessing.dtype or pixels.shape[1:] != preprocessing.shape:
            expected = f"{preprocessing.dtype} {('n', *preprocessing.shape)}"
            raise ValueError(f"pixels must be {expected}, not {pixels.dtype} {pixels.shape}")
        return pack(compute_bits(self._runtime, head, pixels, single_thread or pixels.nbytes <= SMALL_BATCH))

    def margins(self, images: Any) -> tuple[Codes, NDArray[np.float32]]:
        """Return the codes, uint8 (n, bits // 8), and the margins, float32 (n, bits), of a batch as `encode` takes it.

        A margin is the signed distance of a projected output from its threshold, in training standard deviations; it is
        positive for a 1. Margins are computed in float64 and, like codes, do not depend on the batch.
        """
        codes, margins = [np.empty((0, self.bits // 8), np.uint8)], [np.empty((0, self.bits), np.float32)]
        for pixels in self._batches(images):
            codes.append(self.encode_pixels(pixels))
            margins.append(compute_margins(self._runtime, self._parts()[2], pixels))
        return np.concatenate(codes), np.concatenate(margins)

    def errors(self, pixels: Inputs) -> NDArray[np.float32]:
        """Return the squared reconstruction errors, float32 (n,), of inputs as `encode_pixels` takes them.

        An error is summed over an image's values in [0, 1], or over a vector's coordinates. Raise HashretError for a
        model without a network.
        """
        if not self.member.trainable:
            raise HashretError(f"model {self.model!r} has no network to reconstruct images: train one, such as ae")
        return self._runtime.errors(pixels)

    def outliers(self, images: Any) -> list[bool]:
        """Return for each image of a batch, as `encode` takes it, whether its reconstruction error exceeds the largest
        one of the training images, of which at most 5,000 are measured.

        Codes of outliers are unreliable, because the model was not trained on similar images. All results are False for
        a model without a network.
        """
        largest = self._training.get("largest_error")
        if largest is None:
            return [False] * (
                len(images) if isinstance(images, PreparedImages) else sum(1 for _ in iter_images(images))
            )
        parts = [self.errors(pixels) > largest for pixels in self._batches(images)]
        return [bool(is_outlier) for part in parts for is_outlier in part]

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of images or vectors. Raise HashretError before `fit`."""
        return self._parts()[0]

    @property
    def member(self) -> Member:
        """The member, a PyTorch module in evaluation mode that takes float32 (n, c, h, w) in [0, 1], or (n, d).

        Raise HashretError before `fit`.
        """
        return self._parts()[1]

    @property
    def training(self) -> dict[str, Any]:
        """The record of the training: data, steps, seconds, losses and measurements; empty before `fit`."""
        return dict(self._training)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256, in hex, of weights, head, preprocessing and code format: equal models have equal
        fingerprints."""
        return fingerprint_of(self._description(), self._tensors())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model folder (`config.json`, `model.safetensors` and a model card) atomically.

        Raise HashretError if `path` exists and is no model folder.
        """
        config = self._description() | {"fingerprint": self.fingerprint, "training": self._training}
        write_model(path, config, self._tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the hasher saved at `path`. Raise HashretError if there is none, or it is damaged or too new."""
        folder = Path(path)
        config = read_config(folder)
        try:
            hasher = cls(config["model"], config["bits"], config["head"], **config["settings"])
            # Not `defaults`: settings that the member has got since the model was saved would change its fingerprint.
            hasher.settings = hasher._explicit_settings = config["settings"]
            hasher._training = dict(config["training"])
            hasher._fitted = hasher._stored_parts(StoredTensors(folder), config["preprocessing"])
        except (*UNREADABLE, RuntimeError) as error:
            raise damaged_model(folder, error) from None
        if hasher.fingerprint != config.get("fingerprint"):
            raise HashretError(f"the model in {folder} was changed since it was saved: restore it or train again")
        hasher.member.to(default_device())
        return hasher

    def _batches(self, images: Any) -> Iterator[Inputs]:
        """Yield a batch of images, preprocessed, in parts of at most `BATCH_SIZE`."""
        if isinstance(images, PreparedImages):
            if images.fingerprint != self.fingerprint:
                raise HashretError("the images were prepared for another model: prepare them again")
            yield images.pixels
            return
        preprocessing = self.preprocessing
        prepared = map_images(lambda image: preprocessing(to_content(image)).pixels, images)
        yield from map(np.stack, batches(prepared, BATCH_SIZE))

    def _parts(self) -> tuple[Preprocessing, Member, Head]:
        if self._fitted is None:
            raise HashretError("this hasher is not fitted: call fit, or Hasher.load")
        return self._fitted

    @cached_property
    def _runtime(self) -> TorchRuntime:
        return TorchRuntime(self.member)

    def _stored_parts(self, stored: StoredTensors, description: dict[str, Any]) -> tuple[Preprocessing, Member, Head]:
        """Return the parts stored in a model folder. Raise ValueError for tensors that do not fit this model."""
        preprocessing = stored_preprocessing(description, stored.read("preprocessing."))
        with torch.device("meta"):
            member = build(MODELS[self.model], input_shape(preprocessing), self.bits, self.settings)
        expected = {f"member.{name}": _spec(tensor) for name, tensor in member.state_dict().items()}
        shapes = head_shapes(strip_prefix("head.", stored.specs), member.latent, self.bits)
        expected |= {f"head.{name}": TensorSpec(shape, "float64") for name, shape in shapes.items()}
        stored.check(
            expected | {name: spec for name, spec in stored.specs.items() if name.startswith("preprocessing.")}
        )
        weights, head = stored.read("member."), stored.read("head.")
        check_values({f"head.{name}": array for name, array in head.items()}, {f"head.{name}" for name in POSITIVE})
        check_values({f"member.{name}": array for name, array in weights.items()}, ())
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


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
