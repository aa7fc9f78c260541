from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hashret.codes import hamming
from hashret.errors import HashretError
from hashret.evaluation.measures import average_precision, health, mean_average_precision
from hashret.evaluation.protocols import PROTOCOLS, Protocol, choose_protocol, evaluate, read_images, training_images
from hashret.hasher import Hasher
from hashret.parallel import Progress

DIGITS = (load_digits().images * 15).astype(np.uint8)
LABELS = load_digits().target


@pytest.fixture(scope="module")
def hasher() -> Hasher:
    return Hasher("lsh", 32).fit("digits:train")


def write(folder: Path, images: range, name: str = "{label}/{i:04}.png") -> Path:
    """Write digits as files, by default in folders named by their labels; return the folder."""
    for i in images:
        path = folder / name.format(label=LABELS[i], i=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(DIGITS[i]).save(path)
    return folder


def plain_recall(hasher: Hasher, queries: range, database: range, within: bool) -> float:
    """Return the share of the 10 nearest in pixels among the 10 nearest in codes, with ties in random order."""
    vectors, codes = DIGITS.reshape(len(DIGITS), -1).astype(int), hasher.encode(DIGITS)
    shares = []
    for row in queries:
        among = np.array([j for j in database if not within or LABELS[j] == LABELS[row]])
        near = np.square(vectors[among] - vectors[row]).sum(1).argsort(kind="stable")[:10]
        distances = hamming(codes[row : row + 1], codes[among])[0]
        below, tied = distances < np.sort(distances)[9], distances == np.sort(distances)[9]
        shares.append((below[near].sum() + tied[near].sum() * (10 - below.sum()) / tied.sum()) / 10)
    return float(np.mean(shares))


def test_queries_of_a_split_are_its_test_images(hasher: Hasher) -> None:
    done = evaluate(hasher, PROTOCOLS["digits"])
    codes = hasher.encode(((load_digits().images.astype(int) * 255 + 8) // 16).astype(np.uint8))
    expected = [
        mean_average_precision(codes[1437:], LABELS[1437:], codes[:1437], LABELS[:1437], first)
        for first in (None, 1000)
    ]
    assert [done.measures["mAP@all"], done.measures["mAP@1000"]] == expected
    assert done.health == health(codes[:1437])
    assert (done.queries, done.left_out, done.unreadable) == (360, 0, 0)


def test_leave_one_out_queries_are_all_images(tmp_path: Path, hasher: Hasher) -> None:
    reports: list[Progress] = []
    done = evaluate(hasher, choose_protocol(str(write(tmp_path, range(60)))), progress=reports.append)
    order = sorted(range(60), key=lambda i: (LABELS[i], i))
    codes, labels = hasher.encode(DIGITS[order]), LABELS[order]
    distances = hamming(codes, codes).astype(np.int64)
    precisions = []
    for i, row in enumerate(distances):
        others, same = np.delete(row, i), np.delete(labels == labels[i], i)
        items, relevant = (np.bincount(part, minlength=33)[None] for part in (others, others[same]))
        precisions.append(average_precision(items, relevant)[0])
    assert done.measures["mAP@all"] == done.measures["mAP@1000"] == pytest.approx(np.mean(precisions))
    assert (done.queries, done.left_out) == (60, 0)
    assert reports[-1] == Progress("reading", 60, None, {})


def test_queries_may_be_drawn_from_all_images(hasher: Hasher) -> None:
    protocol = Protocol("", ("digits:train", "digits:test"), n_queries=100, n_training=300)
    training, database, queries = protocol.rows([1437, 360])
    assert (len(training), len(database), len(queries)) == (300, 1697, 100)
    assert sorted([*database, *queries]) == [*range(1797)] and set(training) < set(database)
    assert queries.max() > 1437 > queries.min()
    again = protocol.rows([1437, 360])
    assert all((part == other).all() for part, other in zip(again, (training, database, queries), strict=True))
    images = training_images(protocol)
    assert (images[..., 0] == read_images(protocol, hasher.preprocessing).pixels[training][..., 0]).all()
    codes = hasher.encode(((load_digits().images.astype(int) * 255 + 8) // 16).astype(np.uint8))
    expected = mean_average_precision(codes[queries], LABELS[queries], codes[database], LABELS[database])
    assert evaluate(hasher, protocol).measures["mAP@all"] == expected


def test_the_drawn_queries_of_cifar10_are_always_the_same() -> None:
    training, database, queries = PROTOCOLS["cifar10-1k-59k"].rows([50_000, 10_000])
    assert (len(training), len(database), len(queries)) == (5000, 59_000, 1000)
    assert queries[:5].tolist() == [49, 95, 103, 229, 257] and training[:5].tolist() == [9, 24, 60, 63, 65]


def test_recall_of_neighbours_in_pixels_equals_a_plain_loop(tmp_path: Path, hasher: Hasher) -> None:
    train, test = write(tmp_path / "train", range(200)), write(tmp_path / "test", range(200, 260))
    done = evaluate(hasher, choose_protocol("split", str(train), str(test)))
    for name, within in (("recall@10 of neighbours", False), ("recall@10 within labels", True)):
        expected = plain_recall(hasher, range(200, 260), range(200), within)
        assert done.measures[name] == pytest.approx(expected, abs=0.004)


def test_excluded_queries_are_counted(tmp_path: Path, hasher: Hasher) -> None:
    write(tmp_path, range(40))
    write(tmp_path, range(40, 43), "{i}.png")  # no label
    write(tmp_path, range(43, 44), "alone/{i}.png")
    (tmp_path / "0" / "broken.png").write_bytes(b"no image")
    done = evaluate(hasher, choose_protocol(str(tmp_path)))
    assert (done.queries, done.left_out, done.unreadable, done.health.codes) == (40, 4, 1, 44)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("{i}.png", "0 different labels"), ("one/{i}.png", "1 different label"), ("{i}/0.png", "no label of a query")],
)
def test_labels_that_do_not_allow_scoring_are_refused(tmp_path: Path, hasher: Hasher, name: str, reason: str) -> None:
    write(tmp_path, range(5), name)
    with pytest.raises(HashretError, match=reason):
        evaluate(hasher, choose_protocol(str(tmp_path)))


def test_sources_without_images_are_refused(tmp_path: Path, hasher: Hasher) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    for source, reason in ((tmp_path, "has no images that can be read"), (tmp_path / "none", "there is no")):
        with pytest.raises(HashretError, match=reason):
            evaluate(hasher, choose_protocol(str(source)))
    np.save(tmp_path / "v.npy", np.zeros((2, 3)))
    reason = r"v\.npy has vectors of 3 numbers, and the model takes images of 8 × 8 × 1: give a SOURCE of those"
    with pytest.raises(HashretError, match=reason):
        evaluate(hasher, choose_protocol(str(tmp_path / "v.npy")))


def test_protocols_are_chosen_by_name() -> None:
    assert choose_protocol("mnist") == PROTOCOLS["mnist"]
    assert choose_protocol("mnist", "a", "b") == PROTOCOLS["mnist"]._replace(sources=("a", "b"))
    assert choose_protocol("digits:test").sources == ("digits:test",)
    for name, train, test in (("mnist", "a", None), ("photos", "a", "b"), ("split", None, None), ("split", None, "b")):
        with pytest.raises(ValueError, match="go together, with one of mnist, "):
            choose_protocol(name, train, test)
