"""Summarise a collection in figures."""

from pathlib import Path
from typing import Any

from hashret.collection.parts import Parts
from hashret.evaluation.measures import health
from hashret.model_folder import read_config

MAX_HEALTH_CODES = 1_000_000  # a larger collection is sampled


def summary(parts: Parts) -> dict[str, Any]:
    """Return counts, model, index, size on disk, and the health of the codes; see `Collection.info`."""
    folder = parts.originals.folder
    on_disk = sum(map(_size, folder.rglob("*")))
    with parts.store.snapshot() as snapshot:
        settings, items = snapshot.settings, snapshot.count("items")
        config = read_config(parts.models.folder / settings.model.fingerprint)
        _, codes = snapshot.codes(max_items=MAX_HEALTH_CODES)
        return {
            "path": str(folder),
            "items": items,
            "paths": snapshot.count("paths"),
            "failures": snapshot.count("failures"),
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
    except FileNotFoundError:  # replaced by a writer in the meantime
        return 0
