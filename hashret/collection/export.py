"""Items as a file: JSON Lines, Parquet and NumPy arrays, which can be imported again without a loss.

JSON Lines begin with an object that says of which model the codes are, `{"hashret": 1, "fingerprint": …, "bits": …}`;
every other line is an item: `id`, `sha256`, `code` in hex, `width`, `height`, `bytes`, `added`, `metadata` and `paths`,
each of which has a `root`, `name`, `label`, `size` and `mtime_ns`. Parquet has the same names as columns, `code` as
bytes, `metadata` and `paths` as JSON, and the first object in its schema. A `.npz` has the arrays `codes`, `ids`,
`paths`, the first path of each item, and `fingerprint`; beside them lie the lines, without codes, as `items.jsonl`.

That is every item whole. What is not of the items is in none of them: the model, which is a folder of its own, the
contents themselves, those without files neither, verdicts, failures and calibration.
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
from hashret.durable import replace_durably
from hashret.errors import HashretError, one_line
from hashret.parallel import batches
from hashret.results import BLOBS
from hashret.stores.protocol import ItemRow, ModelKey

FORMATS = {"jsonl": ".jsonl", "numpy": ".npz", "parquet": ".parquet"}
VERSION = 1
ROW_GROUP = 50_000
MAX_ID = 2**53  # far from the highest that SQLite has, after which there would be no other
_MAX = 2**63
_SHA256 = re.compile("[0-9a-f]{64}")
_LINES = "items.jsonl"  # in a .npz
_Item = dict[str, Any]  # with the names above; code as bytes, metadata and paths as they are

_Reading = Generator[_Item, None, None]


def format_of(path: Path, named: str | None = None) -> str:
    """The format with this name, or else the one that the path's suffix stands for; ValueError if there is none."""
    found = named or next((kind for kind, suffix in FORMATS.items() if path.suffix.lower() == suffix), path.name)
    if found not in FORMATS:
        raise ValueError(f"{found!r} is no format: choose {', '.join(FORMATS)}")
    return found


def write(path: Path, kind: str, header: ModelKey, contents: Iterable[ItemRow]) -> int:
    """Write a file of contents that come by ascending id, whole or not at all; how many items it has."""
    written = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        count = _WRITERS[kind](written, header, _items(contents))
        replace_durably(written, path)
    finally:
        written.unlink(missing_ok=True)
    return count


def read(path: Path) -> tuple[ModelKey, Iterator[ItemRow]]:
    """Which model a file's codes are of, and its contents, path for path.

    Raises HashretError, now or while they are read, if it is not one that `write` could have made.
    """
    kind = format_of(path)
    with _plain_errors(path):
        items = _READERS[kind](path)
        record = next(items)
        if record.get("hashret") != VERSION:
            raise ValueError("it was not written by hashret export, or by a newer one")
        header = ModelKey(str(record["fingerprint"]), check_bits(record["bits"]))
    return header, _contents(path, header, items)


def _contents(path: Path, header: ModelKey, items: _Reading) -> Iterator[ItemRow]:
    with _plain_errors(path), closing(items):
        for item in items:
            try:
                yield from _checked(item, header.bits)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"item {item.get('id')}: {one_line(error)}") from None


def _items(contents: Iterable[ItemRow]) -> Iterator[_Item]:
    for item_id, same in groupby(contents, key=lambda content: content.id):
        several = list(same)
        first = several[0]
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
                {"root": c.root, "name": c.name, "label": c.label, "size": c.size, "mtime_ns": c.mtime_ns}
                for c in several
            ],
        }


def _checked(item: _Item, bits: int) -> Iterator[ItemRow]:
    """The contents of an item, a path each; raises ValueError, KeyError or TypeError for what cannot be."""
    digest, code, metadata = item["sha256"], item["code"], item["metadata"]
    numbers = {name: item[name] for name in ("id", "width", "height", "bytes")}
    if not _SHA256.fullmatch(digest) or len(code) != bits // 8 or not item["paths"]:
        raise ValueError("it needs a SHA-256, a code of as many bits as the first line says, and a path")
    if not 0 < item["id"] < MAX_ID:
        raise ValueError("its id is none that a collection gives")
    metadata = None if metadata is None else check_metadata(metadata)
    for path in item["paths"]:
        root, name, label = path["root"], path["name"], path["label"]
        for number in (*numbers.values(), path["size"], path["mtime_ns"]):
            if type(number) is not int or not -_MAX <= number < _MAX:
                raise ValueError(f"{number!r} is no whole number of 64 bits")
        if not (root and name) or "\0" in root + name + (label or "") + item["added"]:
            raise ValueError("it has a path or text that cannot be")
        if root == BLOBS and name != digest:
            raise ValueError("a content without a file lies under its SHA-256")
        os.fsencode(root + name + (label or ""))
        yield ItemRow(
            root,
            name,
            label,
            path["size"],
            path["mtime_ns"],
            digest,
            numbers["bytes"],
            numbers["width"],
            numbers["height"],
            code,
            metadata,
            item["added"],
            numbers["id"],
        )


def _write_jsonl(path: Path, header: ModelKey, items: Iterator[_Item]) -> int:
    with path.open("wb") as file:
        return _write_lines(file, header, (item | {"code": item["code"].hex()} for item in items))


def _read_jsonl(path: Path) -> _Reading:
    with path.open("rb") as file, closing(_read_lines(file)) as lines:
        yield next(lines, {})
        for item in lines:
            yield item | {"code": bytes.fromhex(item["code"])}


def _write_lines(file: IO[bytes], header: ModelKey, items: Iterable[_Item]) -> int:
    """JSON writes everything but ASCII, bytes of paths too, in ASCII."""
    count = 0
    file.write(json.dumps({"hashret": VERSION, **header._asdict()}).encode() + b"\n")
    for count, item in enumerate(items, 1):  # noqa: B007  # how many it was
        file.write(json.dumps(item).encode() + b"\n")
    return count


def _read_lines(file: Iterable[bytes]) -> _Reading:
    for number, line in enumerate(file, 1):
        item = json.loads(line)
        if not isinstance(item, dict):
            raise ValueError(f"line {number} is no JSON object")
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
        with file.open(_LINES, "w", force_zip64=True) as lines:
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


def _read_numpy(path: Path) -> _Reading:
    try:
        with zipfile.ZipFile(path) as file:
            if _LINES not in file.namelist():
                raise ValueError(f"it has no {_LINES}, as hashret export writes it now: export again")
            with file.open("codes.npy") as member:
                codes = np.lib.format.read_array(member, allow_pickle=False)
            with file.open(_LINES) as member, closing(_read_lines(member)) as lines:
                yield next(lines, {})
                if codes.dtype != np.uint8 or codes.ndim != 2:
                    raise ValueError(f"codes are {codes.dtype} {codes.shape}, not uint8 (n, bits // 8)")
                for item, code in zip(lines, codes, strict=True):
                    yield item | {"code": code.tobytes()}
    except (zipfile.BadZipFile, zlib.error, EOFError, MemoryError, NotImplementedError, RuntimeError) as error:
        raise ValueError(one_line(error)) from None


def _write_parquet(path: Path, header: ModelKey, items: Iterator[_Item]) -> int:
    pa, parquet = _pyarrow()
    kinds = {"id": pa.int64(), "sha256": pa.string(), "code": pa.binary(), "width": pa.int64(), "height": pa.int64()}
    kinds |= {"bytes": pa.int64(), "added": pa.string(), "metadata": pa.string(), "paths": pa.string()}
    metadata = {"hashret": json.dumps({"hashret": VERSION, **header._asdict()})}
    schema = pa.schema(list(kinds.items()), metadata=metadata)
    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for some in batches(items, ROW_GROUP):
            count += len(some)
            rows = [
                item | {name: None if item[name] is None else json.dumps(item[name]) for name in ("metadata", "paths")}
                for item in some
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return count


def _read_parquet(path: Path) -> _Reading:
    pa, parquet = _pyarrow()
    try:
        with path.open("rb") as raw, parquet.ParquetFile(raw) as file:
            yield json.loads((file.schema_arrow.metadata or {}).get(b"hashret", b"{}"))
            for some in file.iter_batches(1000):
                for item in some.to_pylist():
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
_READERS: dict[str, Callable[[Path], _Reading]] = {
    "jsonl": _read_jsonl,
    "numpy": _read_numpy,
    "parquet": _read_parquet,
}


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Say what is wrong with a file that is being read."""
    try:
        yield
    except OSError as error:
        raise HashretError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        raise HashretError(f"{path} cannot be imported: {one_line(error)}") from None
