"""Members of the family evaluated by PyTorch."""

import copy
import threading
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from hashret.data.contents import Inputs
from hashret.runtime import batch_slices
from hashret.runtime.folding import folded
from hashret.runtime.inputs import to_input
from hashret.runtime.precision import full_float32

if TYPE_CHECKING:
    from hashret.models.base import Member


class TorchRuntime:
    """The `Runtime` of a member in evaluation mode, on the device where its weights are."""

    def __init__(self, member: "Member") -> None:
        self.member = member
        first = next(chain(member.parameters(), member.buffers()), None)
        self.device = torch.device("cpu") if first is None else first.device
        self._weightless = first is None  # what is computed without weights is not worth sharing among threads
        self._lock = threading.Lock()

    def outputs(self, pixels: Inputs, single_thread: bool = False) -> NDArray[np.float32]:
        with full_float32(self.device, single_thread or self._weightless):
            outputs = self._fast.outputs(to_input(pixels, self.device))
        return outputs.cpu().numpy()

    def exact(self, pixels: Inputs, single_thread: bool = False) -> NDArray[np.float64]:
        with full_float32(self.device, single_thread):
            outputs = self._exact.outputs(to_input(pixels, self.device).double())
        return outputs.cpu().numpy()

    def errors(self, pixels: Inputs) -> NDArray[np.float32]:
        """The squared reconstruction error of each image, (n,), summed over its values in [0, 1], or a vector's."""
        errors = np.empty(len(pixels), np.float32)
        with torch.inference_mode():
            for rows in batch_slices(pixels):
                x = to_input(pixels[rows], self.device)
                errors[rows] = (self.member.reconstruct(x) - x).square().flatten(1).sum(1).cpu().numpy()
        return errors

    @cached_property
    def _fast(self) -> "Member":
        with self._lock:
            return folded(self.member).to(memory_format=torch.channels_last)

    @cached_property
    def _exact(self) -> "Member":
        with self._lock:
            return folded(copy.deepcopy(self.member).double())
