import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import hashret

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "torchvision", "faiss", "numba", "sqlite3", "sqlite_utils", "sklearn", "matplotlib", "typer", "PIL"}

# DESIGN §1: modules that each package must never import, directly or indirectly.
FORBIDDEN = {
    "hashret": {*HEAVY, "numpy"},
    "hashret.errors": {*HEAVY, "numpy"},
    "hashret.codes": HEAVY,
    "hashret.results": HEAVY,
    "hashret.parallel": {*HEAVY, "numpy"},
    "hashret.durable": {*HEAVY, "numpy"},
    "hashret.process": HEAVY,
    "hashret.indexes": HEAVY - {"numba"},
    "hashret.data.sources": HEAVY - {"PIL"},
    "hashret.data.sample": HEAVY - {"PIL"},
    "hashret.heads": HEAVY,
    "hashret.models": HEAVY,
    "hashret.models.vae": HEAVY - {"torch"},
    "hashret.training.options": HEAVY,
    "hashret.training.loop": HEAVY - {"torch"},
    "hashret.runtime": HEAVY - {"PIL"},
    "hashret.model_folder": HEAVY,
    "hashret.hasher": HEAVY - {"torch", "PIL"},
    "hashret.stores.protocol": HEAVY,
    "hashret.stores.sqlite": HEAVY - {"sqlite3", "sqlite_utils"},
    "hashret.collection": {"torch", "torchvision", "sklearn", "matplotlib", "typer", "faiss"},
    "hashret.tasks.generation": HEAVY - {"torch", "PIL"},
    "hashret.evaluation.measures": HEAVY,
    "hashret.evaluation.protocols": HEAVY - {"PIL"},
    "hashret.plots": HEAVY - {"PIL"},
    "hashret.service.app": {"torch", "torchvision", "sklearn", "matplotlib", "typer", "faiss", "uvicorn"},
    "hashret.client": {*HEAVY - {"PIL"}, "scipy", "filelock", "fastapi", "httpx"},
    "hashret.cli": HEAVY - {"typer"} | {"numpy"},
}

# The packages and modules of hashret that each package may import, also for types: only earlier ones, to avoid cycles.
GROUND = {"errors", "codes", "results", "parallel", "durable", "process"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "codes": set(),
    "durable": set(),
    "parallel": set(),
    "process": set(),
    "results": {"errors"},
    "indexes": GROUND,
    "data": GROUND,
    "heads": GROUND,
    "stores": GROUND,
    "models": GROUND | {"heads"},
    "model_folder": GROUND | {"data"},
    "runtime": GROUND | {"data", "heads", "models"},
    "training": GROUND | {"data", "heads", "models", "model_folder", "runtime"},
    "hasher": GROUND | {"data", "heads", "models", "model_folder", "training", "runtime"},
    "plots": GROUND | {"data"},
    "tasks": GROUND | {"data", "models", "runtime", "hasher"},
    "evaluation": GROUND | {"data", "hasher"},
    "collection": GROUND | {"indexes", "data", "stores", "model_folder", "hasher", "evaluation"},
    "client": GROUND | {"data"},
    "service": GROUND | {"data", "collection", "tasks"},
    "cli": GROUND | {"indexes", "data", "heads", "models", "model_folder", "training", "hasher", "plots", "tasks"}
    | {"evaluation", "collection", "client", "service"},
    "__init__": {"process", "errors", "results", "hasher", "collection", "client"},
}  # fmt: skip


def python(code: str, *arguments: str, **environment: str) -> str:
    """Return the output of code in a new Python process outside the checkout, which imports nothing else."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd="/", env=inherited | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", FORBIDDEN)
def test_a_room_loads_no_more_than_it_may(module: str) -> None:
    if module.startswith("hashret.service"):
        pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")
    # Numba imports coverage.py where it is installed, which imports sqlite3.
    loaded = set(python(f"import sys; sys.modules['coverage'] = None; import {module}; print(*sys.modules)").split())
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
    """Return the packages of hashret that a file imports anywhere."""
    tree = ast.parse(file.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert not {name for name in names if name.split(".")[0] in ("cli", "indexes", "tests")}, file
    assert "hashret" not in names, f"{file}: import hashret"
    found = {name.split(".")[1] for name in names if name.startswith("hashret.")}
    return {hashret._MODULES[name].split(".")[1] if name in hashret._MODULES else name for name in found}


def files_of(room: str) -> list[Path]:
    base = ROOT / room if room in ("cli", "indexes") else ROOT / "hashret" / room
    files = sorted(base.glob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    return [*files, ROOT / "hashret/__main__.py"] if room == "cli" else files


def test_every_file_belongs_to_a_room_of_the_table() -> None:
    tracked = [ROOT / "hashret" / name for name in ("cli", "indexes")]  # which are links
    files = {file for file in (ROOT / "hashret").rglob("*.py") if not set(tracked) & {*file.parents}}
    files |= {*(ROOT / "cli").rglob("*.py"), *(ROOT / "indexes").rglob("*.py")}
    assert files == {file for room in ROOMS for file in files_of(room)}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted(["hashret", *(f"hashret.{room}" for room in ROOMS if len(files_of(room)) > 1)])


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    assert files_of(room)
    for file in files_of(room):
        assert imported(file) - {room} <= ROOMS[room], file


def test_only_stores_know_sqlite() -> None:
    outside = [file for room in ROOMS if room != "stores" for file in files_of(room)]
    assert len(outside) > 100
    for file in outside:
        text = file.read_text()
        modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        modules |= {a.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for a in node.names}
        assert not {module.split(".")[0] for module in modules if module} & {"sqlite3", "sqlite_utils"}, file
        assert "items.db" not in text, file


def test_the_house_has_few_rooms_and_floors() -> None:
    floors: dict[str, int] = {}
    for room in ROOMS:  # a room is one floor above all that it may import, which comes before it
        below = {other for file in files_of(room) for other in imported(file)} - {room}
        floors[room] = 1 + max((floors[other] for other in below), default=0)
    assert len(ROOMS) <= 24 and max(floors.values()) <= 10


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
    """Build a wheel from a copy of the checkout without symbolic links, which some checkouts lack; return its path."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("hashret", "cli", "indexes"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for link in (folder / "hashret/cli", folder / "hashret/indexes"):
        assert link.is_symlink()
        link.unlink()
    build = [sys.executable, "-m", "build", "--wheel"]
    has_setuptools = (
        importlib.util.find_spec("setuptools") is not None and int(version("setuptools").split(".")[0]) >= 77
    )
    done = subprocess.run(
        [*build, *(["--no-isolation"] if has_setuptools else [])], cwd=folder, capture_output=True, text=True
    )
    if done.returncode and not has_setuptools and "No matching distribution" in done.stdout + done.stderr:
        pytest.skip("setuptools 77 is not installed, and no package index is available")
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


def test_the_wheel_works_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import hashret, hashret.cli.app, hashret.indexes, sys\n"
        "print(hashret.__file__, hashret.cli.__file__, hashret.indexes.__file__)\n"
        "assert hashret.cli.app.run(['--version']) == 0 and 'cli' not in sys.modules"
    )
    out = python(code, PYTHONPATH=str(tmp_path))
    paths = [tmp_path / "hashret" / name / "__init__.py" for name in ("", "cli", "indexes")]
    assert out.split()[:3] == [str(path) for path in paths]


def test_editors_find_the_links_that_they_need() -> None:
    for name in ("cli", "indexes"):
        assert os.readlink(ROOT / "hashret" / name) == f"../{name}"  # noqa: PTH115  # as it is written
    assert not (ROOT / "tests/__init__.py").exists()
