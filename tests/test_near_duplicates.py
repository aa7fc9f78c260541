"""Near-duplicates in a collection of real files: groups, verdicts and calibration."""

import io
import os
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hashret.codes import hamming
from hashret.collection import Collection
from hashret.collection.pairs import read_pairs, write_pairs
from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.results import Group


@cache
def digits() -> NDArray[np.uint8]:
    from sklearn.datasets import load_digits

    return np.asarray((load_digits().images * 15).astype(np.uint8))


@cache
def hasher(model: str = "lsh", bits: int = 32) -> Hasher:
    return Hasher(model, bits).fit(digits()[:300])


def png(pixels: NDArray[np.uint8], margin: int = 0) -> bytes:
    """Return a file, with rows above and below that the centre crop removes, so that its code is the same."""
    file = io.BytesIO()
    Image.fromarray(np.pad(pixels, ((margin, margin), (0, 0)))).save(file, "PNG")
    return file.getvalue()


def write(path: Path, data: bytes, date: int = 1_700_000_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (date, date))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three copies of digit 0 in different sizes with equal codes, two files of digit 1, and ten other digits."""
    folder = tmp_path / "photos"
    write(folder / "old/small.png", png(digits()[0]), 1_000_000_000)
    write(folder / "new/large.png", png(digits()[0], 2))
    write(folder / "new/middle.png", png(digits()[0], 1), 1_500_000_000)
    write(folder / "a/1.png", png(digits()[1]), 1_600_000_000)
    write(folder / "z/1.png", png(digits()[1]), 1_200_000_000)
    for i in range(2, 12):
        write(folder / f"others/{i}.png", png(digits()[i]))
    return folder


@pytest.fixture
def collection(tmp_path: Path, photos: Path) -> Iterator[Collection]:
    with Collection.create(tmp_path / "c", hasher()) as collection:
        collection.index(photos)
        yield collection


def named(groups: list[Group], photos: Path) -> list[list[list[str]]]:
    """Return the file names of the items of each group."""
    return [[[str(Path(path).relative_to(photos)) for path in item.paths] for item in group.items] for group in groups]


def item(collection: Collection, path: Path | str) -> int:
    found = collection.find(path)
    assert found is not None
    return found


TWICE = [["a/1.png", "z/1.png"]]


@pytest.mark.parametrize("by", ["connected", "star"])
@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("largest", [TWICE, [["new/large.png"], ["new/middle.png"], ["old/small.png"]]]),
        ("oldest", [[["z/1.png", "a/1.png"]], [["old/small.png"], ["new/large.png"], ["new/middle.png"]]]),
        ("old", [TWICE, [["old/small.png"], ["new/large.png"], ["new/middle.png"]]]),
        ("z", [[["z/1.png", "a/1.png"]], [["new/large.png"], ["new/middle.png"], ["old/small.png"]]]),
    ],
)
def test_groups_begin_with_the_item_to_keep(
    collection: Collection, photos: Path, by: str, keep: str, expected: list[list[list[str]]]
) -> None:
    found = collection.dupes(0, by=by, keep=photos / keep if len(keep) < 4 else keep)
    assert sorted(named(found, photos)) == sorted(expected)
    assert all(group.distances == [0] * len(group.items) for group in found)
    assert all(Path(path).is_file() for group in found for item in group.items for path in item.paths)


@pytest.mark.parametrize("by", ["connected", "star"])
def test_groups_contain_near_items(collection: Collection, by: str) -> None:
    for radius in (3, 8, 12):
        found = collection.dupes(radius, by=by)
        for group in found:
            codes = collection.hasher.encode([item.paths[0] for item in group.items])
            assert hamming(codes[:1], codes)[0].tolist() == group.distances
            assert group.distances[1:] == sorted(group.distances[1:])
            assert by == "connected" or max(group.distances) <= radius
    assert len(found) < 8  # verdicts changed the groups


def test_keeping_a_folder_without_items_raises_an_error(collection: Collection, photos: Path) -> None:
    for folder in (photos / "ol", photos / "nowhere", "bigest"):
        with pytest.raises(HashretError, match="nothing is indexed under .*: keep the largest, the oldest, or another"):
            collection.dupes(0, keep=folder)
    with pytest.raises(ValueError, match="by is 'connected' or 'star', not 'size'"):
        collection.dupes(0, by="size")
    with pytest.raises(ValueError, match="max_distance must be an integer of at least 0, not -1"):
        collection.dupes(-1)


def test_a_file_indexed_twice_is_not_a_near_duplicate(collection: Collection, photos: Path) -> None:
    collection.index(photos / "others")
    assert len(collection.dupes(0)) == 2


def test_verdicts_override_distances(collection: Collection, photos: Path) -> None:
    small, middle, large = (
        item(collection, photos / f"{name}.png") for name in ("old/small", "new/middle", "new/large")
    )
    five, twice = item(collection, photos / "others/5.png"), item(collection, photos / "a/1.png")
    collection.verdict(small, large, "different")
    collection.verdict(photos / "new/middle.png", small, "different")
    collection.verdict(str(photos / "others/5.png"), photos / "old/small.png", "same")
    for by in ("connected", "star"):
        found = [sorted(item.id for item in group.items) for group in collection.dupes(0, by=by)]
        assert sorted(found) == sorted([sorted([small, five]), sorted([middle, large]), [twice]])
    collection.verdict(large, small, "same")  # again, in the other order
    assert len(collection.verdicts()) == 3 and (*sorted([small, large]), "same") in collection.verdicts()
    found = [sorted(item.id for item in group.items) for group in collection.dupes(0)]
    assert sorted(found) == sorted([sorted([small, five, middle, large]), [twice]])


def test_a_query_leaves_out_items_with_the_verdict_different(collection: Collection, photos: Path) -> None:
    small, large = photos / "old/small.png", photos / "new/large.png"
    ids = item(collection, small), item(collection, large)
    before = [
        collection.query(small, k=20),
        collection.query_item(ids[0], k=20),
        collection.query(photos / "a/1.png", k=3),
    ]
    collection.verdict(*ids, "different")
    after = [
        collection.query(small, k=20),
        collection.query_item(ids[0], k=20),
        collection.query(photos / "a/1.png", k=3),
    ]
    assert after == [[hit for hit in hits if hit.id != ids[1]] for hits in before[:2]] + before[2:]
    assert len(after[0]) == len(before[0]) - 1  # one item was left out
    assert collection.query(small, k=2) == after[0][:2] and collection.query_item(ids[0], k=2) == after[1][:2]
    assert collection.query(Image.open(small), k=20) == before[0]  # its pixels are a different content
    assert collection.query_batch([small, photos / "a/1.png", small], k=3) == [after[0][:3], after[2], after[0][:3]]
    assert collection.query_batch(str(small), None, 0) == [[hit for hit in after[0] if hit.distance == 0]]
    collection.verdict(*ids, "same")
    assert collection.query(small, k=20) == before[0]


def test_a_verdict_stays_with_contents_until_one_is_removed(collection: Collection, photos: Path) -> None:
    small, large = photos / "old/small.png", photos / "new/large.png"
    ids = sorted([item(collection, small), item(collection, large)])
    collection.verdict(small, large, "same")
    moved = small.rename(photos / "old/moved.png")
    collection.index(photos, prune=True)
    assert item(collection, moved) in ids and collection.verdicts() == [(*ids, "same")]
    collection.remove([ids[0]])
    assert collection.verdicts() == []
    collection.index(photos)
    assert collection.verdicts() == []  # it has a new id


def test_invalid_verdicts_raise_errors(collection: Collection, photos: Path) -> None:
    with pytest.raises(HashretError, match="both are item .*, one content: give two different items"):
        collection.verdict(photos / "a/1.png", photos / "z/1.png", "same")
    strange = write(photos / "strange.png", png(digits()[50]))
    with pytest.raises(HashretError, match=r"strange\.png is not in the collection: hashret index its folder first"):
        collection.verdict(strange, photos / "a/1.png", "same")
    with pytest.raises(HashretError, match="there is no item 999"):
        collection.verdict(999, 1, "same")
    with pytest.raises(ValueError, match="a verdict is 'same' or 'different', not 'similar'"):
        collection.verdict(1, 2, "similar")
    assert collection.verdicts() == []


def test_contents_are_read_from_their_sources(tmp_path: Path, photos: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("x/6.png", png(digits()[6], 2))
    np.save(tmp_path / "rows.npy", digits()[100:104])
    with Collection.create(tmp_path / "c", hasher()) as collection:
        for source in (photos, tmp_path / "some.zip", tmp_path / "rows.npy"):
            collection.index(source)
        collection.add([digits()[200], png(digits()[201])])
        everything = dict(collection.contents(range(1, 100)))
        assert sorted(everything) == list(range(1, len(collection) + 1))
        assert all(collection.find(content) == i for i, content in everything.items())
        assert item(collection, f"{tmp_path}/some.zip!/x/6.png") in everything
        assert item(collection, f"{tmp_path}/rows.npy#2") in everything
        assert collection.find("nowhere.png") is None and collection.find("x" * 5000) is None
        lost = item(collection, photos / "others/5.png")
        write(photos / "others/5.png", png(digits()[7], 2))
        assert sorted(everything.keys() - dict(collection.contents(everything)).keys()) == [lost]


def test_labelled_pairs_are_contents(collection: Collection, photos: Path) -> None:
    collection.verdict(photos / "a/1.png", photos / "others/5.png", "same")
    collection.verdict(photos / "a/1.png", photos / "others/6.png", "different")
    read = {name: (photos / name).read_bytes() for name in ("a/1.png", "others/5.png", "others/6.png")}
    expected = [(read["a/1.png"], read["others/5.png"], True), (read["a/1.png"], read["others/6.png"], False)]
    assert sorted(collection.judged()) == sorted(expected)
    (photos / "others/6.png").unlink()
    assert collection.judged() == expected[:1]


def test_calibration_on_augmented_copies(collection: Collection, photos: Path) -> None:
    with pytest.raises(HashretError, match="run hashret calibrate, or give a radius in bits"):
        collection.radius()
    found = collection.calibrate(seed=3)
    assert found.items == len(collection) and sum(map(sum, found.copies.values())) == 5 * len(collection)
    assert sum(found.others) == pytest.approx(5 * len(collection) * (len(collection) - 1))
    assert collection.calibrate(seed=3) == found == collection.calibration()
    assert collection.radius(0.5) == found.radius(0.5)
    assert sum(map(sum, collection.calibrate(images=4).copies.values())) == 20
    with Collection.open(collection.path, read_only=True) as reader:
        assert reader.radius(0.1) == collection.radius(0.1)
    collection.reindex(hasher("pca"))
    with pytest.raises(HashretError, match="run hashret calibrate"):
        collection.calibration()


def test_calibration_needs_readable_images(collection: Collection, photos: Path) -> None:
    photos.rename(photos.with_name("elsewhere"))
    with pytest.raises(HashretError, match="none of the indexed images can be read where it was: put the files back"):
        collection.calibrate()


def test_calibration_on_labelled_pairs(collection: Collection, photos: Path, tmp_path: Path) -> None:
    strange = write(tmp_path / "strange.png", png(digits()[50]))
    first, fifth = photos / "a/1.png", photos / "others/5.png"
    found = collection.calibrate([(first, fifth, True), (item(collection, fifth), strange, False)], source="mine")
    codes = collection.hasher.encode([first, fifth, strange])
    distances = hamming(codes, codes)
    assert found.recall.tolist() == [float(r >= distances[0, 1]) for r in range(33)]
    assert np.flatnonzero(found.others).tolist() == [distances[1, 2]] and found.source == "mine"
    with pytest.raises(HashretError, match="gone.png: cannot be read"):
        collection.calibrate([(first, tmp_path / "gone.png", True)])


def test_pairs_are_written_and_read(tmp_path: Path) -> None:
    strange = 'a,"b"\nc \udcff 🐈.png'
    write_pairs(tmp_path / "pairs.csv", [("x.png", strange, "same"), (" y.png", "-z.png", "different")])
    assert read_pairs(tmp_path / "pairs.csv") == [("x.png", strange, True), (" y.png", "-z.png", False)]
    (tmp_path / "plain.csv").write_bytes(b"\xef\xbb\xbfa.png,b.png,same\r\n\r\nc.png,d.png, different\r\n")
    assert read_pairs(tmp_path / "plain.csv") == [("a.png", "b.png", True), ("c.png", "d.png", False)]


@pytest.mark.parametrize("line", ["a.png,b.png", "a.png,b.png,maybe", "a.png,b.png,same,same", "path_a,path_b,verdict"])
def test_an_invalid_line_of_a_pairs_file_is_reported(tmp_path: Path, line: str) -> None:
    (tmp_path / "pairs.csv").write_text(f"a.png,b.png,same\n{line}\n")
    with pytest.raises(HashretError, match=r"pairs\.csv, line 2: a line is path_a,path_b,same or"):
        read_pairs(tmp_path / "pairs.csv")
    with pytest.raises(HashretError, match=r"gone\.csv cannot be read"):
        read_pairs(tmp_path / "gone.csv")
