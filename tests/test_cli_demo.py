import json
import re
import shlex
from pathlib import Path

import pytest
from command_line import Command, check_failed, files_in
from PIL import Image

from hashret.cli.demo import NOTE


def test_the_demo_ends_with_a_query_to_paste(tmp_path: Path, hashret: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HASHRET_COLLECTION", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/.hashret").mkdir(parents=True)
    (tmp_path / "mine/.hashret/items.db").write_bytes(b"precious")
    check_failed(hashret("demo", "--out", "mine"), 1, "mine holds files that hashret demo did not make: choose another")
    assert files_in(tmp_path) == {"mine/.hashret/items.db": b"precious"}
    (tmp_path / "a demo/.hashret").mkdir(parents=True)  # of an earlier demo that was interrupted
    (tmp_path / "a demo/README.txt").write_text(NOTE)
    (tmp_path / "a demo/.hashret/items.db").write_bytes(b"")
    result = hashret("demo", "--budget", "1s", "--out", "a demo")
    assert result.code == 0
    steps = [line[:2] for line in result.err.splitlines() if line[:1].isdigit()]
    assert steps == ["1.", "2.", "3.", "4."]
    assert "1,597 images indexed. Precision at 10: " in result.out
    hits = re.findall(r"^ *\d+  a demo/photos/\d/\d+\.png$", result.out.replace(f"{tmp_path}/", ""), re.MULTILINE)
    assert len(hits) == 10
    with Image.open("a demo/neighbours.png") as sheet:
        sheet.verify()
    for line in (result.out.splitlines()[-1], result.err.splitlines()[-2].removeprefix("4. ")):
        program, *words = shlex.split(line)
        pasted = hashret(*words)
        assert program == "hashret" and pasted.code == 0 and len(pasted.out.splitlines()) == 10
    assert json.loads(hashret("info", "-c", "a demo/.hashret", "--json").out)["items"] > 1500
