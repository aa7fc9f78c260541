"""The autoencoder family by name. A new member is one file and one entry of `MODELS`.

Importing this package and reading the names and settings of members (`MODELS.settings(name)`) do not load PyTorch.
"""

from typing import TYPE_CHECKING, Any

from hashret.models.catalogue import Catalogue

if TYPE_CHECKING:
    from hashret.models.base import Member

__all__ = ["DEFAULT_MODEL", "MODELS", "Member"]

DEFAULT_MODEL = "contrastive"

MODELS = Catalogue(
    {
        "ae": "hashret.models.ae:Autoencoder",
        "linear": "hashret.models.linear:LinearAutoencoder",
        "sparse": "hashret.models.sparse:SparseAutoencoder",
        "contractive": "hashret.models.contractive:ContractiveAutoencoder",
        "denoising": "hashret.models.denoising:DenoisingAutoencoder",
        "stacked": "hashret.models.stacked:StackedDenoisingAutoencoder",
        "vae": "hashret.models.vae:VariationalAutoencoder",
        "cvae": "hashret.models.cvae:ConditionalVariationalAutoencoder",
        "bernoulli-vae": "hashret.models.bernoulli_vae:BernoulliVariationalAutoencoder",
        "binary": "hashret.models.binary:BinaryAutoencoder",
        "bihalf": "hashret.models.bihalf:BihalfAutoencoder",
        "twin": "hashret.models.twin:TwinBottleneck",
        "contrastive": "hashret.models.contrastive:ContrastiveAutoencoder",
        "graph": "hashret.models.graph:GraphAutoencoder",
        "ortho": "hashret.models.ortho:OrthoHash",
        "lsh": "hashret.models.pixels:Lsh",
        "pca": "hashret.models.pixels:Pca",
        "itq": "hashret.models.pixels:Itq",
        "anchor-graph": "hashret.models.pixels:AnchorGraph",
    }
)


def __getattr__(name: str) -> Any:
    if name != "Member":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hashret.models.base import Member

    return Member
