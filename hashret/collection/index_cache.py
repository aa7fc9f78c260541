"""The collection's index in memory, kept in step with the database, and its cache on disk.

A cache is trusted only while the database names it, and its file has the size, time and inode, or else the checksum,
that are recorded there. Deleting caches loses nothing but the time to build the index again.
"""

import errno
import hashlib
import json
import re
import shutil
import stat
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from hashret.collection.ingest import BATCH_ITEMS
from hashret.errors import HashretError, one_line
from hashret.indexes import INDEXES, CodeIndex, Searched, from_spec
from hashret.stores.sqlite import Store, damaged


class Live(NamedTuple):
    """An index of some kind, and which model and generation of the database it shows."""

    kind: str
    fingerprint: str
    generation: int
    codes: CodeIndex


class LiveIndex:
    """The index of the database `store`, cached in `folder`."""

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder = folder
        self._store = store
        self._lock = threading.RLock()
        self._live: Live | None = None

    def at(self, settings: dict[str, str]) -> Live | None:
        """The index as of these settings, loaded, brought up to date or built; None if it is past them already.

        To be called within the `store.read` that gave the settings. An answer counts only if `holds` says so after it.
        """
        kind, fingerprint, bits = settings["index"], settings["fingerprint"], int(settings["bits"])
        generation = int(settings["generation"])
        with self._lock:
            live = self._live
            if live is None or (live.kind, live.fingerprint) != (kind, fingerprint):
                live = self._load(settings)
            if live is not None and live.generation < generation and not len(live.codes):
                live = None  # all codes in order are read faster than all changes
            if live is not None and live.generation < generation:
                self._live = None  # while it moves on, no answer of it counts
                changes = self._store.changes(live.generation, fingerprint, bits)
                try:
                    if changes is not None:
                        live.codes.remove(changes.removed)
                        live.codes.add(changes.codes, changes.added)
                except ValueError:  # they do not lead on from there, and whatever is damaged, the codes say more
                    changes = None
                live = None if changes is None else Live(kind, fingerprint, generation, live.codes)
            if live is None:
                live = self._build(kind, fingerprint, bits, generation)
            self._live = live
            return live if live.generation == generation else None

    @property
    def searched(self) -> Searched:
        """What the index has been asked since it was loaded or built."""
        live = self._live
        return Searched(0, 0) if live is None else live.codes.searched

    def holds(self, live: Live) -> bool:
        """Whether the index still shows the generation it did: if not, a search of it may have seen a later one."""
        return self._live is live

    def forget(self) -> None:
        """Let go of what is in memory."""
        with self._lock:
            self._live = None

    def _load(self, settings: dict[str, str]) -> Live | None:
        told = _told(settings)
        if told is None:
            return None
        file = self._folder / told.name
        try:
            status = _status(file)
            if status != told.status and (status[0] != told.status[0] or _checksum(file) != told.sha256):
                return None
            codes = INDEXES[settings["index"].partition(":")[0]].load(file, verify=False)
        except (OSError, HashretError, RuntimeError):  # RuntimeError: FAISS, of a file that decayed where it lies
            return None
        if codes.bits != int(settings["bits"]):
            return None
        return Live(settings["index"], told.fingerprint, told.generation, codes)

    def keep(self) -> None:
        """Write the cache, if there is none, or not the one that was written, or if it is far behind.

        To be called by whoever holds the write lock.
        """
        with self._store.read() as settings:
            told = _told(settings)
            reached = -1 if told is None else told.generation
            behind = self._store.count(f"changes WHERE generation > {reached}")
            near = behind <= BATCH_ITEMS or behind <= self._store.count("items") // 20
            with suppress(OSError):
                if told is not None and near and _status(self._folder / told.name) == told.status:
                    self._discard_all_but(told.name)
                    return
            live = self.at(settings)
        assert live is not None  # nobody else can have written
        record = self._save(live)
        with self._store.write(step=0):
            self._store.put_setting("cache", record)
            # Other processes, which are at the last cache or later, can follow from there.
            self._store.forget_changes(max(reached, int(settings["changes_after"])))
        self._discard_all_but(json.loads(record)["name"])

    def prepare(self, kind: str, fingerprint: str, bits: int, generation: int) -> str | None:
        """Write the cache of an index that is to be used from a commit on; what that commit has to put under "cache",
        so that nobody has to build the index after it. None if it cannot be written.

        To be called by whoever holds the write lock; `keep` clears up after the commit, or instead of it.
        """
        live = self._build(kind, fingerprint, bits, generation)
        try:
            return self._save(live)
        except HashretError:
            return None

    def _build(self, kind: str, fingerprint: str, bits: int, generation: int) -> Live:
        ids, codes = self._store.codes(fingerprint, bits)
        live = Live(kind, fingerprint, generation, make_index(kind, bits))
        try:
            live.codes.add(codes, ids)
        except ValueError as error:  # an id that comes twice
            raise damaged(self._store.path, one_line(error)) from error
        return live

    def _save(self, live: Live) -> str:
        """Write a cache; its record, as JSON."""
        kind = re.sub("[^a-zA-Z0-9]", "-", live.kind)
        file = self._folder / f"{live.fingerprint[:16]}-{live.generation:012d}.{kind}"
        try:
            self._folder.mkdir(exist_ok=True)
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)  # a file cannot take its place
            live.codes.save(file)
        except OSError as error:
            raise HashretError(
                f"{self._folder} cannot be written ({error.strerror}): everything is stored, but searches will start "
                f"slowly until a command can write there"
            ) from error
        record = _Record(
            name=file.name,
            fingerprint=live.fingerprint,
            generation=live.generation,
            index=live.kind,
            status=_status(file),
            sha256=_checksum(file),
        )
        return json.dumps(asdict(record))

    def _discard_all_but(self, name: str) -> None:
        for old in self._folder.iterdir():
            if old.name != name and _CACHE.fullmatch(old.name):  # the folder may be a link to who knows where
                with suppress(OSError):  # what stays costs only its place
                    old.unlink()


def make_index(kind: str, bits: int) -> CodeIndex:
    """An empty index: "bitflip", "faiss" or "faiss:FACTORY"; raises ValueError if there is none such."""
    return from_spec(bits, kind)


# A cache, or what was written of one when the power went.
_CACHE = re.compile(r"\.?[0-9a-f]{16}-[0-9]{12,}\.[a-zA-Z0-9-]+(\.[0-9a-f]{16})?")


@dataclass(frozen=True)
class _Record:
    """What the database says of a cache."""

    name: str
    fingerprint: str
    generation: int
    index: str
    status: list[int]
    sha256: str


def _told(settings: dict[str, str]) -> _Record | None:
    """The record of the cache, if it makes sense and is of the current model and kind of index."""
    try:
        told = _Record(**json.loads(settings.get("cache", "null")))
        possible = _CACHE.fullmatch(told.name) and 0 <= told.generation <= int(settings["generation"])
        fits = (told.fingerprint, told.index) == (settings["fingerprint"], settings["index"])
        return told if possible and fits and len(told.status) == 3 else None
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
