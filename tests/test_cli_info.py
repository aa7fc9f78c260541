import json
import re
from pathlib import Path

from command_line import Command


def test_info_shows_a_collection(folder: Path, hashret: Command) -> None:
    result = hashret("info", "--json", "-q")
    info = json.loads(result.out)
    assert list(info) == [
        "path", "items", "paths", "failures", "model", "head", "bits", "fingerprint", "preprocessing", "training",
        "index", "generation", "bytes_on_disk", "bytes_per_item", "health",
    ]  # fmt: skip
    assert result.err == "" and info["path"] == str(folder / ".hashret")
    assert (info["items"], info["paths"], info["failures"], info["bits"]) == (40, 40, 0, 32)
    result = hashret("info")
    assert result.code == 0 and result.err == ""
    assert f"collection  {folder}/.hashret\nitems       40 under 40 paths; 0 files could not be read\n" in result.out
    assert re.search(
        r"\nhealth +\d+ distinct codes, largest bucket \d+ items?, \d+ dead bits?, balance \d+%\n", result.out
    )
    assert re.search(r"\non disk +\d+\.\d MB, [\d,]+ bytes per item\n", result.out)
