import io
import os
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import PASSED_OVER, TREE, picture, save, write

from hashret.data.contents import MAX_BYTES, Content
from hashret.data.records import Source
from hashret.data.sources import open_source
from hashret.errors import HashretError
from hashret.parallel import ordered_map

HIDDEN = {".thumbs/t.png": save(picture(7)), "a/.git/u.png": save(picture(8))}


def listing(source: Source) -> list[tuple[str, int, str | None, Content]]:
    """Return name, size, label and content of each record."""
    return [(record.name, record.size, record.label, record.read()) for record in source]


def expected() -> list[tuple[str, int, str | None, Content]]:
    return [(name, len(TREE[name]), name.split("/")[-2] if "/" in name else None, TREE[name]) for name in sorted(TREE)]


def test_a_folder_is_its_images_in_order(tmp_path: Path) -> None:
    write(tmp_path, TREE | PASSED_OVER | HIDDEN)
    source = open_source(tmp_path)
    assert source.root == f"{tmp_path}/" and source.length is None and not source.streaming and not source.arrays
    for _ in range(2):
        assert listing(source) == expected()
        assert source.ignored == len(PASSED_OVER)
    for record in source:
        assert record.mtime_ns == Path(source.root + record.name).stat().st_mtime_ns
    assert {record.label for record in source} == {None, "a", "er", "a-b", "Zoë"}


def test_one_folder_has_one_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"p/a.png": TREE["b.png"]})
    monkeypatch.chdir(tmp_path)
    for name in ("p", "p/", "./p", "p/../p", str(tmp_path / "p") + "//", Path("p")):
        source = open_source(name)
        assert source.root == f"{tmp_path}/p/"
        assert [record.name for record in source] == ["a.png"]
    assert open_source(".").root == f"{tmp_path}/"
    assert open_source("/").root == "/"


def test_links_to_files_are_read_and_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path, {"photos/a.png": TREE["b.png"], "elsewhere/b.png": TREE["b.png"]})
    photos = tmp_path / "photos"
    (photos / "link.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (photos / "folder").symlink_to(tmp_path / "elsewhere")
    (photos / "folder.png").symlink_to(tmp_path / "elsewhere")
    (photos / "loop").symlink_to(photos)
    source = open_source(photos)
    assert [record.name for record in source] == ["a.png", "link.png"]
    assert [record.read() for record in source] == [TREE["b.png"]] * 2
    assert source.ignored == 3


def test_unreadable_files_are_records_that_fail(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": TREE["b.png"], "gone/b.png": TREE["b.png"], "z.png": TREE["b.png"]})
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    failed = {}
    for record in open_source(tmp_path):
        if record.name == "a.png":
            shutil.rmtree(tmp_path / "gone")  # after its name was listed
        try:
            record.read()
        except HashretError as error:
            failed[record.name] = (str(error), type(error.__cause__))
    assert failed == {
        "dangling.png": ("cannot be read: No such file or directory", FileNotFoundError),
        "gone/": ("cannot be read: No such file or directory", FileNotFoundError),
        "pipe.png": ("cannot be read: not a regular file", type(None)),
    }


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    name = b"caf\xe9.png"
    (tmp_path / os.fsdecode(name)).write_bytes(TREE["b.png"])
    (record,) = open_source(tmp_path)
    assert os.fsencode(record.name) == name
    assert record.read() == TREE["b.png"]


def test_the_excluded_folder_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": b"", "mine/b.png": b"", "mine/deep/c.png": b"", "other/mine/d.png": b""})
    (tmp_path / "alias").symlink_to(tmp_path / "mine")
    for exclude in (tmp_path / "mine", tmp_path / "alias", tmp_path / "other" / ".." / "mine"):
        assert [record.name for record in open_source(tmp_path, exclude=exclude)] == ["a.png", "other/mine/d.png"]
    assert len(list(open_source(tmp_path, exclude=tmp_path / "nothing"))) == 4
    assert list(open_source(tmp_path / "mine", exclude=tmp_path / "mine")) == []


def pack(path: Path, folder: Path, prefix: str = "") -> Path:
    """Write an archive of a folder, in the format of the suffix and the order of names."""
    files = sorted(name for name in folder.rglob("*") if name.is_file())
    names = [(name, prefix + name.relative_to(folder).as_posix()) for name in files]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.mkdir("a")
            for name, inside in names:
                archive.write(name, inside)
    else:
        mode: Any = {".tar": "w", ".bz2": "w:bz2", ".xz": "w:xz"}.get(path.suffix, "w:gz")
        with tarfile.open(path, mode) as archive:
            archive.add(folder / "a", prefix + "a", recursive=False)
            for name, inside in sorted(names, key=lambda pair: pair[1]):
                archive.add(name, inside)
    return path


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".TAR.GZ"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_an_archive_equals_its_folder(tmp_path: Path, suffix: str, prefix: str) -> None:
    folder = write(tmp_path / "f", TREE | PASSED_OVER | HIDDEN)
    path = pack(tmp_path / f"photos{suffix}", folder, prefix)
    before = set(tmp_path.rglob("*"))
    source = open_source(path)
    assert source.root == f"{path}!/" and not source.arrays
    assert source.streaming == (suffix != ".zip")
    assert source.length == (len(TREE) if suffix == ".zip" else None)
    for _ in range(2):
        assert listing(source) == expected()
        assert source.ignored == len(PASSED_OVER | HIDDEN)
    assert {record.mtime_ns for record in source} == {path.stat().st_mtime_ns}
    assert set(tmp_path.rglob("*")) == before  # nothing was extracted


def test_names_in_a_zip_may_begin_with_a_dot_and_a_slash(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("./a/x.png", TREE["b.png"])  # ZipFile.write would remove "./"
    (record,) = open_source(tmp_path / "a.zip")
    assert (record.name, record.label, record.read()) == ("a/x.png", "a", TREE["b.png"])


@pytest.mark.parametrize("suffix", ["", ".zip", ".tar", ".tar.gz"])
def test_a_record_is_found_by_its_name_and_read_later(tmp_path: Path, suffix: str) -> None:
    folder = write(tmp_path / "f", TREE | PASSED_OVER | HIDDEN)
    source = open_source(pack(tmp_path / f"p{suffix}", folder) if suffix else folder)
    found = {name: source.find(name) for name in TREE}
    for name, label in (("a/z.JPG", "a"), ("b.png", None), ("a/deep/er/x.gif", "er")):
        record = found[name]
        assert record is not None and (record.name, record.label, record.read()) == (name, label, TREE[name])
    for name in ("", "z.JPG", "a", "notes.txt", "a/.hidden.png", "../f/b.png"):
        assert source.find(name) is None


def test_rows_are_found_by_their_numbers() -> None:
    source = open_source("digits")
    records = list(source)
    for number in (0, 1436, 1437, 1796):  # both blocks
        record = source.find(str(number))
        assert record is not None and record[:4] == records[number][:4]
        assert np.array_equal(record.read(), records[number].read())
    for name in ("1797", "-1", "", "x", "1.0", "01", "١", " 1", "9" * 5000):
        assert source.find(name) is None


def test_an_open_source_is_returned_unchanged(tmp_path: Path) -> None:
    for source in (write(tmp_path / "f", TREE), np.zeros((2, 8, 8), np.uint8), "digits"):
        opened = open_source(source)
        assert open_source(opened) is opened and open_source(opened, exclude=tmp_path) is opened


def failures(source: Source) -> dict[str, str]:
    reasons = {}
    for record in source:
        try:
            record.read()
        except HashretError as error:
            reasons[record.name] = str(error)
    return reasons


def test_members_of_a_zip_fail_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for member in ("damaged.png", "fine.png", "large.png", "locked.png", "odd.png"):
            archive.writestr(member, member.encode() * 100)
    data = bytearray(path.read_bytes())
    data[data.index(b"damaged.pngdamaged") + 30] ^= 1
    for name, offset, value in (
        (b"large.png", -46 + 24, (MAX_BYTES + 1).to_bytes(4, "little")),  # size, in the directory
        (b"locked.png", -46 + 8, b"\1"),  # flags: encrypted
        (b"odd.png", -46 + 10, b"\x63"),  # method
    ):
        start = data.rindex(name) + offset
        data[start : start + len(value)] = value
    path.write_bytes(data)
    reasons = failures(open_source(path))
    assert list(reasons) == ["damaged.png", "large.png", "locked.png", "odd.png"]
    assert "Bad CRC-32" in reasons["damaged.png"]
    assert reasons["large.png"] == "1.0 GiB: more than the limit of 1 GiB"
    assert reasons["locked.png"] == "cannot be read: encrypted"
    assert reasons["odd.png"].startswith("broken in the archive: ")
    assert all("\n" not in reason for reason in reasons.values())


def test_a_zip_is_read_in_many_threads(tmp_path: Path) -> None:
    files = {f"{i:03}.png": save(picture(i)) for i in range(60)}
    source = open_source(pack(tmp_path / "a.zip", write(tmp_path / "f", {"a/x.txt": b"", **files})))
    contents = list(ordered_map(lambda record: record.read(), source, threads=6))
    assert contents == [files[name] for name in sorted(files)]


def test_links_and_huge_members_of_a_tar_fail_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, member_type in (
            ("a.png", tarfile.SYMTYPE),
            ("b.png", tarfile.LNKTYPE),
            ("c.png", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = member_type, "z.png"
            archive.addfile(member)
        member = tarfile.TarInfo("z.png")
        member.size = len(TREE["b.png"])
        archive.addfile(member, io.BytesIO(TREE["b.png"]))
    reasons = failures(open_source(path))
    assert list(reasons) == ["a.png", "b.png", "c.png"]
    assert set(reasons.values()) == {"cannot be read: it is a link or a device, not a regular file"}
    header = tarfile.TarInfo("big.png")
    header.size = MAX_BYTES + 1
    path.write_bytes(header.tobuf())
    os.truncate(path, MAX_BYTES + 4096)  # a hole: it takes no space
    assert failures(open_source(path)) == {"big.png": "1.0 GiB: more than the limit of 1 GiB"}


def test_a_record_of_a_tar_is_read_before_the_next_or_never(tmp_path: Path) -> None:
    source = open_source(pack(tmp_path / "a.tar", write(tmp_path / "f", TREE)))
    records = list(source)
    for record in records:
        with pytest.raises(ValueError, match="must be read before the next one is requested"):
            record.read()
    walk = iter(source)
    early, _ = next(walk), next(walk)
    with pytest.raises(ValueError, match="must be read before the next one is requested"):
        early.read()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_truncated_tar_yields_its_members_and_then_raises(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    files = {f"{i}.png": rng.bytes(3000) for i in range(8)} | {"a/x.txt": b""}
    path = pack(tmp_path / f"a{suffix}", write(tmp_path / "f", files))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 if suffix == ".tar.gz" else 5 * 3584 + 700])
    source = iter(open_source(path))
    contents = {}
    with pytest.raises(HashretError, match=r"a\.tar.* (is broken|cannot be read)"):
        for record in source:
            try:
                contents[record.name] = record.read()
            except HashretError as error:
                assert "broken in the archive" in str(error)
    assert 2 <= len(contents) < 8
    assert all(files[name] == data for name, data in contents.items())


def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for i in range(8):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = 3000
            archive.addfile(member, io.BytesIO(bytes(3000)))
    data = bytearray(path.read_bytes())
    data[data.index(b"5.png") + 120] ^= 1
    path.write_bytes(data)
    names = []
    with pytest.raises(HashretError, match="the bytes after its last image are not a tar header"):
        names += [record.name for record in open_source(path)]
    path.write_bytes(path.read_bytes()[: data.index(b"5.png")])  # some programs omit the two empty blocks at the end
    assert [record.name for record in open_source(path)] == ["0.png", "1.png", "2.png", "3.png", "4.png"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.npz"])
@pytest.mark.parametrize("data", [b"", b"this is text, not an archive" * 50, bytes(20_000)])
def test_files_that_are_not_archives_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    if name in ("a.tar", "a.tar.gz") and data == bytes(20_000):  # an empty archive
        assert list(open_source(tmp_path / name)) == []
        return
    with pytest.raises(HashretError, match=f"{name} (is broken|cannot be read)"):
        open_source(tmp_path / name)


@pytest.mark.parametrize("name", ["", " ", "nowhere", "nowhere/", "nowhere/a.zip", "fashion_mnist", "a\0b", "x" * 5000])
def test_a_missing_source_is_refused_with_the_possible_ones(name: str) -> None:
    with pytest.raises(HashretError, match=r"(SOURCE is empty|there is no|cannot be read).*") as caught:
        open_source(name)
    assert "\n" not in str(caught.value)
    if len(name) < 100:
        assert "a folder, an archive (.zip, .tar, .tar.gz), an IDX" in str(caught.value)
        assert "digits, mnist, fashion-mnist, cifar10" in str(caught.value)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"one.PNG": TREE["b.png"], "notes.txt": b"text", "empty": b"", "a.gz": b"\x1f\x8b broken"})
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("one.PNG", "one.PNG is a single image: give the folder that holds it"),
        ("notes.txt", "notes.txt is not a source of images: give a folder"),
        ("empty", "empty is not a source of images"),
        ("a.gz", "a.gz (is broken|cannot be read)"),
        ("pipe", "pipe is neither a file nor a folder"),
    ):
        with pytest.raises(HashretError, match=reason):
            open_source(tmp_path / name)


def test_an_existing_path_is_preferred_to_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_source("digits").root == "digits#"
    write(tmp_path, {"digits/a.png": TREE["b.png"]})
    assert open_source("digits").root == f"{tmp_path}/digits/"
    assert open_source("digits:test").root == "digits:test#"


def peak(source: Source) -> int:
    """Return the peak memory, in bytes, of reading a source after a first record was read."""
    walk = iter(source)
    next(walk).read()
    tracemalloc.start()
    try:
        for record in source:
            record.read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    peaks: dict[str, list[int]] = {"npy": [], "npz": [], "tar": []}
    for count in (1000, 4000):
        np.save(tmp_path / f"{count}.npy", np.zeros((count, 64, 64), np.uint8))
        np.savez_compressed(tmp_path / f"{count}.npz", images=np.zeros((count, 64, 64), np.uint8))
        with tarfile.open(tmp_path / f"{count}.tar", "w") as archive:
            member = tarfile.TarInfo("some/folder/image.png")
            member.size = 600
            for _ in range(count):
                archive.addfile(member, io.BytesIO(bytes(600)))
        for suffix in ("npy", "npz", "tar"):
            peaks[suffix].append(peak(open_source(tmp_path / f"{count}.{suffix}")))
    for suffix, (few, many) in peaks.items():
        assert many < few * 1.1 + 100_000, suffix
        assert many < 5_000_000, suffix
