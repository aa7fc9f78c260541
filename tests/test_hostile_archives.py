"""Hostile archives: they are read in place, member by member, and nothing is written outside the collection."""

import bz2
import io
import os
import random
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hashret.collection import Collection, pending
from hashret.data.contents import MAX_BYTES
from hashret.data.sources import open_source
from hashret.errors import HashretError
from hashret.hasher import Hasher

SOAK = "HASHRET_SOAK" in os.environ


@cache
def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def hasher() -> Hasher:
    return Hasher("lsh", 32).fit(np.random.default_rng(0).integers(0, 256, (50, 8, 8), np.uint8))


@pytest.fixture
def collection(tmp_path: Path, hasher: Hasher) -> Iterator[Collection]:
    with Collection.create(tmp_path / "c", hasher) as made:
        yield made


def member(name: str, data: bytes = b"", **fields: object) -> bytes:
    """Return the header and data of a .tar member; `pax` holds extended headers, `fields` override its header."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    pax = fields.pop("pax", None)
    for field, value in fields.items():
        setattr(info, field, value)
    if isinstance(pax, dict):
        info.pax_headers = pax
    head = info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)
    return head + data + bytes(-len(data) % 512)


def write_tar(path: Path, *members: bytes) -> Path:
    with bz2.open(path, "wb") if path.suffix == ".bz2" else path.open("wb") as file:
        file.writelines([*members, bytes(1024)])
    return path


def write_zip(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


UPWARDS = ["../../up.png", "a/../../b.png"]  # ignored like hidden files
NAMES = ["/etc/passwd.png", "C:\\x.png", "-rf.png", "line\nfeed.png", "\x1b[2J.png", "a" * 251 + ".png",
         "/".join(["deep"] * 200) + "/d.png", "//two.png", "\u202egnp.png"]  # fmt: skip


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_names_do_not_leave_the_archive(tmp_path: Path, collection: Collection, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "zip":
        write_zip(path, *((name, png(i)) for i, name in enumerate(NAMES + UPWARDS)))
    else:
        write_tar(path, *(member("x", png(i), pax={"path": name}) for i, name in enumerate(NAMES + UPWARDS)))
    before = sorted(tmp_path.iterdir())
    report = collection.index(path)
    assert (report.added, report.ignored) == (len(NAMES), len(UPWARDS))
    assert collection.index(path, prune=True)[:5] == (0, len(NAMES), 0, 0, 0)
    for i, name in enumerate(NAMES):
        (hit,) = collection.query(png(i), 1)
        assert (hit.distance, hit.path) == (0, f"{path}!/{name}")
    assert sorted(tmp_path.iterdir()) == before
    collection.reindex(Hasher("pca", 8).fit(np.random.default_rng(1).integers(0, 256, (50, 8, 8), np.uint8)))


def test_a_name_with_a_null_byte_is_recognised(tmp_path: Path, collection: Collection) -> None:
    path = write_tar(tmp_path / "a.tar", member("x", png(0), pax={"path": "a\0b.png"}))
    assert collection.index(path).added == 1
    assert collection.index(path, prune=True)[:5] == (0, 1, 0, 0, 0)


def test_links_and_devices_are_refused(tmp_path: Path, collection: Collection) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    types = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE]
    path = write_tar(
        tmp_path / "a.tar",
        *(
            member(f"{code[0]}.png", type=code, linkname=str(tmp_path / "secret.png"), devmajor=1, devminor=5)
            for code in types[:-1]
        ),
        member("link", type=tarfile.SYMTYPE, linkname=str(tmp_path)),
        member("link/secret.png", png(2)),
    )
    report = collection.index(path)
    assert (report.added, report.failed, report.ignored) == (1, 5, 1)
    assert {reason for _, reason in report.failures} == {"cannot be read: it is a link or a device, not a regular file"}
    assert collection.query(png(2), 1)[0].path == f"{path}!/link/secret.png"
    assert collection.index(path)[:5] == (0, 1, 0, 0, 5)


def test_a_repeated_name_is_one_path(tmp_path: Path, collection: Collection) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = write_zip(tmp_path / "a.zip", *(("same.png", png(i)) for i in range(5)))
    assert collection.index(path).added == 1
    assert collection.query(png(4), 1)[0].distance == 0 and len(collection) == 1  # the last one, as with unzip
    assert collection.index(path, prune=True)[:5] == (0, 1, 0, 0, 0)


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_an_archive_may_have_many_names(tmp_path: Path, collection: Collection, suffix: str) -> None:
    names = [f"{i % 1000:03}/{i:07}.png" for i in range(1_000_000 if SOAK else 3_000)]
    path, same = tmp_path / f"a.{suffix}", png(0)
    if suffix == "zip":
        write_zip(path, *((name, same) for name in names))
    else:
        write_tar(path, *(member(name, same) for name in names))
    assert collection.index(path).added == len(names)
    assert collection.index(path)[:5] == (0, len(names), 0, 0, 0)
    (item,) = collection.items()
    assert len(item.paths) == len(names)


def test_a_zip_bomb_is_unpacked_in_bounded_memory(
    tmp_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "CHUNK_BYTES", 2**21)  # a sixteenth of the default
    zeros = bytes(2**22)  # 4 MiB, in 4 KiB of archive
    write_zip(tmp_path / "a.zip", *((f"{i}.png", zeros) for i in range(10)), ("good.png", png(0)))
    write_tar(tmp_path / "a.tar.bz2", *(member(f"{i}.png", zeros) for i in range(10)), member("good.png", png(1)))
    for path in (tmp_path / "a.zip", tmp_path / "a.tar.bz2"):
        collection.query(png(0))  # load everything that stays in memory
        tracemalloc.start()
        report = collection.index(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (report.added, report.failed) == (1, 10)
        assert all(reason.startswith("no image: no format begins with") for _, reason in report.failures)
        assert peak < 6 * len(zeros)


def test_a_member_without_a_name_is_ignored(tmp_path: Path, collection: Collection) -> None:
    path = write_zip(tmp_path / "a.zip", ("x.png", png(0)), ("a.png", png(1)))
    path.write_bytes(path.read_bytes().replace(b"x.png", b"\0.png"))  # zipfile ends names at a null byte
    assert collection.index(path).added == 1


def test_archives_in_archives_are_not_opened(tmp_path: Path, collection: Collection) -> None:
    inner = write_zip(tmp_path / "inner.zip", ("a.png", png(0))).read_bytes()
    report = collection.index(
        write_zip(tmp_path / "a.zip", ("inner.zip", inner), ("inner.png", inner), ("b.png", png(1)))
    )
    assert (report.added, report.failed, report.ignored) == (1, 1, 1)


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """In Fifield's "A better zip bomb" (WOOT 2019), many directory entries share the same bytes."""
    path = write_zip(tmp_path / "a.zip", *((f"{i:02}.png", bytes(2**20)) for i in range(20)))
    data = bytearray(path.read_bytes())
    for i in range(1, 20):  # every entry now points to the first member
        data[(name_start := data.rindex(b"%02d.png" % i)) - 4 : name_start] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(HashretError, match=r"a\.zip is broken|lie in the same bytes"):
        open_source(path)


@pytest.mark.parametrize("claimed", [2**31, 2**40, 2**62, MAX_BYTES + 1])
def test_a_member_that_claims_to_be_huge_is_refused(tmp_path: Path, collection: Collection, claimed: int) -> None:
    path = write_tar(tmp_path / "a.tar", member("a.png", png(0)), member("big.png", b"x", size=claimed))
    with pytest.raises(HashretError, match=r"a\.tar"):  # the next header is not where its size puts it
        collection.index(path)
    assert collection.query(png(0), 1)[0].distance == 0
    data = bytearray(write_zip(tmp_path / "a.zip", ("a.png", png(1)), ("big.png", b"x")).read_bytes())
    field = data.rindex(b"big.png") - 46 + 24  # size, in the directory
    data[field : field + 4] = min(claimed, 2**32 - 2).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data)
    report = collection.index(tmp_path / "a.zip")
    assert (report.added, report.failed) == (1, 1) and "GiB: more than the limit of 1 GiB" in report.failures[0][1]


def pax_with(size: int) -> bytes:
    """Return an extended header that overrides the size of the member after it."""
    record = f"size={size}\n"
    text = f"{len(record) + 3} {record}".encode()
    return member("pax", text, type=tarfile.XHDTYPE) + member("back.png", png(0))


HEADERS: dict[str, Callable[[], list[bytes]]] = {
    "a size below zero": lambda: [member("a.png", png(1)), member("back.png", size=-1024)],
    "a first size below zero": lambda: [member("back.png", size=-512)],
    "a size below zero in an extended header": lambda: [
        member("a.png", png(1)),
        pax_with(-2048),
        member("z.png", png(2)),
    ],
    "a size below zero of an extended header": lambda: [member("a.png", png(1)), member("x", type=b"x", size=-512)],
    "a long name of a gigabyte": lambda: [member("a.png", png(1)), member("x", type=b"L", size=2**30)],
    "a long name of a gigabyte at once": lambda: [member("x", type=b"L", size=2**30)],
    "an extended header of a gigabyte": lambda: [member("a.png", png(1)), member("x", type=b"x", size=2**30)],
    "headers without end": lambda: [member("x", b"9 a=b\n   ", type=b"x")] * 2000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_malformed_headers_end_in_an_error_within_memory(tmp_path: Path, collection: Collection, name: str) -> None:
    path = write_tar(tmp_path / "a.tar", *HEADERS[name]())
    tracemalloc.start()
    with pytest.raises(HashretError, match=r"a\.tar") as refusal:
        collection.index(path)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
    assert [hit.distance for hit in collection.query(png(1), 1)] in ([], [0])  # the member before it may be stored


@pytest.mark.parametrize("blocks", [3, 5])
def test_an_extended_header_that_points_backwards_is_refused(tmp_path: Path, blocks: int) -> None:
    """3 blocks before the data of its member is the header itself, 5 blocks before it that of the previous member."""
    path = write_tar(tmp_path / "a.tar", member("a.png", b"x"), pax_with(-512 * blocks), member("z.png", png(2)))
    with pytest.raises(HashretError, match="the header of 'back.png' points backwards"):
        for number, _ in enumerate(open_source(path)):
            assert number < 10


def test_a_directory_in_another_order_than_its_members_is_accepted(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(5):
            archive.writestr(f"{i}.png", png(i))
        archive.filelist.reverse()
    assert [record.read() for record in open_source(tmp_path / "a.zip")] == [png(i) for i in range(5)]


def test_a_sparse_member_is_read_in_parts(tmp_path: Path, collection: Collection) -> None:
    count = 4000 if SOAK else 1000
    segments = ",".join(f"{2000 * i},1" for i in range(count))
    pax = {"GNU.sparse.map": segments, "GNU.sparse.size": str(2000 * count), "GNU.sparse.name": "s.png"}
    path = write_tar(tmp_path / "a.tar", member("s.png", b"x" * count, pax=pax), member("a.png", png(0)))
    (first, second) = ((record, record.read()) for record in open_source(path))
    assert first[1] == (b"x" + bytes(1999)) * count and second[1] == png(0)


def encrypted_zip() -> bytes:
    """Return a .zip whose headers flag every member as encrypted."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.png", png(0))
        archive.writestr("b.png", png(1))
    data = bytearray(file.getvalue())
    for mark, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        start = -1
        while (start := data.find(mark, start + 1)) >= 0:
            data[start + offset] |= 1
    return bytes(data)


def test_encrypted_members_are_reported_once(tmp_path: Path, collection: Collection) -> None:
    (tmp_path / "a.zip").write_bytes(encrypted_zip())
    report = collection.index(tmp_path / "a.zip")
    assert report.failures == [(f"{tmp_path}/a.zip!/{name}.png", "cannot be read: encrypted") for name in "ab"]
    assert collection.index(tmp_path / "a.zip").failures == [] and len(collection) == 0


def test_damaged_archives_end_in_one_line(tmp_path: Path, collection: Collection) -> None:
    """Bits are flipped, data is truncated and numbers are replaced: indexing succeeds or raises HashretError."""
    files = [(f"{i}.png", png(i)) for i in range(8)]
    write_zip(tmp_path / "a.zip", *files)
    for mode in ("gz", "bz2", "xz", ""):
        with tarfile.open(tmp_path / f"a.tar{'.' * bool(mode)}{mode}", f"w:{mode}") as archive:  # type: ignore[call-overload]
            for name, data in files:
                archive.addfile(_info(name, len(data)), io.BytesIO(data))
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((9, 8, 8), np.uint8), labels=np.arange(9))
    np.save(tmp_path / "a.npy", np.zeros((9, 8, 8), np.uint8))
    (tmp_path / "a-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 9, 8, 8) + bytes(9 * 64))
    whole = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    rng, refused, indexed = random.Random(0), 0, 0
    for i in range(len(whole) * (1000 if SOAK else 12)):
        path, data = list(whole.items())[i % len(whole)]
        damaged = bytearray(data)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.choice((1, 2, 8))):
                size, start = rng.choice((1, 2, 4)), rng.randrange(rng.choice((64, len(damaged))))
                damaged[start : start + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
        path.write_bytes(damaged)
        try:
            report = collection.index(path)
            indexed += 1
            assert all("\n" not in reason and len(reason) < 300 for _, reason in report.failures)
        except HashretError as error:
            refused += 1
            assert path.name in str(error) and "\n" not in str(error) and len(str(error)) < 500
    assert refused > i // 5 and indexed > i // 10


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info
