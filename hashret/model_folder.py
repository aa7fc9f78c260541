"""The folder that holds a model: `config.json`, `model.safetensors` and a model card, written, read and checked without
PyTorch. It is a file format."""

import hashlib
import inspect
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hashret.durable import make_folder_durably, replace_durably
from hashret.errors import HashretError, one_line

FORMAT = 1  # of the model folder and of what its codes mean
FILES = {"config.json", "model.safetensors", "README.md"}
MAX_CONFIG = 2**24  # bytes; a long training has a curve of a few thousand
MAX_DIM = 2**32  # of a tensor
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
UNREADABLE = (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError)  # what a damage may raise

Tensors = Mapping[str, NDArray[Any]]
T = TypeVar("T")


class Kind(NamedTuple):
    """The shape of a tensor and its type, by NumPy's name."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"({self.shape}, torch.{self.dtype})"


def fingerprint_of(description: Mapping[str, Any], tensors: Tensors) -> str:
    """SHA-256, in hex, over what `config.json` says of the model, without the training, and over its tensors."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for part in tensor_bytes(tensors):
        digest.update(part)
    return digest.hexdigest()


def write_model(path: str | os.PathLike[str], config: Mapping[str, Any], tensors: Tensors) -> None:
    """Write a model folder, whole or not at all; raises HashretError where something else is in its place."""
    target = Path(os.path.abspath(path))  # noqa: PTH100  # unlike Path.absolute it takes "." and ".."
    if target.exists() and not (target.is_dir() and _holds_only_a_model(target)):
        raise HashretError(f"{target} exists and is no model folder: choose another place")
    make_folder_durably(target.parent)
    written, old = (target.with_name(f"{target.name}.{os.getpid()}.{suffix}") for suffix in ("new", "old"))
    shutil.rmtree(written, ignore_errors=True)  # of a process that was killed, and had the same number
    try:
        written.mkdir()
        (written / "model.safetensors").write_bytes(save(dict(tensors)))
        (written / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (written / "README.md").write_text(_card(config), "utf-8", "surrogateescape")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.replace(old)
        replace_durably(written, target)
    finally:
        if old.exists() and not target.exists():
            old.replace(target)
        shutil.rmtree(written, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
    except UNREADABLE as error:
        raise damaged_model(folder, error) from None


def damaged_model(folder: Path, error: Exception) -> HashretError:
    """The error for a model folder that is not what was saved."""
    return HashretError(f"the model in {folder} is damaged ({one_line(error)}): restore it or train again")


class StoredTensors:
    """The tensors of a model folder: what they claim to be, which is checked before any of them is read."""

    def __init__(self, folder: Path) -> None:
        """Raises one of `UNREADABLE` where the file is missing or no such file."""
        file = folder / "model.safetensors"
        if file.exists() and not file.is_file():  # a pipe, which would keep us waiting
            raise ValueError("model.safetensors is no file")
        with file.open("rb") as opened:
            # The library only takes paths that are UTF-8, as this one is of whatever file.
            stored: Any = safe_open(f"/dev/fd/{opened.fileno()}" if _has_odd_name(file) else str(file), "np")
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
            self.kinds = {name: _kind(part.get_shape(), part.get_dtype()) for name, part in slices.items()}
            self._stored = stored

    def check(self, expected: Mapping[str, Kind]) -> None:
        """Raises ValueError unless these are the tensors, by their claims."""
        for name in sorted(expected.keys() | self.kinds.keys()):
            found, right = self.kinds.get(name), expected.get(name)
            if found != right:
                raise ValueError(f"{name} is {found}, not {right}")

    def read(self, prefix: str) -> dict[str, NDArray[Any]]:
        """The tensors whose names begin with `prefix`, by the rest of their names."""
        names = [name for name in self.kinds if name.startswith(prefix)]
        for name in names:
            if math.prod(self.kinds[name].shape) > MAX_DIM:
                raise ValueError(f"{name} is {self.kinds[name]}, which is too large")
        return below(prefix, {name: self._stored.get_tensor(name) for name in names})


def check_numbers(tensors: Tensors, positive: Collection[str]) -> None:
    """Raises ValueError for numbers that are not finite, or in the tensors of these names not positive."""
    for name, tensor in sorted(tensors.items()):
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} has numbers that are not finite")
        if name in positive and not (tensor > 0).all():
            raise ValueError(f"{name} has numbers that are not positive")


def below(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """The entries whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _kind(shape: list[int], dtype: str) -> Kind:
    """From safetensors' names: F32, I64, U8, BOOL, BF16 …"""
    letters = dtype.rstrip("0123456789")
    named = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}.get(letters, letters.lower())
    return Kind(tuple(shape), named + dtype.removeprefix(letters))


def _has_odd_name(file: Path) -> bool:
    return os.fsencode(file).decode(errors="ignore") != str(file)


def _holds_only_a_model(folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()}
    return not names or {"config.json", "model.safetensors"} <= names <= FILES


def _card(config: Mapping[str, Any]) -> str:
    """The model card that lies beside the weights."""
    from hashret.data.preprocessing import describe  # late: it loads Pillow

    def table(rows: dict[str, Any]) -> str:
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])

    takes = describe(config["preprocessing"])
    others = "others cannot be coded" if "numbers" in config["preprocessing"] else "others are cropped and resized"
    measured = {name: value for name, value in config["training"].items() if name != "curve"}
    labels = "The" if "classes" in config["training"] else "No"
    return inspect.cleandoc(
        f"""
        # {config["model"]}, {config["bits"]} bits

        A [hashret](https://pypi.org/project/hashret/) model: it turns {takes} ({others}) into binary codes of
        {config["bits"]} bits, through the member `{config["model"]}` and the head `{config["head"]}`. It knows only
        what is like its training data. {labels} labels were used.

            hashret reindex .       # code a collection with this model
        """
    ) + (
        f"\n\n## Settings\n\n{table(config['settings'])}\n\n"
        f"## Training and measurements\n\n{table(measured)}\n\n"
        f"Fingerprint `{config['fingerprint']}`\n"
    )


def tensor_bytes(tensors: Mapping[str, NDArray[Any]]) -> Iterator[bytes]:
    """The name, type, shape and contents of each tensor, in the order of their names: what digests of models and
    checkpoints are taken of, as part of their formats. Types go by PyTorch's names."""
    for name, tensor in sorted(tensors.items()):
        yield f"{name} torch.{tensor.dtype.name} {list(tensor.shape)}\n".encode()
        yield np.ascontiguousarray(tensor).tobytes()
