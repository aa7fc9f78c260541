"""What has happened to a collection that should not have, and how much of a damaged one can be had back."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.indexes import index_class
from hashret.results import BLOBS
from hashret.stores.sqlite import locked
from hashret.stores.sqlite_repair import RecoveredRows, RecoveryReport, check_database, nothing_left


class Finding(NamedTuple):
    """Something wrong with the "database", "items", "model", "blobs" or "index" of a collection, and the way out."""

    part: str
    text: str


def check(folder: Path) -> list[Finding]:
    """Everything that is wrong with the collection in `folder`; every row, every content kept in it and every model is
    read. Raises HashretError if there is no collection."""
    found = check_database(folder)
    try:
        if found.damage:
            return [_damaged(found.database, text) for text in found.damage]
        items = [Finding("items", f"{text}: hashret doctor --recover drops them") for text in found.inconsistencies]
        settings = found.settings
        return [*items, *_blobs(folder, found.blobs), *_model(folder, settings), *_index(folder, settings)]
    except (LookupError, TypeError, ValueError) as error:  # settings that make no sense
        return [_damaged(found.database, str(error))]


def recover(folder: Path) -> RecoveryReport:
    """Make a new database of all that can still be read in a damaged one, which is kept beside it.

    An item is whole with its row, a path and its code; the images of others are found again by indexing their sources.
    Raises HashretError if no model is left, or nothing can be read.
    """
    with locked(folder):
        salvage = RecoveredRows(folder)
        if not salvage.items:
            raise nothing_left(folder)
        restored = salvage.restore(_settings(folder, salvage))
        shutil.rmtree(folder / "index", ignore_errors=True)
    return restored


def _damaged(database: str, reason: str) -> Finding:
    reason = " ".join(reason.split())
    return Finding("database", f"{database} is damaged ({reason}): hashret doctor --recover saves what can be read")


def _blobs(folder: Path, names: list[str]) -> Iterator[Finding]:
    """Contents that the collection should hold, and does not."""
    for name in names:
        try:
            with (folder / BLOBS / name).open("rb") as file:
                wrong = "" if hashlib.file_digest(file, "sha256").hexdigest() == name else "was changed"
        except OSError as error:
            wrong = f"cannot be read ({error.strerror})"
        if wrong:
            yield Finding("blobs", f"{BLOBS}{name} {wrong}: restore it; it can be found, but not coded by other models")


def _model(folder: Path, settings: dict[str, str]) -> Iterator[Finding]:
    """Whether the model that the codes are of is there and whole."""
    model = folder / "models" / settings["fingerprint"]
    try:
        if Hasher.load(model).fingerprint != settings["fingerprint"]:
            yield Finding("model", f"{model} holds another model: restore it")
    except HashretError as error:
        yield Finding("model", str(error))


def _index(folder: Path, settings: dict[str, str]) -> Iterator[Finding]:
    """Whether the cache, if there is one, is as it was written."""
    record = json.loads(settings.get("cache", "null"))
    if record is not None:
        file = folder / "index" / Path(record["name"]).name
        if file.is_file():  # if not, it will be made again
            try:
                index_class(record["index"]).load(file)
            except (HashretError, OSError) as error:
                yield Finding("index", f"{error}; nothing is lost: --recover does that")


def _settings(folder: Path, salvage: RecoveredRows) -> dict[str, str]:
    """The settings that were, and for those that are lost what follows from the rest."""
    settings = salvage.settings
    models = {model.name for model in (folder / "models").glob("*") if (model / "config.json").is_file()}
    if settings.get("fingerprint") not in models:
        coded = [fingerprint for fingerprint, _ in salvage.fingerprints.most_common() if fingerprint in models]
        if not coded:
            raise HashretError(f"no model of the codes is left in {folder / 'models'}: restore it from a backup")
        settings["fingerprint"] = coded[0]
    config = json.loads((folder / "models" / settings["fingerprint"] / "config.json").read_text("utf-8"))
    settings.pop("cache", None)
    generation = str(salvage.generation + 1)
    known = {"bits": str(config["bits"]), "generation": generation, "changes_after": generation}
    return {"index": "bitflip"} | settings | known
