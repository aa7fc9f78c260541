from pathlib import Path

import pytest
from command_line import Command, check_failed

from hashret.cli.common import command_line


def test_the_collection_is_found_from_a_folder_below(
    folder: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hashret("query", "id:1").out
    monkeypatch.chdir(folder / "photos/0")
    assert hashret("query", "id:1").out == expected
    monkeypatch.chdir("/")
    check_failed(
        hashret("query", "id:1"),
        1,
        "there is no collection at /.hashret: make one with hashret index SOURCE -c /.hashret",
    )
    assert hashret("query", "id:1", "-c", folder / ".hashret").out == expected
    monkeypatch.setenv("HASHRET_COLLECTION", str(folder / ".hashret"))
    assert hashret("query", "id:1").out == expected
    check_failed(hashret("query", "id:1", "-c", folder / "empty"), 1, f"no collection at {folder}/empty")


def test_commands_to_paste_are_quoted() -> None:
    assert command_line("query", "a b.png", collection=Path("my photos")) == "hashret query 'a b.png' -c 'my photos'"
    assert command_line("index", "photos") == "hashret index photos"
