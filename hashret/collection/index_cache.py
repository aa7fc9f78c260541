"""The collection's index in memory, kept in step with the store, and its cache on disk.

A cache is trusted only while the store names it, and its file has the size, time and inode, or else the checksum, that
are recorded there. Deleting caches loses nothing but the time to build the index again.
"""

import errno
import hashlib
import json
import re
import shutil
import stat
import threading
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from hashret.errors import HashretError, damaged, one_line
from hashret.indexes import CodeIndex, Searched, from_spec, index_class
from hashret.stores.protocol import ItemStore, ModelKey, Settings, Snapshot

FEW_CHANGES = 1000  # since a cache was written, after which it is not written anew


class IndexSnapshot(NamedTuple):
    """An index by some specification, and of which model and state of the store it is."""

    spec: str
    model: ModelKey
    generation: int
    state: Hashable | None  # None for one that was loaded, until it is known that the store has gone on from there
    codes: CodeIndex


class IndexCache:
    """The index of the items in `store`, cached in `folder`."""

    def __init__(self, folder: Path, store: ItemStore) -> None:
        self._folder = folder
        self._store = store
        self._lock = threading.RLock()
        self._shown: IndexSnapshot | None = None

    def at(self, rows: Snapshot) -> IndexSnapshot | None:
        """The index as of a snapshot, loaded, brought up to date or built; None if it is past that already.

        An answer of it counts only if `is_current` says so afterwards.
        """
        with self._lock:
            shown = self._shown
            if shown is None or (shown.spec, shown.model) != (rows.settings.index, rows.settings.model):
                shown = self._load(rows.settings)
            if shown is not None and shown.state != rows.state:
                if shown.generation > rows.settings.generation:
                    return None
                self._shown = None  # while it moves on, no answer of it counts
                shown = _moved_on(shown, rows)
            self._shown = shown = shown or self._build(rows, rows.settings.index, rows.settings.model)
            return shown

    @property
    def searched(self) -> Searched:
        """What the index has been asked since it was loaded or built."""
        shown = self._shown
        return Searched(0, 0) if shown is None else shown.codes.searched

    def is_current(self, shown: IndexSnapshot) -> bool:
        """Whether the index is still as it was: if not, a search of it may have seen a later state."""
        return self._shown is shown

    def forget(self) -> None:
        """Let go of what is in memory, and delete what is on disk."""
        with self._lock:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._shown = None

    def _load(self, settings: Settings) -> IndexSnapshot | None:
        record = _record(settings)
        if record is None:
            return None
        file = self._folder / record.name
        try:
            status = _status(file)
            if status != record.status and (status[0] != record.status[0] or _checksum(file) != record.sha256):
                return None
            codes = index_class(settings.index).load(file, verify=False)
        except (OSError, HashretError, RuntimeError):  # RuntimeError: FAISS, of a file that decayed where it lies
            return None
        if codes.bits != settings.model.bits:
            return None
        return IndexSnapshot(settings.index, settings.model, record.generation, None, codes)

    def persist(self) -> None:
        """Write the cache, if there is none, or not the one that was written, or if it is far behind.

        To be called within `ItemStore.exclusive`.
        """
        with self._store.snapshot() as rows:
            settings = rows.settings
            record = _record(settings)
            reached = -1 if record is None else record.generation
            if record is not None and not _far_behind(rows, reached):
                with suppress(OSError):
                    if _status(self._folder / record.name) == record.status:
                        self._discard_all_but(record.name)
                        return
            shown = self.at(rows)
        assert shown is not None  # nobody else can have written
        text = self._save(shown)
        with self._store.transaction(advance=False) as transaction:
            transaction.put_setting("cache", text)
            # Other processes, which are at the last cache or later, can follow from there.
            transaction.forget_changes(max(reached, int(settings["changes_after"])))
        self._discard_all_but(json.loads(text)["name"])

    def build_ahead(self, rows: Snapshot, spec: str, model: ModelKey, generation: int) -> str | None:
        """Write the cache of an index that is to be used from a commit on; what that commit has to put under "cache",
        so that nobody has to build the index after it. None if it cannot be written.

        To be called within `ItemStore.exclusive`; `persist` clears up after the commit, or instead of it.
        """
        built = self._build(rows, spec, model)
        try:
            return self._save(built._replace(generation=generation))
        except HashretError:
            return None

    def _build(self, rows: Snapshot, spec: str, model: ModelKey) -> IndexSnapshot:
        ids, codes = rows.codes(model=model)
        index = from_spec(model.bits, spec)
        try:
            index.add(codes, ids)
        except ValueError as error:  # an id that comes twice
            raise damaged(self._store.location, one_line(error)) from error
        return IndexSnapshot(spec, model, rows.settings.generation, rows.state, index)

    def _save(self, shown: IndexSnapshot) -> str:
        """Write a cache; its record, as JSON."""
        suffix = re.sub("[^a-zA-Z0-9]", "-", shown.spec)
        file = self._folder / f"{shown.model.fingerprint[:16]}-{shown.generation:012d}.{suffix}"
        try:
            self._folder.mkdir(exist_ok=True)
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)  # a file cannot take its place
            shown.codes.save(file)
        except OSError as error:
            raise HashretError(
                f"{self._folder} cannot be written ({error.strerror}): everything is stored, but searches will start "
                f"slowly until a command can write there"
            ) from error
        record = _Record(
            name=file.name,
            fingerprint=shown.model.fingerprint,
            generation=shown.generation,
            index=shown.spec,
            status=_status(file),
            sha256=_checksum(file),
        )
        return json.dumps(asdict(record))

    def _discard_all_but(self, name: str) -> None:
        for old in self._folder.iterdir():
            if old.name != name and _CACHE.fullmatch(old.name):  # the folder may be a link to who knows where
                with suppress(OSError):  # what stays costs only its place
                    old.unlink()


def _far_behind(rows: Snapshot, generation: int) -> bool:
    """Whether so much has changed since a generation that its cache is better written anew."""
    changes = rows.count("changes", after=generation)
    return changes > FEW_CHANGES and changes > rows.count("items") // 20


def _moved_on(shown: IndexSnapshot, rows: Snapshot) -> IndexSnapshot | None:
    """An index brought to the state of a snapshot; None if it has to be built instead."""
    if shown.generation == rows.settings.generation:  # of another state, the changes are not known
        return shown._replace(state=rows.state) if shown.state is None else None
    if not len(shown.codes):
        return None  # all codes in order are read faster than all changes
    changes = rows.changes(shown.generation)
    if changes is None:
        return None
    try:
        shown.codes.remove(changes.removed)
        shown.codes.add(changes.codes, changes.added)
    except ValueError:  # they do not lead on from there, and whatever is damaged, the codes say more
        return None
    return shown._replace(generation=rows.settings.generation, state=rows.state)


# A cache, or what was written of one when the power went.
_CACHE = re.compile(r"\.?[0-9a-f]{16}-[0-9]{12,}\.[a-zA-Z0-9-]+(\.[0-9a-f]{16})?")


@dataclass(frozen=True)
class _Record:
    """What the store says of a cache."""

    name: str
    fingerprint: str
    generation: int
    index: str
    status: list[int]
    sha256: str


def _record(settings: Settings) -> _Record | None:
    """The record of the cache, if it makes sense and is of the current model and index."""
    try:
        record = _Record(**json.loads(settings.get("cache", "null")))
        possible = _CACHE.fullmatch(record.name) and 0 <= record.generation <= settings.generation
        fits = (record.fingerprint, record.index) == (settings.model.fingerprint, settings.index)
        return record if possible and fits and len(record.status) == 3 else None
    except (TypeError, ValueError):
        return None


def _status(file: Path) -> list[int]:
    """Size, mtime and inode; OSError if it is no file, such as a pipe, which nobody may be waiting at."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
