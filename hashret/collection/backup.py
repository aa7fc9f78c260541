"""Copy a collection that may be in use: its database, its model, and the contents that it stores itself."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hashret.collection.originals import reported_errors
from hashret.durable import Replacement, make_folder_durably, sync
from hashret.errors import HashretError
from hashret.parallel import Progress
from hashret.results import BLOBS, Backup
from hashret.stores.sqlite import DATABASE, SqliteStore

MAX_ATTEMPTS = 10


def back_up(folder: Path, to: Path, progress: Callable[[Progress], None] | None = None) -> Backup:
    """Copy the collection in `folder` to the new folder `to`; see `Collection.backup`."""
    if os.path.lexists(to):
        raise HashretError(f"{to} exists: choose another folder for the backup")
    if to.is_relative_to(folder):
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
        missing_before, missing = missing, []
        for done, name in enumerate(files, 1):
            if not _copy_file(folder / name, to / name):
                missing.append(name)
            if progress is not None:
                progress(Progress("copying", done, len(files), {}))
        if not missing or missing == missing_before:
            for file in to.glob(f"{BLOBS}*"):
                if f"{BLOBS}{file.name}" not in files:  # removed between two copies of the database
                    file.unlink()
            return Backup(items, len(files) - len(missing), missing)
    raise HashretError(f"contents of {folder} were removed during {MAX_ATTEMPTS} copies: back it up again")


def _contents(folder: Path) -> tuple[int, dict[str, None]]:
    """Return the number of items of a copied database, and the files that it refers to: its model and contents."""
    store = SqliteStore(folder, read_only=True)
    try:
        with store.snapshot() as snapshot:
            model = f"models/{snapshot.settings.model.fingerprint}"
            names = [model, *(f"{BLOBS}{name}" for name in snapshot.names(BLOBS))]
            return snapshot.count("items"), dict.fromkeys(names)
    finally:
        store.close()


def _copy_file(source: Path, target: Path) -> bool:
    """Copy a file or a folder of files durably, unless that is done already; return whether it is there."""
    if target.exists():
        return True
    make_folder_durably(target.parent)
    try:
        if source.is_dir():
            shutil.copytree(source, target)
            for file in target.iterdir():
                sync(file)
        else:
            shutil.copyfile(source, target)
    except (FileNotFoundError, shutil.Error):
        shutil.rmtree(target, ignore_errors=True)
        return False
    sync(target)
    return True
