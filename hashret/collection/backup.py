"""Copy a collection that may be in use: its database, its model, and the contents that it stores itself."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hashret.collection.originals import ABSENT, reported_errors
from hashret.durable import Replacement, make_folder_durably
from hashret.errors import HashretError
from hashret.parallel import Progress
from hashret.results import BLOBS, Backup
from hashret.stores.sqlite import DATABASE, SqliteStore

MAX_ATTEMPTS = 10


def back_up(folder: Path, to: Path, progress: Callable[[Progress], None] | None = None) -> Backup:
    """Copy the collection in `folder` to the new folder `to`; see `Collection.backup`."""
    if os.path.lexists(to):
        raise HashretError(f"{to} exists: choose another folder for the backup")
    to = Path(os.path.realpath(to))
    if to.is_relative_to(os.path.realpath(folder)):
        raise HashretError(f"{to} is in the folder of the collection: choose another folder for the backup")
    with reported_errors(to.parent):
        make_folder_durably(to.parent)
        with Replacement(to, folder=True) as new:
            backup = _copy(folder, new.path, progress)
            new.commit()
    return backup


def _copy(folder: Path, to: Path, progress: Callable[[Progress], None] | None) -> Backup:
    """Copy the database, and then the files that the copy refers to.

    A file that is gone by then was removed by a later commit, so the database is copied again. A file that the second
    copy refers to as well was lost before.
    """
    missing = list[str]()
    for _ in range(MAX_ATTEMPTS):
        store = SqliteStore(folder, read_only=True)
        try:
            store.copy_to(to / DATABASE)
        finally:
            store.close()
        items, files = _contents(to)
        missing_before, missing, copied = missing, [], 0
        for done, (name, size) in enumerate(files.items(), 1):
            if _copy_file(folder / name, to / name):
                copied += 1
            elif size != ABSENT:
                missing.append(name)
            if progress is not None:
                progress(Progress("copying", done, len(files), {}))
        if not missing or missing == missing_before:
            for file in to.glob(f"{BLOBS}*"):
                if f"{BLOBS}{file.name}" not in files:  # removed between two copies of the database
                    file.unlink()
            return Backup(items, copied, missing)
    raise HashretError(f"contents of {folder} were removed during {MAX_ATTEMPTS} copies: back it up again")


def _contents(folder: Path) -> tuple[int, dict[str, int | None]]:
    """Return the number of items of a copied database, and the files that it refers to: its model and contents.

    Each content has its size, or `ABSENT`.
    """
    store = SqliteStore(folder, read_only=True)
    try:
        with store.snapshot() as snapshot:
            files: dict[str, int | None] = {f"models/{snapshot.settings.model.fingerprint}": None}
            contents = snapshot.known_paths(BLOBS, list(snapshot.names(BLOBS)))
            return snapshot.count("items"), files | {f"{BLOBS}{name}": path.size for name, path in contents.items()}
    finally:
        store.close()


def _copy_file(source: Path, target: Path) -> bool:
    """Copy a file or a folder of files, unless that is done already; return whether it is there."""
    if target.exists():
        return True
    target.parent.mkdir(exist_ok=True)
    try:
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    except (FileNotFoundError, shutil.Error):
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True
