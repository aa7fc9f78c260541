"""Kernels compiled once per machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ASK = """
import json, sys, time
import numpy as np
from hashret.indexes import BitFlipIndex, FaissIndex, jit
index = BitFlipIndex(64)
codes = np.arange(3000 * 8, dtype=np.uint32).astype(np.uint8).reshape(3000, 8)
index.add(codes, np.arange(3000))
index.search(codes[:2], 3), index.within(codes[:2], 3)
kernels = [module for name, module in sys.modules.items() if name.startswith("hashret.indexes.kernels")]
compiled = {id(k): k for module in kernels for k in vars(module).values() if hasattr(k, "stats")}.values()
print(json.dumps({
    "file": jit.__file__,
    "folder": jit.CACHE_FOLDER,
    "misses": sum(sum(kernel.stats.cache_misses.values()) for kernel in compiled),
    "hits": sum(sum(kernel.stats.cache_hits.values()) for kernel in compiled),
    "heavy": [name for name in ("torch", "sqlite3", "faiss") if name in sys.modules],
}))
"""


def ask(package: Path, cache: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(package), "XDG_CACHE_HOME": str(cache)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-c", ASK]
    run = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def test_kernels_are_compiled_once_per_machine_and_again_when_any_source_changes(tmp_path: Path) -> None:
    import hashret

    home = Path(hashret.__file__).parent
    package = tmp_path / "package" / "hashret"
    (package / "indexes").mkdir(parents=True)
    for source in [*home.glob("*.py"), *home.glob("indexes/*.py")]:
        (package / source.relative_to(home)).write_bytes(source.read_bytes())
    for folder in (package / "indexes", package):
        folder.chmod(0o555)  # as installed for all users
    first, second = (ask(package.parent, tmp_path / "cache") for _ in range(2))
    assert Path(first["file"]).is_relative_to(package)
    assert first["misses"] > 0 and first["folder"].startswith(str(tmp_path / "cache"))
    assert second["misses"] == 0 and second["hits"] > 0 and second["heavy"] == []
    assert not list(package.rglob("__pycache__"))
    (package / "indexes").chmod(0o755)
    with (package / "indexes" / "kernels.py").open("a") as kernels:
        kernels.write("\nEDITED = True\n")
    assert ask(package.parent, tmp_path / "cache")["folder"] != first["folder"]
