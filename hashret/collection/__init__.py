"""`Collection`: items, their codes and an index; add images, find similar ones, forget them."""

from hashret.collection.collection import Collection, locate
from hashret.collection.reindexing import MissingContents
from hashret.results import Hit, Indexed, IndexReport

__all__ = ["Collection", "Hit", "IndexReport", "Indexed", "MissingContents", "locate"]
