"""Every command that writes: killed at any moment, on a disk that fills up, and where it may not write.

`HASHRET_KILLS` is the number of kills, of all commands together.
"""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from hashret.collection import Collection, repair
from hashret.durable import leftovers
from hashret.hasher import Hasher

SOAK = "HASHRET_SOAK" in os.environ
KILLS = int(os.environ.get("HASHRET_KILLS", 640 if SOAK else 0))  # 0: two of each of a few commands
CHAIN = 3  # kills of one folder before the command is repeated
ROWS, BLOBS = 120, 5  # images of the source, and contents without a file

# A process with everything loaded forks a child for each job. It kills it before a file operation, or after some
# seconds, or limits the size of its files.
WORKER = """
import json, os, resource, signal, sys, tempfile, time
import numpy as np, torch
from hashret.cli.app import run
from hashret.collection import Collection, ingest
from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.indexes import set_threads
from hashret.training import loop
from hashret import plots
import hashret.cli.train, hashret.collection.repair

torch.set_num_threads(1), set_threads(1)
with tempfile.TemporaryDirectory() as folder:  # load compiled kernels and fonts once
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 6), np.uint8)
    with Collection.create(folder + "/c", Hasher("lsh", 16).fit(images)) as collection:
        collection.add(images)
        collection.remove([1])
        collection.query(images[3])
        collection.dupes(1)
    plots.grid(images[:1, :, :, None], 1, folder + "/grid.png", ["a title"])
loop.SAVE_EVERY, ingest.BATCH_ITEMS = 0.0, 50
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def add(folder, file):
    with Collection.open(folder) as collection:
        collection.add(np.load(file) ^ 1)
    return 0

def save(model, target):
    Hasher.load(model).save(target)
    return 0

def watch(job):
    operations, fsync = 0, os.fsync

    def count():
        nonlocal operations
        operations += 1
        if operations == job["operation"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, arguments):
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "sqlite3.connect", "ctypes.dlsym"):
            count()
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            count()

    os.fsync = lambda descriptor: (count(), fsync(descriptor))
    sys.addaudithook(audit)
    return lambda: operations

def work(job):
    os.chdir(job["folder"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    operations = watch(job)
    if job["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    os.umask(job["umask"])
    if job["user"]:
        os.setresgid(job["user"], job["user"], job["user"])
        os.setresuid(job["user"], job["user"], job["user"])
    words = job["words"]
    try:
        code = globals()[words[0]](*words[1:]) if words[0] in ("add", "save") else run(words)
    except (HashretError, OSError) as error:  # of a function of Python
        print(f"hashret: {error}", file=sys.stderr, flush=True)
        code = 1
    os.write(job["pipe"], str(operations()).encode())
    return code

for line in sys.stdin:
    job = json.loads(line)
    reading, job["pipe"] = os.pipe()
    child = os.fork()
    if not child:
        try:
            os._exit(work(job))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    began = time.monotonic()
    if job["after"] is not None:
        time.sleep(job["after"])
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - began
    os.close(job["pipe"])
    print(json.dumps([code, seconds, int(os.read(reading, 20) or 0)]), flush=True)
    os.close(reading)
"""


class Run(NamedTuple):
    code: int  # -9 if it was killed
    seconds: float
    operations: int  # on files
    output: str


class Worker:
    """Runs commands in a child process each."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-c", WORKER], **pipes)

    def __call__(
        self,
        folder: Path,
        words: list[str],
        *,
        after: float | None = None,
        operation: int | None = None,
        limit: int | None = None,
        user: int = 0,
        umask: int = 0o022,
    ) -> Run:
        """Run a command in a folder: killed after some seconds or before a file operation, with a limit of the size of
        files in bytes, as another user, or with another umask."""
        job = {"folder": str(folder), "words": words, "after": after, "operation": operation, "limit": limit}
        job |= {"user": user, "umask": umask}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(job | {"log": str(self._log)}), file=self._process.stdin, flush=True)
        code, seconds, operations = json.loads(self._process.stdout.readline())
        run = Run(code, seconds, operations, self._log.read_text())
        assert run.code in (0, 1, 2, -9) and "Traceback" not in run.output, run
        return run

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with closing(Worker(tmp_path_factory.mktemp("worker"))) as made:
        yield made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images, two models, a collection `c`, and an export of it."""
    folder = tmp_path_factory.mktemp("base")
    images = np.random.default_rng(0).integers(0, 256, (ROWS + 2 * BLOBS, 6, 6), np.uint8)
    np.save(folder / "images.npy", images[:ROWS])
    np.save(folder / "more.npy", images[ROWS:])
    hasher = Hasher("lsh", 16).fit(images)
    hasher.save(folder / "model")
    Hasher("pca", 16).fit(images).save(folder / "other")
    with Collection.create(folder / "c", hasher) as collection:
        collection.index(folder / "images.npy")
        collection.add(images[ROWS : ROWS + BLOBS])
        collection.verdict(1, 2, "same")
        collection.export(folder / "all.jsonl")
    (folder / "verdicts.csv").write_text("an older export\n")
    (folder / "radii.png").write_bytes(b"an older plot")
    return folder


class Case(NamedTuple):
    """A command, what it changes, and a value that is equal whenever it has finished."""

    words: list[str]
    result: Callable[[Path], Any]
    prepare: Callable[[Path], None] = lambda folder: None
    again: Callable[[Path], list[str]] = lambda folder: []  # words to add when the command is repeated


def codes_in(name: str) -> Callable[[Path], Any]:
    """Return a function that reads the model, ids, codes and metadata of a collection, and counts its contents."""

    def read(folder: Path) -> Any:
        with Collection.open(folder / name) as collection:
            items = collection.items(limit=1000)
            ids = [item.id for item in items]
            metadata = [item.metadata for item in items]
            readable = len(list(collection.contents(ids)))
            return collection.fingerprint, ids, collection.codes(ids).tolist(), metadata, readable

    return read


def damage(folder: Path) -> None:
    """Leave changes in the log of the database, and overwrite its first page."""
    with closing(sqlite3.connect(folder / "c/items.db")) as conn:
        conn.execute("PRAGMA wal_autocheckpoint = 0")
        conn.execute("UPDATE items SET metadata = '{}' WHERE id < 9")
        conn.commit()
        database, log = ((folder / f"c/items.db{suffix}").read_bytes() for suffix in ("", "-wal"))
    (folder / "c/items.db").write_bytes(bytes(16) + database[16:])
    (folder / "c/items.db-wal").write_bytes(log)


def downgrade(folder: Path) -> None:
    """Give the collection the schema of version 1."""
    with closing(sqlite3.connect(folder / "c/items.db")) as conn:
        conn.executescript(
            "CREATE TABLE old (id INTEGER PRIMARY KEY AUTOINCREMENT, sha256 TEXT NOT NULL UNIQUE,"
            " width INTEGER NOT NULL, height INTEGER NOT NULL, bytes INTEGER NOT NULL, added TEXT NOT NULL,"
            " metadata TEXT);"
            "INSERT INTO old SELECT * FROM items; DROP TABLE items; DROP TABLE IF EXISTS states;"
            "DELETE FROM settings WHERE key = 'state';"
            "PRAGMA legacy_alter_table = ON; ALTER TABLE old RENAME TO items; PRAGMA user_version = 1"
        )


CASES = {
    "create": Case(["import", "all.jsonl", "-c", "new", "--model", "model"], codes_in("new")),
    "train": Case(["train", "images.npy", "--model", "lsh", "--bits", "16", "-c", "new"], codes_in("new")),
    "train -o": Case(
        ["train", "images.npy", "--model", "linear", "--bits", "16", "--steps", "5", "-o", "model"],
        lambda folder: (Hasher.load(folder / "model").fingerprint, (folder / "model.checkpoint").exists()),
        again=lambda folder: ["--resume"] if (folder / "model.checkpoint").exists() else [],
    ),
    "save": Case(["save", "other", "model"], lambda folder: Hasher.load(folder / "model").fingerprint),
    "index": Case(["index", "more.npy", "-c", "c"], codes_in("c")),
    "add": Case(["add", "c", "more.npy"], codes_in("c")),
    "remove": Case(["remove", "images.npy", "-c", "c"], codes_in("c")),
    "reindex": Case(["reindex", "other", "-c", "c"], codes_in("c")),
    "doctor --recover": Case(["doctor", "--recover", "-c", "c"], codes_in("c"), damage),
    "upgrade": Case(["index", "more.npy", "-c", "c"], codes_in("c"), downgrade),
    "export": Case(["export", "all.jsonl", "-c", "c"], lambda folder: (folder / "all.jsonl").read_bytes()),
    "verdict --export": Case(
        ["verdict", "--export", "verdicts.csv", "-c", "c"], lambda folder: (folder / "verdicts.csv").read_bytes()
    ),
    "calibrate": Case(
        ["calibrate", "-c", "c", "--images", "9", "--plot", "radii.png"],
        lambda folder: (folder / "radii.png").read_bytes(),
    ),
}


LONG = SOAK or KILLS > 0
KILLED = [*CASES] if LONG else ["create", "save", "add", "doctor --recover", "upgrade", "export"]
FILLED = [*CASES] if LONG else ["save", "doctor --recover"]


def check_whole(folder: Path, case: Case) -> None:
    """Check that models, collections and files are as they were or as they should be; leftovers are no damage."""
    assert Hasher.load(folder / "model").bits == Hasher.load(folder / "other").bits == 16
    for name in ("c", "new"):
        if Collection.exists(folder / name):
            allowed = {"leftover"} | ({"database"} if case.prepare is damage else set())
            allowed |= {"blobs"} if name == "new" else set()  # an import has none of the contents without files
            assert {finding.part for finding in repair.check(folder / name)} <= allowed
    for name, end in {"all.jsonl": b"}\n", "verdicts.csv": b"\n"}.items():
        assert (folder / name).read_bytes().endswith(end)
    assert (folder / "radii.png").read_bytes()[-8:] in (b"der plot", b"IEND\xaeB`\x82")


def finish(folder: Path, case: Case, worker: Worker) -> Any:
    """Repeat the command undisturbed; check that nothing is left, and return its result."""
    run = worker(folder, case.words + case.again(folder))
    assert run.code == 0, run.output
    name = "new" if Collection.exists(folder / "new") else "c"
    if {finding.part for finding in repair.check(folder / name)} - {"blobs" if name == "new" else ""}:
        assert worker(folder, ["doctor", "--recover", "-c", name]).code == 0
        assert repair.check(folder / name) == []
    result = case.result(folder)
    for part in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        assert leftovers(part) == [], part
    return result


@pytest.mark.parametrize("name", KILLED)
def test_killed_at_any_moment(tmp_path: Path, base: Path, worker: Worker, name: str) -> None:
    """Half of the kills come before a file operation, each one in turn, and half at a random time."""
    case, rng = CASES[name], random.Random(name)
    number, kills_of_all = KILLED.index(name), KILLS or 2 * len(KILLED)
    goal = kills_of_all * (number + 1) // len(KILLED) - kills_of_all * number // len(KILLED)
    started = shutil.copytree(base, tmp_path / "start")
    case.prepare(started)
    shutil.copytree(started, tmp_path / "right")
    undisturbed = worker(tmp_path / "right", case.words)
    assert undisturbed.code == 0, undisturbed.output
    right = finish(tmp_path / "right", case, worker)
    assert undisturbed.operations >= 3
    operations = cycle(rng.sample(range(1, undisturbed.operations + 1), undisturbed.operations))
    kills = attempts = 0
    while kills < goal:
        folder = shutil.copytree(started, tmp_path / "killed")
        for _ in range(CHAIN):
            attempts += 1
            if attempts % 2:
                moment: dict[str, Any] = {"operation": next(operations)}
            else:
                moment = {"after": rng.uniform(0, undisturbed.seconds)}
            run = worker(folder, case.words + case.again(folder), **moment)
            kills += run.code == -9
            check_whole(folder, case)
            if run.code != -9 or kills >= goal:
                break
        assert finish(folder, case, worker) == right, moment
        assert attempts < 20 + 3 * goal
        shutil.rmtree(folder)


def check_refused(run: Run) -> None:
    """Check that a command failed with one line that says why, and nothing after it."""
    assert run.code in (1, 2), run  # 2 for a folder in an option that cannot be read
    lines = run.output.splitlines()
    assert lines[-1].startswith("hashret: ") and sum(line.startswith("hashret: ") for line in lines) == 1, run.output


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files in a folder, without the lock and what readers leave."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files if not path.name.endswith(("-wal", "-shm", "lock"))}


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a disk in memory; skip the test without the right to."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("only root can mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("name", FILLED)
def test_a_disk_that_fills_up(tmp_path: Path, base: Path, worker: Worker, name: str) -> None:
    """Limits of the size of a file stand for a disk that is full after so many bytes; they need no right to mount."""
    case = CASES[name]
    started = shutil.copytree(base, tmp_path / "start")
    case.prepare(started)
    shutil.copytree(started, tmp_path / "right")
    assert worker(tmp_path / "right", case.words).code == 0
    right, refused = finish(tmp_path / "right", case, worker), 0
    for limit in (1, 200, 1000, 4096, 33_000) if LONG else (1000,):
        folder = shutil.copytree(started, tmp_path / "full")
        run = worker(folder, case.words, limit=limit)
        if run.code:
            check_refused(run)
            refused += 1
        check_whole(folder, case)
        for part in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            assert leftovers(part) == [], part
        assert finish(folder, case, worker) == right
        shutil.rmtree(folder)
    assert refused


def test_a_full_disk(tmp_path: Path, base: Path, worker: Worker) -> None:
    """As above, with every command on one disk that has no space left at all."""
    with small_disk(tmp_path / "disk", "size=64m") as disk:
        for name, case in list(CASES.items())[:: 1 if LONG else 5]:
            folder = shutil.copytree(base, disk / "work")
            case.prepare(folder)
            with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
                while True:
                    filler.write(bytes(1 << 20)) or filler.write(bytes(1))
            run = worker(folder, case.words)
            check_refused(run)
            assert "full" in run.output or "No space left" in run.output or "cannot be" in run.output, (
                name,
                run.output,
            )
            found = worker(folder, ["doctor", "-c", "c"]).output  # reading needs some space, and this is no damage
            assert case.prepare is damage or "damaged" not in found, found
            (disk / "filler").unlink()
            check_whole(folder, case)
            finish(folder, case, worker)
            shutil.rmtree(folder)


def test_read_only_media(tmp_path: Path, base: Path, worker: Worker) -> None:
    with small_disk(tmp_path / "disk", "size=64m") as disk:
        shutil.copytree(base, disk, dirs_exist_ok=True)
        queries = [["query", "id:1", "-c", "c"], ["info", "-c", "c"], ["doctor", "-c", "c"]]
        expected = [worker(disk, words).output for words in queries]
        before = contents(disk)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert [worker(disk, words).output for words in queries] == expected
        for case in CASES.values():
            if case.prepare is not damage:
                check_refused(worker(disk, case.words))
        assert contents(disk) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user(base: Path, worker: Worker) -> None:
    """What was made with umask 077 is refused to others in one line, and what others may write in is not needed."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders admit no other user
        folder = Path(name) / "work"
        shutil.copytree(base, folder)
        Path(name).chmod(0o777)
        folder.chmod(0o777)
        before = contents(folder)
        for path in folder.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
        for words in (*(case.words for case in CASES.values()), ["query", "id:1", "-c", "c"], ["doctor", "-c", "c"]):
            check_refused(worker(folder, words, user=65534, umask=0o077))
        assert contents(folder) == before
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        made = worker(folder, ["import", "all.jsonl", "-c", "new", "--model", "model"], user=65534, umask=0o077)
        assert made.code == 0, made.output
        for path in (folder / "new", *(folder / "new").rglob("*")):
            assert not path.stat().st_mode & 0o077 and path.stat().st_uid == 65534, path
        assert codes_in("new")(folder)[1] == codes_in("c")(folder)[1]  # root reads it


def test_any_umask_gives_the_same_collection(tmp_path: Path, base: Path, worker: Worker) -> None:
    for umask in (0o000, 0o077):
        folder = shutil.copytree(base, tmp_path / f"{umask}")
        assert worker(folder, CASES["create"].words, umask=umask).code == 0
        assert codes_in("new")(folder)[:3] == codes_in("c")(folder)[:3]
        assert worker(folder, ["doctor", "-c", "new", "--recover"], umask=umask).code == 0
