"""The evaluation of members of the family by PyTorch."""

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
    """The `Runtime` of a member in evaluation mode, on the device of its weights."""

    def __init__(self, member: "Member") -> None:
        self.member = member
        first = next(chain(member.parameters(), member.buffers()), None)
        self.device = torch.device("cpu") if first is None else first.device
        self._is_weightless = first is None  # too little work to share among threads
        self._lock = threading.Lock()

    def outputs(self, pixels: Inputs, single_thread: bool = False) -> NDArray[np.float32]:
        with full_float32(self.device, single_thread or self._is_weightless):
            outputs = self._single.outputs(to_input(pixels, self.device))
        return outputs.cpu().numpy()

    def exact(self, pixels: Inputs, single_thread: bool = False) -> NDArray[np.float64]:
        with full_float32(self.device, single_thread):
            outputs = self._double.outputs(to_input(pixels, self.device).double())
        return outputs.cpu().numpy()

    def errors(self, pixels: Inputs) -> NDArray[np.float32]:
        """Return the squared reconstruction error of each input, (n,), summed over an image's values in [0, 1], or over
        a vector's coordinates."""
        errors = np.empty(len(pixels), np.float32)
        with torch.inference_mode():
            for rows in batch_slices(pixels):
                x = to_input(pixels[rows], self.device)
                errors[rows] = (self.member.reconstruct(x) - x).square().flatten(1).sum(1).cpu().numpy()
        return errors

    @cached_property
    def _single(self) -> "Member":
        with self._lock:
            return folded(self.member).to(memory_format=torch.channels_last)

    @cached_property
    def _double(self) -> "Member":
        with self._lock:
            return folded(copy.deepcopy(self.member).double())
