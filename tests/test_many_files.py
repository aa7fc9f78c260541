"""A folder of many files, half of which are links to others: 3,000, and 100,000 with HASHRET_SOAK=1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from hashret.collection import Collection
from hashret.hasher import Hasher

FILES = 100_000 if "HASHRET_SOAK" in os.environ else 3000
MAX_MEMORY = 2**30 + 5000 * FILES  # bytes of the process, which has loaded PyTorch and the kernels
SCRIPT = """
import json
from pathlib import Path
from hashret.collection import Collection

with Collection.open("c") as collection:
    report = collection.index("photos", prune=True)
    # Not ru_maxrss, which includes the memory of the parent before exec.
    peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    print(json.dumps([report.added, report.unchanged, report.removed, report.failed, len(collection), peak]))
"""


def test_a_folder_is_indexed_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(0, FILES, 2):
        path = tmp_path / "photos" / f"{i // 1000:03}" / f"{i:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
        os.link(path, path.with_name(f"{i:06}-link.png"))
    Collection.create(tmp_path / "c", Hasher("lsh", 32).fit(rng.integers(0, 256, (100, 8, 8), np.uint8))).close()

    def index() -> list[int]:
        done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counts: list[int]
        *counts, peak = json.loads(done.stdout)
        assert peak < MAX_MEMORY
        return counts

    assert index() == [FILES, 0, 0, 0, FILES // 2]
    path.unlink()
    assert index() == [0, FILES - 1, 1, 0, FILES // 2]  # its link still has the item
