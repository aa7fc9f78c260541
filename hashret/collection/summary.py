"""What a collection holds, in figures."""

from pathlib import Path
from typing import Any

from hashret.collection.parts import Parts
from hashret.evaluation.measures import health
from hashret.model_folder import read_config

HEALTH_CODES = 1_000_000  # whose health is looked at


def summary(parts: Parts) -> dict[str, Any]:
    """Counts, model, index, size on disk and health of the codes, of at most a million of them."""
    folder = parts.originals.folder
    on_disk = sum(map(_size, folder.rglob("*")))
    with parts.store.snapshot() as rows:
        settings, items = rows.settings, rows.count("items")
        config = read_config(parts.models.folder / settings.model.fingerprint)
        _, codes = rows.codes(max_items=HEALTH_CODES)
        return {
            "path": str(folder),
            "items": items,
            "paths": rows.count("paths"),
            "failures": rows.count("failures"),
            "model": config["model"],
            "head": config["head"],
            "bits": settings.model.bits,
            "fingerprint": settings.model.fingerprint,
            "preprocessing": config["preprocessing"],
            "training": config["training"],
            "index": settings.index,
            "generation": settings.generation,
            "bytes_on_disk": on_disk,
            "bytes_per_item": on_disk / items if items else 0.0,
            "health": health(codes)._asdict(),
        }


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:  # a writer has just replaced it
        return 0
