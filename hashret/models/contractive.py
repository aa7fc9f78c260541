"""The contractive autoencoder: Rifai, Vincent, Muller, Glorot and Bengio, "Contractive Auto-Encoders: Explicit
Invariance During Feature Extraction", ICML 2011, https://icml.cc/2011/papers/455_icmlpaper.pdf. Ours works with any
network: an unbiased estimate of the penalty needs one random projection of each code (Hutchinson 1990). It
batch-normalises each unit, so that scaling the code down and the decoder up does not reduce the penalty."""

from typing import Any

import torch
from torch import Tensor

from hashret.models.base import Member


class ContractiveAutoencoder(Member):
    """An autoencoder whose code changes little with small changes of the image."""

    normalised = True

    def __init__(self, *args: Any, contraction: float = 0.01, **parts: Any) -> None:
        """`contraction` is the weight λ of the squared Frobenius norm of the code's Jacobian with respect to pixels."""
        super().__init__(*args, **parts)
        if not contraction >= 0:
            raise ValueError(f"contraction must be 0 or more, not {contraction}")
        self.contraction = contraction

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():  # also when the loss is only evaluated
            x = x.clone().requires_grad_()
            h = self.features(x)
            # For random signs v, E[v vᵀ] = I, hence E‖Jᵀv‖² = trace(J Jᵀ) = ‖J‖². J is the Jacobian of the whole batch:
            # in training, batch normalisation makes an image's code depend a little on the other images.
            v = torch.randint(2, h.shape, device=h.device, dtype=torch.float32) * 2 - 1
            (product,) = torch.autograd.grad((h.float() * v).sum(), x, create_graph=True)
        z, penalties = self.bottleneck(h)
        nll = self.likelihood.nll(self.decode(z), x).mean()
        contraction = self.contraction * product.square().flatten(1).sum(1).mean()
        return {"reconstruction": nll, "contraction": contraction} | penalties
