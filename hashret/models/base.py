"""The base class of all members: networks and likelihoods by name, the reconstruction loss, and binary bottlenecks."""

import inspect
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hashret.errors import HashretError, choose
from hashret.models.backbones import PREFIX, backbone
from hashret.models.likelihoods import LIKELIHOODS
from hashret.models.networks import NETWORKS, Network, Shape

MAX_WEIGHTS = 2**30  # per member: 4 GiB, and training needs three times as much besides
VECTOR_DEFAULTS = {"network": "mlp", "likelihood": "gaussian"}  # settings whose defaults do not fit vectors


class TrainingDefaults(NamedTuple):
    """A member's default batch size, learning rate and weight decay, and whether Muon (`hashret.training.muon`) instead
    of AdamW updates its matrices."""

    batch: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    muon: bool = False


class Member(nn.Module):
    """An autoencoder whose encoder outputs are turned into bits by a head.

    A member overrides `corrupt` (the encoder's input in training), `bottleneck` (the map from encoder to decoder, and
    its penalties) and `outputs` (the real numbers that become bits), or `loss` if these do not suffice. Images are
    float32 (n, c, h, w) in [0, 1]. Vectors are float32 (n, d) with mean 0 and variance 1; their `shape` is (d,).
    """

    head: ClassVar[str] = "median"  # the default head
    trainable: ClassVar[bool] = True
    labelled: bool = False  # whether training requires labels; the setting `classes` then holds their number
    outputs_per_latent: ClassVar[int] = 1  # encoder outputs per unit of the bottleneck
    normalised: ClassVar[bool] = False  # batch-normalise encoder outputs, so that no scaling escapes a penalty
    allows_skips: ClassVar[bool] = False  # accepts networks whose decoder sees more of the image than the code
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
        """Build the networks with random weights.

        `latent` is the width of the bottleneck, 0 for one unit per bit; `width` scales the network's layers; `weights`
        are the pretrained weights of a network `backbone:NAME` (see `hashret.models.backbones`). Raise ValueError for
        an unknown name or an invalid value, and HashretError for parts that do not support vectors.
        """
        super().__init__()
        if latent < 0 or width < 1:
            raise ValueError(f"latent must be 0 or more and width 1 or more, not {latent} and {width}")
        self.shape, self.bits, self.latent = shape, bits, latent or bits
        parts = _network(network, weights)
        if parts.has_skips and not self.allows_skips:
            raise ValueError(
                f"the decoder of network {network!r} sees the image past the code: choose model 'denoising'"
            )
        self.likelihood = choose(LIKELIHOODS, likelihood, "likelihood")
        if len(shape) == 1:
            check_for_vectors("network", network, [name for name, part in NETWORKS.items() if part.for_vectors])
            check_for_vectors("likelihood", likelihood, [n for n, part in LIKELIHOODS.items() if part.for_vectors])
        self.decoded_shape = (shape[0] * self.likelihood.n_params, *shape[1:])
        self.encoder = parts.encoder(shape, self.latent * self.outputs_per_latent, width)
        self.decoder = parts.decoder(self.latent + self.condition_dim, self.decoded_shape, width)
        if self.normalised:
            norm = nn.BatchNorm1d(self.latent * self.outputs_per_latent, affine=False)
            self.encoder.append(norm)  # type: ignore[operator]

    def features(self, x: Tensor) -> Tensor:
        """Return the encoder outputs, (n, latent × outputs_per_latent)."""
        return self.encoder(x)  # type: ignore[no-any-return]

    def decode(self, z: Tensor) -> Tensor:
        """Return the parameters of the likelihood, (n, *decoded_shape), from a bottleneck output (n, latent)."""
        return self.decoder(z)  # type: ignore[no-any-return]

    def corrupt(self, x: Tensor) -> Tensor:
        """Return the encoder's input in training, in place of `x`."""
        return x

    def bottleneck(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the decoder's input (n, latent), and penalties by name in nats per image."""
        return features, {}

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        """Return the loss terms by name, scalars in nats per image; training minimises their sum."""
        z, penalties = self.bottleneck(self.features(self.corrupt(x)))
        return {"reconstruction": self.likelihood.nll(self.decode(z), x).mean()} | penalties

    def labelled_loss(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss terms with labels, int64 (n,), −1 for an image without one."""
        return self.loss(x)

    def pair_loss(self, x: Tensor, pairs: Tensor, same: Tensor) -> Tensor:
        """Return the mean contrastive loss of labelled pairs, (2, p, c, h, w), with `same` bool (p,), as a scalar.

        The loss of a pair that is the same is its Hamming distance; that of a pair that is not is the amount by which
        its distance falls short of half of the bits (Liu, Wang, Shan and Chen, "Deep Supervised Hashing for Fast Image
        Retrieval", CVPR 2016). Bits are the signs of the outputs, standardised over the pairs and the unpaired images
        `x`, so that the thresholds of the head matter little.
        """
        z = self.outputs(torch.cat([x, *pairs])).float()
        a, b = straight_through_sign((z - z.mean(0)) / (z.std(0) + 1e-6))[len(x) :].chunk(2)
        differing = (1 - a * b).sum(1) / 2
        return torch.where(same, differing, F.relu(self.latent / 2 - differing)).mean()

    def on_train_start(self, x: Tensor, labels: Tensor | None) -> None:
        """Adapt to the training images, of which `x` is a sample; called before the first step, also when a run is
        resumed."""

    def auto_settings(self) -> dict[str, float]:
        """Return the settings that the member derived from the images, by name, for the model card."""
        return {}

    def on_step_start(self, step: int, total_steps: int) -> None:
        """Update settings that depend on the training step; called before each step, counted from 0."""

    def outputs(self, x: Tensor) -> Tensor:
        """Return the real numbers (n, latent) that a head turns into bits."""
        return self.features(x)[:, : self.latent]

    def metrics(self, x: Tensor) -> dict[str, Tensor]:
        """Return scalars by name that are reported for held-out images, but not minimised."""
        return {}

    def sample_prior(self, n: int) -> Tensor | None:
        """Return n samples (n, latent) from the prior of the bottleneck, or None if there is no prior."""
        return None

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstructions of images, (n, c, h, w) in [0, 1], or of vectors, (n, d)."""
        z, _ = self.bottleneck(self.features(x))
        reconstruction = self.likelihood.mean(self.decode(z))
        return reconstruction if x.ndim == 2 else reconstruction.clamp(0, 1)

    def init_from(self, other: "Member") -> None:
        """Copy the encoder's weights from another member, and all other weights of equal names and shapes. Raise
        HashretError if the encoders differ."""
        own, others = self.state_dict(), other.state_dict()
        shared = {name: tensor for name, tensor in others.items() if name in own and own[name].shape == tensor.shape}
        weights = [name for name, _ in self.named_parameters() if name.startswith("encoder.")]
        missing = [name for name in weights if name not in shared]
        if missing:
            raise HashretError(
                "the model to begin with has another network: train both with the same bits, size, and settings of the "
                f"network ({', '.join(missing[:3])} differ)"
            )
        self.load_state_dict(own | shared)

    @classmethod
    def recommended_settings(cls, shape: Shape, images: int) -> dict[str, Any]:
        """Return the settings, by name, that suit so many images of a shape (c, h, w) better than the defaults."""
        return {}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the member's settings with their defaults: the keyword-only parameters of its class and, if that takes
        `**kwargs`, of its base classes."""
        settings: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, Member) and "__init__" in vars(base):
                parameters = inspect.signature(base.__init__).parameters.values()
                if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                    settings = {}
                settings |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return settings


def build(member: type[Member], shape: Shape, bits: int, settings: dict[str, Any]) -> Member:
    """Return a member with random weights. Raise HashretError if it has more than `MAX_WEIGHTS`."""
    with torch.device("meta"):  # allocates no memory
        weights = sum(p.numel() for p in member(shape, bits, **settings).parameters())
    if weights > MAX_WEIGHTS:
        raise HashretError(f"a network of {weights:,} weights is too large: choose smaller settings or images")
    return member(shape, bits, **settings)


def check_for_vectors(part: str, name: str, supported: list[str]) -> None:
    """Raise HashretError unless the part (a network, a likelihood …) called `name` supports vectors."""
    if name not in supported:
        raise HashretError(f"{part} {name!r} is for images: choose {' or '.join(supported)} for vectors")


def _network(name: str, weights: str) -> Network:
    if name.startswith(PREFIX):
        return backbone(name, weights)
    if weights:
        raise ValueError(f"weights are for a network such as {PREFIX}resnet18: network {name!r} takes none")
    return choose(NETWORKS, name, "network")


def straight_through_sign(h: Tensor) -> Tensor:
    """Return the signs of `h`, −1 or +1, with the gradient of tanh (Bengio, Léonard and Courville 2013)."""
    soft = torch.tanh(h)
    return torch.where(h > 0, 1.0, -1.0).to(h.dtype) + (soft - soft.detach())  # in this order exactly ±1
