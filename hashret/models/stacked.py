"""The stacked denoising autoencoder: Vincent, Larochelle, Lajoie, Bengio and Manzagol, "Stacked Denoising
Autoencoders", JMLR 2010, https://jmlr.org/papers/v11/vincent10a.html. Ours pretrains the layers of an ordinary network
of the family, with batch normalisation, so that any member on the same network can be initialised from it."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hashret.models.denoising import DenoisingAutoencoder


class StackedDenoisingAutoencoder(DenoisingAutoencoder):
    """A denoising autoencoder with greedy layer-wise pretraining: each layer learns to reconstruct the clean outputs of
    the layer below; then all layers are trained together."""

    def __init__(
        self,
        *args: Any,
        network: str = "mlp",
        pretrain: float = 0.5,
        fine_tune: bool = False,
        classes: int = 0,
        **parts: Any,
    ) -> None:
        """`pretrain` is the share of the steps for layer-wise pretraining. The remaining steps train the whole
        autoencoder to reconstruct images, or with `fine_tune` to classify them: a third of these steps trains a last
        layer only, the others the whole encoder. `classes` is counted from the labels."""
        super().__init__(*args, network=network, **parts)
        if not 0 <= pretrain < 1:
            raise ValueError(f"pretrain must be at least 0 and less than 1, not {pretrain}")
        dense = nn.Flatten | nn.Linear | nn.BatchNorm1d | nn.ReLU
        if any(not isinstance(layer, dense) for layer in self.encoder.children()):
            raise ValueError(f"model 'stacked' needs fully connected layers, which network {network!r} does not have")
        self.pretrain, self.labelled = pretrain, fine_tune
        self.classifier = nn.Linear(self.latent, classes or 1) if fine_tune else None
        self.pretrained_layer: int | None = None  # the layer that the current step pretrains

    def on_step_start(self, step: int, total_steps: int) -> None:
        layers = len(_blocks(self.encoder))
        pretraining_steps = int(self.pretrain * total_steps)
        self.pretrained_layer = step * layers // pretraining_steps if step < pretraining_steps else None
        trained: list[nn.Module] = [self]
        if self.pretrained_layer is not None:
            trained = [_blocks(self.encoder)[self.pretrained_layer], _blocks(self.decoder)[-1 - self.pretrained_layer]]
        elif self.classifier is not None and step < pretraining_steps + (total_steps - pretraining_steps) // 3:
            trained = [self.classifier]
        self.eval().requires_grad_(False)
        for part in trained:
            part.train().requires_grad_(True)

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        layer = self.pretrained_layer
        if layer is None:
            return super().loss(x)
        blocks = _blocks(self.encoder)
        with torch.no_grad():
            clean: Tensor = nn.Sequential(*blocks[:layer])(x)
        reconstruction = _blocks(self.decoder)[-1 - layer](blocks[layer](self.corrupt(clean)))
        if layer == 0:
            return {"layer 1": self.likelihood.nll(reconstruction, x).mean()}
        return {f"layer {layer + 1}": 0.5 * (reconstruction - clean).square().sum(1).mean()}

    def labelled_loss(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.pretrained_layer is not None or self.classifier is None:
            return self.loss(x)
        is_labelled = labels >= 0
        logits = self.classifier(self.features(x)[is_labelled])
        cross_entropy = F.cross_entropy(logits, labels[is_labelled], reduction="sum")
        return {"class": cross_entropy / is_labelled.sum().clamp(min=1)}


def _blocks(layers: nn.Module) -> list[nn.Module]:
    """Split a network into blocks of one linear layer with the layers that follow it; layers before the first linear
    layer belong to the first block."""
    stack = list(layers.children())
    starts = [i for i, layer in enumerate(stack) if isinstance(layer, nn.Linear)]
    return [nn.Sequential(*stack[a:b]) for a, b in pairwise([0, *starts[1:], len(stack)])]
