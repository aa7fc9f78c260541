"""Check a collection for damage, and recover what is readable of a damaged one."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from hashret.collection.originals import ABSENT, Originals, reported_errors
from hashret.durable import delete_leftovers, is_locked, leftovers
from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.indexes import index_class
from hashret.results import BLOBS
from hashret.stores.protocol import ItemRow
from hashret.stores.sqlite import SqliteStore, locked
from hashret.stores.sqlite_repair import (
    RecoveredRows,
    RecoveryReport,
    check_database,
    finish_recovery,
    nothing_left,
    unfinished,
)

_DIGEST = re.compile("[0-9a-f]{64}")


class Finding(NamedTuple):
    """A fault in the "database", "items", "model", "blobs" or "index" of a collection, or a "leftover" of a killed
    process, with advice."""

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
        found = [*items, *_blobs(folder, report.blobs), *_model(folder, settings), *_index(folder, settings)]
        return found + [_leftover(folder, path) for path in _leftovers(folder, report.blobs)]
    except (LookupError, TypeError, ValueError) as error:  # invalid settings
        return [_damaged(report.database, str(error))]


def recover(folder: Path) -> RecoveryReport:
    """Replace a damaged database by a new one of its complete items: those with a readable row, path and code.

    The damaged database is kept beside it. Indexing the sources adds the lost items again. Raise HashretError if no
    item is readable, or no model of the codes is left.
    """
    with locked(folder):
        finish_recovery(folder)
        rows = RecoveredRows(folder)
        if not rows.items:
            raise nothing_left(folder)
        report = rows.restore(_settings(folder, rows))
        shutil.rmtree(folder / "index", ignore_errors=True)
    return report


def _damaged(database: str, reason: str) -> Finding:
    reason = " ".join(reason.split())
    return Finding("database", f"{database} is damaged ({reason}): hashret doctor --recover saves what can be read")


def restore_contents(folder: Path) -> tuple[int, int]:
    """Store missing and damaged contents again that can still be read at another path of their items.

    The other ones are recorded as absent, which is no fault any more, and damaged files are kept as `NAME.damaged`.
    Return the numbers of both.
    """
    originals = Originals(folder)
    with closing(SqliteStore(folder)) as store, store.exclusive(), reported_errors(folder):
        faults = [digest for digest, _ in _faulty(folder, check_database(folder).blobs) if _DIGEST.fullmatch(digest)]
        with store.snapshot() as snapshot:
            ids = snapshot.find(faults)
            items, data_root = snapshot.items(ids.values()), snapshot.settings.get("data_root")
            paths = [path for path in snapshot.paths(ids.values()) if path.root != BLOBS]
        for digest in ids:
            if (file := folder / BLOBS / digest).exists():
                file.replace(file.with_name(f"{digest}.damaged"))
        sizes = dict.fromkeys(ids, ABSENT)
        sizes |= (originals.store(content) for _, content in originals.read_all(paths, items, data_root))
        with store.transaction(advance=False) as transaction:
            transaction.put([ItemRow(BLOBS, d, None, size, 0, d, 0, 0, 0, None) for d, size in sizes.items()])
    absent = sum(size == ABSENT for size in sizes.values())
    return len(sizes) - absent, absent


def absent_contents(folder: Path) -> int:
    """Return the number of contents that are recorded as absent."""
    blobs = check_database(folder).blobs
    return sum(size == ABSENT and not (folder / BLOBS / name).exists() for name, size in blobs.items())


def clean(folder: Path) -> None:
    """Delete what killed processes left in the folder, and stored contents of no item."""
    with locked(folder):
        for part in _parts(folder):
            delete_leftovers(part)
        for path in (*unfinished(folder), *_orphans(folder, check_database(folder).blobs)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _parts(folder: Path) -> tuple[Path, ...]:
    return (folder, folder / "models", folder / "index", folder / BLOBS)


def _leftovers(folder: Path, blobs: Iterable[str]) -> Iterator[Path]:
    """Iterate over what killed processes left in the folder."""
    for part in _parts(folder):
        yield from leftovers(part)
    if not is_locked(folder / "lock"):  # by a process that is using these
        yield from unfinished(folder)
        yield from _orphans(folder, blobs)


def _orphans(folder: Path, blobs: Iterable[str]) -> Iterator[Path]:
    """Iterate over the stored contents of no item, whose removal or addition was interrupted."""
    known = set(blobs)
    for path in sorted((folder / BLOBS).glob("*")):
        if _DIGEST.fullmatch(path.name) and path.name not in known:
            yield path


def _leftover(folder: Path, path: Path) -> Finding:
    name = path.relative_to(folder)
    return Finding("leftover", f"{name} was left by a process that was killed: hashret doctor --recover deletes it")


def _blobs(folder: Path, sizes: dict[str, int]) -> Iterator[Finding]:
    """Check the contents that the collection stores itself."""
    for name, fault in _faulty(folder, sizes):
        advice = "restore it, or add --recover; it is still found, but other models cannot encode it"
        yield Finding("blobs", f"{BLOBS}{name} {fault}: {advice}")


def _faulty(folder: Path, sizes: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Iterate over the names of damaged and missing contents, each with its fault."""
    for name, size in sizes.items():
        try:
            with (folder / BLOBS / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != name:
                    yield name, "was changed"
        except OSError as error:
            if size != ABSENT or not isinstance(error, FileNotFoundError):
                yield name, f"cannot be read ({error.strerror})"


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
