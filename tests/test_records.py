from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hashret.data.contents import Content, read_file
from hashret.data.records import LabelledSource, Record, Source, is_image, label_of, read
from hashret.data.sources import open_source
from hashret.errors import HashretError


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.png", True),
        ("a/b.JPG", True),
        ("a.b/c.TiFf", True),
        ("png", False),
        ("a/png", False),
        (".png", False),
        ("a.png.txt", False),
        (".a/b.png", False),
        ("a/.b/c.png", False),
        ("a/.b.png", False),
        ("a.png/b", False),
    ],
)
def test_an_image_has_a_known_suffix_and_is_not_hidden(name: str, image: bool) -> None:
    assert is_image(name) == image


def test_a_label_is_the_innermost_folder() -> None:
    assert [label_of(name) for name in ("a.png", "b/a.png", "c/b/a.png", "c/ b /a.png")] == [None, "b", "b", " b "]


def test_an_error_keeps_no_content_in_memory() -> None:
    def fail() -> Content:
        try:
            raise ValueError("decoder error")
        except ValueError:
            raise HashretError("broken") from None

    error = read(Record("a.png", 0, 0, None, fail))
    assert isinstance(error, HashretError) and str(error) == "broken"
    assert error.__traceback__ is None and error.__context__ is None


def test_an_error_that_may_be_temporary_keeps_its_cause(tmp_path: Path) -> None:
    error = read(Record("a.png", 0, 0, None, lambda: read_file(tmp_path / "a.png")))
    assert isinstance(error, HashretError) and isinstance(error.__cause__, FileNotFoundError)
    assert error.__traceback__ is None
    assert read(Record("a.png", 0, 0, None, lambda: b"content")) == b"content"


def test_labels_replace_those_of_a_source(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    source = open_source(tmp_path)
    labelled = LabelledSource(source, [7, None, "x"])
    assert labelled.root == source.root and labelled.length == 3 and labelled.describe() == "images"
    for _ in range(2):
        assert [record.label for record in labelled] == ["7", None, "x"]
        assert labelled.ignored == source.ignored == 1
    assert [record.read() for record in labelled] == [record.read() for record in source]
    for labels, images in (([1, 2], "more images than the 2"), ([1, 2, 3, 4], "only 3 images for the 4")):
        with pytest.raises(ValueError, match=f"there are {images} labels: give one label per image"):
            list(LabelledSource(source, labels))


def test_labelled_vectors_remain_vectors() -> None:
    labelled = LabelledSource(open_source(np.zeros((3, 1000))), "abc")
    assert (labelled.arrays, labelled.streaming, labelled.dim) == (True, False, 1000)
    assert labelled.describe() == "vectors of 1,000 numbers"


def test_a_record_is_found_without_reading_the_whole_source() -> None:
    class Endless(Source):
        def __iter__(self) -> Iterator[Record]:
            number = 0
            while True:
                yield Record(str(number), number, 0, None, bytes)
                number += 1

    record = Endless().find("70")
    assert record is not None and record.size == 70
