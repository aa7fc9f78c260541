import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "torchvision", "faiss", "numba", "sqlite3", "sqlite_utils", "sklearn", "matplotlib", "typer", "PIL"}

# DESIGN §1: what each room must never import, directly or through others.
FORBIDDEN = {
    "hashret": {*HEAVY, "numpy"},
    "hashret.errors": {*HEAVY, "numpy"},
    "hashret.cli": HEAVY - {"typer"} | {"numpy"},
    "hashret.codes": HEAVY,
    "hashret.indexes": {"torch", "torchvision", "sqlite3", "sqlite_utils", "PIL", "sklearn"},
    "hashret.data.images": HEAVY - {"PIL"},
    "hashret.data.sources": HEAVY - {"PIL"},
    "hashret.models": HEAVY - {"torch"},
    "hashret.training.loop": HEAVY - {"torch"},
    "hashret.stores.sqlite": {"torch", "torchvision", "faiss", "numba", "sklearn", "PIL"},
    "hashret.collection": {"torch", "torchvision", "sklearn", "matplotlib", "typer"},
    "hashret.collection.originals": HEAVY - {"PIL"},
    "hashret.client": {"torch", "torchvision", "sklearn", "matplotlib", "typer", "fastapi", "httpx"},
    "hashret.service.app": {"torch", "torchvision", "sklearn", "matplotlib", "typer", "uvicorn"},
    "hashret.evaluation.measures": HEAVY,
    "hashret.plots": {"matplotlib", "torch", "sqlite3"},
}

# What of hashret each room may import, anywhere in its files.
ROOMS = {
    "hashret/errors.py": set(),
    "hashret/codes.py": set(),
    "hashret/files.py": set(),
    "indexes": {"errors", "codes", "process", "indexes"},
    "hashret/images.py": {"errors"},
    "hashret/arrays.py": {"errors", "images"},
    "hashret/vectors.py": {"errors", "images"},
    "hashret/sources.py": {"errors", "images", "arrays", "vectors"},
    "hashret/models": {"errors", "codes", "models"},
    "hashret/ranking.py": {"codes"},
    "hashret/metadata.py": {"errors"},
    "hashret/filters.py": {"errors", "metadata"},
    "hashret/store.py": {"errors", "codes", "files", "filters"},
    "hashret/transfer.py": {"errors", "codes", "files", "metadata", "sources", "store"},
    "hashret/evaluation.py": {"codes"},
    "hashret/contents.py": {"errors", "images", "sources"},
    "hashret/client.py": {"errors", "calibration", "codes", "images", "store", "copies", "collection", "service"},
    "hashret/service": {"errors", "codes", "images", "copies", "collection", "generating", "service"},
}


def python(code: str, *arguments: str, **environment: str) -> str:
    """What a Python of its own, away from the checkout, prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd="/", env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", FORBIDDEN)
def test_a_room_loads_no_more_than_it_may(module: str) -> None:
    if module.startswith("hashret.service"):
        pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")
    loaded = set(python(f"import sys, {module}; print(*sys.modules)").split())
    assert module in loaded and not FORBIDDEN[module] & loaded
    assert not {"cli", "indexes", "tests"} & loaded


def test_every_module_is_known_by_its_one_name() -> None:
    names = sorted(
        ".".join(["hashret", *path.with_suffix("").parts[room == "hashret" :]]).removesuffix(".__init__")
        for room in ("hashret", "cli", "indexes")
        for path in (file.relative_to(ROOT) for file in (ROOT / room).rglob("*.py"))
        if room != "hashret" or path.parts[1] not in ("cli", "indexes")  # which are links
    )
    assert {"hashret.cli.app", "hashret.indexes.bitflip", "hashret.models.vae", "hashret.stores.sqlite"} <= set(names)
    code = (
        "import sys, importlib; [importlib.import_module(name) for name in sys.argv[1:]]\n"
        "print(*(name for name in sys.modules if name.split('.')[0] in ('hashret', 'cli', 'indexes')))"
    )
    assert sorted(python(code, *names).split()) == names


def imported(file: Path) -> set[str]:
    """The rooms of hashret that a file names in its imports, wherever they stand in it, but not for types alone."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert not {name for name in names if name.split(".")[0] in ("cli", "indexes", "tests")}, file
    return {name.split(".")[1] for name in names if name.startswith("hashret.")}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).glob("*.py"))
    assert files
    for file in files:
        assert imported(file) <= ROOMS[room], file


def test_the_public_names_are_fetched_on_first_use() -> None:
    code = (
        "import sys, hashret\n"
        "assert not {'numpy', 'torch'} & sys.modules.keys()\n"
        "from hashret import Collection, Hit, HashretError\n"
        "assert 'torch' not in sys.modules\n"
        "from hashret import *\n"
        "assert Hasher.__module__ == 'hashret.hasher' and Collection is hashret.Collection\n"
        "try: hashret.nothing\n"
        "except AttributeError as error: print(error, hashret.__version__)"
    )
    assert python(code).startswith("module 'hashret' has no attribute 'nothing' 0.")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout that has lost its links, as some checkouts do."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("hashret", "cli", "indexes"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for link in (folder / "hashret/cli", folder / "hashret/indexes"):
        assert link.is_symlink()
        link.unlink()
    build = [sys.executable, "-m", "build", "--wheel"]
    here = importlib.util.find_spec("setuptools") is not None and int(version("setuptools").split(".")[0]) >= 77
    done = subprocess.run([*build, *(["--no-isolation"] if here else [])], cwd=folder, capture_output=True, text=True)
    if done.returncode and not here and "No matching distribution" in done.stdout + done.stderr:
        pytest.skip("setuptools 77 is not installed, and there is no package index to get it from")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_one_package(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {Path(name) for name in archive.namelist()}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "hashret = hashret.cli:main" in archive.read(entry_points).decode()
    (described,) = {file.parts[0] for file in files} - {"hashret"}
    assert described.endswith(".dist-info")
    inside = {file for file in files if file.parts[0] == "hashret"}
    page = {Path("hashret/service/page") / name for name in ("index.html", "page.css", "page.js", "icon.svg")}
    expected = {Path("hashret/py.typed"), *page}
    for room, target in (("hashret", ""), ("cli", "cli"), ("indexes", "indexes")):
        for file in (ROOT / room).rglob("*.py"):
            path = file.relative_to(ROOT / room)
            if room != "hashret" or path.parts[0] not in ("cli", "indexes"):
                expected.add(Path("hashret") / target / path)
    assert inside == expected
    assert any(file.parts[1:] == ("licenses", "LICENSE") for file in files if file.parts[0] == described)


def test_the_wheel_works_where_there_is_no_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import hashret, hashret.cli.app, hashret.indexes, sys\n"
        "print(hashret.__file__, hashret.cli.__file__, hashret.indexes.__file__)\n"
        "assert hashret.cli.app.run(['--version']) == 0 and 'cli' not in sys.modules"
    )
    out = python(code, PYTHONPATH=str(tmp_path))
    places = [tmp_path / "hashret" / name / "__init__.py" for name in ("", "cli", "indexes")]
    assert out.split()[:3] == [str(place) for place in places]


def test_the_links_that_editors_need_are_there() -> None:
    for name in ("cli", "indexes"):
        assert os.readlink(ROOT / "hashret" / name) == f"../{name}"  # noqa: PTH115  # as it is written
    assert not (ROOT / "tests/__init__.py").exists()
