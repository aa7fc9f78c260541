from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pictures import Pixels, pixel_arrays, save, sides, smooth
from PIL import Image

from hashret.data.contents import content_bytes
from hashret.data.images import resize
from hashret.data.preprocessing import ImagePreprocessing, Preprocessing, describe, stored_preprocessing
from hashret.data.sources import open_source
from hashret.data.vectors import VectorPreprocessing
from hashret.errors import HashretError

sizes = st.integers(1, 48)
preprocessings = st.builds(ImagePreprocessing, sizes, sizes, st.sampled_from([1, 3]))


@settings(deadline=None)
@given(preprocessings, pixel_arrays)
def test_a_file_and_its_pixels_are_prepared_alike(preprocessing: ImagePreprocessing, array: Pixels) -> None:
    prepared = preprocessing(array)
    assert prepared.pixels.shape == (preprocessing.height, preprocessing.width, preprocessing.channels)
    assert prepared.pixels.dtype == np.uint8
    assert prepared[1:] == (array.shape[1], array.shape[0])
    for other in (save(array, "PNG"), content_bytes(array)):
        again = preprocessing(other)
        assert (again.pixels == prepared.pixels).all() and again[1:] == prepared[1:]


@settings(deadline=None)
@given(preprocessings, arrays(np.uint8, st.tuples(st.integers(0, 5), sides, sides, st.sampled_from([1, 3, 4]))))
def test_a_batch_is_its_images_one_by_one(preprocessing: ImagePreprocessing, rows: Pixels) -> None:
    batch = preprocessing.batch(rows)
    assert batch.shape == (len(rows), preprocessing.height, preprocessing.width, preprocessing.channels)
    for pixels, row in zip(batch, rows, strict=True):
        assert (pixels == preprocessing(row).pixels).all()
    same_size = ImagePreprocessing(rows.shape[1], rows.shape[2], preprocessing.channels)
    for pixels, row in zip(same_size.batch(rows), rows, strict=True):
        assert (pixels == same_size(row).pixels).all()


def test_unchanged_pixels_are_not_copied() -> None:
    rows = np.zeros((5, 28, 28, 1), np.uint8)
    assert ImagePreprocessing(28, 28, 1).batch(rows) is rows
    assert np.shares_memory(ImagePreprocessing(28, 28, 1)(rows[0]).pixels, rows)


def test_a_batch_of_another_dtype_or_shape_is_refused() -> None:
    batches: list[NDArray[Any]] = [np.zeros(shape, np.uint8) for shape in ((5, 28, 28), (5, 28, 28, 2), (5, 28, 28, 1))]
    batches[2] = batches[2].astype(float)
    for rows in batches:
        with pytest.raises(ValueError, match=r"uint8|float64"):
            ImagePreprocessing(28, 28, 1).batch(rows)


def test_the_centre_is_cropped_to_the_aspect_ratio() -> None:
    picture = np.zeros((40, 100, 1), np.uint8)
    picture[:, 30:70] = 200
    # The filter of an edge pixel reaches half a pixel beyond the crop, not further.
    assert (ImagePreprocessing(20, 20, 1)(picture).pixels[:, 1:-1] == 200).all()
    assert (ImagePreprocessing(20, 20, 1)(picture.transpose(1, 0, 2)).pixels[1:-1] == 200).all()
    mirrored = ImagePreprocessing(20, 20, 1)(picture[:, ::-1]).pixels
    assert (ImagePreprocessing(20, 20, 1)(picture).pixels == mirrored).all()
    assert (ImagePreprocessing(40, 40, 1)(picture).pixels == picture[:, 30:70]).all()  # a crop without resizing
    narrow = ImagePreprocessing(20, 21, 1)(picture).pixels
    assert (narrow[:, 1:-1] == 200).all() and (narrow[:, [0, -1]] < 200).all()


def test_a_crop_by_an_odd_number_of_pixels_does_not_blur() -> None:
    picture = smooth(10, 13)
    assert (ImagePreprocessing(10, 10, 3)(picture).pixels == picture[:, 1:11]).all()


def test_reduction_is_antialiased() -> None:
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    reduced = ImagePreprocessing(16, 16, 1)(board).pixels
    assert np.abs(reduced.astype(int) - 127).max() <= 2


@given(arrays(np.uint8, st.tuples(sides, sides, st.just(3))))
def test_grey_is_what_pillow_makes_of_colour(array: Pixels) -> None:
    grey = ImagePreprocessing(array.shape[0], array.shape[1], 1)(array).pixels
    assert (grey[..., 0] == np.asarray(Image.fromarray(array).convert("L"))).all()


def test_grey_and_colour_of_every_level_are_inverse() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    colour = ImagePreprocessing(16, 16, 3)(levels).pixels
    assert (colour == levels).all() and colour.shape == (16, 16, 3)
    assert (ImagePreprocessing(16, 16, 1)(colour).pixels == levels).all()


def test_a_preprocessing_is_stored_and_restored() -> None:
    preprocessing = ImagePreprocessing(28, 32, 1)
    assert preprocessing.to_dict() == {"height": 28, "width": 32, "channels": 1}
    assert ImagePreprocessing.from_stored(preprocessing.to_dict(), {}) == preprocessing
    for values in ({"height": 28, "width": 28}, {**preprocessing.to_dict(), "crop": True}):
        with pytest.raises(ValueError, match="preprocessing has height, width and channels"):
            ImagePreprocessing.from_stored(values, {})


@pytest.mark.parametrize(
    "values", [(0, 8, 1), (8, -1, 1), (8, 8, 2), (8, 8, 4), (8.0, 8, 1), ("8", 8, 1), (True, 8, 1), (20_000, 20_000, 1)]
)
def test_an_invalid_preprocessing_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        ImagePreprocessing(*values)


def test_a_broken_file_cannot_be_prepared() -> None:
    with pytest.raises(HashretError, match="truncated JPEG"):
        ImagePreprocessing(8, 8, 3)(save(smooth(200, 300), "JPEG")[:2000])
    with pytest.raises(ValueError, match="float64"):
        resize(np.zeros((4, 4)), 2, 2)  # type: ignore[arg-type]  # on purpose


VECTORS = np.random.default_rng(0).normal(size=(9, 1200)).astype(np.float32)
PREPROCESSINGS: dict[str, tuple[Preprocessing, Any]] = {
    "images": (ImagePreprocessing(8, 9, 3), np.zeros((4, 8, 9, 3), np.uint8)),
    "vectors": (VectorPreprocessing.fitted(VECTORS), VECTORS),
}


@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_a_preprocessing_describes_its_inputs(name: str) -> None:
    preprocessing, rows = PREPROCESSINGS[name]
    inputs = preprocessing.batch(rows)
    assert inputs.dtype == preprocessing.dtype and inputs.shape[1:] == preprocessing.shape
    alone = preprocessing(rows[0])
    assert (alone.pixels == inputs[0]).all() and alone[1:] == (preprocessing.width, preprocessing.height)
    assert np.prod(preprocessing.shape) == preprocessing.height * preprocessing.width * preprocessing.channels
    assert preprocessing.size == ((8, 9) if name == "images" else None)
    assert describe(preprocessing.to_dict()) == preprocessing.describe()
    again = stored_preprocessing(preprocessing.to_dict(), preprocessing.tensors())
    assert type(again) is type(preprocessing) and (again.batch(rows) == inputs).all()


def test_a_preprocessing_describes_contents() -> None:
    assert [preprocessing.describe() for preprocessing, _ in PREPROCESSINGS.values()] == [
        "images of 8 × 9 × 3",
        "vectors of 1,200 numbers",
    ]
    with pytest.raises(KeyError, match="channels"):
        describe({"height": 8, "width": 8})


@pytest.mark.parametrize(
    ("name", "rows", "reason"),
    [
        ("images", VECTORS, "array has vectors of 1,200 numbers, and the model takes images of 8 × 9 × 3"),
        ("vectors", VECTORS[:, 1:], "array has vectors of 1,199 numbers, and the model takes vectors of 1,200 numbers"),
        ("vectors", PREPROCESSINGS["images"][1], "array has images, and the model takes vectors of 1,200 numbers"),
    ],
)
def test_a_source_of_other_contents_is_refused(name: str, rows: Any, reason: str) -> None:
    preprocessing, fitting = PREPROCESSINGS[name]
    preprocessing.check_source(open_source(fitting))
    with pytest.raises(HashretError, match=f"^{reason}: put them into a collection of their own$"):
        preprocessing.check_source(open_source(rows))
    with pytest.raises(HashretError, match=f"^{reason}: give others$"):
        preprocessing.check_source(open_source(rows), "give others")


def test_vectors_are_refused_where_images_are_required() -> None:
    PREPROCESSINGS["images"][0].require_images("decode")
    with pytest.raises(HashretError, match="takes vectors, which have no pictures to decode: give one that learned"):
        PREPROCESSINGS["vectors"][0].require_images("decode")
    with pytest.raises(HashretError, match="no pictures to alter: give pairs$"):
        PREPROCESSINGS["vectors"][0].require_images("alter", "give pairs")
