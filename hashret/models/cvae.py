"""The conditional variational autoencoder: Sohn, Lee and Yan, "Learning Structured Output Representation using Deep
Conditional Generative Models", NeurIPS 2015, https://papers.nips.cc/paper/5775. Ours has a further class "unknown",
trained by dropping labels at random, so that images without a label can be encoded."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hashret.models.vae import VariationalAutoencoder


class ConditionalVariationalAutoencoder(VariationalAutoencoder):
    """A variational autoencoder whose encoder and decoder are also given the label, so that the code carries what the
    label does not."""

    labelled = True

    def __init__(self, *args: Any, classes: int = 0, dropped: float = 0.2, **parts: Any) -> None:
        """`dropped` is the share of labels that training makes "unknown"; `classes` is counted from the labels."""
        self.condition_dim = classes + 1
        super().__init__(*args, **parts)
        if not 0 <= dropped <= 1:
            raise ValueError(f"dropped must be from 0 to 1, not {dropped}")
        self.dropped = dropped
        self.condition = nn.Linear(self.condition_dim, self.latent * self.outputs_per_latent, bias=False)

    def features(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.encoder(x) + self.condition(self._one_hot(x, labels))  # type: ignore[no-any-return]

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.decoder(torch.cat([z, self._one_hot(z, labels)], dim=1))  # type: ignore[no-any-return]

    def labelled_loss(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            labels = labels.masked_fill(torch.rand(len(labels), device=labels.device) < self.dropped, -1)
        z, penalties = self.bottleneck(self.features(x, labels))
        return {"reconstruction": self.likelihood.nll(self.decode(z, labels), x).mean()} | penalties

    def _one_hot(self, like: Tensor, labels: Tensor | None) -> Tensor:
        """Return one-hot labels, (n, condition_dim), in the dtype and on the device of `like`; "unknown" is first."""
        if labels is None:
            labels = like.new_full((len(like),), -1, dtype=torch.int64)
        return F.one_hot(labels + 1, self.condition_dim).to(like)
