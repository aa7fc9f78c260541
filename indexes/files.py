"""The file format of saved indexes: a checked header, then plain little-endian arrays that can be mapped.

8 bytes   magic, the last one the version
4 bytes   length of the header (uint32)
4 bytes   CRC-32 of the header
header    JSON: kind, settings, and each array's name, dtype, shape, offset and CRC-32
arrays    each from a multiple of 64 bytes on, with zeros up to the next; the CRC-32 covers both
"""

import json
import mmap
import os
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashret.errors import HashretError

MAGIC = b"hashret\x02"
_ALIGN = 64
_PRELUDE = len(MAGIC) + 8

Arrays = dict[str, NDArray[Any]]


def write(path: str | os.PathLike[str], kind: str, settings: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Save arrays so that `path` holds either what it held before or all of them, whatever happens meanwhile."""
    path = Path(path)
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    plain = {name: array.astype(array.dtype.newbyteorder("<"), copy=False) for name, array in plain.items()}
    entries = [
        {"name": name, "dtype": array.dtype.str, "shape": list(array.shape), "crc": _crc(array)}
        for name, array in plain.items()
    ]
    header = json.dumps({"kind": kind, "settings": settings, "arrays": entries}).encode()
    header += b" " * (-(_PRELUDE + len(header)) % _ALIGN)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(MAGIC + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little") + header)
            for array in plain.values():
                file.write(array.reshape(-1).view(np.uint8).data)
                file.write(bytes(-array.nbytes % _ALIGN))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: str | os.PathLike[str], kind: str, verify: bool) -> tuple[dict[str, Any], Arrays]:
    """The settings and read-only arrays saved at `path`, mapped into memory; only the header is read unless `verify`.

    Raises HashretError, naming the file, if it is no index of this kind, is truncated, or (with `verify`) was altered.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prelude = file.read(_PRELUDE)
        if prelude[:7] != MAGIC[:7]:
            raise HashretError(f"{path} is not a saved index; save one there with index.save")
        if prelude[:8] != MAGIC:
            raise HashretError(f"{path} was saved by another version of hashret; build the index again")
        header = file.read(int.from_bytes(prelude[8:12], "little"))
        if len(prelude) < _PRELUDE or zlib.crc32(header) != int.from_bytes(prelude[12:16], "little"):
            raise damaged(path, "its header does not match its checksum")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    fields = json.loads(header)
    if fields["kind"] != kind:
        raise HashretError(f"{path} holds a {fields['kind']} index, not {kind}; load it with the class that saved it")
    arrays: Arrays = {}
    offset = _PRELUDE + len(header)
    for entry in fields["arrays"]:
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        end = offset + count * dtype.itemsize + -(count * dtype.itemsize) % _ALIGN
        if end > size:
            raise damaged(path, "it is truncated")
        if verify and zlib.crc32(memoryview(content)[offset:end]) != entry["crc"]:
            raise damaged(path, f"{entry['name']} does not match its checksum")
        arrays[entry["name"]] = np.frombuffer(content, dtype, count, offset).reshape(shape)
        offset = end
    if offset != size:
        raise damaged(path, "it is longer than it was")
    return fields["settings"], arrays


def damaged(path: str | os.PathLike[str], reason: str) -> HashretError:
    """The error for a file that is not what was saved."""
    return HashretError(f"{path} is damaged: {reason}; delete it and build the index again")


def _crc(array: NDArray[Any]) -> int:
    return zlib.crc32(bytes(-array.nbytes % _ALIGN), zlib.crc32(array.reshape(-1).view(np.uint8).data))
