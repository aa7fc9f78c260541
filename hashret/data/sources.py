"""Where images, or vectors, come from: a folder, an archive, an IDX or NumPy file, an array, or a data set by name.

`open_source` makes of any of them the same thing: a stream of `Record`s in an order that never changes, which holds a
few images at a time however many there are. `in_order` decodes in parallel; `sample` chooses a model's images and how
they are prepared. What is read of a source is read in place: nothing is extracted, and nothing is unpickled.

The file is longer than most: each form of SOURCE is a class of its own, and `sample` is here because it decides what
a source is to a model.
"""

import contextlib
import os
import random
import statistics
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from hashret.data.arrays import (
    DATA_SETS,
    ImageArray,
    open_data_set,
    open_idx,
    open_npy,
    open_npz,
    open_plain_or_gzip,
    reading,
    rows_of,
)
from hashret.data.images import (
    MAX_BYTES,
    SUFFIXES,
    Content,
    Inputs,
    Preprocessing,
    decode,
    has_colour,
    read_file,
    resize,
    to_vector,
)
from hashret.data.vectors import NOT_FINITE, VectorPreprocessing
from hashret.errors import HashretError, one_line
from hashret.parallel import in_order
from hashret.results import Root

T = TypeVar("T")
R = TypeVar("R")


class Record(NamedTuple):
    """One image of a source: its name there, its size in bytes, and how to read it.

    `size` and `mtime_ns` stay the same while the image does. `read` raises HashretError, which is caused by an OSError
    where the image could not be read now but might be later.
    """

    name: str
    size: int
    mtime_ns: int
    label: str | None
    read: Callable[[], Content]


class Source:
    """A stream of records, the same at every pass: what every form of SOURCE is to the rest of hashret."""

    root: Root  # what is in front of a record's name in its full path
    ignored: int = 0  # files passed over in this pass, because of their suffix or because they are hidden
    streaming: bool = False  # a record must be read before the next is taken, and in the thread that iterates
    arrays: bool = False  # contents are arrays, with nothing to decode
    length: int | None = None  # number of records, where it is known beforehand
    numbers: int | None = None  # in every content, where they are vectors

    def __iter__(self) -> Iterator[Record]:
        raise NotImplementedError

    def find(self, name: str) -> Record | None:
        """The record of this name, already read if it must be; None if there is none."""
        for record in self:
            if record.name == name:
                return record._replace(read=partial(bytes, record.read())) if self.streaming else record
        return None


def open_source(
    source: "str | os.PathLike[str] | NDArray[Any] | Source",
    *,
    data_root: str | os.PathLike[str] | None = None,
    exclude: Path | None = None,
) -> Source:
    """The images of a folder, an archive, an IDX, .npy or .npz file, an array (n, h, w[, c]), or a data set by name; or
    the vectors of a .npy or .npz file or an array of floats (n, d), which become float32.

    Something that exists as a path is one; other text is looked up in `DATA_SETS`, alone or with `:train` or `:test`.
    torchvision's data sets are looked for in `data_root` (by default hashret's folder in the user's cache) and
    downloaded to it. The folder `exclude` is passed over. A `Source` is returned as it is. Raises HashretError for what
    is no source, and ValueError for an array that holds neither.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, np.ndarray):
        # An array has no date by which an unchanged one could be known: with this one, its contents are compared.
        return _Rows(Root.of_rows("array"), rows_of(source), time.time_ns())
    text = os.fspath(source)
    path = Path(text)
    if not text.strip():
        raise HashretError(f"SOURCE is empty: give {_KINDS}")
    try:
        if path.is_dir():
            return _Folder(path, exclude)
        if path.is_file():
            return _open_file(path)
        exists = path.exists()
    except OSError as error:
        raise HashretError(f"{text}: cannot be read: {error.strerror}") from error
    if exists:
        raise HashretError(f"{text} is neither a file nor a folder: give {_KINDS}")
    if text.partition(":")[0] in DATA_SETS:
        root = Path(data_root) if data_root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hashret"
        return _Rows(Root.of_rows(text), open_data_set(text, root.expanduser()), 0)
    raise HashretError(f"there is no {text!r}: give {_KINDS}")


_KINDS = (
    "a folder, an archive (.zip, .tar, .tar.gz), an IDX, .npy or .npz file, or a data set "
    f"({', '.join(DATA_SETS)}; :train or :test for a part)"
)


def _open_file(path: Path) -> Source:
    name = path.name.lower()
    if name.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        return _Tar(path)
    if name.endswith(".zip"):
        return _Zip(path)
    if path.suffix.lower() in SUFFIXES:
        raise HashretError(f"{path} is a single image: give the folder it lies in")
    with reading(path), open_plain_or_gzip(path) as file:
        is_idx = file.read(2) == b"\0\0"
    openers = {".npz": open_npz, ".npy": open_npy}
    if path.suffix.lower() not in openers and not is_idx:
        raise HashretError(f"{path} is no source of images: give {_KINDS}")
    opened = openers.get(path.suffix.lower(), open_idx)(path)
    return _Rows(Root.of_rows(_absolute(path)), opened, path.stat().st_mtime_ns)


class _Folder(Source):
    """Every image below a folder, by name; file links are read, links to folders are not followed."""

    def __init__(self, path: Path, exclude: Path | None) -> None:
        self.root = Root.of_folder(_absolute(path))
        self._exclude = exclude

    def __iter__(self) -> Iterator[Record]:
        self.ignored = 0
        stack = [iter([""])]
        while stack:
            name = next(stack[-1], None)
            if name is None:
                stack.pop()
            elif name and not name.endswith("/"):
                yield self._record(name)
            else:
                try:
                    stack.append(iter(self._list(name)))
                except OSError as error:
                    if not name:
                        raise HashretError(f"{self.root}: cannot be read: {error.strerror}") from error
                    yield Record(name, 0, 0, None, partial(_fail, error))  # else its images would seem to be gone

    def _list(self, folder: str) -> list[str]:
        """Names in a folder, sorted, those of folders with a final "/": so walked, whole names are in order too."""
        names = []
        with contextlib.suppress(OSError):
            if self._exclude and self._exclude.samefile(self.root + folder):
                return []
        with os.scandir(self.root + folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith("."):
                        names.append(f"{folder}{entry.name}/")
                elif _is_image(entry.name) and not entry.is_dir():
                    names.append(folder + entry.name)
                else:
                    self.ignored += 1
        return sorted(names)

    def _record(self, name: str) -> Record:
        path = self.root + name
        try:
            status = os.stat(path)  # noqa: PTH116  # once for each file: a Path would cost as much again
        except OSError:  # a link to nothing: reading it will say so
            return Record(name, 0, 0, _label(name), partial(read_file, path))
        return Record(name, status.st_size, status.st_mtime_ns, _label(name), partial(read_file, path))


class _Zip(Source):
    """The images in a .zip, by name; its directory is in memory, as `zipfile` has it."""

    def __init__(self, path: Path) -> None:
        self.root = Root.of_archive(_absolute(path))
        with reading(path):
            self._mtime_ns = path.stat().st_mtime_ns
            self._zip = zipfile.ZipFile(path)
            _check_apart(self._zip.infolist())
        named = [info for info in self._zip.infolist() if info.filename]  # zipfile fails on what has no name
        files = {info.filename.removeprefix("./"): info for info in named if not info.is_dir()}
        self._members = {name: files[name] for name in sorted(files) if _is_image(name)}
        self._passed_over = len(files) - len(self._members)
        self.length = len(self._members)

    def __iter__(self) -> Iterator[Record]:
        self.ignored = self._passed_over
        for name, info in self._members.items():
            yield self._record(name, info)

    def find(self, name: str) -> Record | None:
        info = self._members.get(name)
        return None if info is None else self._record(name, info)

    def _record(self, name: str, info: zipfile.ZipInfo) -> Record:
        return Record(name, info.file_size, self._mtime_ns, _label(name), partial(self._read, info))

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        _check_member(info.file_size)
        if info.flag_bits & 1:
            raise HashretError("cannot be read: encrypted")
        try:
            with self._zip.open(info) as file:
                return file.read(MAX_BYTES + 1)
        except Exception as error:  # zipfile and the compressors raise a dozen kinds for members that are broken
            raise HashretError(f"broken in the archive: {one_line(error)}") from None


def _check_apart(members: list[zipfile.ZipInfo]) -> None:
    """Raises HashretError if members share their bytes: a few megabytes could then be unpacked for days."""
    members = sorted(members, key=lambda info: info.header_offset)
    for here, there in pairwise(members):
        if here.header_offset + here.compress_size > there.header_offset:
            raise HashretError(f"{here.filename!r} and {there.filename!r} lie in the same bytes of the archive")


class _Header(tarfile.TarInfo):
    """A header that neither leads back to where the archive was read already, nor fills the memory with a name."""

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


class _Tar(Source):
    """The images in a .tar, compressed or not, in the order they lie there, read once from front to back."""

    streaming = True

    def __init__(self, path: Path) -> None:
        self.root = Root.of_archive(_absolute(path))
        self._path = path
        self._current: tarfile.TarInfo | None = None
        with reading(path), tarfile.open(path, tarinfo=_Header):
            self._mtime_ns = path.stat().st_mtime_ns

    def __iter__(self) -> Iterator[Record]:
        self.ignored = reached = 0
        with reading(self._path), contextlib.closing(tarfile.open(self._path, tarinfo=_Header)) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header it has seen
                if archive.offset <= reached:  # by an extended header's negative size
                    raise HashretError(f"{self._path} is broken: {member.name!r} leads back to what was read")
                reached = archive.offset
                name = member.name.removeprefix("./")
                if member.isdir():
                    continue
                if not _is_image(name):
                    self.ignored += 1
                    continue
                self._current = member
                yield Record(name, member.size, self._mtime_ns, _label(name), partial(self._read, archive, member))
                self._current = None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise HashretError(f"{self._path} is broken: what follows its last image is no tar header")

    def _read(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        if member is not self._current or archive.closed:  # type: ignore[attr-defined]  # unknown to typeshed
            raise ValueError("a record of a .tar must be read before the next is taken")
        _check_member(member.size)
        if not member.isreg():
            raise HashretError("cannot be read: a link, or no file at all")
        try:
            with archive.extractfile(member) as file:  # type: ignore[union-attr]  # a regular file has one
                return b"".join(iter(partial(file.read, 2**20), b""))  # at once, a sparse one would be copied for ever
        except Exception as error:  # as in _Zip
            raise HashretError(f"broken in the archive: {one_line(error)}") from None


class _Rows(Source):
    """The rows of an array, which are views into its blocks: names are row numbers."""

    arrays = True

    def __init__(self, root: Root, array: ImageArray, mtime_ns: int) -> None:
        self.root = root
        self.length, self.numbers = array.length, array.numbers
        self._array = array
        self._mtime_ns = mtime_ns

    def __iter__(self) -> Iterator[Record]:
        number = 0
        for block in self._array.blocks():
            for row in block:
                yield self._record(number, row)
                number += 1

    def find(self, name: str) -> Record | None:
        number = wanted = int(name)
        for block in self._array.blocks():  # by whole blocks: a record for each row before it would cost far more
            if number < len(block):
                return self._record(wanted, block[number])
            number -= len(block)
        return None

    def _record(self, number: int, row: NDArray[np.uint8]) -> Record:
        label = None if self._array.labels is None else self._array.labels[number]
        return Record(str(number), row.nbytes, self._mtime_ns, label, row.view)  # view(): the row itself


class Labelled(Source):
    """A source whose records have these labels, in its order, instead of their own."""

    def __init__(self, source: Source, labels: Sequence[object]) -> None:
        self.root, self.streaming, self.arrays, self.length = source.root, source.streaming, source.arrays, len(labels)
        self.numbers = source.numbers
        self._source, self._labels = source, labels

    def __iter__(self) -> Iterator[Record]:
        labels = iter(self._labels)
        number = 0
        for number, record in enumerate(self._source, 1):
            if number > len(self._labels):
                break
            label = next(labels)
            yield record._replace(label=None if label is None else str(label))
        self.ignored = self._source.ignored
        if number != len(self._labels):
            more = "more than" if number > len(self._labels) else f"only {number} of"
            raise ValueError(f"there are {more} the {len(self._labels)} images that labels were given for")


class Sample(NamedTuple):
    """Images chosen from a source, as the chosen preprocessing makes them: uint8 (n, height, width, channels). Vectors
    are float32 (n, d), and as they are in the source.

    `labels` are those of the images; `seen` counts the records of the source; `failures` are (name, reason) of chosen
    images that could not be read.
    """

    images: Inputs
    labels: list[str | None]
    preprocessing: Preprocessing | VectorPreprocessing
    seen: int
    failures: list[tuple[str, str]]


class _Held(NamedTuple):
    pixels: NDArray[np.uint8]  # as large as the model can see, in the image's own channels
    height: int
    width: int
    original: Content | None  # kept while a size smaller than `pixels` may still be chosen
    label: str | None


_MAX_SIDE, _MIN_SIDE = 32, 8  # at 32 a minute on two cores teaches a model something; at 64, four times as slow, not
_MAX_ORIGINALS = 2**28  # bytes


def sample(
    source: Source,
    *,
    size: tuple[int, int] | None = None,
    limit: int = 100_000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Sample:
    """At most `limit` images of a source, each with the same chance, and the preprocessing that fits them.

    One pass, in memory for the result and a quarter of a gigabyte; only chosen images are decoded. `size` is (height,
    width). Without it, images that all have one size with sides up to 32 keep that; others become squares of 32, or of
    the median short side where that is smaller, but at least 8 (the median is not waited for, and the side is 32, once
    the originals of images larger than 32 fill the quarter gigabyte). The model sees colour when any image has some
    (`images.has_colour`). `progress` is told how many records were seen. The same seed gives the same sample.
    Raises HashretError when there is no image or none that can be read, or a size for vectors, ValueError for an
    impossible size or limit.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit!r}")
    if size is not None:
        Preprocessing(*size, channels=1)  # raises ValueError
    chance = random.Random(seed)
    seen = 0

    def choose() -> Iterator[_Job]:
        nonlocal seen
        for record in source:
            place = seen if seen < limit else int(chance.random() * (seen + 1))  # Vitter's algorithm R (1985)
            seen += 1
            if progress is not None:
                progress(seen)
            if place < limit:
                yield place, record, _read(record) if source.streaming else None

    if source.numbers is not None:
        if size is not None:
            raise HashretError(f"{source.root.location} has vectors, which have no size in pixels: leave --size out")
        vectors, labels, failures = _hold_vectors(choose(), min(limit, source.length or limit), source.numbers)
        if not len(vectors):
            raise HashretError(_no_images(source, seen, failures))
        return Sample(vectors, labels, VectorPreprocessing.fitted(vectors), seen, failures)
    hold = partial(_hold, size=size)
    results = (hold(job) for job in choose()) if source.arrays else in_order(hold, choose(), weigh=_weight)
    held: list[_Held] = []
    failures = []
    originals, keep_originals = 0, True  # in bytes
    with contextlib.closing(results):
        for place, name, image in results:
            if isinstance(image, HashretError):
                failures.append((name, str(image)))
                continue
            if not keep_originals:
                image = image._replace(original=None)
            if place < len(held):
                originals -= _original_size(held[place])
                held[place] = image
            else:  # the first ones, and later where broken images left places empty
                held.append(image)
            originals += _original_size(image)
            if originals > _MAX_ORIGINALS:
                held = [image._replace(original=None) for image in held]
                originals, keep_originals = 0, False
    if not held:
        raise HashretError(_no_images(source, seen, failures))
    height, width = size or _choose_size(held, keep_originals)
    colour = any(has_colour(image.pixels) for image in held)
    preprocessing = Preprocessing(height, width, 3 if colour else 1)
    images = np.empty((len(held), height, width, preprocessing.channels), np.uint8)
    labels = [image.label for image in held]
    held.reverse()
    for row in images:
        image = held.pop()  # lets go of each while the result fills
        fits = image.original is None or image.pixels.shape[:2] == (height, width)
        row[...] = preprocessing(image.pixels if fits or image.original is None else image.original).pixels
    return Sample(images, labels, preprocessing, seen, failures)


_Job = tuple[int, Record, Content | HashretError | None]  # place in the sample, record, and content where read already


def _hold(job: _Job, size: tuple[int, int] | None) -> tuple[int, str, _Held | HashretError]:
    place, record, content = job
    content = _read(record) if content is None else content
    if isinstance(content, HashretError):
        return place, record.name, content
    try:
        if size is not None:
            pixels, width, height = resize(content, *size)
            original = None
        else:
            pixels, width, height = decode(content, at_least=(_MAX_SIDE, _MAX_SIDE))
            original = content if max(height, width) > _MAX_SIDE else None
            if original is not None:
                pixels = resize(pixels, _MAX_SIDE, _MAX_SIDE).pixels
    except HashretError as error:
        return place, record.name, error
    if isinstance(content, np.ndarray):  # rows are views into blocks: a copy lets go of the block
        pixels, original = pixels.copy(), None if original is None else content.copy()
    return place, record.name, _Held(pixels, height, width, original, record.label)


def _hold_vectors(
    chosen: Iterator[_Job], most: int, numbers: int
) -> tuple[NDArray[np.float32], list[str | None], list[tuple[str, str]]]:
    """At most so many vectors, (n, numbers), their labels, and which ones of those chosen cannot be used, and why."""
    vectors = np.empty((most, numbers), np.float32)
    labels: list[str | None] = []
    failures: list[tuple[str, str]] = []
    for place, record, _ in chosen:
        vector = to_vector(record.read())
        if not np.isfinite(vector).all():
            failures.append((record.name, NOT_FINITE))
        elif place < len(labels):
            vectors[place], labels[place] = vector, record.label
        else:
            vectors[len(labels)] = vector
            labels.append(record.label)
    return vectors[: len(labels)], labels, failures


def _read(record: Record) -> Content | HashretError:
    try:
        return record.read()
    except HashretError as error:
        return error


def _weight(job: _Job) -> float:
    return max(1, job[1].size / 2**22)  # of which 64, a quarter gigabyte, are read before the first is looked at


def _original_size(image: _Held) -> int:
    if isinstance(image.original, np.ndarray):
        return image.original.nbytes
    return 0 if image.original is None else len(image.original)


def _choose_size(held: list[_Held], all_known: bool) -> tuple[int, int]:
    if not all_known:
        return _MAX_SIDE, _MAX_SIDE
    first = held[0]
    if max(first.height, first.width) <= _MAX_SIDE and all(image[1:3] == first[1:3] for image in held):
        return first.height, first.width
    side = statistics.median_low(min(image.height, image.width) for image in held)
    side = max(_MIN_SIDE, min(_MAX_SIDE, side))
    return side, side


def _no_images(source: Source, seen: int, failures: list[tuple[str, str]]) -> str:
    where = source.root.location
    if failures:
        name, reason = failures[0]
        return f"{where}: none of {seen} images could be read; the first, {name}: {reason}"
    return f"{where} has no images ({source.ignored} other files were passed over)"


def _is_image(name: str) -> bool:
    _, dot, suffix = name.rpartition(".")
    return dot + suffix.lower() in SUFFIXES and not name.startswith(".") and "/." not in name


def _absolute(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100  # unlike Path.absolute it takes "..": one folder, one root


def _label(name: str) -> str | None:
    return name.split("/")[-2] if "/" in name else None


def _check_member(size: int) -> None:
    if size > MAX_BYTES:
        raise HashretError(f"{size / 2**30:.1f} GiB: more than the {MAX_BYTES // 2**30} that is read")


def _fail(error: OSError) -> Content:
    raise HashretError(f"cannot be read: {error.strerror}") from error
