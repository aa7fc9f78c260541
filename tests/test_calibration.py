import numpy as np
import pytest
from PIL import Image

from hashret.codes import Codes, hamming
from hashret.collection.calibration import MAX_SIDE, TRANSFORMS, augmented_copies, from_augmented, from_pairs
from hashret.errors import HashretError
from hashret.results import Calibration

RNG = np.random.default_rng(0)
BITS = 16


def random_codes(n: int) -> Codes:
    return RNG.integers(0, 256, (n, BITS // 8), np.uint8)


def near(codes: Codes, share: float) -> Codes:
    return codes ^ np.packbits(RNG.random((len(codes), BITS)) < share, axis=1)


def test_pairs_give_the_precision_and_recall_among_them() -> None:
    a = random_codes(300)
    same = RNG.random(300) < 0.4
    b = np.where(same[:, None], near(a, 0.1), near(a, 0.4)).astype(np.uint8)
    found = from_pairs("pairs.csv", a, b, same)
    distances = np.array([hamming(x[None], y[None])[0, 0] for x, y in zip(a, b, strict=True)])
    for radius in range(BITS + 1):
        shown = distances <= radius
        assert found.recall[radius] == pytest.approx(shown[same].mean())
        assert found.precision()[radius] == pytest.approx(same[shown].mean() if shown.any() else 1)
    assert (found.precision(10**9) == found.precision()).all()  # whatever the number of items is


@pytest.mark.parametrize("verdicts", [[], [True, True], [False]])
def test_pairs_of_one_label_raise_an_error(verdicts: list[bool]) -> None:
    codes = random_codes(len(verdicts))
    with pytest.raises(
        HashretError, match=r"pairs\.csv: \d pairs? labelled the same and \d different: label some of both"
    ):
        from_pairs("pairs.csv", codes, codes, np.array(verdicts, np.bool_))


@pytest.mark.parametrize("sample_size", [60, 23])
def test_copies_are_searched_for_among_all_items(sample_size: int) -> None:
    codes = np.concatenate([random_codes(50), np.zeros((10, BITS // 8), np.uint8)])
    rows = np.array([3, 55, 9, 59])
    copies = {transform: near(codes[rows], 0.1) for transform in ("cropped", "turned")}
    pool = np.sort(RNG.permutation(60)[:sample_size])
    own = np.array([np.flatnonzero(pool == row)[0] if row in pool else -1 for row in rows])
    found = from_augmented(codes[rows], copies, own, codes[pool], 60)
    for radius in range(BITS + 1):
        right, wrong = 0, 0.0
        for queries in copies.values():
            for query, row in zip(queries, rows.tolist(), strict=True):
                others = pool[pool != row]
                right += int(hamming(query[None], codes[[row]])[0, 0] <= radius)
                wrong += float((hamming(query[None], codes[others])[0] <= radius).mean()) * 59
        assert found.recall[radius] == pytest.approx(right / 8)
        assert found.precision()[radius] == pytest.approx(right / (right + wrong) if right + wrong else 1)
        assert found.precision(119)[radius] == pytest.approx(right / (right + 2 * wrong) if right + wrong else 1)
    assert set(found.recalls) == set(copies)


def test_the_only_item_has_no_others() -> None:
    code = random_codes(1)
    found = from_augmented(code, {"cropped": code}, np.array([0]), code, 1)
    assert (found.precision() == 1).all() and found.radius() == 0


MADE = Calibration("altered copies", {"a": [2, 0, 4, 0, 0], "b": [1, 1, 1, 0, 1]}, [0, 0, 1, 1, 50], 100)


@pytest.mark.parametrize(("target", "radius"), [(1.0, 1), (0.95, 1), (0.9, 2), (0.16, 4), (0.05, 4)])
def test_the_radius_has_the_highest_recall_at_the_target(target: float, radius: int) -> None:
    assert MADE.radius(target) == radius  # 3 finds no more than 2


def test_more_items_need_a_smaller_radius() -> None:
    assert [MADE.radius(0.5, items) for items in (2, 100, 500, 1000)] == [4, 2, 2, 1]


def test_a_target_that_cannot_be_met_is_refused() -> None:
    codes = np.zeros((2, 2), np.uint8)
    found = from_pairs("pairs.csv", codes, codes, np.array([True, False]))
    with pytest.raises(
        HashretError, match=r"no radius has precision 0\.95: the best there is has 0\.500, so aim lower"
    ):
        found.radius()
    for target in (0, -1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="a target is a precision above 0 and at most 1"):
            found.radius(target)


def test_json_round_trip() -> None:
    assert Calibration.from_json(MADE.to_json()) == MADE


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 3), (8, 8, 1), (2, 3, 3), (90, 120, 3), (1500, 20, 1)])
def test_any_image_can_be_augmented(shape: tuple[int, int, int]) -> None:
    pixels = RNG.integers(0, 256, shape, np.uint8)
    copies = augmented_copies(pixels, np.random.default_rng(1))
    assert len(copies) == len(TRANSFORMS) and all(
        copy.dtype == np.uint8 and copy.size and max(copy.shape) <= MAX_SIDE for copy in copies
    )
    again = augmented_copies(pixels, np.random.default_rng(1))
    assert all(np.array_equal(copy, other) for copy, other in zip(copies, again, strict=True))


def test_augmented_copies_match_their_names() -> None:
    pixels = np.asarray(Image.linear_gradient("L").resize((200, 100)))[..., None] // 2 + 50
    cropped, resized, jpeg, brighter, turned = augmented_copies(pixels, np.random.default_rng(0))
    assert cropped.shape == (90, 180) and resized.shape == (75, 150) and jpeg.shape == brighter.shape == (100, 200)
    assert 90 < turned.shape[0] + 2 * 5 <= 101 and turned.min() >= pixels.min() - 1  # no black corner is left
    assert 0 < np.abs(jpeg.astype(int) - pixels[..., 0]).max() < 20
    assert brighter.mean() / pixels.mean() == pytest.approx(0.8, abs=0.02) or brighter.mean() / pixels.mean() > 1.15
