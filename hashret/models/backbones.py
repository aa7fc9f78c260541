"""Pretrained networks: the frozen features of a torchvision classifier, followed by one trainable linear layer.

Their names are `backbone:NAME`, as in `backbone:resnet18`. A saved model contains their weights, so that its folder
suffices.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hashret.errors import HashretError, one_line
from hashret.models.networks import Network, Shape, conv_decoder

PREFIX = "backbone:"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue

# The first two have auxiliary outputs and a normalisation of their own. From their name alone, the last two cannot be
# built on the meta device, or not at the image size of their weights.
UNSUPPORTED = ("googlenet", "inception", "regnet", "vit_h")


class Backbone(nn.Module):
    """A classifier without its last layer: from images (n, c, h, w) in [0, 1], which it resizes, converts to colour and
    normalises, to features (n, d). Its weights are buffers, so that no optimiser changes them, and it always stays in
    evaluation mode."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, classifier: nn.Module, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None])
        for module in classifier.modules():
            for name, weights in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, weights.detach())
        self.classifier = classifier.eval()

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        x = x.expand(-1, 3, -1, -1)  # repeats the channel of grey images
        return self.classifier((x - self.mean) / self.deviation)  # type: ignore[no-any-return]


def backbone(network: str, weights: str) -> Network:
    """Return the network `backbone:NAME` with the decoder of `conv`.

    `weights` is "" for those in torchvision's cache on this machine, "random", or the path of a state dict. Raise
    ValueError for an unknown classifier. The network's encoder raises HashretError if the weights are missing, unless
    it is built on the meta device.
    """
    import torchvision  # late, because it is slow to import

    name = network.removeprefix(PREFIX)
    names = [n for n in torchvision.models.list_models(torchvision.models) if not n.startswith(UNSUPPORTED)]
    if name not in names:
        raise ValueError(f"there is no network {network!r}; choose {PREFIX} and one of {', '.join(names)}")

    def encoder(shape: Shape, outputs: int, width: int) -> nn.Module:
        if shape[0] not in (1, 3):
            raise ValueError(f"network {network!r} takes images of 1 or 3 channels, not {shape[0]}")
        default = torchvision.models.get_model_weights(name).DEFAULT
        classifier, features = _without_last_layer(_classifier(name, weights, default))
        frozen = Backbone(classifier, default.transforms().crop_size[0])
        return nn.Sequential(frozen, nn.Flatten(), nn.Linear(features, outputs))

    return Network(encoder, conv_decoder)


def _classifier(name: str, weights: str, default: Any) -> nn.Module:
    """Return the classifier; on the meta device without loading weights, which are only counted, or loaded later."""
    import torchvision

    is_meta = torch.empty(0).is_meta
    if weights == "" and not is_meta:
        cached = Path(torch.hub.get_dir(), "checkpoints", default.url.rpartition("/")[2])
        if not cached.is_file():
            raise HashretError(
                f"the weights of {name} are not on this machine: download {default.url} to {cached}, "
                f"or give the setting weights a file that has them"
            )
        return torchvision.models.get_model(name, weights=default)  # type: ignore[no-any-return]
    classifier: nn.Module = torchvision.models.get_model(name)
    if weights not in ("", "random") and not is_meta:
        try:
            classifier.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, TypeError, ValueError) as error:
            raise HashretError(
                f"{weights} does not have the weights of {name} ({one_line(error)}): give another file"
            ) from None
    return classifier


def _without_last_layer(classifier: nn.Module) -> tuple[nn.Module, int]:
    """Replace the last layer of a classifier by the identity. Return the classifier and the number of its features."""
    name, last = [(n, m) for n, m in classifier.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    parent, _, child = name.rpartition(".")
    setattr(classifier.get_submodule(parent), child, nn.Identity())
    return classifier, last.in_features if isinstance(last, nn.Linear) else last.in_channels
