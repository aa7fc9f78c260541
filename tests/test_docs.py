"""The documentation is tested: its examples run, its links lead somewhere, and its reference is complete."""

import importlib.util
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from documented import PAGES, ROOT, Reader, blocks

import hashret
from hashret.cli.app import run
from hashret.collection import Collection
from hashret.hasher import Hasher

DOCS = ROOT / "docs"
SITE, QUICKSTART = ROOT / "mkdocs.yml", DOCS / "quickstart.md"
EXTERNAL = re.compile(r"https?://|mailto:")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def module(path: str) -> ModuleType:
    """Import a file of the project that is not part of the package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def rendered(page: Path) -> str:
    """Return the Markdown of a page with everything that is inserted when the site is built."""
    text = page.read_text("utf-8")
    text = re.sub(r'^--8<-- "(.*)"$', lambda match: (ROOT / match[1]).read_text("utf-8"), text, flags=re.MULTILINE)
    return str(module("docs/hooks.py").on_page_markdown(text))


def prose(text: str) -> str:
    """Markdown without code."""
    return re.sub(r"^([ ]*)```.*?^\1```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page: its headings, as in MkDocs, and the objects that mkdocstrings shows."""
    text = rendered(page)
    without_code = re.sub(r"^([ ]*)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)
    slugs = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[\s-]+", "-", slug) for slug in slugs} | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8")))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder where `hashret demo` has run, with a short training."""
    folder = tmp_path_factory.mktemp("ada").resolve()
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run(["demo", "--quiet", "--budget", "1s"]) == 0
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def demo(home: Path) -> Path:
    """Return the folder of the demo, with a copy of its collection beside it, and a cat and a dog."""
    folder = home / "hashret-demo"
    shutil.copytree(folder / ".hashret", home / "collection")
    (folder / "cat.png").symlink_to("queries/3/0003.png")
    (folder / "dog.png").symlink_to("queries/5/0005.png")
    return folder


@pytest.fixture
def reader(demo: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """Return a reader that runs pages in the unchanged folder of the demo."""
    files = set(demo.iterdir())
    monkeypatch.chdir(demo)
    monkeypatch.delenv("HASHRET_COLLECTION", raising=False)
    opened: list[Collection] = []

    def serve_here() -> str:
        opened.append(Collection.open(".hashret"))
        return serve(opened[0], host="127.0.0.1")

    yield Reader(demo.parent, serve_here)
    for collection in opened:
        collection.close()
    for path in set(demo.iterdir()) - files:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(demo / ".hashret")
    shutil.copytree(demo.parent / "collection", demo / ".hashret")


@pytest.mark.parametrize("page", [page for page in PAGES if page != QUICKSTART], ids=name_of)
def test_the_examples_of_a_page_run(page: Path, reader: Reader) -> None:
    reader.read(page)


def test_the_quick_start_runs_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Reader(tmp_path, lambda: pytest.fail("nothing is served")).read(QUICKSTART)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_stand_in_blocks_that_run(page: Path) -> None:
    for block in blocks(page):
        if block.language not in ("console", "python"):
            assert not re.search(r"^\$? ?hashret ", block.text, re.MULTILINE), (
                f"{page}:{block.line} is no console block"
            )
        if not block.is_run:
            assert block.comment.removeprefix("not run:").strip(), f"{page}:{block.line} gives no reason"


def test_the_navigation_lists_every_page() -> None:
    listed = re.findall(r"^ +- .*: (\S+\.md)$", SITE.read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))], ids=name_of
)
def test_every_internal_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if EXTERNAL.match(link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.is_file(), f"{page.name}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {link} is no heading of {path.name}"


def test_the_reference_has_every_command_and_option() -> None:
    text = rendered(DOCS / "reference/cli.md")
    sections = set(re.findall(r"^## (hashret .*)$", text, re.MULTILINE))
    from hashret.cli.app import COMMANDS

    abilities = {f"hashret model {name}" for name in ("reconstruct", "denoise", "upscale", "sample", "plot")}
    assert sections == {f"hashret {name}" for name in COMMANDS} | abilities
    assert "| `--where SQL` |" in text and "label = 'cat'" in text


def test_the_reference_has_every_public_name() -> None:
    shown = "\n".join(page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md"))
    identifiers = re.findall(r"^::: (\S+)$", shown, re.MULTILINE)
    for name in set(hashret.__all__) - {"__version__"}:
        member = getattr(hashret, name)
        assert f"{member.__module__}.{name}" in identifiers or f"hashret.{name}" in identifiers, name
    for identifier in identifiers:
        assert is_documented(identifier), identifier


def is_documented(identifier: str) -> bool:
    """Return whether a name of the reference exists, and has a docstring if it is a class or a function."""
    module, _, name = identifier.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    return bool(inspect.getdoc(found)) if inspect.isclass(found) or inspect.isfunction(found) else True


def test_the_site_loads_nothing_from_another_host() -> None:
    settings = SITE.read_text("utf-8")
    assert "\n  font: false" in settings and not EXTERNAL.search(settings)
    for page in PAGES:
        text = page.read_text("utf-8")
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(img|script|link|iframe)\b", text), page


def test_every_picture_is_used() -> None:
    used = {(page.parent / link).resolve() for page in PAGES for link in links(page) if link.endswith(".png")}
    assert used == {path.resolve() for path in DOCS.rglob("*.png")}


def test_the_hasher_of_the_examples_is_the_default(demo: Path) -> None:
    with Collection.open(demo / ".hashret", read_only=True) as photos:
        assert photos.hasher.model == Hasher().model


def test_the_page_of_retrieval_quality_is_written_from_its_rows() -> None:
    quality = module("benchmarks/quality.py")
    done = quality.load(ROOT / "benchmarks/quality.json")
    missing = [row for row in quality.plan(None) if str(row) not in done]
    assert quality.page(list(done.values()), missing) == (DOCS / "quality.md").read_text("utf-8")


def test_the_figures_of_the_threat_model_are_limits_and_name_tests() -> None:
    from hashret.data import images
    from hashret.service import http11, load, memory, messages, server

    text = (ROOT / "SECURITY.md").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    defined = {
        name
        for file in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)
    }
    assert named and named <= defined
    figures = [
        f"{http11.MAX_CONNECTIONS:,}, or the limit of open files less {http11.RESERVED_FILES};",
        f"{http11.MAX_HEAD_BYTES // 2**10} KiB of URL and headers, {http11.MAX_HEADERS} headers",
        f"{server.IDLE_SECONDS:.0f} s without a request, {server.UPLOAD_SECONDS:.0f} s for a body, "
        f"{server.DOWNLOAD_SECONDS:.0f} s to read",
        f"{http11.MAX_READ_BYTES // 2**10} KiB of one client at a time",
        f"{load.MAX_IN_FLIGHT}; beyond that 503",
        f"{memory.MAX_REQUEST_BYTES // 2**20} MiB for a body, {memory.MAX_BYTES_IN_FLIGHT // 2**20} MiB for all, and "
        f"{memory.SMALL_BYTES // 2**10} KiB for each",
        f"{messages.MAX_JSON_BYTES // 2**10} KiB, which",
        f"{images.MAX_PIXELS // 10**6} megapixels",
        f"ends the process within {server.SHUTDOWN_SECONDS:.0f} seconds",
    ]
    assert [figure for figure in figures if figure not in text] == []
