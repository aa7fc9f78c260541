"""What all members of the family share: parts by name, the reconstruction loss, and the maths of binary bottlenecks."""

import inspect
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hashret.errors import HashretError, choose
from hashret.models.backbones import PREFIX, backbone
from hashret.models.likelihoods import LIKELIHOODS
from hashret.models.networks import NETWORKS, Network, Shape

MAX_WEIGHTS = 2**30  # of a member: four gigabytes, and training needs as much again three times
FOR_VECTORS = {"network": "mlp", "likelihood": "gaussian"}  # defaults of settings that images have others for


class TrainingDefaults(NamedTuple):
    """How a member is trained unless it is said otherwise: images in a step, the two rates of AdamW, and whether
    matrices go the way of Muon instead (`hashret.training.muon`)."""

    batch: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    muon: bool = False


class Member(nn.Module):
    """An autoencoder whose encoder gives the real numbers that a head turns into bits.

    A member states what is its own by overriding `corrupt` (what the encoder sees), `bottleneck` (what goes from the
    encoder to the decoder, and which penalties that costs) and `outputs` (which real numbers become bits), or, if that
    does not say it, `loss`. Images are float32 (n, c, h, w) in [0, 1]; vectors, for which `shape` is (d,), are float32
    (n, d), with a mean of 0 and a variance of 1.
    """

    head: ClassVar[str] = "median"  # the head a member gets if none is asked for
    trainable: ClassVar[bool] = True
    labelled: bool = False  # whether it learns from labels, and cannot without; its setting `classes` says how many
    outputs_per_latent: ClassVar[int] = 1  # how many numbers the encoder gives for each unit of the bottleneck
    normalised: ClassVar[bool] = False  # over the batch, where a free scale would escape a penalty
    allows_skips: ClassVar[bool] = False  # whether the decoder may see more of the image than the code
    training_defaults: TrainingDefaults = TrainingDefaults()
    condition_dim: int = 0  # inputs of the decoder besides the latent ones

    def __init__(
        self,
        shape: Shape,
        bits: int,
        *,
        network: str = "conv",
        likelihood: str = "bernoulli",
        latent: int = 0,
        width: int = 24,
        weights: str = "",
    ) -> None:
        """`latent` is the width of the bottleneck, 0 for one unit a bit; `width` scales the network's layers; `weights`
        are those of a network `backbone:NAME` (see `hashret.models.backbones`)."""
        super().__init__()
        if latent < 0 or width < 1:
            raise ValueError(f"latent must be 0 or more and width 1 or more, not {latent} and {width}")
        self.shape, self.bits, self.latent = shape, bits, latent or bits
        parts = _network(network, weights)
        if parts.has_skips and not self.allows_skips:
            raise ValueError(f"network {network!r} shows the decoder the image past the code: choose model 'denoising'")
        self.likelihood = choose(LIKELIHOODS, likelihood, "likelihood")
        if len(shape) == 1:
            check_for_vectors("network", network, [name for name, there in NETWORKS.items() if there.vectors])
            check_for_vectors("likelihood", likelihood, [name for name, there in LIKELIHOODS.items() if there.vectors])
        self.decoded_shape = (shape[0] * self.likelihood.n_params, *shape[1:])
        self.encoder = parts.encoder(shape, self.latent * self.outputs_per_latent, width)
        self.decoder = parts.decoder(self.latent + self.condition_dim, self.decoded_shape, width)
        if self.normalised:
            norm = nn.BatchNorm1d(self.latent * self.outputs_per_latent, affine=False)
            self.encoder.append(norm)  # type: ignore[operator]

    def features(self, x: Tensor) -> Tensor:
        """What the encoder makes of an image: (n, latent × outputs_per_latent)."""
        return self.encoder(x)  # type: ignore[no-any-return]

    def decode(self, z: Tensor) -> Tensor:
        """What the likelihood takes, from what went through the bottleneck."""
        return self.decoder(z)  # type: ignore[no-any-return]

    def corrupt(self, x: Tensor) -> Tensor:
        """What the encoder sees in training instead of `x`."""
        return x

    def bottleneck(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """From the encoder's features: the decoder's input (n, latent), and penalties by name, in nats per image."""
        return features, {}

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        """The terms by name, each a scalar in nats per image, of which training minimises the sum."""
        z, penalties = self.bottleneck(self.features(self.corrupt(x)))
        return {"reconstruction": self.likelihood.nll(self.decode(z), x).mean()} | penalties

    def labelled_loss(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What `loss` is for a member that learns from labels: int64 (n,), -1 for an image without one."""
        return self.loss(x)

    def pair_loss(self, x: Tensor, pairs: Tensor, same: Tensor) -> Tensor:
        """What pairs that were judged cost, beside images `x` of all kinds: `pairs` (2, p, c, h, w), `same` bool (p,).

        Of the mean pair: as many nats as there are bits that differ between images that are the same, and as the bits
        that differ between others are short of half of all. Bits are signs of the outputs centred and scaled over all
        these images, so that it matters little how a head cuts them. Pulling together, and pushing apart as far as a
        margin, is the loss of Liu, Wang, Shan and Chen, "Deep Supervised Hashing for Fast Image Retrieval", CVPR 2016.
        """
        z = self.outputs(torch.cat([x, *pairs])).float()
        a, b = straight_through_sign((z - z.mean(0)) / (z.std(0) + 1e-6))[len(x) :].chunk(2)
        differing = (1 - a * b).sum(1) / 2
        return torch.where(same, differing, F.relu(self.latent / 2 - differing)).mean()

    def on_train_start(self, x: Tensor, labels: Tensor | None) -> None:
        """What has to be found out before training, or before it goes on, from some of the images."""

    def auto_settings(self) -> dict[str, float]:
        """What it chose by itself for these images, by name: told in the model card."""
        return {}

    def on_step_start(self, step: int, total_steps: int) -> None:
        """What changes as training goes on: called before each step, counted from 0, of the steps planned."""

    def outputs(self, x: Tensor) -> Tensor:
        """The real numbers (n, latent) that a head turns into bits."""
        return self.features(x)[:, : self.latent]

    def metrics(self, x: Tensor) -> dict[str, Tensor]:
        """What else is worth knowing of how images are remembered, by name, each a scalar: reported, not minimised."""
        return {}

    def sample_prior(self, n: int) -> Tensor | None:
        """n draws (n, latent) from the prior of what goes through the bottleneck; None if there is none."""
        return None

    def reconstruct(self, x: Tensor) -> Tensor:
        """The images (n, c, h, w) in [0, 1], or vectors (n, d), that the model remembers `x` by."""
        z, _ = self.bottleneck(self.features(x))
        remembered = self.likelihood.mean(self.decode(z))
        return remembered if x.ndim == 2 else remembered.clamp(0, 1)

    def init_from(self, other: "Member") -> None:
        """Copy the weights of another member's encoder, which must be of the same shapes, and of what else is alike.
        Raises HashretError for another network."""
        mine, theirs = self.state_dict(), other.state_dict()
        alike = {name: tensor for name, tensor in theirs.items() if name in mine and mine[name].shape == tensor.shape}
        weights = [name for name, _ in self.named_parameters() if name.startswith("encoder.")]
        lacking = [name for name in weights if name not in alike]
        if lacking:
            raise HashretError(
                "the model to begin with has another network: train both with the same bits, size, and settings of the "
                f"network ({', '.join(lacking[:3])} differ)"
            )
        self.load_state_dict(mine | alike)

    @classmethod
    def recommended_settings(cls, shape: Shape, images: int) -> dict[str, Any]:
        """Settings that suit so many images of a shape (c, h, w) better than the defaults, by name."""
        return {}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The settings a member takes, by name, with their defaults: the keyword-only parameters of its class and, if
        it passes others on, of its base classes."""
        settings: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, Member) and "__init__" in vars(base):
                parameters = inspect.signature(base.__init__).parameters.values()
                if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                    settings = {}
                settings |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return settings


def build(member: type[Member], shape: Shape, bits: int, settings: dict[str, Any]) -> Member:
    """A member with new weights; raises HashretError for more of them than fit into any memory."""
    with torch.device("meta"):  # takes no memory
        weights = sum(p.numel() for p in member(shape, bits, **settings).parameters())
    if weights > MAX_WEIGHTS:
        raise HashretError(f"a network of {weights:,} weights is too large: choose smaller settings or images")
    return member(shape, bits, **settings)


def check_for_vectors(what: str, name: str, fitting: list[str]) -> None:
    """Raises HashretError if the part called `name` is none of those that do for vectors."""
    if name not in fitting:
        raise HashretError(f"{what} {name!r} is for images: choose {' or '.join(fitting)} for vectors")


def _network(name: str, weights: str) -> Network:
    if name.startswith(PREFIX):
        return backbone(name, weights)
    if weights:
        raise ValueError(f"weights are for a network such as {PREFIX}resnet18: network {name!r} takes none")
    return choose(NETWORKS, name, "network")


def straight_through_sign(h: Tensor) -> Tensor:
    """−1 or +1 by the sign of `h`, with the gradient of tanh (Bengio, Léonard and Courville 2013)."""
    soft = torch.tanh(h)
    return torch.where(h > 0, 1.0, -1.0).to(h.dtype) + (soft - soft.detach())  # in this order it is ±1 to the last bit
