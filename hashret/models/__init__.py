"""The autoencoder family. A new member is one file and one line here."""

from hashret.models.ae import Autoencoder
from hashret.models.base import Member
from hashret.models.bernoulli_vae import BernoulliVariationalAutoencoder
from hashret.models.bihalf import BihalfAutoencoder
from hashret.models.binary import BinaryAutoencoder
from hashret.models.contractive import ContractiveAutoencoder
from hashret.models.contrastive import ContrastiveAutoencoder
from hashret.models.cvae import ConditionalVariationalAutoencoder
from hashret.models.denoising import DenoisingAutoencoder
from hashret.models.graph import GraphAutoencoder
from hashret.models.linear import LinearAutoencoder
from hashret.models.ortho import OrthoHash
from hashret.models.pixels import AnchorGraph, Itq, Lsh, Pca
from hashret.models.sparse import SparseAutoencoder
from hashret.models.stacked import StackedDenoisingAutoencoder
from hashret.models.twin import TwinBottleneck
from hashret.models.vae import VariationalAutoencoder

__all__ = ["DEFAULT_MODEL", "MODELS", "Member"]

DEFAULT_MODEL = "contrastive"

MODELS: dict[str, type[Member]] = {
    "ae": Autoencoder,
    "linear": LinearAutoencoder,
    "sparse": SparseAutoencoder,
    "contractive": ContractiveAutoencoder,
    "denoising": DenoisingAutoencoder,
    "stacked": StackedDenoisingAutoencoder,
    "vae": VariationalAutoencoder,
    "cvae": ConditionalVariationalAutoencoder,
    "bernoulli-vae": BernoulliVariationalAutoencoder,
    "binary": BinaryAutoencoder,
    "bihalf": BihalfAutoencoder,
    "twin": TwinBottleneck,
    "contrastive": ContrastiveAutoencoder,
    "graph": GraphAutoencoder,
    "ortho": OrthoHash,
    "lsh": Lsh,
    "pca": Pca,
    "itq": Itq,
    "anchor-graph": AnchorGraph,
}
