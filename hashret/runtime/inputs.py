"""Where networks are computed, and what they take."""

import torch
from torch import Tensor

from hashret.data.contents import Inputs


def device() -> torch.device:
    """A CUDA GPU where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_input(images: Inputs, where: torch.device) -> Tensor:
    """Network input, float32 (n, c, h, w) in [0, 1], from uint8 images (n, h, w, c), whose channels stay the last in
    memory, where convolutions are faster; vectors (n, d) as they are."""
    if images.ndim == 2:
        return torch.tensor(images, device=where)
    return torch.tensor(images, device=where).permute(0, 3, 1, 2).float().div_(255)
