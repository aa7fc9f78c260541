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
from pictures import JPEG_OF_TEXT, PASSED_OVER, TREE, picture, save, write

from hashret.data import sample as sampling
from hashret.data.contents import Content
from hashret.data.preprocessing import ImagePreprocessing
from hashret.data.records import LabelledSource, Record, Source
from hashret.data.sample import Sample, sample
from hashret.data.sources import open_source
from hashret.errors import HashretError
from hashret.results import Root


def pack(path: Path, folder: Path) -> Path:
    """Write an archive of a folder, in the format of the suffix and the order of names."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.write(folder / name, name)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as packed:
            for name in names:
                packed.add(folder / name, name)
    return path


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hashret-map")]


class ContentSource(Source):
    """A source of files whose contents are in memory."""

    root = Root("contents/")

    def __init__(self, contents: list[Content]) -> None:
        self.contents = contents

    def __iter__(self) -> Iterator[Record]:
        for i, content in enumerate(self.contents):
            yield Record(str(i), 0, 0, None, lambda content=content: content)  # type: ignore[misc]


def check(sampled: Sample, contents: list[Content]) -> None:
    """Check that a sample holds all contents, each preprocessed."""
    preprocessing = sampled.preprocessing
    assert sampled.seen == len(contents) and not sampled.failures
    assert sampled.images.shape == (len(contents), preprocessing.height, preprocessing.width, preprocessing.channels)
    assert sampled.images.dtype == np.uint8
    for image, content in zip(sampled.images, contents, strict=True):
        assert (image == preprocessing(content).pixels).all()


sides = st.one_of(st.integers(1, 20), st.integers(60, 70), st.integers(100, 300))
content_lists = st.lists(
    st.builds(
        lambda seed, height, width, channels, format_name: (
            save(picture(seed, height, width, channels), format_name)
            if format_name
            else picture(seed, height, width, channels)
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
    content_lists, st.one_of(st.none(), st.tuples(st.integers(1, 80), st.integers(1, 80))), st.sampled_from([0, 2**28])
)
def test_a_sample_holds_preprocessed_images(
    contents: list[Content], size: tuple[int, int] | None, max_originals: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "MAX_ORIGINALS", max_originals)
        sampled = sample(ContentSource(contents), size=size)
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
        ([(30, 40), (20, 40), (26, 40), (24, 40)], (24, 24)),
    ],
)
def test_the_size_is_chosen_from_the_drawn_images(shapes: list[tuple[int, int]], size: tuple[int, int]) -> None:
    contents = sizes(*shapes)
    sampled = sample(ContentSource(contents))
    assert (sampled.preprocessing.height, sampled.preprocessing.width) == size
    check(sampled, contents)


def test_a_jpeg_decoded_at_reduced_size_is_preprocessed_from_the_original() -> None:
    contents: list[Content] = [save(picture(1, 600, 800), "JPEG"), *sizes(*[(20, 30)] * 4)]
    sampled = sample(ContentSource(contents))
    assert sampled.preprocessing == ImagePreprocessing(20, 20, 3)
    check(sampled, contents)
    large: list[Content] = [save(picture(i, 600, 800), "JPEG") for i in range(3)]
    check(sample(ContentSource(large)), large)
    check(sample(ContentSource(large), size=(100, 20)), large)


def test_originals_are_bounded_in_memory_and_then_the_side_is_32(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = sizes((300, 200), *[(30, 20)] * 5)
    assert sample(ContentSource(contents)).preprocessing == ImagePreprocessing(20, 20, 3)
    monkeypatch.setattr(sampling, "MAX_ORIGINALS", 100_000)
    assert sample(ContentSource(contents)).preprocessing == ImagePreprocessing(32, 32, 3)
    monkeypatch.setattr(sampling, "MAX_ORIGINALS", 200_000)
    assert sample(ContentSource(contents)).preprocessing == ImagePreprocessing(20, 20, 3)
    # A replaced original does not count.
    replaced = sizes(*[(300, 200)] * 40)
    assert sample(ContentSource([*replaced, *sizes(*[(30, 20)] * 500)]), limit=1).preprocessing == ImagePreprocessing(
        30, 20, 3
    )


def test_one_colour_image_gives_three_channels() -> None:
    grey = [np.repeat(picture(i, channels=1), 3, axis=2) for i in range(5)]
    assert sample(ContentSource([save(image, "JPEG") for image in grey])).preprocessing.channels == 1
    assert sample(ContentSource([picture(i, channels=1) for i in range(5)])).preprocessing.channels == 1
    assert sample(ContentSource([*grey, picture(9)])).preprocessing.channels == 3


def test_a_sample_is_uniform_and_reproducible() -> None:
    source = open_source(np.arange(200, dtype=np.uint8).repeat(64).reshape(200, 8, 8))
    count: Counter[int] = Counter()
    for seed in range(400):
        drawn = sample(source, limit=10, seed=seed)
        assert drawn.seen == 200
        values = drawn.images[:, 0, 0, 0].tolist()
        assert len(set(values)) == 10
        count.update(values)
    # The expected count of each is 20, with a standard deviation of 4.4.
    assert set(count) == set(range(200)) and max(count.values()) < 42
    assert 1750 < sum(count[value] for value in range(100)) < 2250
    pair = open_source(np.arange(2, dtype=np.uint8).repeat(64).reshape(2, 8, 8))
    assert 70 < sum(int(sample(pair, limit=1, seed=seed).images[0, 0, 0, 0]) for seed in range(200)) < 130
    first, again = sample(source, limit=10, seed=5), sample(source, limit=10, seed=5)
    assert (first.images == again.images).all() and first[1:] == again[1:]
    assert sample(source, limit=3, seed=0).images[:, 0, 0, 0].tolist() == [189, 6, 172]  # golden


@pytest.mark.parametrize("of_vectors", [False, True])
def test_labels_belong_to_the_drawn_images(of_vectors: bool) -> None:
    numbers = np.arange(200, dtype=np.uint8)
    rows = numbers[:, None].astype(np.float32) if of_vectors else numbers.repeat(64).reshape(200, 8, 8)
    drawn = sample(LabelledSource(open_source(rows), range(200)), limit=10, seed=1)
    assert drawn.labels == [str(int(image.flat[0])) for image in drawn.images] and len(set(drawn.labels)) == 10


def test_large_files_are_not_read_far_ahead() -> None:
    class Large(Source):
        root = Root("large/")

        def __iter__(self) -> Iterator[Record]:
            for i in range(6):
                read: list[int] = []
                yield Record(str(i), 2**28, 0, None, lambda i=i, read=read: slowly(i, read))  # type: ignore[misc]
                assert read  # before the next record is requested

    def slowly(i: int, read: list[int]) -> Content:
        time.sleep(0.05)
        read.append(i)
        return picture(i)

    assert sample(Large()).seen == 6


def test_drained_items_are_removed_from_their_list() -> None:
    items = list(range(5))
    for number, item in enumerate(sampling._drain(items)):
        assert item == number and items == list(range(4, number, -1))


def test_broken_images_are_listed_and_leave_no_empty_row(tmp_path: Path) -> None:
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
    assert len(sample(ContentSource(contents), limit=20, seed=1).images) <= 20


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_an_archive_has_the_sample_of_its_folder(tmp_path: Path, suffix: str) -> None:
    folder = write(tmp_path / "f", TREE | {f"a/{i:02}.png": save(picture(i)) for i in range(40)})
    path = pack(tmp_path / f"p{suffix}", folder)
    for limit in (10, 100):
        a, b = sample(open_source(folder), limit=limit), sample(open_source(path), limit=limit)
        assert (a.images == b.images).all() and a[1:] == b[1:]


def test_progress_is_reported(tmp_path: Path) -> None:
    reports: list[int] = []
    sample(ContentSource(sizes(*[(20, 20)] * 30)), limit=5, progress=reports.append)
    assert reports == list(range(1, 31))


def test_a_source_without_readable_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HashretError, match=f"^{tmp_path} has no images \\(0 other files ignored\\)$"):
        sample(open_source(tmp_path))
    write(tmp_path, PASSED_OVER)
    with pytest.raises(HashretError, match=r"has no images \(4 other files ignored\)"):
        sample(open_source(tmp_path))
    write(tmp_path, {"x.jpg": JPEG_OF_TEXT, "y.jpg": b""})
    with pytest.raises(HashretError, match=r"no image could be read; the first, x.jpg: no image: no format"):
        sample(open_source(tmp_path))
    with pytest.raises(HashretError, match="array has no images"):
        sample(open_source(np.zeros((0, 8, 8), np.uint8)))


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"size": (0, 8)}, {"size": (8.5, 8)}])
def test_an_invalid_size_or_limit_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        sample(open_source(np.zeros((3, 8, 8), np.uint8)), **arguments)


def test_an_interrupted_sample_leaves_no_thread(tmp_path: Path) -> None:
    def interrupt(seen: int) -> None:
        if seen == 20:
            raise KeyboardInterrupt

    write(tmp_path, {f"{i}.png": TREE["b.png"] for i in range(50)})
    with pytest.raises(KeyboardInterrupt):
        sample(open_source(tmp_path), progress=interrupt)
    assert not workers()


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    peaks = []
    for count in (1000, 8000):
        np.save(tmp_path / "a.npy", np.zeros((count, 64, 64), np.uint8))
        tracemalloc.start()
        sample(open_source(tmp_path / "a.npy"), limit=50)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    few, many = peaks
    assert many < few * 1.1 + 100_000 and many < 5_000_000


def test_the_photo_archive_is_sampled(shared_data: Path) -> None:
    source = open_source(shared_data / "photos" / "photos.tar.gz")
    sampled = sample(source, limit=200, seed=3)
    assert sampled.seen == 1514 and not sampled.failures and source.ignored == 0
    assert sampled.preprocessing == ImagePreprocessing(32, 32, 3)
    assert len({record.label for record in source}) == 33
