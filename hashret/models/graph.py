"""An encoder that learns the bits of an anchor-graph teacher: self-taught hashing (Zhang, Wang, Cai and Lu, SIGIR 2010,
https://doi.org/10.1145/1835449.1835455) from the anchor graph of Liu, Wang, Kumar and Chang, "Hashing with Graphs",
ICML 2011. Ours learns soft targets, derived from the teacher's margins, on augmented views, and adds a reconstruction
loss."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hashret.heads import HEADS, Head
from hashret.models.augment import ViewedAutoencoder
from hashret.models.base import straight_through_sign


class GraphAutoencoder(ViewedAutoencoder):
    """A binary autoencoder whose bits predict an image's anchor-graph code."""

    def __init__(
        self,
        *args: Any,
        sharpness: float = 2.0,
        reconstruction: float = 5.0,
        rotation: float = 5.0,
        **parts: Any,
    ) -> None:
        """The target of a bit is σ(`sharpness` × the teacher's margin in standard deviations). `reconstruction` is the
        weight of the reconstruction loss in nats per pixel."""
        super().__init__(*args, rotation=rotation, **parts)
        if not (sharpness > 0 and reconstruction >= 0):
            raise ValueError(
                f"sharpness must be above 0 and reconstruction 0 or more, not {sharpness} and {reconstruction}"
            )
        self.sharpness, self.reconstruction = sharpness, reconstruction
        self.teacher: Head | None = None

    def on_train_start(self, x: Tensor, labels: Tensor | None) -> None:
        super().on_train_start(x, labels)
        self.teacher = HEADS["anchor-graph"](x.flatten(1).cpu().numpy(), self.latent, 0)

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        h = self.features(self.view(x) if self.training else x).float()
        terms = self.reconstruction_loss(straight_through_sign(h), x)
        if self.teacher is not None:
            terms["teacher"] = F.binary_cross_entropy_with_logits(2 * h, (self.sharpness * self.margins(x)).sigmoid())
        return terms

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the teacher runs in NumPy
    def margins(self, x: Tensor) -> Tensor:
        """Return the teacher's margins, (n, latent)."""
        assert self.teacher is not None
        return torch.from_numpy(self.teacher.margins(x.flatten(1).float().cpu().numpy())).to(x.device)
