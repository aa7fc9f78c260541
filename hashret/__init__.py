"""Learn compact binary codes of images, and find similar images in milliseconds.

>>> from hashret import Collection, Hasher

Importing this package loads no other module; public names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hashret.client import Client
    from hashret.collection import Collection
    from hashret.errors import HashretError
    from hashret.hasher import Hasher
    from hashret.results import Hit

__version__: str
__all__ = ["Client", "Collection", "Hasher", "HashretError", "Hit", "__version__"]

_MODULES = {
    "Client": "hashret.client",
    "Collection": "hashret.collection",
    "Hasher": "hashret.hasher",
    "HashretError": "hashret.errors",
    "Hit": "hashret.results",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from hashret.process import version

        return version()
    if name not in _MODULES:
        raise AttributeError(f"module 'hashret' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
