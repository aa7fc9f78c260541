import io
import os
import shutil
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from hashret.data import sources
from hashret.data.images import MAX_BYTES, Content, Preprocessing
from hashret.data.sources import Record, Sample, Source, open_source, sample
from hashret.errors import HashretError
from hashret.parallel import in_order
from hashret.results import Root

Pixels = NDArray[np.uint8]
JPEG_OF_TEXT = b"Dear diary, this is no photo."


def picture(seed: int, height: int = 20, width: int = 30, channels: int = 3) -> Pixels:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, channels), np.uint8)
    image = Image.fromarray(coarse[..., 0] if channels == 1 else coarse).resize((width, height))
    return np.asarray(image).reshape(height, width, channels)


def save(pixels: Pixels, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, kind)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


TREE = {
    "b.png": save(picture(1)),
    "a/z.JPG": save(picture(2), "JPEG"),
    "a/deep/er/x.gif": save(picture(3), "GIF"),
    "a.jpeg": save(picture(4), "JPEG"),
    "a-b/broken.jpg": JPEG_OF_TEXT,
    "Zoë/ünï.webp": save(picture(5), "WEBP"),
}
PASSED_OVER = {"notes.txt": b"no image", "a/jpg": b"", "a/.hidden.png": save(picture(6)), "a/x.jpg.part": b""}
HIDDEN = {".thumbs/t.png": save(picture(7)), "a/.git/u.png": save(picture(8))}


def listing(source: Source) -> list[tuple[str, int, str | None, Content]]:
    """Everything of a source but its dates, read in time."""
    return [(record.name, record.size, record.label, record.read()) for record in source]


def expected() -> list[tuple[str, int, str | None, Content]]:
    return [(name, len(TREE[name]), name.split("/")[-2] if "/" in name else None, TREE[name]) for name in sorted(TREE)]


# Folders


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


def test_what_cannot_be_read_is_a_record_that_fails_not_a_gap(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": TREE["b.png"], "gone/b.png": TREE["b.png"], "z.png": TREE["b.png"]})
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    failed = {}
    for record in open_source(tmp_path):
        if record.name == "a.png":
            shutil.rmtree(tmp_path / "gone")  # after its name was seen: as if it became unreadable
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


def test_the_excluded_folder_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": b"", "mine/b.png": b"", "mine/deep/c.png": b"", "other/mine/d.png": b""})
    (tmp_path / "alias").symlink_to(tmp_path / "mine")
    for exclude in (tmp_path / "mine", tmp_path / "alias", tmp_path / "other" / ".." / "mine"):
        assert [record.name for record in open_source(tmp_path, exclude=exclude)] == ["a.png", "other/mine/d.png"]
    assert len(list(open_source(tmp_path, exclude=tmp_path / "nothing"))) == 4
    assert list(open_source(tmp_path / "mine", exclude=tmp_path / "mine")) == []


# Archives


def pack(path: Path, folder: Path, prefix: str = "") -> Path:
    """An archive of a folder, by suffix, in the order of names."""
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
def test_an_archive_is_the_folder_it_was_made_of(tmp_path: Path, suffix: str, prefix: str) -> None:
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


def failures(source: Source) -> dict[str, str]:
    found = {}
    for record in source:
        try:
            record.read()
        except HashretError as error:
            found[record.name] = str(error)
    return found


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
        place = data.rindex(name) + offset
        data[place : place + len(value)] = value
    path.write_bytes(data)
    found = failures(open_source(path))
    assert list(found) == ["damaged.png", "large.png", "locked.png", "odd.png"]
    assert "Bad CRC-32" in found["damaged.png"]
    assert found["large.png"] == "1.0 GiB: more than the 1 that is read"
    assert found["locked.png"] == "cannot be read: encrypted"
    assert found["odd.png"].startswith("broken in the archive: ")
    assert all("\n" not in reason for reason in found.values())


def test_a_zip_is_read_from_several_threads(tmp_path: Path) -> None:
    files = {f"{i:03}.png": save(picture(i)) for i in range(60)}
    source = open_source(pack(tmp_path / "a.zip", write(tmp_path / "f", {"a/x.txt": b"", **files})))
    contents = list(in_order(lambda record: record.read(), source, threads=6))
    assert contents == [files[name] for name in sorted(files)]


def test_links_and_giants_in_a_tar_fail_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("a.png", tarfile.SYMTYPE),
            ("b.png", tarfile.LNKTYPE),
            ("c.png", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "z.png"
            archive.addfile(member)
        member = tarfile.TarInfo("z.png")
        member.size = len(TREE["b.png"])
        archive.addfile(member, io.BytesIO(TREE["b.png"]))
    found = failures(open_source(path))
    assert list(found) == ["a.png", "b.png", "c.png"]
    assert set(found.values()) == {"cannot be read: a link, or no file at all"}
    header = tarfile.TarInfo("big.png")
    header.size = MAX_BYTES + 1
    path.write_bytes(header.tobuf())
    os.truncate(path, MAX_BYTES + 4096)  # a hole: it takes no space
    assert failures(open_source(path)) == {"big.png": "1.0 GiB: more than the 1 that is read"}


def test_a_tar_is_read_in_time_or_not_at_all(tmp_path: Path) -> None:
    source = open_source(pack(tmp_path / "a.tar", write(tmp_path / "f", TREE)))
    records = list(source)
    for record in records:
        with pytest.raises(ValueError, match="must be read before the next is taken"):
            record.read()
    walk = iter(source)
    early, _ = next(walk), next(walk)
    with pytest.raises(ValueError, match="must be read before the next is taken"):
        early.read()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_that_is_cut_gives_what_it_has_and_then_says_so(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    files = {f"{i}.png": rng.bytes(3000) for i in range(8)} | {"a/x.txt": b""}
    path = pack(tmp_path / f"a{suffix}", write(tmp_path / "f", files))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 if suffix == ".tar.gz" else 5 * 3584 + 700])
    source = iter(open_source(path))
    got = {}
    with pytest.raises(HashretError, match=r"a\.tar.* (is broken|cannot be read)"):
        for record in source:
            try:
                got[record.name] = record.read()
            except HashretError as error:
                assert "broken in the archive" in str(error)
    assert 2 <= len(got) < 8
    assert all(files[name] == data for name, data in got.items())


def test_a_tar_with_a_damaged_header_does_not_seem_to_end_there(tmp_path: Path) -> None:
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
    with pytest.raises(HashretError, match="what follows its last image is no tar header"):
        names += [record.name for record in open_source(path)]
    path.write_bytes(path.read_bytes()[: data.index(b"5.png")])  # without the two empty blocks, which some leave out
    assert [record.name for record in open_source(path)] == ["0.png", "1.png", "2.png", "3.png", "4.png"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.npz"])
@pytest.mark.parametrize("data", [b"", b"this is text, not an archive" * 50, bytes(20_000)])
def test_what_is_no_archive_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    if name in ("a.tar", "a.tar.gz") and data == bytes(20_000):  # that is how an empty archive looks
        assert list(open_source(tmp_path / name)) == []
        return
    with pytest.raises(HashretError, match=f"{name} (is broken|cannot be read)"):
        open_source(tmp_path / name)


# Names


@pytest.mark.parametrize("name", ["", " ", "nowhere", "nowhere/", "nowhere/a.zip", "fashion_mnist", "a\0b", "x" * 5000])
def test_a_source_that_does_not_exist_is_refused_with_what_could_be_given(name: str) -> None:
    with pytest.raises(HashretError, match=r"(SOURCE is empty|there is no|cannot be read).*") as caught:
        open_source(name)
    assert "\n" not in str(caught.value)
    if len(name) < 100:
        assert "a folder, an archive (.zip, .tar, .tar.gz), an IDX" in str(caught.value)
        assert "digits, mnist, fashion-mnist, cifar10" in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"one.PNG": TREE["b.png"], "notes.txt": b"text", "empty": b"", "a.gz": b"\x1f\x8b broken"})
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("one.PNG", "one.PNG is a single image: give the folder it lies in"),
        ("notes.txt", "notes.txt is no source of images: give a folder"),
        ("empty", "empty is no source of images"),
        ("a.gz", "a.gz (is broken|cannot be read)"),
        ("pipe", "pipe is neither a file nor a folder"),
    ):
        with pytest.raises(HashretError, match=reason):
            open_source(tmp_path / name)


def test_what_exists_as_a_path_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_source("digits").root == "digits#"
    write(tmp_path, {"digits/a.png": TREE["b.png"]})
    assert open_source("digits").root == f"{tmp_path}/digits/"
    assert open_source("digits:test").root == "digits:test#"


# In order


@pytest.mark.parametrize("helping", [False, True])
def test_results_come_in_the_order_of_the_items(helping: bool) -> None:
    def slow(i: int) -> int:
        time.sleep(0.002 * (i % 5))
        return i * i

    assert list(in_order(slow, range(200), threads=8, helping=helping)) == [i * i for i in range(200)]
    assert list(in_order(slow, [], helping=helping)) == []
    assert list(in_order(slow, range(3), ahead=1, helping=helping)) == [0, 1, 4]


def test_a_helping_caller_works_while_it_would_wait() -> None:
    both = threading.Barrier(2)

    def work(i: int) -> str:
        both.wait(30)  # for whoever is the other of two threads
        return threading.current_thread().name

    names = Counter(in_order(work, range(40), threads=2, ahead=4, helping=True))
    assert len(names) == 2 and names[threading.current_thread().name] == 20


def test_items_are_taken_in_this_thread_and_not_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(1000):
            assert threading.current_thread() is threading.main_thread()
            taken.append(i)
            yield i

    for result in in_order(lambda i: i, items(), threads=2, ahead=10):
        assert len(taken) <= result + 10


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hashret-order")]


@pytest.mark.parametrize("helping", [False, True])
def test_errors_of_the_function_and_of_the_items_come_out_in_their_place(helping: bool) -> None:
    def broken_items() -> Iterator[int]:
        yield from range(5)
        raise HashretError("broken stream")

    results = in_order(lambda i: 10 // (i - 20), range(50), threads=3, helping=helping)
    assert [next(results) for _ in range(20)] == [10 // (i - 20) for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(HashretError, match="broken stream"):
        list(in_order(lambda i: i, broken_items(), helping=helping))
    assert not workers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, None])
def test_stopping_early_drops_what_waits_and_leaves_no_thread(error: type[BaseException] | None) -> None:
    done = []

    def work(i: int) -> int:
        time.sleep(0.01)
        done.append(i)
        return i

    results = in_order(work, range(10_000), threads=2, ahead=500)
    assert next(results) == 0
    assert workers()
    if error is None:
        results.close()
    else:
        with pytest.raises(error):
            results.throw(error)
    assert not workers()
    assert len(done) < 500


# Samples


class Contents(Source):
    """Contents in memory as a source of files."""

    root = Root("contents/")

    def __init__(self, contents: list[Content]) -> None:
        self.contents = contents

    def __iter__(self) -> Iterator[Record]:
        for i, content in enumerate(self.contents):
            yield Record(str(i), 0, 0, None, lambda content=content: content)  # type: ignore[misc]


def check(sampled: Sample, contents: list[Content]) -> None:
    """A sample of all these contents has what its preprocessing makes of each."""
    preprocessing = sampled.preprocessing
    assert sampled.seen == len(contents) and not sampled.failures
    assert sampled.images.shape == (len(contents), preprocessing.height, preprocessing.width, preprocessing.channels)
    assert sampled.images.dtype == np.uint8
    for image, content in zip(sampled.images, contents, strict=True):
        assert (image == preprocessing(content).pixels).all()


sides = st.one_of(st.integers(1, 20), st.integers(60, 70), st.integers(100, 300))
some_contents = st.lists(
    st.builds(
        lambda seed, height, width, channels, kind: (
            save(picture(seed, height, width, channels), kind) if kind else picture(seed, height, width, channels)
        ),
        st.integers(0, 99),
        sides,
        sides,
        st.sampled_from([1, 3]),
        st.sampled_from(["JPEG", "PNG", None]),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    some_contents, st.one_of(st.none(), st.tuples(st.integers(1, 80), st.integers(1, 80))), st.sampled_from([0, 2**28])
)
def test_a_sample_is_what_its_preprocessing_makes(
    contents: list[Content], size: tuple[int, int] | None, originals: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_MAX_ORIGINALS", originals)
        sampled = sample(Contents(contents), size=size)
    check(sampled, contents)
    if size:
        assert (sampled.preprocessing.height, sampled.preprocessing.width) == size


def sizes(*shapes: tuple[int, int]) -> list[Content]:
    return [picture(i, height, width) for i, (height, width) in enumerate(shapes)]


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ([(28, 28)] * 3, (28, 28)),
        ([(32, 20)] * 3, (32, 20)),
        ([(5, 5)] * 2, (5, 5)),
        ([(33, 33)] * 3, (32, 32)),
        ([(28, 28), (28, 29)], (28, 28)),
        ([(240, 300), (300, 240), (20, 20)], (32, 32)),
        ([(240, 300), (24, 50), (40, 20)], (24, 24)),
        ([(3, 3), (4, 4), (5, 5)], (8, 8)),
        ([(1000, 3), (3, 1000), (30, 30)], (8, 8)),
    ],
)
def test_the_size_is_chosen_from_what_was_seen(shapes: list[tuple[int, int]], size: tuple[int, int]) -> None:
    contents = sizes(*shapes)
    sampled = sample(Contents(contents))
    assert (sampled.preprocessing.height, sampled.preprocessing.width) == size
    check(sampled, contents)


def test_a_jpeg_that_decodes_at_a_reduced_size_is_sampled_as_it_is_prepared() -> None:
    contents: list[Content] = [save(picture(1, 600, 800), "JPEG"), *sizes(*[(20, 30)] * 4)]
    sampled = sample(Contents(contents))
    assert sampled.preprocessing == Preprocessing(20, 20, 3)
    check(sampled, contents)
    large: list[Content] = [save(picture(i, 600, 800), "JPEG") for i in range(3)]
    check(sample(Contents(large)), large)
    check(sample(Contents(large), size=(100, 20)), large)


def test_originals_are_bounded_in_memory_and_then_the_side_is_32(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = sizes((300, 200), *[(30, 20)] * 5)
    assert sample(Contents(contents)).preprocessing == Preprocessing(20, 20, 3)
    monkeypatch.setattr(sources, "_MAX_ORIGINALS", 100_000)
    assert sample(Contents(contents)).preprocessing == Preprocessing(32, 32, 3)
    monkeypatch.setattr(sources, "_MAX_ORIGINALS", 200_000)
    assert sample(Contents(contents)).preprocessing == Preprocessing(20, 20, 3)
    # An original that a later image replaces no longer counts.
    two = sizes(*[(300, 200)] * 40)
    assert sample(Contents([*two, *sizes(*[(30, 20)] * 500)]), limit=1).preprocessing == Preprocessing(30, 20, 3)


def test_colour_is_what_any_chosen_image_shows() -> None:
    grey = [np.repeat(picture(i, channels=1), 3, axis=2) for i in range(5)]
    assert sample(Contents([save(image, "JPEG") for image in grey])).preprocessing.channels == 1
    assert sample(Contents([picture(i, channels=1) for i in range(5)])).preprocessing.channels == 1
    assert sample(Contents([*grey, picture(9)])).preprocessing.channels == 3


def test_a_sample_is_drawn_evenly_and_again_the_same() -> None:
    source = open_source(np.arange(200, dtype=np.uint8).repeat(64).reshape(200, 8, 8))
    count: Counter[int] = Counter()
    for seed in range(400):
        drawn = sample(source, limit=10, seed=seed)
        assert drawn.seen == 200
        values = drawn.images[:, 0, 0, 0].tolist()
        assert len(set(values)) == 10
        count.update(values)
    # 20 of each are expected, with a standard deviation of 4.4.
    assert set(count) == set(range(200)) and max(count.values()) < 42
    assert 1750 < sum(count[value] for value in range(100)) < 2250
    pair = open_source(np.arange(2, dtype=np.uint8).repeat(64).reshape(2, 8, 8))
    assert 70 < sum(int(sample(pair, limit=1, seed=seed).images[0, 0, 0, 0]) for seed in range(200)) < 130
    first, again = sample(source, limit=10, seed=5), sample(source, limit=10, seed=5)
    assert (first.images == again.images).all() and first[1:] == again[1:]
    assert sample(source, limit=3, seed=0).images[:, 0, 0, 0].tolist() == [189, 6, 172]  # for ever


def test_broken_images_are_listed_and_leave_no_gap(tmp_path: Path) -> None:
    write(tmp_path, TREE | {"a/cut.jpg": TREE["a.jpeg"][:300]})
    (tmp_path / "link.png").symlink_to("nowhere.png")
    sampled = sample(open_source(tmp_path))
    assert len(sampled.images) == 5 and sampled.seen == 8
    assert [name for name, _ in sampled.failures] == ["a-b/broken.jpg", "a/cut.jpg", "link.png"]
    assert [reason for _, reason in sampled.failures] == [
        "no image: no format begins with b'Dear dia'",
        "truncated JPEG",
        "cannot be read: No such file or directory",
    ]
    contents: list[Content] = [JPEG_OF_TEXT if i % 2 else picture(i) for i in range(60)]
    assert len(sample(Contents(contents), limit=20, seed=1).images) <= 20


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_an_archive_gives_the_sample_of_its_folder(tmp_path: Path, suffix: str) -> None:
    folder = write(tmp_path / "f", TREE | {f"a/{i:02}.png": save(picture(i)) for i in range(40)})
    path = pack(tmp_path / f"p{suffix}", folder)
    for limit in (10, 100):
        a, b = sample(open_source(folder), limit=limit), sample(open_source(path), limit=limit)
        assert (a.images == b.images).all() and a[1:] == b[1:]


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[int] = []
    sample(Contents(sizes(*[(20, 20)] * 30)), limit=5, progress=told.append)
    assert told == list(range(1, 31))


def test_a_sample_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HashretError, match=f"^{tmp_path} has no images \\(0 other files were passed over\\)$"):
        sample(open_source(tmp_path))
    write(tmp_path, PASSED_OVER)
    with pytest.raises(HashretError, match=r"has no images \(4 other files were passed over\)"):
        sample(open_source(tmp_path))
    write(tmp_path, {"x.jpg": JPEG_OF_TEXT, "y.jpg": b""})
    with pytest.raises(HashretError, match=r"none of 2 images could be read; the first, x.jpg: no image: no format"):
        sample(open_source(tmp_path))
    with pytest.raises(HashretError, match="array has no images"):
        sample(open_source(np.zeros((0, 8, 8), np.uint8)))


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"size": (0, 8)}, {"size": (8.5, 8)}])
def test_an_impossible_sample_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        sample(open_source("digits"), **arguments)


def test_an_interrupted_sample_leaves_no_thread(tmp_path: Path) -> None:
    def interrupt(seen: int) -> None:
        if seen == 20:
            raise KeyboardInterrupt

    write(tmp_path, {f"{i}.png": TREE["b.png"] for i in range(50)})
    with pytest.raises(KeyboardInterrupt):
        sample(open_source(tmp_path), progress=interrupt)
    assert not workers()


# Memory


def peak(source: Source) -> int:
    """The most memory that reading a source takes, after a first look at it."""
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
    peaks: dict[str, list[int]] = {"npy": [], "npz": [], "tar": [], "sample": []}
    for count in (1000, 8000):
        np.save(tmp_path / f"{count}.npy", np.zeros((count, 64, 64), np.uint8))
        np.savez_compressed(tmp_path / f"{count}.npz", images=np.zeros((count, 64, 64), np.uint8))
        with tarfile.open(tmp_path / f"{count}.tar", "w") as archive:
            member = tarfile.TarInfo("some/folder/image.png")
            member.size = 600
            for _ in range(count):
                archive.addfile(member, io.BytesIO(bytes(600)))
        for kind in ("npy", "npz", "tar"):
            peaks[kind].append(peak(open_source(tmp_path / f"{count}.{kind}")))
        tracemalloc.start()
        sample(open_source(tmp_path / f"{count}.npy"), limit=50)
        peaks["sample"].append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    for kind, (few, many) in peaks.items():
        assert many < few * 1.1 + 100_000, kind
        assert many < 5_000_000, kind


# Real data


def test_the_photo_archive_is_photos(shared_data: Path) -> None:
    source = open_source(shared_data / "photos" / "photos.tar.gz")
    sampled = sample(source, limit=200, seed=3)
    assert sampled.seen == 1514 and not sampled.failures and source.ignored == 0
    assert sampled.preprocessing == Preprocessing(32, 32, 3)
    assert len({record.label for record in source}) == 33
