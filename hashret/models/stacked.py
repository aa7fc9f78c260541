"""The stacked denoising autoencoder: Vincent, Larochelle, Lajoie, Bengio and Manzagol, "Stacked Denoising
Autoencoders", JMLR 2010, https://jmlr.org/papers/v11/vincent10a.html. Ours stacks the layers that another member of the
family would have, batch normalisation and all, so that any member on the same network can begin with them."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hashret.models.denoising import DenoisingAutoencoder


class StackedDenoisingAutoencoder(DenoisingAutoencoder):
    """Each layer learns to remember what the ones below it see of clean images; then all of them learn together."""

    def __init__(
        self,
        *args: Any,
        network: str = "mlp",
        pretrain: float = 0.5,
        fine_tune: bool = False,
        classes: int = 0,
        **parts: Any,
    ) -> None:
        """`pretrain` is the share of the steps that layers learn alone in. Then the whole autoencoder learns to
        remember images, or with `fine_tune` to tell labels: first a last layer alone for a third of what is left, then
        everything. `classes` is counted from the labels."""
        super().__init__(*args, network=network, **parts)
        if not 0 <= pretrain < 1:
            raise ValueError(f"pretrain must be at least 0 and less than 1, not {pretrain}")
        dense = nn.Flatten | nn.Linear | nn.BatchNorm1d | nn.ReLU
        if any(not isinstance(layer, dense) for layer in self.encoder.children()):
            raise ValueError(f"model 'stacked' stacks fully connected layers, which network {network!r} does not have")
        self.pretrain, self.labelled = pretrain, fine_tune
        self.classifier = nn.Linear(self.latent, classes or 1) if fine_tune else None
        self.alone: int | None = None  # the layer that learns alone now

    def on_step_start(self, step: int, total_steps: int) -> None:
        layers = len(_blocks(self.encoder))
        early = int(self.pretrain * total_steps)
        self.alone = step * layers // early if step < early else None
        learning: list[nn.Module] = [self]
        if self.alone is not None:
            learning = [_blocks(self.encoder)[self.alone], _blocks(self.decoder)[-1 - self.alone]]
        elif self.classifier is not None and step < early + (total_steps - early) // 3:
            learning = [self.classifier]
        self.eval().requires_grad_(False)
        for part in learning:
            part.train().requires_grad_(True)

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        if self.alone is None:
            return super().loss(x)
        blocks = _blocks(self.encoder)
        with torch.no_grad():
            clean: Tensor = nn.Sequential(*blocks[: self.alone])(x)
        remembered = _blocks(self.decoder)[-1 - self.alone](blocks[self.alone](self.corrupt(clean)))
        if self.alone == 0:
            return {"layer 1": self.likelihood.nll(remembered, x).mean()}
        return {f"layer {self.alone + 1}": 0.5 * (remembered - clean).square().sum(1).mean()}

    def labelled_loss(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.alone is not None or self.classifier is None:
            return self.loss(x)
        known = labels >= 0
        told = F.cross_entropy(self.classifier(self.features(x)[known]), labels[known], reduction="sum")
        return {"class": told / known.sum().clamp(min=1)}


def _blocks(layers: nn.Module) -> list[nn.Module]:
    """The layers with weights, each with what comes after it, and the first with what comes before it."""
    stack = list(layers.children())
    starts = [i for i, layer in enumerate(stack) if isinstance(layer, nn.Linear)]
    return [nn.Sequential(*stack[a:b]) for a, b in pairwise([0, *starts[1:], len(stack)])]
