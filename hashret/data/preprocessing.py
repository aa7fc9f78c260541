"""Preprocessing: what every content goes through before a model sees it, as stored with the model.

A kind of content (images, vectors) is one class with the methods of `Preprocessing`, so that nothing else asks which
kind it has; `stored_preprocessing` and `describe` are where its name is looked up.
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
    """How a content becomes what a model sees: `ImagePreprocessing` or `VectorPreprocessing`."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what a model sees."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what a model sees: (height, width, channels) of an image, (d,) of a vector."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def size(self) -> tuple[int, int] | None:
        """The (height, width) that contents are resized to, for `sample`; None if that is not done to them."""

    def __call__(self, content: Content) -> Prepared:
        """The content as the model sees it, and its own size. Raises HashretError for one that cannot be made so."""

    def batch(self, rows: NDArray[Any]) -> Inputs:
        """Contents of one shape, (n, …), as the model sees them: the same as one by one, but faster."""

    def describe(self) -> str:
        """What the model takes, in words: "images of 32 × 32 × 3"."""

    def check_source(self, source: Source, advice: str = ...) -> None:
        """Raise HashretError, with the advice at its end, if the contents of a source are none that the model takes."""

    def require_images(self, purpose: str, advice: str = ...) -> None:
        """Raise HashretError, with the advice at its end, if what a model sees has no picture to `purpose` (a verb)."""

    def to_dict(self) -> dict[str, int]:
        """Its numbers by name, for `config.json`."""

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """What is too long for `config.json`."""

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_dict` and `tensors`; raises ValueError for what they cannot have given."""

    @staticmethod
    def describe_stored(values: Mapping[str, int]) -> str:
        """`describe()` of the one that `to_dict` gave these values; raises KeyError if they lack one."""


@dataclass(frozen=True)
class ImagePreprocessing:
    """Images: centre crop to the aspect ratio of (height, width), antialiased resize, then grey ↔ colour (ITU-R 601
    luma)."""

    height: int
    width: int
    channels: int

    dtype: ClassVar = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what a model sees: (height, width, channels)."""
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
        """The content as the model sees it, uint8 (height, width, channels); raises as `decode` does."""
        pixels, width, height = resize(content, self.height, self.width)
        return Prepared(self._convert(pixels), width, height)

    def batch(self, rows: NDArray[Any]) -> NDArray[np.uint8]:
        """Images of one size, uint8 (n, h, w, 1 | 3 | 4), as the model sees them: the same as one by one, but faster.

        When nothing has to change the result is `rows` itself.
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
        check_contents(source, source.numbers is None, self.describe(), advice)

    def require_images(self, purpose: str, advice: str = "") -> None:
        """Images have pictures: this raises nothing."""

    def to_dict(self) -> dict[str, int]:
        """The three numbers by name, for `config.json`."""
        return asdict(self)

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """What is too long for `config.json`: nothing."""
        return {}

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_dict` and `tensors`; raises ValueError for other names or values."""
        if tensors:
            raise ValueError(f"preprocessing of images has no {sorted(tensors)}")
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
        # ITU-R 601-2 luma in the same integers as Pillow's convert("L").
        weighted = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
        return ((weighted + 0x8000) >> 16).astype(np.uint8)[..., None]


def stored_preprocessing(values: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Preprocessing:
    """The inverse of `to_dict` and `tensors`; raises ValueError for what they cannot have given."""
    return _kind(values).from_stored(values, tensors)


def describe(values: Mapping[str, int]) -> str:
    """In words what a model takes, by `to_dict` of its preprocessing; raises KeyError if that lacks a value."""
    return _kind(values).describe_stored(values)


def _kind(values: Mapping[str, Any]) -> type[Preprocessing]:
    return VectorPreprocessing if "numbers" in values else ImagePreprocessing
