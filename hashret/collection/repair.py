"""Check a collection for damage, and recover what is readable of a damaged one."""

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
    """A fault in the "database", "items", "model", "blobs" or "index" of a collection, with advice."""

    part: str
    text: str


def check(folder: Path) -> list[Finding]:
    """Return all faults of the collection in `folder`, after reading every row, stored content and model.

    Raise HashretError if there is no collection.
    """
    report = check_database(folder)
    try:
        if report.damage:
            return [_damaged(report.database, text) for text in report.damage]
        items = [Finding("items", f"{text}: hashret doctor --recover drops them") for text in report.inconsistencies]
        settings = report.settings
        return [*items, *_blobs(folder, report.blobs), *_model(folder, settings), *_index(folder, settings)]
    except (LookupError, TypeError, ValueError) as error:  # invalid settings
        return [_damaged(report.database, str(error))]


def recover(folder: Path) -> RecoveryReport:
    """Replace a damaged database by a new one of its complete items: those with a readable row, path and code.

    The damaged database is kept beside it. Indexing the sources adds the lost items again. Raise HashretError if no
    item is readable, or no model of the codes is left.
    """
    with locked(folder):
        rows = RecoveredRows(folder)
        if not rows.items:
            raise nothing_left(folder)
        report = rows.restore(_settings(folder, rows))
        shutil.rmtree(folder / "index", ignore_errors=True)
    return report


def _damaged(database: str, reason: str) -> Finding:
    reason = " ".join(reason.split())
    return Finding("database", f"{database} is damaged ({reason}): hashret doctor --recover saves what can be read")


def _blobs(folder: Path, names: list[str]) -> Iterator[Finding]:
    """Check the contents that the collection stores itself."""
    for name in names:
        try:
            with (folder / BLOBS / name).open("rb") as file:
                fault = "" if hashlib.file_digest(file, "sha256").hexdigest() == name else "was changed"
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault:
            yield Finding(
                "blobs", f"{BLOBS}{name} {fault}: restore it; it is still found, but other models cannot encode it"
            )


def _model(folder: Path, settings: dict[str, str]) -> Iterator[Finding]:
    """Check the model of the codes."""
    model = folder / "models" / settings["fingerprint"]
    try:
        if Hasher.load(model).fingerprint != settings["fingerprint"]:
            yield Finding("model", f"{model} holds another model: restore it")
    except HashretError as error:
        yield Finding("model", str(error))


def _index(folder: Path, settings: dict[str, str]) -> Iterator[Finding]:
    """Check the index cache, if there is one, against its checksum."""
    record = json.loads(settings.get("cache", "null"))
    if record is not None:
        file = folder / "index" / Path(record["name"]).name
        if file.is_file():  # a missing cache is rebuilt
            try:
                index_class(record["index"]).load(file)
            except (HashretError, OSError) as error:
                yield Finding("index", f"{error}; nothing is lost: --recover does that")


def _settings(folder: Path, rows: RecoveredRows) -> dict[str, str]:
    """Return the recovered settings, with lost ones inferred from the models and the other rows."""
    settings = rows.settings
    models = {model.name for model in (folder / "models").glob("*") if (model / "config.json").is_file()}
    if settings.get("fingerprint") not in models:
        candidates = [fingerprint for fingerprint, _ in rows.fingerprints.most_common() if fingerprint in models]
        if not candidates:
            raise HashretError(f"no model of the codes is left in {folder / 'models'}: restore it from a backup")
        settings["fingerprint"] = candidates[0]
    config = json.loads((folder / "models" / settings["fingerprint"] / "config.json").read_text("utf-8"))
    settings.pop("cache", None)
    generation = str(rows.generation + 1)
    inferred = {"bits": str(config["bits"]), "generation": generation, "changes_after": generation}
    return {"index": "bitflip"} | settings | inferred
