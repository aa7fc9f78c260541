import gzip
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hashret.data.records import Record, Source
from hashret.data.sources import open_source
from hashret.errors import HashretError

IMAGES = np.random.default_rng(0).integers(0, 256, (300, 12, 9), np.uint8)
LABELS = np.arange(300) % 10


def idx(array: NDArray[Any], shape: tuple[int, ...] | None = None, type_code: int = 8) -> bytes:
    shape = array.shape if shape is None else shape
    return (
        bytes([0, 0, type_code, len(shape)]) + b"".join(n.to_bytes(4) for n in shape) + array.astype(np.uint8).tobytes()
    )


def rows(source: Source) -> NDArray[np.uint8]:
    """Return all contents of a source of arrays, after checking its records."""
    records = list(source)
    assert [record.name for record in records] == [str(i) for i in range(len(records))]
    assert source.length == len(records) and not source.streaming and source.arrays and source.ignored == 0
    contents = [record.read() for record in records]
    assert [record.size for record in records] == [len(bytes(content)) for content in contents]
    return np.stack([np.asarray(content) for content in contents])


def labels(source: Source) -> list[str | None]:
    return [record.label for record in source]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("shape", [(300, 12, 9), (100, 12, 9, 3), (300, 12, 9, 1)])
def test_idx_yields_its_rows(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    path = write(tmp_path / f"some-images{suffix}", idx(IMAGES.reshape(shape)))
    source = open_source(path)
    assert source.root == f"{path}#"
    assert (rows(source) == IMAGES.reshape(shape)).all()
    assert (rows(source) == IMAGES.reshape(shape)).all()  # in a second pass
    assert {record.mtime_ns for record in source} == {path.stat().st_mtime_ns}
    assert labels(source) == [None] * shape[0]


@pytest.mark.parametrize("images", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "train-images.idx3-ubyte"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_labels_are_found_beside_the_images(tmp_path: Path, images: str, suffix: str) -> None:
    path = write(tmp_path / images, idx(IMAGES))
    name = images.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1") + suffix
    write(tmp_path / name, idx(LABELS))
    assert labels(open_source(path)) == [str(label) for label in LABELS]


def test_idx_of_many_blocks_is_read_completely(tmp_path: Path) -> None:
    big = np.random.default_rng(1).integers(0, 256, (5000, 28, 28), np.uint8)
    path = write(tmp_path / "images.gz", idx(big))
    assert (rows(open_source(path)) == big).all()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (idx(IMAGES, (301, 12, 9)), "broken"),
        (idx(IMAGES, (299, 12, 9)), "broken"),
        (idx(IMAGES)[:-1], "broken"),
        (idx(IMAGES)[:10], "broken"),
        (idx(IMAGES, (2**32 - 1,) * 3), "broken|more than"),
        (idx(IMAGES, (1, 20_000, 20_000)), "more than the limit of 100000000"),
        (idx(IMAGES, (300, 0, 9)), "must be uint8 of shape"),
        (idx(LABELS), "must be uint8 of shape"),
        (idx(IMAGES, (300, 36, 3)), "must be uint8 of shape"),
        (idx(IMAGES, type_code=13), "not an IDX file of bytes: it begins with 00 00 0d 03"),
        (b"\0\0", "not an IDX file of bytes"),
    ],
)
def test_idx_with_a_false_header_is_refused(tmp_path: Path, suffix: str, data: bytes, reason: str) -> None:
    path = write(tmp_path / f"images{suffix}", data)
    with pytest.raises(HashretError, match=f"{path.name}.*({reason})"):
        rows(open_source(path))


def test_truncated_or_damaged_gzip_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(idx(IMAGES))
    path = tmp_path / "images.gz"
    for data in (whole[:-1], whole[:-9], whole[:5000], whole[:-6] + b"\0\0" + whole[-4:]):
        path.write_bytes(data)
        with pytest.raises(HashretError, match=r"images\.gz (is broken|cannot be read)"):
            rows(open_source(path))


def test_a_wrong_number_of_labels_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "images", idx(IMAGES))
    for data in (idx(LABELS[:-1]), idx(LABELS)[:-1], idx(IMAGES)):
        write(tmp_path / "labels", data)
        with pytest.raises(HashretError, match="labels must have one label for each of the 300 images of images"):
            open_source(path)


@pytest.mark.parametrize("shape", [(300, 12, 9), (100, 12, 9, 3), (300, 12, 9, 1), (0, 12, 9)])
def test_npy_yields_its_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = IMAGES.reshape(shape) if shape[0] else np.zeros(shape, np.uint8)
    np.save(tmp_path / "a.npy", array)
    source = open_source(tmp_path / "a.npy")
    assert source.root == f"{tmp_path}/a.npy#"
    assert source.length == shape[0]
    if shape[0]:
        assert (rows(source) == array).all()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8"])
def test_floats_of_two_dimensions_are_vectors(tmp_path: Path, dtype: str) -> None:
    vectors = np.random.default_rng(1).normal(size=(3000, 130)).astype(dtype)  # several blocks
    np.save(tmp_path / "a.npy", vectors)
    np.savez(tmp_path / "a.npz", vectors=vectors, other=vectors[:, :3], labels=np.arange(3000))
    for source in (open_source(tmp_path / "a.npy"), open_source(tmp_path / "a.npz"), open_source(vectors)):
        assert source.dim == 130 and source.length == 3000
        contents = rows(source)
        assert contents.dtype == np.float32 and (contents == vectors.astype(np.float32)).all()
    assert labels(open_source(tmp_path / "a.npz"))[2999] == "2999"
    np.savez(tmp_path / "b.npz", images=IMAGES, vectors=vectors[:300])
    assert open_source(tmp_path / "b.npz").dim is None  # images first
    np.savez(tmp_path / "c.npz", left=vectors, right=vectors)
    with pytest.raises(HashretError, match="has the arrays left, right: .* the vectors 'vectors'"):
        open_source(tmp_path / "c.npz")
    whole = (tmp_path / "a.npy").read_bytes()
    for data in (whole[:-1], whole + b"!"):
        (tmp_path / "a.npy").write_bytes(data)
        with pytest.raises(HashretError, match="broken"):
            open_source(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="vectors of 65537 numbers: more than the limit of 65536"):
        open_source(np.zeros((2, 65_537), dtype))
    for empty in (vectors[:, :0], vectors[0], vectors[:, :128].reshape(3000, 8, 16)):
        with pytest.raises(ValueError, match="or vectors, floats of shape"):
            open_source(empty)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (IMAGES.astype(np.float32), r"must be uint8 .* not float32 of \(300, 12, 9\)"),
        (IMAGES > 7, "not bool of"),
        (IMAGES[0], r"not uint8 of \(12, 9\)"),
        (IMAGES.reshape(300, 36, 3), r"not uint8 of \(300, 36, 3\)"),
        (IMAGES.reshape(300, 2, 6, 9), r"not uint8 of \(300, 2, 6, 9\)"),
        (np.asfortranarray(IMAGES), "Fortran order: save numpy.ascontiguousarray"),
        (np.array([{}, []], dtype=object), "not object of"),
    ],
)
def test_an_array_file_without_images_is_refused(tmp_path: Path, array: NDArray[Any], reason: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "a.npz", images=array)
    with pytest.raises(HashretError, match=f"a.npy .*{reason}"):
        open_source(tmp_path / "a.npy")
    with pytest.raises(HashretError, match=r"a\.npz"):
        open_source(tmp_path / "a.npz")


def test_npy_with_a_false_length_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    whole = (tmp_path / "a.npy").read_bytes()
    for data in (whole[:-1], whole + b"!", whole.replace(b"(300, 12, 9)", b"(30000, 12, 9)"), whole[:50], b"", b"text"):
        (tmp_path / "a.npy").write_bytes(data)
        with pytest.raises(HashretError, match=r"broken"):
            open_source(tmp_path / "a.npy")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("images", ["images", "x", "x_train", "data", "other"])
@pytest.mark.parametrize("labels_name", ["labels", "y", "y_train", None])
def test_npz_finds_its_images_and_labels(tmp_path: Path, save: Any, images: str, labels_name: str | None) -> None:
    arrays = {"a_mean": np.zeros((12, 9)), images: IMAGES} | ({labels_name: LABELS[:, None]} if labels_name else {})
    save(tmp_path / "a.npz", **arrays)
    source = open_source(tmp_path / "a.npz")
    assert source.root == f"{tmp_path}/a.npz#"
    assert (rows(source) == IMAGES).all()
    assert labels(source) == ([str(label) for label in LABELS] if labels_name else [None] * 300)


def test_npz_labels_may_be_strings_but_not_pickles(tmp_path: Path) -> None:
    words = np.array(["shoe", "Hemd"] * 150)
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=words)
    assert labels(open_source(tmp_path / "a.npz")) == words.tolist()
    for bad in (words.astype(object), LABELS[:-1], LABELS + 0.5):
        np.savez(tmp_path / "a.npz", allow_pickle=True, images=IMAGES, labels=bad)
        with pytest.raises(HashretError, match=r"a\.npz"):
            open_source(tmp_path / "a.npz")


class Touch:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_in_an_array_file_is_never_loaded(tmp_path: Path) -> None:
    trap = np.array([Touch(tmp_path / "run")] * 300, dtype=object)
    np.savez(tmp_path / "a.npz", allow_pickle=True, images=IMAGES, labels=trap)
    np.savez(tmp_path / "b.npz", allow_pickle=True, images=trap)
    np.save(tmp_path / "c.npy", trap, allow_pickle=True)
    for name in ("a.npz", "b.npz", "c.npy"):
        with pytest.raises(HashretError, match=name):
            open_source(tmp_path / name)
    assert not (tmp_path / "run").exists()
    np.load(tmp_path / "c.npy", allow_pickle=True)
    assert (tmp_path / "run").exists()  # the pickle does create the file


def test_npz_with_ambiguous_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", left=IMAGES, right=IMAGES)
    with pytest.raises(HashretError, match="has the arrays left, right: name the one with the images 'images'"):
        open_source(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", flat=LABELS)
    with pytest.raises(HashretError, match="has the arrays flat"):
        open_source(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"this is no zip")
    with pytest.raises(HashretError, match="broken"):
        open_source(tmp_path / "a.npz")


def test_damaged_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(HashretError, match="CRC"):
        rows(open_source(tmp_path / "a.npz"))
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("images.npy", b"no array")
    with pytest.raises(HashretError, match="broken"):
        open_source(tmp_path / "b.npz")


def test_an_array_is_a_source(tmp_path: Path) -> None:
    source = open_source(IMAGES)
    assert source.root == "array#"
    assert (rows(source) == IMAGES).all()
    # An array may change in place: a new modification time has its contents compared again.
    assert next(iter(open_source(IMAGES))).mtime_ns != next(iter(source)).mtime_ns
    for array in (IMAGES[0], IMAGES.astype(float), IMAGES.reshape(300, 36, 3)):
        with pytest.raises(ValueError, match="an array of images must be uint8 of shape"):
            open_source(array)


def test_digits_come_with_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    source = open_source("digits")
    assert source.root == "digits#"
    images = rows(source)
    assert images.shape == (1797, 8, 8) and images.max() == 255
    assert (images == np.floor(bunch.images * 255 / 16 + 0.5)).all()
    assert labels(source) == [str(digit) for digit in bunch.target]
    train, test = open_source("digits:train"), open_source("digits:test")
    assert test.root == "digits:test#"
    assert (np.concatenate([rows(train), rows(test)]) == images).all()
    assert labels(train) + labels(test) == labels(source)


@pytest.mark.parametrize("name", ["digits:", "digits:all", "mnist:validation", "cifar10:train:test"])
def test_an_unknown_part_is_refused(name: str) -> None:
    with pytest.raises(HashretError, match="has no part '.*': give .*:train or .*:test"):
        open_source(name)


def first(source: Source) -> Record:
    return next(iter(source))


@pytest.mark.parametrize(
    ("name", "folder", "label"), [("fashion-mnist", "FashionMNIST", "Ankle boot"), ("mnist", "MNIST", "5")]
)
def test_torchvision_reads_existing_compressed_files(
    tmp_path: Path, shared_data: Path, name: str, folder: str, label: str
) -> None:
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for path in (shared_data / name).glob("*.gz"):
        (raw / path.name).symlink_to(path)
    train, test = open_source(f"{name}:train", data_root=tmp_path), open_source(f"{name}:test", data_root=tmp_path)
    both = open_source(name, data_root=tmp_path)

    def pixels(source: Source) -> NDArray[np.uint8]:
        return np.stack([np.asarray(record.read()) for record in source])

    assert [source.length for source in (train, test, both)] == [60_000, 10_000, 70_000]
    assert [source.root for source in (train, both)] == [f"{name}:train#", f"{name}#"]
    beside = open_source(shared_data / name / "train-images-idx3-ubyte.gz")
    expected = pixels(both)
    assert (pixels(beside) == expected[:60_000]).all() and (pixels(test) == expected[60_000:]).all()
    assert (pixels(train) == expected[:60_000]).all()
    assert first(train).label == label
    assert first(beside).label == ("9" if name == "fashion-mnist" else "5")
    assert len(set(labels(both))) == 10


def run(code: str, **environment: str) -> str:
    """Run a program that fails, and return the last line of its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 1 and not done.stdout
    return done.stderr.splitlines()[-1]


def test_without_a_network_the_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for name, ending in (
        ("fashion-mnist:test", f"t10k-labels-idx1-ubyte.gz into {tmp_path / 'FashionMNIST' / 'raw'}"),
        ("cifar10", f"put cifar-10-python.tar.gz into {tmp_path}"),
    ):
        with pytest.raises(HashretError, match="could not be downloaded .*Connection refused") as caught:
            open_source(name, data_root=tmp_path)
        assert str(caught.value).endswith(ending)


def test_data_sets_are_stored_in_the_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(HashretError, match=f"into {tmp_path}/hashret$"):
        open_source("cifar10")


@pytest.mark.parametrize(
    "error", ['RuntimeError("operator torchvision::nms does not exist")', 'ImportError("undefined symbol: _ZN3c10")']
)
def test_incompatible_torch_and_torchvision_are_explained(tmp_path: Path, error: str) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {error}\n")
    last = run("from hashret.data.sources import open_source; open_source('mnist')", PYTHONPATH=str(tmp_path))
    assert last.startswith("hashret.errors.HashretError: torch and torchvision do not fit together")
    assert last.endswith("install them as a pair, pip install --upgrade torch torchvision")


def test_sources_import_neither_torchvision_nor_scikit_learn() -> None:
    code = (
        "import sys, hashret.data.sources; sys.exit(any(m in sys.modules for m in ('torch', 'torchvision', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
