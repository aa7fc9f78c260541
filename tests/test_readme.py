"""The README and the pages on models and make targets agree with the code; test_docs.py runs their examples."""

import re

from documented import ROOT, blocks

from hashret.heads import HEADS
from hashret.models import MODELS
from hashret.models.likelihoods import LIKELIHOODS
from hashret.models.networks import NETWORKS

README, FAMILY = ROOT / "README.md", ROOT / "docs/concepts/family.md"


def test_the_readme_shows_two_commands_and_the_same_in_python() -> None:
    console, python = (block for block in blocks(README) if block.language in ("console", "python"))
    assert console.text.splitlines() == ["$ hashret index photos/", "$ hashret query cat.png"]
    assert 'budget="2m"' in python.text and console.is_run and python.is_run


def test_the_readme_is_a_screen_and_a_half() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 110


def test_every_number_of_the_readme_names_its_command() -> None:
    rows = re.findall(r"^\| .*\*\*.*$", README.read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 8
    for row in rows:
        command = row.split("|")[-2]
        scripts = re.findall(r"`python (benchmarks/\w+\.py)", command)
        assert command.strip() == "the same" or (all((ROOT / script).is_file() for script in scripts) and scripts), row


def test_every_member_and_part_is_in_the_tables() -> None:
    listed = set(re.findall(r"`([^`\s]+)`", FAMILY.read_text("utf-8")))
    assert listed >= {*MODELS, *LIKELIHOODS, *HEADS, *NETWORKS}


def test_make_knows_every_target_that_is_named() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for page in (README, ROOT / "CONTRIBUTING.md"):
        targets = set(re.findall(r"`make ([\w-]+)`", page.read_text("utf-8")))
        assert {"demo", "test"} <= targets
        for target in targets:
            assert re.search(rf"^(\S+ )?{target}( \S+)?:", makefile, re.MULTILINE), target
