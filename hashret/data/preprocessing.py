"""Preprocessing: the conversion of contents to the inputs of a model, stored with the model.

Images and vectors have one class each with the methods of `Preprocessing`. Only `stored_preprocessing` and `describe`
choose between the classes; all other code uses the protocol.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from hashret.data.contents import Content, Inputs, Prepared, check_array, describe_value
from hashret.data.images import MAX_PIXELS, resize
from hashret.data.records import Source, check_contents
from hashret.data.vectors import VectorPreprocessing


class Preprocessing(Protocol):
    """The conversion of contents to inputs: `ImagePreprocessing` or `VectorPreprocessing`."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of an input."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input: (height, width, channels) for an image, (d,) for a vector."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def size(self) -> tuple[int, int] | None:
        """The (height, width) that contents are resized to; None for vectors."""

    def __call__(self, content: Content) -> Prepared:
        """Return a content as an input, and its original size. Raise HashretError if it cannot be converted."""

    def batch(self, rows: NDArray[Any]) -> Inputs:
        """Return contents of one shape, (n, …), as inputs: equal to separate calls, but faster."""

    def describe(self) -> str:
        """Return what the model takes as text: "images of 32 × 32 × 3"."""

    def check_source(self, source: Source, advice: str = ...) -> None:
        """Raise HashretError, whose text ends in `advice`, if the model does not take the contents of a source."""

    def require_images(self, purpose: str, advice: str = ...) -> None:
        """Raise HashretError, whose text ends in `advice`, if inputs are no images to `purpose` (a verb)."""

    def to_dict(self) -> dict[str, int]:
        """Return its settings by name, for `config.json`."""

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Return its arrays by name, which are too long for `config.json`."""

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """Invert `to_dict` and `tensors`. Raise ValueError for invalid values."""

    @staticmethod
    def describe_stored(values: Mapping[str, int]) -> str:
        """Return `describe()` from the values of `to_dict`. Raise KeyError if one is missing."""


@dataclass(frozen=True)
class ImagePreprocessing:
    """Crop the centre of an image to the aspect ratio of (height, width), resize it with antialiasing, and convert it
    to `channels`: 1 for grey (ITU-R 601 luma), 3 for colour."""

    height: int
    width: int
    channels: int

    dtype: ClassVar = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input: (height, width, channels)."""
        return self.height, self.width, self.channels

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, not {self.channels!r}")
        if self.height * self.width > MAX_PIXELS:
            raise ValueError(f"height × width must be at most {MAX_PIXELS}, not {self.height} × {self.width}")

    def __call__(self, content: Content) -> Prepared:
        """Return a content as an input, uint8 (height, width, channels), with its original size. Raise as `decode`."""
        pixels, width, height = resize(content, self.height, self.width)
        return Prepared(self._convert(pixels), width, height)

    def batch(self, rows: NDArray[Any]) -> NDArray[np.uint8]:
        """Return images of one size, uint8 (n, h, w, 1 | 3 | 4), as inputs: equal to separate calls, but faster.

        The result is `rows` itself if they have the size and channels of inputs. Raise ValueError for another array.
        """
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 4:
            raise ValueError(f"rows must be a uint8 array of shape (n, h, w, channels), not {describe_value(rows)}")
        if rows.shape[1:3] == self.size and rows.shape[3] in (1, 3):
            return self._convert(rows)
        out = np.empty((len(rows), *self.shape), np.uint8)
        for row, image in zip(out, rows, strict=True):
            row[...] = self(check_array(image)).pixels
        return out

    def describe(self) -> str:
        return self.describe_stored(self.to_dict())

    def check_source(self, source: Source, advice: str = "put them into a collection of their own") -> None:
        """Raise HashretError if the contents of a source are vectors."""
        check_contents(source, source.dim is None, self.describe(), advice)

    def require_images(self, purpose: str, advice: str = "") -> None:
        """Do nothing: inputs are images."""

    def to_dict(self) -> dict[str, int]:
        """Return height, width and channels by name, for `config.json`."""
        return asdict(self)

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Return no arrays."""
        return {}

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """Invert `to_dict` and `tensors`. Raise ValueError for other names or values."""
        if tensors:
            raise ValueError(f"preprocessing of images has no arrays {sorted(tensors)}")
        if set(values) != {"height", "width", "channels"}:
            raise ValueError(f"preprocessing has height, width and channels, not {sorted(values)}")
        return cls(**values)

    @staticmethod
    def describe_stored(values: Mapping[str, int]) -> str:
        return "images of {height} × {width} × {channels}".format(**values)

    def _convert(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if pixels.shape[-1] == self.channels:
            return pixels
        if self.channels == 3:
            return np.repeat(pixels, 3, axis=-1)
        # ITU-R 601-2 luma in the integer arithmetic of Pillow's convert("L").
        weighted = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
        return ((weighted + 0x8000) >> 16).astype(np.uint8)[..., None]


def stored_preprocessing(values: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Preprocessing:
    """Return the preprocessing with these values of `to_dict` and `tensors`. Raise ValueError for invalid ones."""
    return _preprocessing_type(values).from_stored(values, tensors)


def describe(values: Mapping[str, int]) -> str:
    """Return what a model takes as text, from `to_dict` of its preprocessing. Raise KeyError if a value is missing."""
    return _preprocessing_type(values).describe_stored(values)


def _preprocessing_type(values: Mapping[str, Any]) -> type[Preprocessing]:
    return VectorPreprocessing if "numbers" in values else ImagePreprocessing
