"""`Collection`: index images, search for similar ones, find near-duplicates, and manage the items."""

from hashret.collection.collection import Collection, locate
from hashret.collection.reindexing import MissingContents
from hashret.results import Hit, Indexed, IndexReport

__all__ = ["Collection", "Hit", "IndexReport", "Indexed", "MissingContents", "locate"]
