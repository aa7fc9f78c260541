import json
import os
import shutil
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hashret.data.metadata import open_metadata
from hashret.data.sources import open_source
from hashret.results import BLOBS, Root

FOLDERS = ["plain", "x!", "a#b", "a#", "x!#", "x.zip!", "  x ", "line\nfeed", os.fsdecode(b"caf\xe9"), "Zoë 🦊"]


def photos(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "a.png")
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_a_root_leads_back_to_its_folder_with_any_name(tmp_path: Path, name: str) -> None:
    folder = photos(tmp_path / name)
    root = open_source(folder).root
    assert type(root) is Root and root == Root.of_folder(str(folder)) == f"{folder}/"
    assert root.is_folder and root.location == str(folder)
    again = open_source(root.location)
    assert again.root == root and [record.name for record in again] == ["a.png"]
    assert not root.within(str(folder)[:-1]) and not root.within(f"{folder}x")
    assert root.within(str(folder)) and root.within(f"{folder}/") and root.within(str(tmp_path)) and root.within("/")


@pytest.mark.parametrize("name", [name for name in FOLDERS if not name.endswith("!")])
def test_a_root_names_a_deleted_folder(tmp_path: Path, name: str) -> None:
    root = Root.of_folder(str(tmp_path / name))
    assert not root.is_folder and root.location == str(tmp_path / name)


def test_a_deleted_folder_named_like_an_archive_is_found(tmp_path: Path) -> None:
    root = open_source(photos(tmp_path / "a!")).root
    shutil.rmtree(tmp_path / "a!")
    assert root.within(str(tmp_path / "a!")) and root.within(str(tmp_path)) and not root.within(str(tmp_path / "b"))


def test_the_root_of_all_files_is_itself() -> None:
    for root in (open_source("/").root, Root("/"), Root.of_folder("//")):
        assert root == root.location == "/" and root.is_folder and root.within("/") and not root.within("/tmp")
    assert Root("/tmp/").within("/")


@pytest.mark.parametrize("name", [os.fsencode(f"{folder}.zip") for folder in FOLDERS] + [b"a.tar", b"!.tar"])
def test_a_root_leads_back_to_its_archive(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    file = photos(tmp_path / "photos") / "a.png"
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(file, "a.png")
    else:
        with tarfile.open(path, "w") as packed:
            packed.add(file, "a.png")
    root = open_source(path).root
    assert type(root) is Root and root == Root.of_archive(str(path)) == f"{path}!/"
    assert not root.is_folder and root.location == str(path)
    assert open_source(root.location).root == root
    assert root.within(str(path)) and root.within(str(tmp_path)) and not root.within(f"{path}!")
    assert not root.within(str(path)[:-1])


@pytest.mark.parametrize("name", ["a.npy", "a#.npy", "b#", "x!", os.fsdecode(b"caf\xe9.npy")])
def test_a_root_leads_back_to_its_file_of_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".npy":
        np.save(path, np.zeros((3, 8, 8), np.uint8))
    else:
        path.write_bytes(b"\0\0\x08\x03" + b"".join(size.to_bytes(4) for size in (3, 8, 8)) + bytes(3 * 64))
    root = open_source(path).root
    assert type(root) is Root and root == Root.of_rows(str(path)) == f"{path}#"
    assert not root.is_folder and root.location == str(path)
    assert open_source(root.location).root == root
    assert root.within(str(path)) and root.within(str(tmp_path)) and not root.within(f"{path}#")


@pytest.mark.parametrize("name", ["digits", "digits:test"])
def test_a_root_leads_back_to_its_data_set(name: str) -> None:
    root = open_source(name).root
    assert type(root) is Root and root == f"{name}#" and root.location == name and not root.is_folder
    assert root.within(name) and not root.within("digit") and not root.within("/")
    assert open_source(np.zeros((2, 8, 8), np.uint8)).root.location == "array"


def test_a_folder_is_not_taken_for_the_archive_of_its_name(tmp_path: Path) -> None:
    root = open_source(photos(tmp_path / "a!")).root
    assert not root.within(str(tmp_path / "a")) and root.within(str(tmp_path / "a!"))
    (tmp_path / "a!/metadata.csv").write_text("path,x\na.png,1\n")
    (tmp_path / "a.metadata.csv").write_text("path,x\na.png,2\n")
    assert list(open_metadata(None, root)) == [("a.png", {"x": 1})]


def test_a_root_is_stored_as_its_text(tmp_path: Path) -> None:
    root = Root.of_folder("/photos")
    assert json.dumps({"root": root}) == '{"root": "/photos/"}' and f"{root}a.png" == root + "a.png" == "/photos/a.png"
    (stored,) = sqlite3.connect(":memory:").execute("SELECT ?", (root,)).fetchone()
    assert type(stored) is str and stored == root and hash(stored) == hash(root)
    assert BLOBS == "blobs/" and BLOBS.location == "blobs"
