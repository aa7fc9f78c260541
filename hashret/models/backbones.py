"""Networks that others have trained: the frozen features of a torchvision classifier, and one linear layer to train.

They go by the name `backbone:NAME`, as in `backbone:resnet18`. Their weights are part of a model, so that who has the
model folder needs nothing else.
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

# The first two have further outputs and their own normalisation. The others cannot be made without memory, or for the
# size of image that their weights are for, by their name alone.
UNLIKE = ("googlenet", "inception", "regnet", "vit_h")


class Backbone(nn.Module):
    """Images (n, c, h, w) in [0, 1], resized, in colour and normalised, to features: all but the last layer of a
    classifier. Its weights are buffers, which no optimiser is given, and it is in evaluation mode always."""

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
        x = x.expand(-1, 3, -1, -1)  # repeats a grey channel
        return self.classifier((x - self.mean) / self.deviation)  # type: ignore[no-any-return]


def backbone(network: str, weights: str) -> Network:
    """The network `backbone:NAME` with the decoder of `conv`, and with such weights: "" for those that torchvision has
    on this machine, "random", or a file of a state dict.

    Raises ValueError if there is no such classifier; its encoder raises HashretError if there are no such weights,
    unless it is made on the meta device, where none are needed.
    """
    import torchvision  # late: it takes long to import

    name = network.removeprefix(PREFIX)
    names = [n for n in torchvision.models.list_models(torchvision.models) if not n.startswith(UNLIKE)]
    if name not in names:
        raise ValueError(f"there is no network {network!r}; choose {PREFIX} and one of {', '.join(names)}")

    def encoder(shape: Shape, outputs: int, width: int) -> nn.Module:
        if shape[0] not in (1, 3):
            raise ValueError(f"network {network!r} sees grey or colour, not {shape[0]} channels")
        best = torchvision.models.get_model_weights(name).DEFAULT
        classifier, features = _without_last_layer(_classifier(name, weights, best))
        frozen = Backbone(classifier, best.transforms().crop_size[0])
        return nn.Sequential(frozen, nn.Flatten(), nn.Linear(features, outputs))

    return Network(encoder, conv_decoder)


def _classifier(name: str, weights: str, best: Any) -> nn.Module:
    import torchvision

    empty = torch.empty(0).is_meta  # weights come from elsewhere, or are only counted
    if weights == "" and not empty:
        cached = Path(torch.hub.get_dir(), "checkpoints", best.url.rpartition("/")[2])
        if not cached.is_file():
            raise HashretError(
                f"the weights of {name} are not on this machine: download {best.url} to {cached}, "
                f"or give the setting weights a file that has them"
            )
        return torchvision.models.get_model(name, weights=best)  # type: ignore[no-any-return]
    classifier: nn.Module = torchvision.models.get_model(name)
    if weights not in ("", "random") and not empty:
        try:
            classifier.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, TypeError, ValueError) as error:
            raise HashretError(
                f"{weights} does not have the weights of {name} ({one_line(error)}): give another file"
            ) from None
    return classifier


def _without_last_layer(classifier: nn.Module) -> tuple[nn.Module, int]:
    """A classifier that stops before the layer that tells classes, and how many features that layer was given."""
    name, last = [(n, m) for n, m in classifier.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    parent, _, child = name.rpartition(".")
    setattr(classifier.get_submodule(parent), child, nn.Identity())
    return classifier, last.in_features if isinstance(last, nn.Linear) else last.in_channels
