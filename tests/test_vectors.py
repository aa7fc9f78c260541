import hashlib
import io
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hashret.codes import Codes, hamming
from hashret.collection import Collection, Hit
from hashret.data.contents import content_bytes, sha256
from hashret.data.images import decode, to_content
from hashret.data.preprocessing import ImagePreprocessing, describe, stored_preprocessing
from hashret.data.records import LabelledSource
from hashret.data.sample import sample
from hashret.data.sources import open_source
from hashret.data.vectors import VectorPreprocessing
from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.models import MODELS
from hashret.models.augment import augment, check_views
from hashret.plots import contact_sheet
from hashret.tasks import generation, restoration

Vectors = NDArray[np.float32]
RNG = np.random.default_rng(0)
CLUSTERS = RNG.integers(0, 6, 500)
# Six clusters, far from the origin, in 20 dimensions whose scales span a factor of 100.
POINTS = RNG.normal(size=(6, 20))[CLUSTERS] + RNG.normal(size=(500, 20)) / 4
VECTORS: Vectors = (50 + np.geomspace(1, 100, 20) * POINTS).astype(np.float32)


@cache
def hasher(model: str = "itq", bits: int = 16, **settings: Any) -> Hasher:
    return Hasher(model, bits, **settings).fit(VECTORS[:400])


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    with Collection.create(tmp_path / "c", hasher()) as collection:
        yield collection


def test_the_sha256_of_a_vector_is_that_of_its_float32_values() -> None:
    vector = np.array([1.5, -2, 0, 3e38])
    content = to_content(vector)
    assert isinstance(content, np.ndarray) and content.dtype == np.float32
    assert np.array_equal(np.load(io.BytesIO(content_bytes(content))), vector.astype(np.float32))
    for same in (vector.astype(">f8"), np.stack([vector, vector], 1)[:, 0], content.view()):
        assert sha256(to_content(same)) == sha256(content) == hashlib.sha256(content_bytes(content)).hexdigest()
    assert sha256(content) == "8b21118f8eb7ead25f4bb67501b81930d5f4615f5dcf6180ecfb8fe7c1f10578"
    assert sha256(to_content(vector[:3].astype(np.float16))) == sha256(to_content(vector[:3]))


@pytest.mark.parametrize("bad", [np.zeros(0), np.arange(4), np.zeros((2, 2)), np.array(1.0), np.zeros(3, complex), 1.5])
def test_contents_that_are_no_vectors_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="vector"):
        to_content(bad)


def test_a_vector_has_no_picture(tmp_path: Path) -> None:
    with pytest.raises(HashretError, match="a vector of 20 numbers, which has no picture"):
        decode(VECTORS[0])
    with pytest.raises(HashretError, match="which has no picture"):
        ImagePreprocessing(8, 8, 1)(content_bytes(VECTORS[0]))
    np.save(tmp_path / "v.npy", VECTORS[0])
    with pytest.raises(HashretError, match="which has no picture"):
        contact_sheet(tmp_path / "v.npy", [Hit(0, 1, str(tmp_path / "v.npy"), [], None, None)], tmp_path / "s.png")
    model = Hasher("denoising", 8, width=1, corruption="gaussian").fit(VECTORS, steps=1)
    calls: list[Callable[[], Any]] = [
        lambda: generation.reconstruct(model, model.preprocessing.batch(VECTORS[:2])),
        lambda: generation.sample(model, 2),
        lambda: generation.manifold(model),
        lambda: generation.interpolate(model, model.preprocessing.batch(VECTORS[:2])),
    ]
    for call in calls:
        with pytest.raises(HashretError, match="vectors, which have no pictures"):
            call()
    with pytest.raises(HashretError, match="vectors, which have no pictures to restore: give one"):
        restoration.denoise(model, np.zeros((9, 9, 1), np.uint8))


def test_vectors_are_centred_and_scaled_by_one_number() -> None:
    preprocessing = VectorPreprocessing.fitted(VECTORS)
    inputs = preprocessing.batch(VECTORS)
    assert inputs.dtype == np.float32 and preprocessing.shape == (20,) and preprocessing.dim == 20
    assert np.abs(inputs.mean(0)).max() < 1e-5 and np.square(inputs).mean() == pytest.approx(1, abs=1e-5)
    exact = VECTORS.astype(np.float64)
    assert inputs == pytest.approx((exact - exact.mean(0)) / np.sqrt(exact.var(0).mean()), abs=1e-5)
    near = np.square(inputs[:, None] - inputs).sum(2).argsort(1)[:, :5]
    assert (near == np.square(exact[:, None] - exact).sum(2).argsort(1)[:, :5]).mean() > 0.999
    for i in (0, 499):  # the same alone and in a batch, from an array and from a file
        alone = preprocessing(VECTORS[i])
        assert alone[1:] == (20, 1) and (alone.pixels == inputs[i]).all()
        assert (preprocessing(content_bytes(VECTORS[i])).pixels == inputs[i]).all()


def test_vectors_that_are_all_equal_have_a_scale() -> None:
    assert not VectorPreprocessing.fitted(np.full((9, 3), 7, np.float32)).batch(np.full((2, 3), 7, np.float32)).any()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (VECTORS[0, :19], "vectors of 19 numbers, and the model takes vectors of 20 numbers"),
        (np.zeros((1, 20), np.uint8), "no vector"),
        (b"no array", "no vector"),
        (np.where(np.arange(20) == 3, np.nan, VECTORS[0]), "not finite"),
        (np.where(np.arange(20) == 3, -np.inf, VECTORS[0]), "not finite"),
        (np.where(np.arange(20) == 3, 1e300, VECTORS[0].astype(np.float64)), "not finite"),
    ],
)
def test_other_contents_are_refused(content: Any, reason: str) -> None:
    with pytest.raises(HashretError, match=reason):
        hasher().preprocessing(to_content(content))


def test_preprocessing_is_stored_whole() -> None:
    preprocessing = VectorPreprocessing.fitted(VECTORS)
    fields, tensors = preprocessing.to_dict(), preprocessing.tensors()
    stored = stored_preprocessing(fields, tensors)
    assert (stored.batch(VECTORS) == preprocessing.batch(VECTORS)).all()
    assert stored_preprocessing({"height": 3, "width": 4, "channels": 1}, {}) == ImagePreprocessing(3, 4, 1)
    nan, zero = np.full(20, np.nan, np.float32), np.array(0, np.float32)
    for wrong_fields, wrong_tensors in (
        ({"numbers": 19}, tensors),
        ({"numbers": 20, "height": 1}, tensors),
        ({"numbers": 20}, {}),
        ({"numbers": 20}, tensors | {"more": nan}),
        ({"numbers": 20}, tensors | {"mean": nan}),
        ({"numbers": 20}, tensors | {"mean": nan.astype(np.float64)}),
        ({"numbers": 20}, tensors | {"scale": zero}),
        ({"height": 3, "width": 4, "channels": 1}, tensors),
    ):
        with pytest.raises(ValueError, match="preprocessing of"):
            stored_preprocessing(wrong_fields, wrong_tensors)


def test_the_inputs_of_a_model_are_described() -> None:
    assert describe(hasher().preprocessing.to_dict()) == "vectors of 20 numbers"
    assert describe(ImagePreprocessing(8, 9, 3).to_dict()) == "images of 8 × 9 × 3"


def test_a_sample_has_vectors_that_are_finite() -> None:
    broken = VECTORS.copy()
    broken[7, 3], broken[9] = np.nan, np.inf
    samples = sample(LabelledSource(open_source(broken), CLUSTERS.tolist()))
    kept = np.delete(np.arange(500), [7, 9])
    assert (samples.images == VECTORS[kept]).all() and samples.labels == [str(cluster) for cluster in CLUSTERS[kept]]
    assert [name for name, _ in samples.failures] == ["7", "9"] and samples.seen == 500
    subset = sample(open_source(VECTORS), limit=50, seed=1)
    assert len(subset.images) == 50 and subset.seen == 500
    assert len(np.unique(subset.images, axis=0)) == 50 and np.isin(subset.images, VECTORS).all()
    assert not np.array_equal(subset.images, sample(open_source(VECTORS), limit=50, seed=2).images)
    with pytest.raises(HashretError, match="no image could be read; the first, 0: a vector with numbers"):
        sample(open_source(np.full_like(VECTORS, np.nan)))
    with pytest.raises(HashretError, match="array has vectors, which have no size in pixels"):
        sample(open_source(VECTORS), size=(8, 8))


def in_batches(hasher: Hasher, vectors: Vectors, size: int) -> Codes:
    return np.concatenate([hasher.encode(vectors[i : i + size]) for i in range(0, len(vectors), size)])


@pytest.mark.parametrize("name", MODELS)
def test_every_member_trains_on_vectors(tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {"width": 4} if "width" in MODELS[name].defaults() else {}
    labels: Any = CLUSTERS[:400].tolist() if MODELS[name].labelled else False
    model = Hasher(name, 16, **settings).fit(VECTORS[:400], steps=40, labels=labels)
    assert [model.settings.get(key, value) for key, value in (("network", "mlp"), ("likelihood", "gaussian"))] == [
        "mlp",
        "gaussian",
    ]
    assert model.preprocessing.shape == (20,) and "of vectors of 20 numbers" not in repr(model)
    codes = model.encode(VECTORS)
    for size in (1, 7):  # the same codes in batches of any size
        assert (in_batches(model, VECTORS[:100], size) == codes[:100]).all()
    assert (model.encode(list(VECTORS[:100].astype(np.float64))) == codes[:100]).all()
    nearest = np.argsort(hamming(codes[400:], codes[:400]), axis=1, kind="stable")[:, :10]
    assert (CLUSTERS[nearest] == CLUSTERS[400:, None]).mean() > 0.5  # chance is a sixth
    if model.member.trainable:
        inputs = model.preprocessing.batch(VECTORS)
        with torch.no_grad():
            reconstructed = model.member.reconstruct(torch.from_numpy(inputs)).numpy()
        assert reconstructed.min() < 0  # unlike pixels
        if name != "twin":  # reconstructs a vector from others of its batch
            assert model.errors(inputs) == pytest.approx(np.square(reconstructed - inputs).sum(1), rel=1e-3)
    model.save(tmp_path / "model")
    stored = Hasher.load(tmp_path / "model")
    assert stored.fingerprint == model.fingerprint and (stored.encode(VECTORS) == codes).all()
    assert "turns vectors of 20 numbers" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("ae", {"network": "conv"}, "network 'conv' is for images: choose mlp or deep for vectors"),
        ("ae", {"network": "resnet"}, "network 'resnet' is for images"),
        ("denoising", {"network": "unet"}, "network 'unet' is for images"),
        ("ae", {"network": "backbone:resnet18", "weights": "random"}, "network 'backbone:resnet18' is for images"),
        ("vae", {"likelihood": "bernoulli"}, "likelihood 'bernoulli' is for images: choose gaussian or laplace"),
        ("vae", {"likelihood": "categorical"}, "likelihood 'categorical' is for images"),
        ("denoising", {"corruption": "downscaling"}, "corruption 'downscaling' is for images: choose gaussian or mask"),
        ("stacked", {"corruption": "salt-and-pepper"}, "corruption 'salt-and-pepper' is for images"),
    ],
)
def test_parts_for_images_are_refused_by_name(name: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(HashretError, match=reason):
        Hasher(name, 8, **settings).fit(VECTORS, steps=1)


def test_parts_for_vectors_are_accepted() -> None:
    model = Hasher("denoising", 8, width=1, network="deep", likelihood="laplace", corruption="gaussian", strength=0.1)
    assert model.fit(VECTORS, steps=1).settings["network"] == "deep"


def test_a_hasher_fitted_to_vectors_can_be_fitted_to_images() -> None:
    model = Hasher("ae", 8, width=1).fit(VECTORS, steps=1)
    images = RNG.integers(0, 256, (40, 8, 8), np.uint8)
    assert model.fit(images, steps=1).settings["network"] == "conv"
    assert len(model.encode(images)) == 40
    with pytest.raises(HashretError, match="no image: a vector of 20 numbers"):
        model.encode(VECTORS)


def test_another_mean_is_another_model(tmp_path: Path) -> None:
    model = hasher()
    model.save(tmp_path / "model")
    data = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    position = data.find(model.preprocessing.tensors()["mean"].tobytes())
    assert position > 0
    data[position] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(data)
    with pytest.raises(HashretError, match="was changed since it was saved"):
        Hasher.load(tmp_path / "model")


def test_views_of_vectors_have_noise_and_masked_values() -> None:
    x = torch.ones(2000, 50)
    unchanged: dict[str, float] = {"crop": 1, "rotation": 0, "flip": 0, "light": 0, "erase": 0}
    assert torch.equal(augment(x, **unchanged), x)
    masked = augment(x, **unchanged, masking=0.3)
    assert set(masked.flatten().tolist()) == {0, 1} and float(masked.mean()) == pytest.approx(0.7, abs=0.01)
    noisy = augment(x, **unchanged, noise=0.5)
    assert float(noisy.mean()) == pytest.approx(1, abs=0.01) and float(noisy.std()) == pytest.approx(0.5, abs=0.01)
    for name, value in (("noise", -0.1), ("masking", 1.5)):
        with pytest.raises(ValueError, match=f"{name} {value}"):
            check_views(crop=1, rotation=0, flip=0, light=0, **{name: value})


def as_npy(path: Path, vectors: NDArray[Any]) -> Path:
    np.save(path.with_suffix(".npy"), vectors)
    return path.with_suffix(".npy")


def as_npz(path: Path, vectors: NDArray[Any]) -> Path:
    np.savez(path.with_suffix(".npz"), vectors=vectors, labels=CLUSTERS[: len(vectors)])
    return path.with_suffix(".npz")


@pytest.mark.parametrize("form", [as_npy, as_npz, lambda path, vectors: vectors], ids=["npy", "npz", "array"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2"])
def test_every_form_of_vectors_is_indexed_and_found(
    tmp_path: Path, collection: Collection, form: Callable[[Path, NDArray[Any]], Any], dtype: str
) -> None:
    vectors = VECTORS[:60].astype(dtype)
    codes = hasher().encode(vectors)
    source = form(tmp_path / "v", vectors)
    report = collection.index(source)
    assert report[:6] == (60, 0, 0, 0, 0, 60)
    root = "array" if isinstance(source, np.ndarray) else str(source)
    for i in (0, 59):
        hit = collection.query(vectors[i], 1)[0]
        assert hit.distance == 0
        item = collection.get(i + 1)
        assert (item.width, item.height, item.paths) == (20, 1, [f"{root}#{i}"])
        assert item.sha256 == sha256(to_content(vectors[i])) and item.label == (
            str(CLUSTERS[i]) if form is as_npz else None
        )
        expected = np.sort(hamming(codes[i : i + 1], codes)[0])[:5]
        assert [hit.distance for hit in collection.query_batch(vectors, 5)[i]] == expected.tolist()
    again = collection.index(form(tmp_path / "v", vectors))
    assert (again.added, again.decoded, again.unchanged) == (0, 0, 60)
    assert collection.add(vectors[:3]) == [1, 2, 3]  # the contents are indexed already


def test_added_vectors_are_reindexed(tmp_path: Path, collection: Collection) -> None:
    collection.index(as_npy(tmp_path / "v", VECTORS[:30]))
    ids = collection.add(VECTORS[30:40].astype(np.float64))
    other = Hasher("lsh", 32).fit(VECTORS)
    collection.reindex(other)
    assert len(collection) == 40
    blob = collection.get(ids[5]).paths[0]
    for query in (VECTORS[35], blob):  # a file of one vector is a query
        assert ids[5] in {hit.id for hit in collection.query(query, None, 0)}


def test_vectors_that_are_not_finite_are_skipped(collection: Collection) -> None:
    broken = VECTORS[:50].copy()
    broken[7, 3] = np.inf
    report = collection.index(broken)
    assert (report.added, report.failed) == (49, 1)
    assert report.failures == [
        ("array#7", "a vector with numbers that are not finite, or that overflow in preprocessing")
    ]
    with pytest.raises(HashretError, match="not finite"):
        collection.add(broken)


def test_a_collection_is_of_vectors_of_one_width_or_of_images(tmp_path: Path, collection: Collection) -> None:
    images = RNG.integers(0, 256, (9, 8, 8), np.uint8)
    narrow = as_npy(tmp_path / "narrow", VECTORS[:, :5])
    with pytest.raises(HashretError, match=r"narrow.npy has vectors of 5 numbers, and the model takes vectors of 20"):
        collection.index(narrow)
    with pytest.raises(HashretError, match="array has images, and the model takes vectors of 20 numbers"):
        collection.index(images)
    for bad in (VECTORS[:2, :5], [VECTORS[0], VECTORS[1, :3]], images):
        for method in (collection.query_batch, collection.add):
            with pytest.raises(HashretError, match="numbers|no vector"):
                method(bad)
    assert len(collection) == 0
    with Collection.create(tmp_path / "images", Hasher("lsh", 8).fit(images)) as of_images:
        with pytest.raises(HashretError, match="array has vectors of 20 numbers, and the model takes images of 8 × 8"):
            of_images.index(VECTORS)
        with pytest.raises(HashretError, match="no image: a vector of 20 numbers"):
            of_images.query(VECTORS[0])


def test_near_duplicates_of_vectors_are_found_but_cannot_be_augmented(collection: Collection) -> None:
    ids = collection.add([*VECTORS[:30], VECTORS[3] + np.float32(0.001)])
    groups = collection.dupes(0)
    assert any({ids[3], ids[30]} <= {item.id for item in group.items} for group in groups)
    with pytest.raises(HashretError, match="vectors, which have no pictures to augment: give labelled pairs"):
        collection.calibrate()
    calibration = collection.calibrate([(ids[3], ids[30], True), (ids[0], ids[1], False)])
    assert calibration.recall[0] == 1
