"""Export of items to JSON Lines, Parquet or NumPy arrays, and lossless import.

The first line of JSON Lines is a header with the model of the codes, `{"hashret": 1, "fingerprint": …, "bits": …}`.
Every other line is an item: `id`, `sha256`, `code` in hex, `width`, `height`, `bytes`, `added`, `metadata` and `paths`,
each of which has a `root`, `name`, `label`, `size` and `mtime_ns`. Parquet has the same names as columns, with `code`
as bytes, `metadata` and `paths` as JSON, and the header in its schema. A `.npz` has the arrays `codes`, `ids`, `paths`
(the first path of each item) and `fingerprint`, and the lines without codes as `items.jsonl`.

An export contains every item completely. It contains neither the model, which is a folder of its own, nor the contents,
not even those without files, nor verdicts, failures and calibration.
"""

import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hashret.codes import check_bits
from hashret.data.metadata import check_metadata
from hashret.durable import Replacement
from hashret.errors import HashretError, one_line
from hashret.parallel import batches
from hashret.results import BLOBS
from hashret.stores.protocol import ItemRow, ModelKey

FORMATS = {"jsonl": ".jsonl", "numpy": ".npz", "parquet": ".parquet"}
VERSION = 1
ROW_GROUP = 50_000
MAX_ID = 2**53  # far below SQLite's highest id, after which it could assign no other
_INT64_LIMIT = 2**63
_SHA256 = re.compile("[0-9a-f]{64}")
_LINES_NAME = "items.jsonl"  # in a .npz
_Item = dict[str, Any]  # with the keys above; code as bytes, metadata and paths as Python values

_ItemGenerator = Generator[_Item, None, None]


def format_of(path: Path, name: str | None = None) -> str:
    """Return `name` if it is given, else the format of the path's suffix; raise ValueError if there is none."""
    if name is not None:
        if name not in FORMATS:
            raise ValueError(f"{name!r} is not a format: choose {', '.join(FORMATS)}")
        return name
    for file_format, suffix in FORMATS.items():
        if path.suffix.lower() == suffix:
            return file_format
    raise ValueError(f"{path.name}: the suffix must be {', '.join(FORMATS.values())}")


def write(path: Path, file_format: str, header: ModelKey, rows: Iterable[ItemRow]) -> int:
    """Write rows, ordered by id, to a file, atomically; return the number of items."""
    with Replacement(path) as new:
        count = _WRITERS[file_format](new.path, header, _items(rows))
        new.commit()
    return count


def read(path: Path) -> tuple[ModelKey, Iterator[ItemRow]]:
    """Return the model of a file's codes, and an iterator over its rows, one for each path.

    Raise HashretError, also during iteration, for a file that `write` cannot have written.
    """
    file_format = format_of(path)
    with _reported_errors(path):
        items = _READERS[file_format](path)
        record = next(items)
        if record.get("hashret") != VERSION:
            raise ValueError("it was not written by hashret export, or by a newer one")
        header = ModelKey(str(record["fingerprint"]), check_bits(record["bits"]))
    return header, _rows(path, header, items)


def _rows(path: Path, header: ModelKey, items: _ItemGenerator) -> Iterator[ItemRow]:
    with _reported_errors(path), closing(items):
        for item in items:
            try:
                yield from _item_rows(item, header.bits)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"item {item.get('id')}: {one_line(error)}") from None


def _items(rows: Iterable[ItemRow]) -> Iterator[_Item]:
    for item_id, group in groupby(rows, key=lambda row: row.id):
        item_rows = list(group)
        first = item_rows[0]
        yield {
            "id": item_id,
            "sha256": first.sha256,
            "code": first.code,
            "width": first.width,
            "height": first.height,
            "bytes": first.length,
            "added": first.added,
            "metadata": first.metadata,
            "paths": [
                {"root": r.root, "name": r.name, "label": r.label, "size": r.size, "mtime_ns": r.mtime_ns}
                for r in item_rows
            ],
        }


def _item_rows(item: _Item, bits: int) -> Iterator[ItemRow]:
    """Iterate over the rows of an item, one for each path; raise ValueError, KeyError or TypeError if it is invalid."""
    digest, code, metadata = item["sha256"], item["code"], item["metadata"]
    integers = {name: item[name] for name in ("id", "width", "height", "bytes")}
    if not _SHA256.fullmatch(digest) or len(code) != bits // 8 or not item["paths"]:
        raise ValueError("it needs a SHA-256, a code of as many bits as the first line says, and a path")
    if not 0 < item["id"] < MAX_ID:
        raise ValueError(f"its id is not between 1 and {MAX_ID - 1}")
    metadata = None if metadata is None else check_metadata(metadata)
    for path in item["paths"]:
        root, name, label = path["root"], path["name"], path["label"]
        for number in (*integers.values(), path["size"], path["mtime_ns"]):
            if type(number) is not int or not -_INT64_LIMIT <= number < _INT64_LIMIT:
                raise ValueError(f"{number!r} is not a 64-bit integer")
        if not (root and name) or "\0" in root + name + (label or "") + item["added"]:
            raise ValueError("it has an empty path, or a text with a zero character")
        if root == BLOBS and name != digest:
            raise ValueError("the name of a content without a file is not its SHA-256")
        os.fsencode(root + name + (label or ""))
        yield ItemRow(
            root,
            name,
            label,
            path["size"],
            path["mtime_ns"],
            digest,
            integers["bytes"],
            integers["width"],
            integers["height"],
            code,
            metadata,
            item["added"],
            integers["id"],
        )


def _write_jsonl(path: Path, header: ModelKey, items: Iterator[_Item]) -> int:
    with path.open("wb") as file:
        return _write_lines(file, header, (item | {"code": item["code"].hex()} for item in items))


def _read_jsonl(path: Path) -> _ItemGenerator:
    with path.open("rb") as file, closing(_read_lines(file)) as lines:
        yield next(lines, {})
        for item in lines:
            yield item | {"code": bytes.fromhex(item["code"])}


def _write_lines(file: IO[bytes], header: ModelKey, items: Iterable[_Item]) -> int:
    """Write lines as JSON in ASCII, which also escapes the undecodable bytes of paths."""
    count = 0
    file.write(json.dumps({"hashret": VERSION, **header._asdict()}).encode() + b"\n")
    for count, item in enumerate(items, 1):  # noqa: B007  # its last value is returned
        file.write(json.dumps(item).encode() + b"\n")
    return count


def _read_lines(file: Iterable[bytes]) -> _ItemGenerator:
    for number, line in enumerate(file, 1):
        item = json.loads(line)
        if not isinstance(item, dict):
            raise ValueError(f"line {number} is not a JSON object")
        yield item


def _write_numpy(path: Path, header: ModelKey, items: Iterator[_Item]) -> int:
    ids, codes, paths = list[int](), list[bytes](), list[str]()

    def without_codes() -> Iterator[_Item]:
        for item in items:
            ids.append(item["id"])
            codes.append(item.pop("code"))
            paths.append(item["paths"][0]["root"] + item["paths"][0]["name"])
            yield item

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open(_LINES_NAME, "w", force_zip64=True) as lines:
            count = _write_lines(lines, header, without_codes())
        arrays: dict[str, NDArray[Any]] = {
            "codes": np.frombuffer(b"".join(codes), np.uint8).reshape(count, header.bits // 8),
            "ids": np.array(ids, np.int64),
            "paths": np.array(paths, np.str_),
            "fingerprint": np.array(header.fingerprint),
        }
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return count


def _read_numpy(path: Path) -> _ItemGenerator:
    try:
        with zipfile.ZipFile(path) as file:
            if _LINES_NAME not in file.namelist():
                raise ValueError(f"it has no {_LINES_NAME}, as hashret export writes it now: export again")
            with file.open("codes.npy") as member:
                codes = np.lib.format.read_array(member, allow_pickle=False)
            with file.open(_LINES_NAME) as member, closing(_read_lines(member)) as lines:
                yield next(lines, {})
                if codes.dtype != np.uint8 or codes.ndim != 2:
                    raise ValueError(f"codes are {codes.dtype} {codes.shape}, not uint8 (n, bits // 8)")
                for item, code in zip(lines, codes, strict=True):
                    yield item | {"code": code.tobytes()}
    except (zipfile.BadZipFile, zlib.error, EOFError, MemoryError, NotImplementedError, RuntimeError) as error:
        raise ValueError(one_line(error)) from None


def _write_parquet(path: Path, header: ModelKey, items: Iterator[_Item]) -> int:
    pa, parquet = _pyarrow()
    types = {"id": pa.int64(), "sha256": pa.string(), "code": pa.binary(), "width": pa.int64(), "height": pa.int64()}
    types |= {"bytes": pa.int64(), "added": pa.string(), "metadata": pa.string(), "paths": pa.string()}
    metadata = {"hashret": json.dumps({"hashret": VERSION, **header._asdict()})}
    schema = pa.schema(list(types.items()), metadata=metadata)
    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for batch in batches(items, ROW_GROUP):
            count += len(batch)
            rows = [
                item | {name: None if item[name] is None else json.dumps(item[name]) for name in ("metadata", "paths")}
                for item in batch
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return count


def _read_parquet(path: Path) -> _ItemGenerator:
    pa, parquet = _pyarrow()
    try:
        with path.open("rb") as raw, parquet.ParquetFile(raw) as file:
            yield json.loads((file.schema_arrow.metadata or {}).get(b"hashret", b"{}"))
            for batch in file.iter_batches(1000):
                for item in batch.to_pylist():
                    yield item | {
                        "metadata": json.loads(item["metadata"] or "null"),
                        "paths": json.loads(item["paths"]),
                    }
    except pa.ArrowException as error:
        raise ValueError(one_line(error)) from None


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise HashretError("Parquet needs pyarrow: pip install 'hashret[parquet]', or choose jsonl") from None
    return pyarrow, pyarrow.parquet


_WRITERS: dict[str, Callable[[Path, ModelKey, Iterator[_Item]], int]] = {
    "jsonl": _write_jsonl,
    "numpy": _write_numpy,
    "parquet": _write_parquet,
}
_READERS: dict[str, Callable[[Path], _ItemGenerator]] = {
    "jsonl": _read_jsonl,
    "numpy": _read_numpy,
    "parquet": _read_parquet,
}


@contextmanager
def _reported_errors(path: Path) -> Iterator[None]:
    """Translate errors in the content of a file that is read into HashretError."""
    try:
        yield
    except OSError as error:
        raise HashretError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        raise HashretError(f"{path} cannot be imported: {one_line(error)}") from None
