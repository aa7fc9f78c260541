"""Replacing files and folders as a whole, and what is left by writers that were killed."""

import ctypes
import errno
import fcntl
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hashret import durable
from hashret.durable import Replacement, delete_leftovers, leftovers, restore, write_durably

TOKEN = "0123456789abcdef"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "a").write_text(content)
    return path


def replace_folder(target: Path, content: str) -> None:
    with Replacement(target, folder=True) as new:
        (new.path / "a").write_text(content)
        new.commit()


@pytest.fixture(params=["exchange", "renames", "no library function"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Exchange folders in one step, or in three as where the file system or the C library cannot."""
    if request.param == "renames":
        monkeypatch.setattr(durable, "_RENAME_EXCHANGE", 1 << 20)  # flags that the system refuses
        monkeypatch.setattr(durable, "_RENAME_SWAP", 1 << 20)
    elif request.param == "no library function":
        monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    name: str = request.param
    return name


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, exchange: str) -> None:
    target = tmp_path / "a [*] 'model'\n"
    for content in ("first", "second"):
        replace_folder(target, content)
        assert (target / "a").read_text() == content and names_in(tmp_path) == [target.name]
    with pytest.raises(KeyError), Replacement(target, folder=True) as new:
        (new.path / "a").write_text("unfinished")
        raise KeyError
    with Replacement(target, folder=True) as new:  # not committed
        (new.path / "b").mkdir()
    assert (target / "a").read_text() == "second" and names_in(tmp_path) == [target.name]


def test_readers_never_miss_or_take_a_folder_that_is_being_replaced(tmp_path: Path, exchange: str) -> None:
    """At each rename, another writer cleans the folder and a reader looks for the target."""
    renames = 0

    def observe(event: str, arguments: Any) -> None:
        nonlocal renames
        if event == "os.rename" and str(arguments[0]).startswith(str(tmp_path)):
            renames += 1
            restore(tmp_path / "m")
            delete_leftovers(tmp_path)

    replace_folder(tmp_path / "m", "first")
    sys.addaudithook(observe)
    replace_folder(tmp_path / "m", "second")
    assert (tmp_path / "m/a").read_text() == "second" and names_in(tmp_path) == ["m"]
    assert renames == (0 if exchange == "exchange" else 3)


def kill_at(number: int, write: Callable[[], None]) -> bool:
    """Run `write` in a child that is killed before its file operation of this number; return whether it was."""

    def child() -> None:
        operations = 0

        def count(event: str, arguments: Any) -> None:
            nonlocal operations
            if event.startswith(("open", "os.", "fcntl.", "shutil.", "ctypes.")):
                operations += 1
                if operations == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        write()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_killed_at_any_operation(tmp_path: Path, exchange: str) -> None:
    """The target is whole after each kill, once a reader or a writer has come by, and nothing is left."""
    target, file = folder(tmp_path / "m", "0"), tmp_path / "f"
    file.write_text("0")
    for write in (lambda: replace_folder(target, "1"), lambda: write_durably(file, b"1")):
        number = 1
        while kill_at(number, write):
            restore(target)
            assert (target / "a").read_text() in "01" and file.read_text() in "01"
            number += 1
        assert number > 8
    assert leftovers(tmp_path) == [] and names_in(tmp_path) == ["f", "m"]  # deleted by the writers after them
    assert (target / "a").read_text() == file.read_text() == "1"


def test_leftovers_are_those_of_dead_writers_alone(tmp_path: Path) -> None:
    """A live writer's file is locked, whatever process id it has; names that only resemble ours are the user's."""
    users = ["new", f"x.{TOKEN}.new", f".x.{TOKEN}.new.png", f".x.{TOKEN.upper()}.new", f".{TOKEN}.new", ".x.12.new"]
    for name in users:
        (tmp_path / name).write_text("mine")
    (tmp_path / f".x.{TOKEN}.new").write_text("dead")
    folder(tmp_path / f".y\n.{TOKEN}.new", "dead")
    (tmp_path / f".link.{TOKEN}.new").symlink_to(tmp_path / "new")
    os.mkfifo(tmp_path / f".pipe.{TOKEN}.new")
    code = (
        "import sys; from pathlib import Path; from hashret.durable import Replacement\n"
        "with Replacement(Path(sys.argv[1])) as new:\n"
        "    new.path.write_text('live'); print(flush=True); input(); new.commit()"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "x"], **pipes) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        (live,) = (path for path in tmp_path.iterdir() if path.name not in users and path.name.startswith(".x."))
        (tmp_path / f".x.{TOKEN}.new").write_text("dead")  # again: the writer deleted it
        with Replacement(tmp_path / "x") as new:  # two writers of one target at a time
            new.path.write_text("ours")
            assert not (tmp_path / f".x.{TOKEN}.new").exists() and live.read_text() == "live"
            delete_leftovers(tmp_path)
            assert live.exists() and new.path.exists() and leftovers(tmp_path) == []
            new.commit()
        assert (tmp_path / "x").read_text() == "ours"
        writer.communicate("\n")
    assert writer.returncode == 0 and (tmp_path / "x").read_text() == "live"
    expected = {"x", f".link.{TOKEN}.new", *users}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_an_old_version_is_put_back_only_where_it_is_missing(tmp_path: Path) -> None:
    folder(tmp_path / f".m.{TOKEN}.old", "old")
    folder(tmp_path / f".m.{TOKEN}.new", "new")
    folder(tmp_path / f".other.{TOKEN}.old", "old")
    folder(tmp_path / "other", "new")
    restore(tmp_path / "other")
    restore(tmp_path / "m")
    assert (tmp_path / "m/a").read_text() == "old" and (tmp_path / "other/a").read_text() == "new"
    assert [path.name for path in leftovers(tmp_path)] == [f".m.{TOKEN}.new", f".other.{TOKEN}.old"]
    (tmp_path / "m").rename(tmp_path / f".m.{TOKEN}.old")
    delete_leftovers(tmp_path)
    assert names_in(tmp_path) == ["m", "other"] and (tmp_path / "m/a").read_text() == "old"


def test_links_streams_and_permissions(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    write_durably(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    write_durably(Path("/dev/null"), b"nothing")
    assert Path("/dev/null").is_char_device() and leftovers(Path("/dev")) == []
    before = os.umask(0o027)
    try:
        write_durably(tmp_path / "fresh", b"x")
        replace_folder(tmp_path / "m", "x")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("fresh", "m", "m/a")]
    assert modes == [0o640, 0o750, 0o640]


def test_an_error_names_the_target(tmp_path: Path) -> None:
    for target in (tmp_path / "none/x", tmp_path / ("x" * 250)):
        with pytest.raises(OSError) as caught:
            write_durably(target, b"x")
        assert caught.value.filename == str(target)
    with pytest.raises(IsADirectoryError) as caught:
        write_durably(folder(tmp_path / "m", "x"), b"x")
    assert caught.value.filename == str(tmp_path / "m") and names_in(tmp_path) == ["m"]


def test_nothing_is_deleted_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(durable, "_RENAME_EXCHANGE", 1 << 20)
    (tmp_path / f".x.{TOKEN}.new").write_text("perhaps of a live writer on another host")
    folder(tmp_path / f".m.{TOKEN}.old", "old")
    restore(tmp_path / "m")
    assert (tmp_path / "m/a").read_text() == "old"
    replace_folder(tmp_path / "m", "new")
    write_durably(tmp_path / "x", b"new")
    assert names_in(tmp_path) == [f".x.{TOKEN}.new", "m", "x"] and leftovers(tmp_path) == []
    assert (tmp_path / "m/a").read_text() == (tmp_path / "x").read_text() == "new"
