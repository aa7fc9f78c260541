"""What a model folder says of its model: `config.json`, checked, and read without PyTorch."""

import json
from pathlib import Path
from typing import Any

from hashret.errors import HashretError, one_line

FORMAT = 1  # of the model folder and of what its codes mean
MAX_CONFIG = 2**24  # bytes; a long training has a curve of a few thousand
FIELDS = {
    "format": int,
    "model": str,
    "bits": int,
    "head": str,
    "settings": dict,
    "preprocessing": dict,
    "training": dict,
    "fingerprint": str,
}


def read_config(folder: Path) -> dict[str, Any]:
    """All fields of the model in a folder; raises HashretError if there is none, or it is damaged or too new."""
    file = folder / "config.json"
    try:
        if not file.is_file():
            raise HashretError(f"{folder} is no model folder: make one with hashret train SOURCE -o {folder}")
        if file.stat().st_size > MAX_CONFIG:
            raise ValueError(f"config.json of {file.stat().st_size} bytes")
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if config["format"] > FORMAT:
            raise HashretError(f"{folder} was made by a newer hashret: upgrade hashret to read it")
        if config["format"] != FORMAT:
            raise ValueError(f"format {config['format']!r}")
        for name, kind in FIELDS.items():
            if not isinstance(config[name], kind):
                raise TypeError(f"{name} is {config[name]!r}")
        return config
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise damaged_model(folder, error) from None


def damaged_model(folder: Path, error: Exception) -> HashretError:
    """The error for a model folder that is not what was saved."""
    return HashretError(f"the model in {folder} is damaged ({one_line(error)}): restore it or train again")
