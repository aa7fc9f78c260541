import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import MAIN, Command, check_failed, files_in, fill, hasher, photos
from unprivileged import unprivileged

from hashret.cli import app
from hashret.cli.app import COMMANDS, run
from hashret.codes import to_hex
from hashret.collection import Collection
from hashret.heads import HEADS
from hashret.models import MODELS

MODEL_TASKS = ("reconstruct", "denoise", "upscale", "sample", "plot")


@pytest.fixture(scope="module")
def filled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("filled"))


@pytest.fixture
def unchanged_folder(filled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, shared by tests that do not change it."""
    monkeypatch.delenv("HASHRET_COLLECTION", raising=False)
    monkeypatch.chdir(filled_folder)
    return filled_folder


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("index none", 1, "there is no 'none': give a folder, an archive"),
        ("index none -c new", 1, "there is no 'none': give a folder, an archive"),
        ("index empty", 1, r"empty has no images \(0 other files ignored"),
        ("index notes", 1, r"notes has no images \(1 other file ignored"),
        ("index broken.png", 1, "broken.png is a single image: give the folder that holds it"),
        ("index notes/a.txt", 1, "notes/a.txt is not a source of images: give"),
        ("index photos -c broken.png", 1, "broken.png cannot be written to: choose another folder"),
        ("index photos --index tree", 2, "--index: there is no index 'tree'"),
        ("index photos --index faiss:Tree", 2, "--index: factory must be"),
        ("index", 2, "Missing argument 'SOURCE': see hashret index --help"),
        ("model sample --between 1 2 --manifold", 2, ".*: see hashret model sample --help"),
        ("index photos --nonsense", 2, "No such option.*: see hashret index --help"),
        ("train none -o new", 1, "there is no 'none'"),
        (
            "train none --model nosuch -o new",
            2,
            "there is no model 'nosuch'; choose one of ae, .*: see hashret train --help",
        ),
        ("train photos --model lsh --bits 12 -o new", 2, "bits must be a multiple of 8 from 8 to 1024, not 12"),
        ("train photos --model lsh --bits 2048 -o new", 2, "bits must be a multiple of 8"),
        ("train photos --model lsh --bits many -o new", 2, "Invalid value for '--bits'"),
        ("train photos --model lsh --head none -o new", 2, "there is no head 'none'; choose"),
        ("train photos --model lsh --set width=3 -o new", 2, "model 'lsh' has no setting 'width'"),
        ("train photos --model lsh --set width -o new", 2, "a setting is KEY=VALUE, not 'width'"),
        ("train photos --model lsh --size big -o new", 2, "a size is HEIGHTxWIDTH such as 64x64, not 'big'"),
        ("train photos --model lsh --size 99999x99999 -o new", 2, "height × width must be at most"),
        ("train photos --model lsh --budget soon -o new", 2, "a budget is a time such as 90s, 2m or 1h, not 'soon'"),
        ("train photos --model lsh --steps 2 --epochs 3 -o new", 2, "give one of --budget, --epochs and --steps"),
        ("train photos --model ae --steps 2 --learning-rate 1e300 -o new", 2, "Invalid value for '--learning-rate'"),
        ("train photos --model pca --bits 128 -o new", 1, "head 'pca' needs at least as many images"),
        ("train empty --model lsh -o new", 1, "empty has no images"),
        ("train notes --model lsh -c new", 1, "notes has no images"),
        ("train photos --model lsh -o photos", 1, "photos holds other files than a model: choose another folder"),
        ("train photos --model lsh -o .", 1, "holds other files than a model"),
        ("train photos --model lsh -o /", 1, "holds other files than a model"),
        ("train photos --model lsh -o broken.png", 1, "broken.png cannot be written to"),
        ("query none.png", 1, "none.png: cannot be read: No such file or directory"),
        ("query none", 1, "none: there is no 'none': give"),
        ("query empty", 1, r"empty: no images \(0 other files"),
        ("query broken.png", 1, "broken.png: no image: "),
        ("query notes/a.txt", 1, "notes/a.txt: no image: "),
        ("query id:0", 1, "id:0: there is no item 0"),
        ("query id:x", 1, "id:x: an item is named by its number"),
        ("query id:²", 1, "id:²: an item is named by its number"),
        ("query id:99999999999999999999", 1, "an item is named by its number"),
        ("query hex:12", 1, "hex:12: codes must have 32 bits, not 8"),
        ("query hex:xyz", 1, "'xyz' is not a code"),
        ("query id:1 -k 0", 2, "Invalid value for '-k'"),
        ("query id:1 -r -1", 2, "a distance is a whole number of bits, or auto, not '-1'"),
        ("query id:1 -r ½", 2, "a distance is a whole number of bits, or auto, not '½'"),
        ("query id:1 -r 3 --target 0.5", 2, "--target goes with -r auto"),
        ("dupes -r -1", 2, "a distance is a whole number of bits, or auto, not '-1'"),
        ("dupes --by size", 2, "by is 'connected' or 'star', not 'size'"),
        (
            "dupes --keep bigest",
            1,
            "nothing is indexed under .*/bigest: keep the largest, the oldest, or another folder",
        ),
        ("dupes --json --script", 2, "give one of --json and --script"),
        ("verdict id:1 id:2", 2, "give two images and same or different, or --export FILE"),
        ("verdict id:1 id:2 similar", 2, "a verdict is 'same' or 'different', not 'similar'"),
        ("verdict id:1 id:1 same", 1, "both are item 1, one content: give two different items"),
        ("verdict id:1 id:999 same", 1, "there is no item 999"),
        ("verdict id:1 broken.png same", 1, "broken.png is not in the collection: hashret index its folder first"),
        ("verdict id:1 id:2 same --export x.csv", 2, "give two images and same or different, or --export FILE"),
        ("calibrate none.csv", 1, "none.csv cannot be read: No such file"),
        ("calibrate notes/a.txt", 1, "notes/a.txt, line 1: a line is path_a,path_b,same or"),
        ("calibrate --verdicts", 1, "verdicts: 0 pairs labelled the same and 0 different: label some of both kinds"),
        ("calibrate --target 2", 2, "Invalid value for '--target'"),
        ("calibrate pairs.csv --verdicts", 2, "give one of PAIRS.csv and --verdicts"),
        ("query id:1 --json --paths", 2, "give one of --json, --jsonl and --paths"),
        ("query", 2, "Missing argument"),
        ("query id:1 -c empty", 1, "there is no collection at (.*/empty): make one with hashret index SOURCE -c \\1"),
        ("info -c new", 1, "there is no collection at .*/new"),
        ("query id:1 --where width>", 1, "where: .*syntax error: give an SQLite expression such as"),
        ("remove", 2, "give a PATH, id:N or --where"),
        ("remove id:x", 1, "an item is named by its number"),
        ("remove photos --where )", 1, "where: a closing bracket"),
        ("failures -c new", 1, "there is no collection at .*/new"),
        ("estimate 0", 2, "Invalid value for 'N'"),
        ("estimate 9 --bits 12", 2, "bits must be a multiple of 8"),
        ("estimate 9 --source none", 1, "there is no 'none'"),
        ("export out.txt", 2, "OUT: out.txt: the suffix must be .jsonl, .npz, .parquet"),
        ("export nowhere/out.jsonl", 1, "nowhere/out.jsonl cannot be written: create the folder .*/nowhere first"),
        ("import none.jsonl -c new", 1, "none.jsonl cannot be read"),
        ("import notes/a.txt", 2, "FILE: a.txt: the suffix must be"),
        ("reindex none", 1, "none is no model folder: make one with hashret train"),
        ("reindex photos", 1, "photos is no model folder"),
        ("reindex other -c new", 1, "there is no collection at .*/new"),
        ("demo --out broken.png", 1, "broken.png is not a folder: choose another with --out DIR"),
        ("demo --budget soon --out new", 2, "a budget is a time"),
        ("train photos --budget", 2, "requires an argument: see hashret train --help"),
        ("calibrate --plot none/x.png", 1, "none/x.png cannot be written: create the folder .*/none first"),
        ("nonsense", 2, "No such command 'nonsense'"),
    ],
)
def test_bad_input_is_reported_in_one_line_and_changes_nothing(
    unchanged_folder: Path, hashret: Command, line: str, code: int, text: str
) -> None:
    before = files_in(unchanged_folder)
    check_failed(hashret(*line.split()), code, text)
    assert files_in(unchanged_folder) == before and not (unchanged_folder / "new").exists()


@pytest.mark.parametrize("data", [b"", b"no database", bytes(4096)])
def test_a_file_that_is_not_a_database_is_left_alone(folder: Path, hashret: Command, data: bytes) -> None:
    (folder / ".hashret/items.db").write_bytes(data)
    for line in ("info", "query id:1", "index photos", "reindex other", "train photos --model lsh"):
        check_failed(hashret(*line.split()), 1, r"items.db is (damaged|not the database)")
    assert (folder / ".hashret/items.db").read_bytes() == data


def test_no_command_shows_the_help(hashret: Command) -> None:
    result = hashret()
    assert result.code == 2 and result.out == ""
    assert hashret("--help") == (0, result.err, "")
    assert hashret("--version").out.strip().count(".") == 2
    result = hashret("model")
    assert result.code == 2 and result.out == "" and hashret("model", "--help") == (0, result.err, "")


def test_the_help_lists_every_command_in_a_group_and_whole(hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = hashret("--help").out
    assert max(map(len, text.splitlines())) <= 80 and "..." not in text.partition("Options:")[2] and "…" not in text
    groups = dict(re.findall(r"^([A-Z][a-z ]+):\n((?:  .*\n)+)", text, re.MULTILINE))
    assert list(groups) == ["Options", *app.GROUPS]
    listed = {group: re.findall(r"^  (\w+)  +[A-Z].*\w\.$", lines, re.MULTILINE) for group, lines in groups.items()}
    for group, commands in app.GROUPS.items():
        assert listed[group] == [*commands, *(["model"] if group == "Models" else [])]
    text = hashret("model", "--help").out.partition("Commands:")[2]
    assert re.findall(r"^  (\w+)  +[A-Z].*\w\.$", text, re.MULTILINE) == list(MODEL_TASKS) and "..." not in text


def test_every_option_has_a_help_text() -> None:
    commands: dict[str, Any] = dict(typer.main.get_command(app.app).commands)  # type: ignore[attr-defined]
    commands |= commands.pop("model").commands
    assert commands.keys() == {*COMMANDS, *MODEL_TASKS}
    parameters = [parameter for command in commands.values() for parameter in command.params]
    assert len(parameters) > 100 and all(parameter.help for parameter in parameters)
    helps = {parameter.help for parameter in parameters if parameter.name == "collection"}
    assert len(helps) == 1 and "$HASHRET_COLLECTION" in helps.pop()


def test_python_can_run_the_package() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "hashret", *arguments], capture_output=True, text=True)

    done = run("info", "--nonsense")
    assert done.returncode == 2
    assert re.fullmatch("hashret: No such option: --nonsense.*: see hashret info --help\n", done.stderr)
    command = f"{shlex.quote(sys.executable)} -m hashret --show-completion bash; true"  # for the name of the parent
    script = subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout
    assert re.search(r"^complete .* hashret$", script, re.MULTILINE) and "python" not in script


def complete(line: str) -> tuple[list[str], set[str]]:
    """Return the completions that bash gets for a line, and the modules that this loads."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    code = "import sys\nfrom hashret.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    environment = os.environ | {"_HASHRET_COMPLETE": "complete_bash"} | words
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), set(done.stderr.split())


def test_bash_completes_commands_and_names() -> None:
    offered, _ = complete("hashret ")
    assert set(offered) == {*COMMANDS, "model"}
    assert complete("hashret tr")[0] == ["train"]
    for line, expected in (("hashret train --model ", MODELS), ("hashret train photos --head ", HEADS)):
        offered, modules = complete(line)
        assert offered == list(expected) and not {"torch", "torchvision", "sklearn"} & modules
    assert complete("hashret train --model co")[0] == ["contractive", "contrastive"]


def test_a_read_only_folder(hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders admit no other user
        folder = fill(Path(name).resolve())
        monkeypatch.chdir(folder)
        expected = hashret("query", "photos/0/00.png", "--json").out
        within = hashret("query", "id:1", "-r", 9).out
        filtered = ("query", "id:1", "-r", 9, "--where", "id > 0 AND label <> ''")
        assert hashret(*filtered).out == within  # and kernels are compiled, which another user cannot find again
        (folder / ".hashret/items.db-wal").unlink()
        (folder / ".hashret/items.db-shm").unlink()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = files_in(folder)
        with unprivileged():
            assert hashret("query", "photos/0/00.png", "--json") == (0, expected, "")
            assert hashret("query", "id:1", "-r", 9).out == within
            assert hashret(*filtered).out == within
            assert hashret("info").code == 0
            for line in (
                "index photos",
                "index photos -c .hashret/new",
                "reindex other",
                "train photos --model lsh -o new",
                "train photos --model lsh -c new",
                "demo",
            ):
                check_failed(hashret(*line.split()), 1, "(cannot be (written to|opened)|Permission denied: check)")
            monkeypatch.chdir("/")
        assert files_in(folder) == before
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def test_help_and_queries_by_code_load_little(folder: Path) -> None:
    """Neither --help nor a query by code imports torch or torchvision, and --help does not import NumPy."""
    lines = [*([command, "--help"] for command in (*COMMANDS, "model")), ["--help"], ["--version"]]
    check = (
        "import json, sys\n"
        "from hashret.cli.app import COMMANDS, run\n"
        "lines = json.loads(sys.argv[1])\n"
        "assert all(run(line) == 0 for line in lines)\n"
        "assert not {'torch', 'torchvision', 'numpy', 'PIL', 'sqlite_utils', 'faiss', 'numba'} & sys.modules.keys()\n"
        "assert run(['query', 'hex:00000000']) == 0 and run(['query', 'id:1', '--json']) == 0\n"
        "assert run(['info']) == 0 and run(['index', 'photos']) == 0\n"
        "assert not {'torch', 'torchvision', 'sklearn', 'matplotlib', 'faiss'} & sys.modules.keys()\n"
        "assert 'numba' in sys.modules and 'cli' not in sys.modules and 'indexes' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", check, json.dumps(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: hashret query" in done.stdout and "0 added, 40 unchanged" in done.stderr


def test_stdout_that_is_full_or_closed_and_paths_that_are_not_text(folder: Path) -> None:
    odd = folder / os.fsdecode(b"photos/0/\xff.png")
    odd.write_bytes(photos()["0/00.png"])
    (folder / "photos/0/00.png").unlink()
    assert run(["index", "photos", "--prune", "-q"]) == 0
    (code,) = to_hex(hasher().encode(odd))
    found = subprocess.run([*MAIN, "query", f"hex:{code}", "--paths", "-k", "1"], capture_output=True)
    assert found.stdout == os.fsencode(odd) + b"\n"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*MAIN, "info"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"No space left on device" in done.stderr
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*MAIN, "info", "--json"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1 and done.stderr == b""


def test_ctrl_c_is_reported(folder: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Collection, "index", interrupt)
    check_failed(hashret("index", "photos"), 130, "interrupted: run the same command to continue")
    monkeypatch.setattr(Collection, "query_codes", interrupt)
    check_failed(hashret("query", "hex:00000000"), 130, "interrupted")
