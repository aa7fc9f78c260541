"""What the digests of models and checkpoints are taken of. It is part of their formats."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def tensor_bytes(tensors: Mapping[str, NDArray[Any]]) -> Iterator[bytes]:
    """The name, type, shape and contents of each tensor, in the order of their names. Types go by PyTorch's names."""
    for name, tensor in sorted(tensors.items()):
        yield f"{name} torch.{tensor.dtype.name} {list(tensor.shape)}\n".encode()
        yield np.ascontiguousarray(tensor).tobytes()
