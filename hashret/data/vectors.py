"""Vectors as contents: embeddings, or whatever numbers describe an image, in place of its pixels.

A vector goes the way of an image through sources, training, codes and collections; what is its own is here and in
`hashret.data.contents.to_vector`. Its picture is not known, so whatever shows pictures refuses it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from hashret.data.contents import Content, Prepared, to_vector
from hashret.data.records import Source, check_contents
from hashret.errors import HashretError

NOT_FINITE = "a vector with numbers that are not finite, or far beyond those of the training"


@dataclass(frozen=True, eq=False)
class VectorPreprocessing:
    """Vectors: less the training `mean`, float32 (d,), over `scale`, the standard deviation of all training numbers
    from their means.

    One scale serves all coordinates, so that who is whose neighbour stays as it was.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]  # ()

    dtype: ClassVar = np.dtype(np.float32)
    height: ClassVar = 1
    channels: ClassVar = 1
    size: ClassVar = None  # none that a vector could be resized to

    @classmethod
    def fitted(cls, vectors: NDArray[np.float32]) -> Self:
        """That of these training vectors (n, d), all finite."""
        mean = vectors.mean(axis=0, dtype=np.float64)
        blocks = (vectors[start : start + 4096] for start in range(0, len(vectors), 4096))
        variance = sum(float(np.square(block - mean).sum()) for block in blocks) / vectors.size
        scale = np.float32(variance**0.5)
        return cls(mean.astype(np.float32), np.array(scale if scale > 0 else 1, np.float32))

    @property
    def numbers(self) -> int:
        """How many numbers a vector has."""
        return len(self.mean)

    @property
    def width(self) -> int:
        return self.numbers

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what a model sees: (d,)."""
        return (self.numbers,)

    def __call__(self, content: Content) -> Prepared:
        """The content as the model sees it, float32 (d,). Raises HashretError for one that is no such vector."""
        return Prepared(self.batch(to_vector(content)[None])[0], self.numbers, 1)

    def batch(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Vectors, float32 (n, d), as the model sees them; raises as for one."""
        if rows.dtype != np.float32 or rows.shape[1:] != self.shape:
            given = self.describe_stored({"numbers": rows.shape[1]}) if rows.ndim == 2 else "images"
            raise HashretError(f"{given}, and the model takes {self.describe()}")
        with np.errstate(over="ignore", invalid="ignore"):
            seen: NDArray[np.float32] = rows - self.mean
            seen /= self.scale
        if not np.isfinite(seen).all():
            raise HashretError(NOT_FINITE)
        return seen

    def describe(self) -> str:
        return self.describe_stored(self.to_dict())

    def check_source(self, source: Source, advice: str = "put them into a collection of their own") -> None:
        """Raise HashretError unless the contents of a source are vectors of so many numbers."""
        check_contents(source, source.numbers == self.numbers, self.describe(), advice)

    def require_images(self, purpose: str, advice: str = "give one that learned from images") -> None:
        """Raise HashretError: a vector has no picture."""
        raise HashretError(f"this model knows vectors, which have no pictures to {purpose}: {advice}")

    def to_dict(self) -> dict[str, int]:
        """How many numbers, by name, for `config.json`."""
        return {"numbers": self.numbers}

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """What is too long for `config.json`."""
        return {"mean": self.mean, "scale": self.scale}

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `to_dict` and `tensors`; raises ValueError for what they cannot have given."""
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
        return f"vectors of {values['numbers']:,} numbers"
