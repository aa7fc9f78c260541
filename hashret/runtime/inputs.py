"""The device of networks, and their inputs."""

import torch
from torch import Tensor

from hashret.data.contents import Inputs


def default_device() -> torch.device:
    """Return the first CUDA GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_input(images: Inputs, device: torch.device) -> Tensor:
    """Return uint8 images (n, h, w, c) as float32 (n, c, h, w) in [0, 1], or float32 vectors (n, d) unchanged.

    Images are in the channels-last memory format, in which convolutions are faster.
    """
    if images.ndim == 2:
        return torch.tensor(images, device=device)
    return torch.tensor(images, device=device).permute(0, 3, 1, 2).float().div_(255)
