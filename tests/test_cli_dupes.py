import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from command_line import MAIN, PHOTOS, Command, files_in, photos
from PIL import Image

from hashret.collection import Collection

ODD_NAMES = ["-rf.png", "a\nrm -- kept.png", 'it\'s $(touch pwned) `x` "q".png', "🐈.png", "~.png"]


@pytest.fixture
def copies(folder: Path, hashret: Command) -> Path:
    """Return an indexed folder of equal files with odd names, and of a file with other contents but the same code."""
    copies = folder / "copies"
    copies.mkdir()
    for name in ODD_NAMES:
        (copies / name).write_bytes(photos()["0/00.png"])
    Image.open(folder / "photos/0/00.png").save(copies / "other.bmp")
    assert hashret("index", "copies", "-q").code == 0
    return copies


def test_dupes_are_printed_in_groups(folder: Path, hashret: Command, copies: Path) -> None:
    equal = sorted(f"{folder}/{name}" for name in ("photos/0/00.png", *(f"copies/{name}" for name in ODD_NAMES)))
    result = hashret("dupes", "-r", 0, "--keep", "photos")
    kept = f"{folder}/photos/0/00.png"
    equal.remove(kept)
    paths = [kept, *equal, f"{copies}/other.bmp"]
    assert result.code == 0 and result.out == "".join(f"   0  {path}\n" for path in paths)
    assert result.err == "1 group of 7 images within 0 bits: 6 can be removed\n"
    document = json.loads(hashret("dupes", "-r", 0, "--keep", "photos", "--by", "star", "--json").out)
    assert document.keys() == {"radius", "by", "keep", "groups"} and document["by"] == "star"
    first, second = document["groups"][0]
    assert first["paths"] == paths[:-1] and second["paths"] == paths[-1:] and first["distance"] == 0
    stars = hashret("dupes", "-r", 12, "--by", "star", "-q")
    assert stars.err == "" and "\n\n   0  " in stars.out and stars.out.endswith(".png\n")


def test_the_script_removes_all_but_the_kept_images(folder: Path, hashret: Command, copies: Path) -> None:
    names = [*ODD_NAMES, os.fsdecode(b"\xff.png")]
    (copies / names[-1]).write_bytes(photos()["0/00.png"])
    assert hashret("index", "copies", "-q").code == 0
    before = files_in(folder)
    script = subprocess.run([*MAIN, "dupes", "-r", "0", "--keep", "photos", "--script"], capture_output=True).stdout
    assert files_in(folder) == before and script.startswith(b"#!/bin/sh\n")
    assert os.fsencode(f'\n# keep "{folder}/photos/0/00.png"\n') in script
    subprocess.run(["sh", "-eu"], input=script, check=True, cwd=copies)
    assert before.keys() - files_in(folder).keys() == {f"copies/{name}" for name in (*names, "other.bmp")}
    again = subprocess.run([*MAIN, "dupes", "-r", "0", "--script"], capture_output=True).stdout
    assert b"\nrm " not in again  # the last copy stays, though it is not the image to keep


def test_the_script_leaves_images_beyond_the_radius(folder: Path, hashret: Command) -> None:
    with Collection.open(folder / ".hashret") as collection:
        groups = collection.dupes(12)
    lines = hashret("dupes", "-r", 12, "--script").out.splitlines()
    removed = {line.removeprefix("rm -- ") for line in lines if line.startswith("rm -- ")}
    others = [(group.items[i].paths[0], d) for group in groups for i, d in enumerate(group.distances) if i]
    far = {path for path, distance in others if distance > 12}
    assert far and removed == {path for path, distance in others if distance <= 12}
    assert all(any(line.startswith("# ") and path in line for line in lines) for path in far)
    assert [line for line in lines if line.startswith("# keep ")] == [f'# keep "{g.items[0].paths[0]}"' for g in groups]


def script(hashret: Command, *options: object) -> tuple[list[str], str]:
    """Return the paths that the script removes, and the whole script."""
    text = hashret("dupes", "-r", 0, "--script", *options).out
    return [line.removeprefix("rm -- ") for line in text.splitlines() if line.startswith("rm ")], text


def test_the_script_never_removes_the_last_copy(folder: Path, hashret: Command, tmp_path: Path) -> None:
    kept, other = folder / "photos/0/00.png", folder / "copies/00.png"
    other.parent.mkdir()
    other.symlink_to(kept)
    assert hashret("index", "copies", "-q").code == 0
    for keep in ("copies", "photos"):
        removed, text = script(hashret, "--keep", keep)
        assert removed == [] and "# the same file: " in text
    other.unlink()
    shutil.copy(kept, other)
    assert script(hashret, "--keep", "photos")[0] == [str(other)]
    kept.unlink()
    removed, text = script(hashret, "--keep", "photos")
    assert removed == [] and f'# keep "{other}"' in text and f'changed since: "{kept}"' in text
    kept.write_bytes(b"something else")
    assert script(hashret, "--keep", "photos")[0] == []
    os.truncate(other, 1)
    assert "# nothing to remove: the image to keep is not a file, or has changed since" in script(hashret)[1]


def test_the_script_leaves_contents_without_files(folder: Path, hashret: Command) -> None:
    with Collection.open(folder / ".hashret") as collection:
        collection.add([np.asarray(Image.open("photos/0/00.png"))])
    removed, text = script(hashret)
    assert removed == [] and "# nothing to remove: the image to keep is not a file" in text  # the largest in bytes
    removed, text = script(hashret, "--keep", "photos")
    assert removed == [] and "# not a file, or changed since: " in text


def test_verdicts_are_recorded_and_exported(folder: Path, hashret: Command) -> None:
    first, second, third = sorted(photos())[:3]
    assert hashret("verdict", f"photos/{first}", "id:2", "different") == (0, "", "")
    assert hashret("verdict", f"photos/{third}", f"photos/{first}", "same").code == 0
    assert hashret("verdict", "--export", "pairs.csv").err == "exported 2 verdicts to pairs.csv\n"
    paths = [f"{folder}/photos/{name}" for name in (first, second, third)]
    assert Path("pairs.csv").read_text().splitlines() == [
        "path_a,path_b,verdict",
        f"{paths[0]},{paths[1]},different",
        f"{paths[0]},{paths[2]},same",
    ]
    hits = hashret("query", f"photos/{first}", "-k", PHOTOS, "--paths").out.splitlines()
    assert len(hits) == PHOTOS - 1 and paths[1] not in hits
    groups = json.loads(hashret("dupes", "-r", 0, "--json").out)["groups"]
    assert [{copy["id"] for copy in group} for group in groups] == [{1, 3}]
