"""The file format of saved indexes: a header with a checksum, then little-endian arrays that can be mapped.

8 bytes   magic, the last byte is the version
4 bytes   length of the header (uint32)
4 bytes   CRC-32 of the header
header    JSON: kind, settings, and the name, dtype, shape and CRC-32 of each array; padded with spaces
arrays    each begins at a multiple of 64 bytes and is padded with zeros; the CRC-32 covers the padding
"""

import json
import mmap
import os
import zlib
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from hashret.durable import Replacement
from hashret.errors import HashretError

MAGIC = b"hashret\x06"
_ALIGN = 64
_PRELUDE = len(MAGIC) + 8
_HEADER = 8192  # bytes reserved for prelude and header, which are written last

# The names in files of the fields of `Segment`, where they differ: they are part of the format.
_STORED_NAMES = {
    "shared_ranks": "shared",
    "shared_offsets": "starts",
    "tombstones": "dead",
    "layout": "cuts",
    "bucket_ranks": "marks",
    "bucket_offsets": "bounds",
    "signatures": "sifts",
    "pivots": "centres",
    "member_offsets": "begins",
}

Arrays = dict[str, NDArray[Any]]


def array_name(segment: str, field: str) -> str:
    """Return the name in files of a field of a segment, which files call "base" (main) or "tail" (delta)."""
    return f"{segment}.{_STORED_NAMES.get(field, field)}"


class Writer:
    """Writes an index array by array, whole or in blocks, so that no array has to fit in memory.

    `with Writer(path, backend) as writer:` replaces the file at `path` when `finish` returns, and leaves it as it is if
    that does not happen.
    """

    def __init__(self, path: str | os.PathLike[str], backend: str) -> None:
        self._backend = backend
        self._replacement = Replacement(Path(path))
        self._entries: dict[str, dict[str, Any]] = {}
        self._begins: dict[str, int] = {}  # offset of each array in the file

    def __enter__(self) -> Self:
        self._replacement.__enter__()
        self._file = self._replacement.path.open("wb")
        self._file.seek(_HEADER)
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._file.close()
        finally:
            self._replacement.__exit__(*error)

    def write(self, name: str, blocks: Iterable[NDArray[Any]]) -> None:
        """Write an array from at least one block, which are consecutive along the first axis."""
        begin, rows, crc = self._file.tell(), 0, 0
        for block in blocks:
            array = np.ascontiguousarray(block)
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            content = array.reshape(-1).view(np.uint8).data
            self._file.write(content)
            crc, rows, dtype, shape = zlib.crc32(content, crc), rows + len(array), array.dtype, array.shape
        padding = bytes(-(self._file.tell() - begin) % _ALIGN)
        self._file.write(padding)
        self._entries[name] = {
            "name": name,
            "dtype": dtype.str,
            "shape": [rows, *shape[1:]],
            "crc": zlib.crc32(padding, crc),
        }
        self._begins[name] = begin

    def read(self, name: str, begin: int, end: int) -> NDArray[Any]:
        """Return rows begin ... end - 1 of an array that has been written, read-only."""
        self._file.flush()
        entry = self._entries[name]
        dtype, columns = np.dtype(entry["dtype"]), entry["shape"][1:]
        row = int(np.prod(columns, dtype=np.int64))
        offset = self._begins[name] + begin * row * dtype.itemsize
        flat: NDArray[Any] = np.fromfile(self._replacement.path, dtype, (end - begin) * row, offset=offset)
        flat.flags.writeable = False
        return flat.reshape(end - begin, *columns)

    def mapped(self, name: str) -> NDArray[Any]:
        """Return an array that has been written, mapped into memory, read-only."""
        entry = self._entries[name]
        if not all(entry["shape"]):
            return self.read(name, 0, entry["shape"][0])
        self._file.flush()
        array = np.memmap(self._replacement.path, entry["dtype"], "r", self._begins[name], tuple(entry["shape"]))
        return np.asarray(array)

    def finish(self, settings: Mapping[str, Any]) -> None:
        """Write the header, and rename the file to `path` when all is on the disk."""
        fields = {"kind": self._backend, "settings": settings, "arrays": list(self._entries.values())}
        header = json.dumps(fields).encode().ljust(_HEADER - _PRELUDE)
        if len(header) > _HEADER - _PRELUDE:
            raise ValueError(f"a header of {len(header)} bytes is too long")
        self._file.seek(0)
        self._file.write(MAGIC + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little") + header)
        self._file.flush()
        self._replacement.commit()


def read(
    path: str | os.PathLike[str], backend: str, verify: bool, random_access: Container[str] = ()
) -> tuple[dict[str, Any], Arrays]:
    """Return the settings and read-only arrays saved at `path`, mapped into memory; read all of it only with `verify`.

    Readahead is turned off for the arrays named in `random_access`: of a file larger than memory it would evict pages
    that are needed again.

    Raise HashretError, naming the file, if it is no `backend` index, is truncated, or (with `verify`) was altered.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        fields, offset = _read_header(file, path)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if fields["kind"] != backend:
        raise HashretError(
            f"{path} holds a {fields['kind']} index, not {backend}; load it with the class that saved it"
        )
    arrays: Arrays = {}
    for entry in fields["arrays"]:
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        end = offset + count * dtype.itemsize + -(count * dtype.itemsize) % _ALIGN
        if end > size:
            raise damaged_file(path, "it is truncated")
        if verify and zlib.crc32(memoryview(content)[offset:end]) != entry["crc"]:
            raise damaged_file(path, f"{entry['name']} does not match its checksum")
        arrays[entry["name"]] = np.frombuffer(content, dtype, count, offset).reshape(shape)
        begin, length = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, end - offset - mmap.PAGESIZE
        if entry["name"] in random_access and length > 0 and hasattr(mmap, "MADV_RANDOM"):
            content.madvise(mmap.MADV_RANDOM, begin, length)
        offset = end
    if offset != size:
        raise damaged_file(path, "it is longer than its header says")
    return fields["settings"], arrays


def _read_header(file: BinaryIO, path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """Return the fields of the header, and the offset of the arrays."""
    prelude = file.read(_PRELUDE)
    if prelude[:7] != MAGIC[:7]:
        raise HashretError(f"{path} is not a saved index; save one there with index.save")
    if prelude[:8] != MAGIC:
        raise HashretError(f"{path} was saved by another version of hashret; build the index again")
    header = file.read(int.from_bytes(prelude[8:12], "little"))
    if len(prelude) < _PRELUDE or zlib.crc32(header) != int.from_bytes(prelude[12:16], "little"):
        raise damaged_file(path, "its header does not match its checksum")
    return json.loads(header), _PRELUDE + len(header)


def damaged_file(path: str | os.PathLike[str], reason: str) -> HashretError:
    """Return the error for a damaged index file."""
    return HashretError(f"{path} is damaged: {reason}; delete it and build the index again")
