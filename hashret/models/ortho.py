"""Codes from labels: Hoe, Ng, Zhang, Chan, Song and Xiang, "One Loss for All: Deep Hashing with a Single Cosine
Similarity based Learning Objective" (OrthoHash), NeurIPS 2021, https://arxiv.org/abs/2109.14449. Ours adds a
reconstruction loss, so that a code also describes the image within its class."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hashret.models.augment import ViewedAutoencoder
from hashret.models.base import straight_through_sign


class OrthoHash(ViewedAutoencoder):
    """A binary autoencoder whose codes are near a fixed random code of their class."""

    labelled = True
    targets: Tensor  # (classes, latent), ±1

    def __init__(
        self,
        *args: Any,
        classes: int = 0,
        margin: float = 0.2,
        scale: float = 8.0,
        reconstruction: float = 0.5,
        **parts: Any,
    ) -> None:
        """`margin` is subtracted from an image's cosine similarity with the code of its class; `scale` is the inverse
        temperature of the softmax. `reconstruction` is the weight of the reconstruction loss in nats per pixel.
        `classes` is counted from the labels."""
        super().__init__(*args, **parts)
        if not (0 <= margin < 2 and scale > 0 and reconstruction >= 0):
            raise ValueError(
                "margin must be at least 0 and less than 2, scale above 0, and reconstruction 0 or more, not "
                f"{margin}, {scale} and {reconstruction}"
            )
        self.margin, self.scale, self.reconstruction = margin, scale, reconstruction
        self.register_buffer("targets", torch.empty(classes, self.latent).bernoulli_(0.5).mul_(2).sub_(1))

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        return self.labelled_loss(x, torch.full((len(x),), -1, device=x.device))

    def labelled_loss(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.features(self.view(x) if self.training else x)
        terms = self.reconstruction_loss(straight_through_sign(h), x)
        is_labelled = labels >= 0
        if len(self.targets):
            classes = labels[is_labelled]
            cosines = F.normalize(h[is_labelled].float(), dim=1) @ F.normalize(self.targets, dim=1).T
            logits = self.scale * (cosines - self.margin * F.one_hot(classes, len(self.targets)))
            terms["class"] = F.cross_entropy(logits, classes, reduction="sum") / is_labelled.sum().clamp(min=1)
        return terms
