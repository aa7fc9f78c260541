"""The examples of the documentation, and a way to run them as a reader would.

Every ```console and ```python block of a page is run, page after page from the top, unless a comment right before it
says why not: `<!-- not run: REASON -->`. Output lines that a console block shows must be those that come, number for
number, or in all but their numbers under `<!-- numbers vary -->`; `...` stands for any lines.
"""

import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from hashret.cli.app import run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HOME, ADDRESS = "/home/ada", "http://127.0.0.1:8000"  # as the documentation has them
STEPS = "3"  # training steps, instead of the documented budget


class Block(NamedTuple):
    """A fenced block of code and the comment before it."""

    line: int
    language: str
    text: str
    comment: str

    @property
    def is_run(self) -> bool:
        return not self.comment.startswith("not run: ")


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = page.read_text("utf-8")
    pattern = r"(?:^<!-- ([^\n]*) -->\n\n?)?^([ ]*)```(\w*)\n(.*?)^\2```$"
    return [
        Block(text[: match.start(3)].count("\n") + 1, match[3], match[4], match[1] or "")
        for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


class Reader:
    """Runs the blocks of a page in the working directory; `serve` serves its collection and returns the address."""

    def __init__(self, home: Path, serve: Callable[[], str]) -> None:
        self._home, self._serve = home, serve
        self._address = ADDRESS
        self._names: dict[str, Any] = {"__name__": "__main__"}

    def read(self, page: Path) -> None:
        for block in blocks(page):
            if block.is_run and block.language == "console":
                self._run_console(f"{page.name}:{block.line}", block)
            elif block.is_run and block.language == "python":
                text = block.text.replace(ADDRESS, self._address)
                text = re.sub(r"(budget|steps)=[^,)]+", f"steps={STEPS}", text)
                exec(compile(text, f"{page.name}:{block.line}", "exec"), self._names)

    def _run_console(self, name: str, block: Block) -> None:
        for command, expected in commands(block.text):
            output = self._run(command)
            output = output.replace(str(self._home), HOME).replace(self._address, ADDRESS)
            output = output.replace(f", {STEPS} steps, seed", ", budget 20 s, seed")
            check_lines(f"{name}: {command}\n{output}", expected, output.splitlines(), "numbers vary" in block.comment)

    def _run(self, command: str) -> str:
        """Run a command line, check that it succeeds, and return its output."""
        command = command.replace(ADDRESS, self._address)
        if command.startswith("cd "):
            os.chdir(command.split()[1])
            return ""
        if variable := re.match(r"(\w+)=(\S+) (?=hashret )", command):
            with patch.dict(os.environ, {variable[1]: variable[2].replace(HOME, str(self._home))}):
                return self._run(command[variable.end() :])
        if not command.startswith("hashret "):
            return _shell(command)
        command, _, pipe = command.partition(" | ")
        command, out, source = _redirected(command)
        words = shlex.split(command, comments=True)[1:]
        if words[0] == "serve":
            self._address = self._serve() if words == ["serve"] else self._address
            return ""
        output, messages = io.StringIO(), io.StringIO()
        stdin = io.TextIOWrapper(io.BytesIO(Path(source).read_bytes() if source else b""))
        with redirect_stdout(output), redirect_stderr(messages if pipe or out else output), patch("sys.stdin", stdin):
            code = run(quick(words))
        assert code == 0, f"{command}: exit {code}\n{output.getvalue()}{messages.getvalue()}"
        if out:
            Path(out).write_text(output.getvalue())
            return messages.getvalue()
        return _shell(pipe, output.getvalue()) if pipe else output.getvalue()


def _redirected(command: str) -> tuple[str, str, str]:
    """Return a command line without its redirection, the output file and the input file; "" for none."""
    redirection = re.search(r" ([<>]) (\S+)$", command)
    if redirection is None:
        return command, "", ""
    files = redirection[2] if redirection[1] == ">" else "", redirection[2] if redirection[1] == "<" else ""
    return command[: redirection.start()], *files


def quick(words: list[str]) -> list[str]:
    """Return the command line with a training of a few steps instead of minutes."""
    if words[0] == "demo":
        return [*words, "--budget", "1s"]
    if words[0] != "train" or "--steps 0" in " ".join(words):
        return words
    lengths = ("--budget", "--steps")
    kept = [word for i, word in enumerate(words) if word not in lengths and words[i - 1] not in lengths]
    return [*kept, "--steps", STEPS]


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the command lines of a console block, each with its output lines."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *lines = part.replace("\\\n", " ").splitlines()
        while lines and not lines[-1].strip():
            lines.pop()
        yield command, lines


def check_lines(name: str, expected: list[str], found: list[str], numbers_vary: bool) -> None:
    """Fail unless the lines found are those expected, in order; with none expected, anything goes."""
    position = 0
    for i, line in enumerate(expected):
        if line.strip() == "...":
            continue
        same = [j for j in range(position, len(found)) if _plain(found[j], numbers_vary) == _plain(line, numbers_vary)]
        assert same, f"{name}\nlacks the line: {line}"
        assert same[0] == position or (i and expected[i - 1].strip() == "..."), f"{name}\nis not in order at: {line}"
        position = same[0] + 1
    complete = not expected or expected[-1].strip() == "..." or position == len(found)
    assert complete, f"{name}\nshows more lines than the documentation has"


def _plain(line: str, numbers_vary: bool) -> str:
    if numbers_vary:
        line = re.sub(r"\b[0-9a-f]{16,}\b|\d[\d,.:]*", "#", line)
        line = re.sub(r"# (bit|group|image|item|path)s?\b", r"# \1", line)  # 1 bit, 2 bits
    return " ".join(line.split())


def _shell(command: str, text: str = "") -> str:
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is not installed")
    program = subprocess.run(
        ["sh", "-c", command], input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    assert program.returncode == 0, f"{command}: exit {program.returncode}\n{program.stdout}"
    return program.stdout
