"""`IndexCache`: the index of a collection in memory, updated incrementally from the store, and its cache on disk.

A cache file is loaded only if the store's record names it, and its size, mtime and inode, or else its checksum, match
that record. Deleting cache files loses nothing but the time to rebuild the index.
"""

import errno
import hashlib
import json
import re
import shutil
import stat
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from hashret.durable import delete_leftovers
from hashret.errors import HashretError, damaged, one_line
from hashret.indexes import CodeIndex, Searched, from_spec, index_class
from hashret.results import State
from hashret.stores.protocol import ItemStore, ModelKey, Settings, Snapshot

FEW_CHANGES = 1000  # the cache file is not rewritten for fewer


class IndexSnapshot(NamedTuple):
    """An index of one state of the store, with its specification and its model."""

    spec: str
    model: ModelKey
    state: State
    code_index: CodeIndex


class IndexCache:
    """The index of the items in `store`, with a cache in `folder`."""

    def __init__(self, folder: Path, store: ItemStore) -> None:
        self._folder = folder
        self._store = store
        self._lock = threading.RLock()
        self._current: IndexSnapshot | None = None

    @property
    def current(self) -> IndexSnapshot | None:
        """The index in memory."""
        return self._current

    def index_for(self, snapshot: Snapshot, before: IndexSnapshot | None) -> IndexSnapshot | None:
        """Return the index for a snapshot of the store: in memory, loaded, updated or built.

        `before` is what `current` was before the snapshot began. Return None if the index has moved on to a state that
        may be later. A later call updates the same index in place, so results of a search are valid only if `current`
        is still the same afterwards.
        """
        settings = snapshot.settings
        with self._lock:
            current = self._current
            if current is None or (current.spec, current.model) != (settings.index, settings.model):
                current = before = self._load(settings)
            if current is not None and current.state != snapshot.state:
                # An index that is ahead of a snapshot that began after it: the store went back to a backup.
                if current.state.generation >= settings.generation and current is not before:
                    return None
                self._current = None  # results of searches during the update are invalid
                current = _updated(current, snapshot)
            self._current = current = current or self._build(snapshot, settings.index, settings.model)
            return current

    @property
    def searched(self) -> Searched:
        """The counts of queries and probes since the index was loaded or built."""
        current = self._current
        return Searched(0, 0) if current is None else current.code_index.searched

    def clear(self) -> None:
        """Discard the index in memory, and delete the cache files."""
        with self._lock:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._current = None

    def _load(self, settings: Settings) -> IndexSnapshot | None:
        record = _read_record(settings)
        if record is None:
            return None
        file = self._folder / record.name
        try:
            status = _status(file)
            if status != record.status and (status[0] != record.status[0] or _checksum(file) != record.sha256):
                return None
            index = index_class(settings.index).load(file, verify=False)
        except (OSError, HashretError, RuntimeError):  # RuntimeError: FAISS, of a corrupted file
            return None
        if index.bits != settings.model.bits:
            return None
        return IndexSnapshot(settings.index, settings.model, State(record.generation, record.state), index)

    def persist(self) -> None:
        """Write the cache file if it is missing, was altered, or is far behind the store.

        Must be called within `ItemStore.exclusive`.
        """
        before = self._current
        with self._store.snapshot() as snapshot:
            settings = snapshot.settings
            record = _read_record(settings)
            cached_generation = -1 if record is None else record.generation
            if record is not None and not _is_far_behind(snapshot, cached_generation):
                with suppress(OSError):
                    if _status(self._folder / record.name) == record.status:
                        self._delete_all_but(record.name)
                        return
            current = self.index_for(snapshot, before)
        if current is None:  # a reader that saw the store before it went back to a backup has replaced the index
            return
        record_json = self._save(current).to_json()
        with self._store.transaction(advance=False) as transaction:
            transaction.put_setting("cache", record_json)
            # Changes since the previous cache file are kept: other processes may still have to catch up from there.
            transaction.forget_changes(max(cached_generation, int(settings["changes_after"])))
        self._delete_all_but(json.loads(record_json)["name"])

    def build_ahead(self, snapshot: Snapshot, spec: str, model: ModelKey, generation: int) -> "CacheRecord | None":
        """Write the cache file of an index that a later commit switches to, so that no reader has to build it then.

        Return the record for the setting "cache", to be completed by the state of that commit, or None if the file
        cannot be written. Must be called within `ItemStore.exclusive`; `persist` deletes superseded files after the
        commit.
        """
        built = self._build(snapshot, spec, model)
        try:
            return self._save(built._replace(state=State(generation, "")))
        except HashretError:
            return None

    def _build(self, snapshot: Snapshot, spec: str, model: ModelKey) -> IndexSnapshot:
        ids, codes = snapshot.codes(model=model)
        index = from_spec(model.bits, spec)
        try:
            index.add(codes, ids)
        except ValueError as error:  # a duplicate id
            raise damaged(self._store.location, one_line(error)) from error
        return IndexSnapshot(spec, model, snapshot.state, index)

    def _save(self, current: IndexSnapshot) -> "CacheRecord":
        """Write a cache file; return its record."""
        suffix = re.sub("[^a-zA-Z0-9]", "-", current.spec)
        file = self._folder / f"{current.model.fingerprint[:16]}-{current.state.generation:012d}.{suffix}"
        try:
            self._folder.mkdir(exist_ok=True)
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)  # a file cannot replace a folder
            elif file.is_symlink() or not file.is_file():
                file.unlink(missing_ok=True)  # what it leads to would be written to
            current.code_index.save(file)
        except OSError as error:
            raise HashretError(
                f"{self._folder} cannot be written ({error.strerror}): everything is stored, but searches will start "
                f"slowly until a command can write there"
            ) from error
        return CacheRecord(
            name=file.name,
            fingerprint=current.model.fingerprint,
            generation=current.state.generation,
            state=current.state.id,
            index=current.spec,
            status=_status(file),
            sha256=_checksum(file),
        )

    def _delete_all_but(self, name: str) -> None:
        delete_leftovers(self._folder)
        for file in self._folder.iterdir():
            # The folder may be a symbolic link, so delete only what looks like a cache file.
            if file.name != name and _CACHE_NAME.fullmatch(file.name):
                with suppress(OSError):  # a file that stays only takes space
                    file.unlink()


def _is_far_behind(snapshot: Snapshot, generation: int) -> bool:
    """Return whether so much has changed since a generation that its cache file should be rewritten."""
    changes = snapshot.count("changes", after=generation)
    return changes > FEW_CHANGES and changes > snapshot.count("items") // 20


def _updated(current: IndexSnapshot, snapshot: Snapshot) -> IndexSnapshot | None:
    """Update an index in place to the state of a snapshot; return None if it must be rebuilt instead."""
    if not len(current.code_index):
        return None  # building from all codes is faster than replaying all changes
    changes = snapshot.changes(current.state)
    if changes is None:
        return None
    try:
        current.code_index.remove(changes.removed)
        current.code_index.add(changes.codes, changes.added)
    except ValueError:  # the changes do not fit the index: one of them is damaged, and the codes are the truth
        return None
    return current._replace(state=snapshot.state)


_CACHE_NAME = re.compile(r"[0-9a-f]{16}-[0-9]{12,}\.[a-zA-Z0-9-]+")


@dataclass(frozen=True)
class CacheRecord:
    """The store's record of the cache file, under the setting "cache"."""

    name: str
    fingerprint: str
    generation: int
    state: str
    index: str
    status: list[int]
    sha256: str

    def to_json(self, state: State | None = None) -> str:
        """Return the record as JSON, with `state` in place of its own if it is given."""
        own = self if state is None else replace(self, generation=state.generation, state=state.id)
        return json.dumps(asdict(own))


def _read_record(settings: Settings) -> CacheRecord | None:
    """Return the record of the cache file if it is valid, and of the current model and index."""
    try:
        record = CacheRecord(**json.loads(settings.get("cache", "null")))
        is_valid = _CACHE_NAME.fullmatch(record.name) and 0 <= record.generation <= settings.generation
        is_current = (record.fingerprint, record.index) == (settings.model.fingerprint, settings.index)
        return record if is_valid and is_current and len(record.status) == 3 else None
    except (TypeError, ValueError):
        return None


def _status(file: Path) -> list[int]:
    """Return size, mtime and inode; raise OSError if it is no regular file: opening a pipe could block for ever."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
