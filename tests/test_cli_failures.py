import json
import re
import shutil
from pathlib import Path

from command_line import Command


def test_unreadable_files_are_listed_and_tried_again(folder: Path, hashret: Command) -> None:
    assert hashret("failures") == (0, "", "")
    shutil.copy(folder / "broken.png", folder / "photos/broken.png")
    hashret("index", "photos")
    result = hashret("failures")
    assert re.fullmatch(f"{folder}/photos/broken.png: no image: .*\n", result.out) and result.err == ""
    (failure,) = json.loads(hashret("failures", "--json").out)
    assert list(failure) == ["path", "reason", "seen"] and failure["path"] == f"{folder}/photos/broken.png"
    assert "; 1 file could not be read\n" in hashret("info").out
    assert hashret("failures", "--retry").err == "tried 1 file again: 0 could be read\n"
    shutil.copy(folder / "photos/0/00.png", folder / "photos/broken.png")
    assert hashret("failures", "--retry") == (0, "", "tried 1 file again: 1 could be read\n")
    assert hashret("failures", "--json") == (0, "[]\n", "")
