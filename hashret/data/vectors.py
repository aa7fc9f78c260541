"""Preprocessing of vectors: embeddings or other features that describe an image in place of its pixels.

Sources, training, codes and collections treat a vector as they treat an image. A vector cannot be shown as a picture:
functions that show or alter pictures refuse it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from hashret.data.contents import Content, Prepared, to_vector
from hashret.data.records import Source, check_contents
from hashret.errors import HashretError, format_count

NOT_FINITE = "a vector with numbers that are not finite, or that overflow in preprocessing"


@dataclass(frozen=True, eq=False)
class VectorPreprocessing:
    """Subtract the training `mean`, float32 (d,), and divide by `scale`, the pooled standard deviation of all
    coordinates.

    All coordinates have one scale, so that the order of distances between vectors does not change.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]  # ()

    dtype: ClassVar = np.dtype(np.float32)
    height: ClassVar = 1
    channels: ClassVar = 1
    size: ClassVar = None  # vectors are not resized

    @classmethod
    def fitted(cls, vectors: NDArray[np.float32]) -> Self:
        """Return the preprocessing for these training vectors, float32 (n, d), all finite."""
        mean = vectors.mean(axis=0, dtype=np.float64)
        blocks = (vectors[start : start + 4096] for start in range(0, len(vectors), 4096))
        variance = sum(float(np.square(block - mean).sum()) for block in blocks) / vectors.size
        scale = np.float32(variance**0.5)
        return cls(mean.astype(np.float32), np.array(scale if scale > 0 else 1, np.float32))

    @property
    def dim(self) -> int:
        """The number of coordinates, d."""
        return len(self.mean)

    @property
    def width(self) -> int:
        return self.dim

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input: (d,)."""
        return (self.dim,)

    def __call__(self, content: Content) -> Prepared:
        """Return a vector as an input, float32 (d,). Raise HashretError for any other content or dimension."""
        return Prepared(self.batch(to_vector(content)[None])[0], self.dim, 1)

    def batch(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Return vectors, float32 (n, d), as inputs. Raise HashretError for another shape or numbers not finite."""
        if rows.dtype != np.float32 or rows.shape[1:] != self.shape:
            description = self.describe_stored({"numbers": rows.shape[1]}) if rows.ndim == 2 else "images"
            raise HashretError(f"{description}, and the model takes {self.describe()}")
        with np.errstate(over="ignore", invalid="ignore"):
            inputs: NDArray[np.float32] = rows - self.mean
            inputs /= self.scale
        if not np.isfinite(inputs).all():
            raise HashretError(NOT_FINITE)
        return inputs

    def describe(self) -> str:
        return self.describe_stored(self.to_dict())

    def check_source(self, source: Source, advice: str = "put them into a collection of their own") -> None:
        """Raise HashretError unless the contents of a source are vectors of this dimension."""
        check_contents(source, source.dim == self.dim, self.describe(), advice)

    def require_images(self, purpose: str, advice: str = "give one that learned from images") -> None:
        """Raise HashretError: inputs are vectors."""
        raise HashretError(f"this model takes vectors, which have no pictures to {purpose}: {advice}")

    def to_dict(self) -> dict[str, int]:
        """Return the dimension by name, for `config.json`."""
        return {"numbers": self.dim}

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Return mean and scale, which are too long for `config.json`."""
        return {"mean": self.mean, "scale": self.scale}

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """Invert `to_dict` and `tensors`. Raise ValueError for invalid values."""
        shapes = {name: (tensor.shape, tensor.dtype.name) for name, tensor in tensors.items()}
        if shapes != {"mean": ((values["numbers"],), "float32"), "scale": ((), "float32")} or len(values) > 1:
            raise ValueError(f"preprocessing of vectors is {dict(values)} with {shapes}")
        if not all(np.isfinite(tensor).all() for tensor in tensors.values()) or not tensors["scale"] > 0:
            raise ValueError(
                "preprocessing of vectors has numbers that are not finite, or a scale that is not positive"
            )
        return cls(tensors["mean"], tensors["scale"])

    @staticmethod
    def describe_stored(values: Mapping[str, int]) -> str:
        return f"vectors of {format_count(values['numbers'], 'number')}"
