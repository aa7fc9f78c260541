"""The folder of a model, which is a file format: `config.json`, `model.safetensors` and a model card. It is written,
read and checked without PyTorch."""

import hashlib
import inspect
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hashret.durable import Replacement, make_folder_durably, restore
from hashret.errors import HashretError, one_line

FORMAT = 1  # of the model folder and of codes
FILES = {"config.json", "model.safetensors", "README.md"}
MAX_CONFIG = 2**24  # bytes; the curve of a long training has a few thousand
MAX_TENSOR_VALUES = 2**32
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
UNREADABLE = (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError)  # raised for damaged files

Tensors = Mapping[str, NDArray[Any]]
T = TypeVar("T")


class TensorSpec(NamedTuple):
    """The shape of a tensor, and NumPy's name of its dtype."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"({self.shape}, torch.{self.dtype})"


def fingerprint_of(description: Mapping[str, Any], tensors: Tensors) -> str:
    """Return the SHA-256, in hex, of a model's description (`config.json` without the training) and its tensors."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for part in tensor_bytes(tensors):
        digest.update(part)
    return digest.hexdigest()


def write_model(path: str | os.PathLike[str], config: Mapping[str, Any], tensors: Tensors) -> None:
    """Write a model folder atomically, in place of an older one. Raise HashretError if `path` is anything else."""
    target = Path(os.path.abspath(path))  # noqa: PTH100  # unlike Path.absolute it takes "." and ".."
    if target.exists() and not (target.is_dir() and _contains_only_a_model(target)):
        raise HashretError(f"{target} exists and is no model folder: choose another path")
    make_folder_durably(target.parent)
    with Replacement(target, folder=True) as new:
        (new.path / "model.safetensors").write_bytes(save(dict(tensors)))
        (new.path / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (new.path / "README.md").write_text(_card(config), "utf-8", "surrogateescape")
        new.commit()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's `config.json`. Raise HashretError if it is missing, damaged or too new."""
    file = folder / "config.json"
    try:
        restore(folder)
        if not file.is_file():
            raise HashretError(f"{folder} is no model folder: make one with hashret train SOURCE -o {folder}")
        if file.stat().st_size > MAX_CONFIG:
            raise ValueError(f"config.json of {file.stat().st_size} bytes")
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if config["format"] > FORMAT:
            raise HashretError(f"{folder} was made by a newer hashret: upgrade hashret to read it")
        if config["format"] != FORMAT:
            raise ValueError(f"format {config['format']!r}")
        for name, expected in FIELDS.items():
            if not isinstance(config[name], expected):
                raise TypeError(f"{name} is {config[name]!r}")
        return config
    except UNREADABLE as error:
        raise damaged_model(folder, error) from None


def damaged_model(folder: Path, error: Exception) -> HashretError:
    """Return the error for a model folder whose contents have changed."""
    return HashretError(f"the model in {folder} is damaged ({one_line(error)}): restore it or train again")


class StoredTensors:
    """The tensors of a model folder. Their `specs` are read from the header, and checked before any data is read."""

    def __init__(self, folder: Path) -> None:
        """Open the file. Raise one of `UNREADABLE` if it is missing or not a safetensors file."""
        file = folder / "model.safetensors"
        if file.exists() and not file.is_file():  # a pipe would block
            raise ValueError("model.safetensors is no file")
        with file.open("rb") as opened:
            # The library only accepts paths that are UTF-8, as that of an open file in /dev/fd is.
            stored: Any = safe_open(f"/dev/fd/{opened.fileno()}" if _has_odd_name(file) else str(file), "np")
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
            self.specs = {name: _spec(part.get_shape(), part.get_dtype()) for name, part in slices.items()}
            self._stored = stored

    def check(self, expected: Mapping[str, TensorSpec]) -> None:
        """Raise ValueError unless the specs are the expected ones."""
        for name in sorted(expected.keys() | self.specs.keys()):
            if self.specs.get(name) != expected.get(name):
                raise ValueError(f"{name} is {self.specs.get(name)}, not {expected.get(name)}")

    def read(self, prefix: str) -> dict[str, NDArray[Any]]:
        """Return the tensors whose names begin with `prefix`, by the rest of their names."""
        names = [name for name in self.specs if name.startswith(prefix)]
        for name in names:
            if math.prod(self.specs[name].shape) > MAX_TENSOR_VALUES:
                raise ValueError(f"{name} is {self.specs[name]}, which is too large")
        return strip_prefix(prefix, {name: self._stored.get_tensor(name) for name in names})


def check_values(tensors: Tensors, positive: Collection[str]) -> None:
    """Raise ValueError for numbers that are not finite, or not positive in the tensors named in `positive`."""
    for name, tensor in sorted(tensors.items()):
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} has numbers that are not finite")
        if name in positive and not (tensor > 0).all():
            raise ValueError(f"{name} has numbers that are not positive")


def strip_prefix(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the entries whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _spec(shape: list[int], dtype: str) -> TensorSpec:
    """Return the spec of a dtype by safetensors' name: F32, I64, U8, BOOL, BF16 …"""
    letters = dtype.rstrip("0123456789")
    name = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}.get(letters, letters.lower())
    return TensorSpec(tuple(shape), name + dtype.removeprefix(letters))


def _has_odd_name(file: Path) -> bool:
    return os.fsencode(file).decode(errors="ignore") != str(file)


def _contains_only_a_model(folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()}
    return not names or {"config.json", "model.safetensors"} <= names <= FILES


def _card(config: Mapping[str, Any]) -> str:
    """Return the model card."""
    from hashret.data.preprocessing import describe  # late, because it imports Pillow

    def table(rows: dict[str, Any]) -> str:
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])

    inputs = describe(config["preprocessing"])
    others = "others cannot be encoded" if "numbers" in config["preprocessing"] else "others are cropped and resized"
    measured = {name: value for name, value in config["training"].items() if name != "curve"}
    labels = "The" if "classes" in config["training"] else "No"
    return inspect.cleandoc(
        f"""
        # {config["model"]}, {config["bits"]} bits

        A [hashret](https://pypi.org/project/hashret/) model: it turns {inputs} ({others}) into binary codes of
        {config["bits"]} bits, with the member `{config["model"]}` and the head `{config["head"]}`. Its codes are good
        only for inputs similar to its training data. {labels} labels were used.

            hashret reindex .       # encode a collection with this model
        """
    ) + (
        f"\n\n## Settings\n\n{table(config['settings'])}\n\n"
        f"## Training and measurements\n\n{table(measured)}\n\n"
        f"Fingerprint `{config['fingerprint']}`\n"
    )


def tensor_bytes(tensors: Mapping[str, NDArray[Any]]) -> Iterator[bytes]:
    """Yield the name, dtype (by PyTorch's name), shape and contents of each tensor, sorted by name.

    The digests of models and checkpoints are those of these bytes, which are therefore part of their formats.
    """
    for name, tensor in sorted(tensors.items()):
        yield f"{name} torch.{tensor.dtype.name} {list(tensor.shape)}\n".encode()
        yield np.ascontiguousarray(tensor).tobytes()
