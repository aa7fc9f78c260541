import json
from pathlib import Path

from command_line import Command, files_in, photos


def test_remove_takes_paths_folders_items_and_filters(folder: Path, hashret: Command) -> None:
    zeros = sorted((folder / "photos/0").iterdir())
    paths = "".join(f"{path}\n" for path in zeros)
    counts = f"{len(zeros)} paths and {len(zeros)} items; your files are untouched\n"
    before = files_in(folder)
    assert hashret("remove", "photos/0", "--dry-run") == (0, paths, f"would remove {counts}")
    assert hashret("remove", "--where", "label = '0'", "--dry-run", "-q") == (0, paths, "")
    assert files_in(folder) == before
    assert hashret("remove", "photos/0") == (0, paths, f"removed {counts}")
    assert hashret("remove", "photos/0").err == "removed 0 paths and 0 items; your files are untouched\n"
    last = hashret("query", "id:20", "--where", "id = 40", "--paths").out.strip()
    result = hashret("remove", "id:40", "photos/3/03.png", "id:40", "none", "--json", "-q")
    assert json.loads(result.out) == {"items": 2, "paths": [f"{folder}/photos/3/03.png", last], "dry_run": False}
    assert result.err == ""
    assert json.loads(hashret("info", "--json").out)["items"] == 40 - len(zeros) - 2
    assert hashret("remove", "id:20").err == "removed 1 path and 1 item; your files are untouched\n"
    assert all((folder / "photos" / name).read_bytes() == data for name, data in photos().items())
