"""Archives of image files, .zip and .tar, read in place: nothing is extracted.

An archive may be hostile. At most `MAX_BYTES` of a member are read, whatever its header claims. Members that share
their bytes and headers that point backwards are refused: with them a small file could unpack for days.
"""

import contextlib
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Self

from hashret.data.arrays import translate_errors
from hashret.data.contents import MAX_BYTES, too_large
from hashret.data.records import Record, Source, absolute, is_image, label_of
from hashret.errors import HashretError, one_line
from hashret.results import Root


class Zip(Source):
    """The images in a .zip, in the order of their names. `zipfile` keeps the directory in memory."""

    def __init__(self, path: Path) -> None:
        self.root = Root.of_archive(absolute(path))
        with translate_errors(path):
            self._mtime_ns = path.stat().st_mtime_ns
            self._zip = zipfile.ZipFile(path)
            _check_overlaps(self._zip.infolist())
        # zipfile raises on a member without a name.
        files = {i.filename.removeprefix("./"): i for i in self._zip.infolist() if i.filename and not i.is_dir()}
        self._members = {name: files[name] for name in sorted(files) if is_image(name)}
        self._ignored = len(files) - len(self._members)
        self.length = len(self._members)

    def __iter__(self) -> Iterator[Record]:
        self.ignored = self._ignored
        for name, info in self._members.items():
            yield self._record(name, info)

    def find(self, name: str) -> Record | None:
        info = self._members.get(name)
        return None if info is None else self._record(name, info)

    def _record(self, name: str, info: zipfile.ZipInfo) -> Record:
        return Record(name, info.file_size, self._mtime_ns, label_of(name), partial(self._read, info))

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        _check_member(info.file_size)
        if info.flag_bits & 1:
            raise HashretError("cannot be read: encrypted")
        try:
            with self._zip.open(info) as file:
                return file.read(MAX_BYTES + 1)
        except Exception as error:  # zipfile and the decompressors raise many exception types for broken members
            raise HashretError(f"broken in the archive: {one_line(error)}") from None


def _check_overlaps(members: list[zipfile.ZipInfo]) -> None:
    """Raise HashretError if two members share bytes of the archive."""
    members = sorted(members, key=lambda info: info.header_offset)
    for info, following in pairwise(members):
        if info.header_offset + info.compress_size > following.header_offset:
            raise HashretError(f"{info.filename!r} and {following.filename!r} lie in the same bytes of the archive")


class _Header(tarfile.TarInfo):
    """A member header that is refused if its size is negative or its extended data is too large for memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDED and header.size > 2**18):
            raise tarfile.HeaderError(f"a header of {header.size} bytes")
        return header


_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class Tar(Source):
    """The images in a .tar, compressed or not, in archive order. Each pass reads the archive once, front to back."""

    streaming = True

    def __init__(self, path: Path) -> None:
        self.root = Root.of_archive(absolute(path))
        self._path = path
        self._current: tarfile.TarInfo | None = None
        with translate_errors(path), tarfile.open(path, tarinfo=_Header):
            self._mtime_ns = path.stat().st_mtime_ns

    def __iter__(self) -> Iterator[Record]:
        self.ignored = last_offset = 0
        with translate_errors(self._path), contextlib.closing(tarfile.open(self._path, tarinfo=_Header)) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                if archive.offset <= last_offset:  # an extended header can give the member a negative size
                    raise HashretError(f"{self._path} is broken: the header of {member.name!r} points backwards")
                last_offset = archive.offset
                name = member.name.removeprefix("./")
                if member.isdir():
                    continue
                if not is_image(name):
                    self.ignored += 1
                    continue
                self._current = member
                yield Record(name, member.size, self._mtime_ns, label_of(name), partial(self._read, archive, member))
                self._current = None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise HashretError(f"{self._path} is broken: the bytes after its last image are not a tar header")

    def _read(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        if member is not self._current or archive.closed:  # type: ignore[attr-defined]  # unknown to typeshed
            raise ValueError("a record of a .tar must be read before the next one is requested")
        _check_member(member.size)
        if not member.isreg():
            raise HashretError("cannot be read: it is a link or a device, not a regular file")
        try:
            with archive.extractfile(member) as file:  # type: ignore[union-attr]  # a regular file has one
                # In blocks: read() of a whole sparse member takes quadratic time.
                return b"".join(iter(partial(file.read, 2**20), b""))
        except Exception as error:  # as in Zip._read
            raise HashretError(f"broken in the archive: {one_line(error)}") from None


def _check_member(size: int) -> None:
    if size > MAX_BYTES:
        raise HashretError(too_large(size))
