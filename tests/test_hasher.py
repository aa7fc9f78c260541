import copy
import json
import os
import re
import resource
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

from hashret.codes import Codes, hamming, pack, to_hex
from hashret.data.contents import PreparedImages, sha256
from hashret.data.preprocessing import ImagePreprocessing
from hashret.data.sources import open_source
from hashret.errors import HashretError
from hashret.hasher import SMALL_BATCH, Hasher
from hashret.heads import HEADS
from hashret.model_folder import FORMAT
from hashret.models import MODELS, Member
from hashret.models.vae import VariationalAutoencoder
from hashret.process import SWITCH_INTERVAL
from hashret.runtime.inputs import to_input
from hashret.training.loop import split
from hashret.training.options import TrainingOptions, parse_duration

Pixels = NDArray[np.uint8]

DIGITS: Pixels = (load_digits().images * 15.9375).astype(np.uint8)  # (1797, 8, 8)
LABELS: NDArray[np.int64] = load_digits().target
COLOUR: Pixels = np.stack([DIGITS, DIGITS // 2, 255 - DIGITS], -1)
NAMES = [str(label) for label in LABELS]
SIMPLE = ("mlp", "conv")  # the networks that every member is tested on; test_networks.py has the others
MEMBERS = [
    (name, network)
    for name, member in MODELS.items()
    for network in (SIMPLE if member.trainable else [""])
    if "network" in member.defaults() or not member.trainable or network == "mlp"
    if (name, network) != ("stacked", "conv")  # it supports only fully connected networks
]
STORED = Path(__file__).parent / "data"


def on_two_threads(hasher: Hasher, images: Any) -> Codes:
    torch.set_num_threads(2)
    try:
        return hasher.encode(images)
    finally:
        torch.set_num_threads(1)


def fit(name: str, network: str, images: Pixels, bits: int = 32, width: int = 8, steps: int = 20) -> Hasher:
    if not network:
        return Hasher(name, bits).fit(images)
    defaults = MODELS[name].defaults()
    settings: dict[str, Any] = {k: v for k, v in (("network", network), ("width", width)) if k in defaults}
    labels: Any = NAMES[: len(images)] if MODELS[name].labelled else False
    return Hasher(name, bits, **settings).fit(images, steps=steps, labels=labels)


@pytest.fixture(scope="module", params=MEMBERS, ids="-".join)
def hasher(request: pytest.FixtureRequest) -> Hasher:
    """Return a hasher of each member and network, fitted to grey digits."""
    name, network = request.param
    return fit(name, network, DIGITS)


@pytest.fixture(scope="module")
def small() -> Hasher:
    return fit("vae", "mlp", DIGITS, bits=16, width=1, steps=5)


def in_batches(hasher: Hasher, images: Any, size: int) -> Codes:
    return np.concatenate([hasher.encode(images[i : i + size]) for i in range(0, len(images), size)])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "network"), MEMBERS)
def test_neighbours_share_the_label_and_a_stored_model_gives_the_same_codes(
    tmp_path: Path, name: str, network: str, channels: int
) -> None:
    images = DIGITS if channels == 1 else COLOUR
    hasher = fit(name, network, images, bits=32, width=16, steps=120)
    assert hasher.preprocessing == ImagePreprocessing(8, 8, channels)
    codes = hasher.encode(images)
    nearest = np.argsort(hamming(codes[:300], codes[300:]), axis=1, kind="stable")[:, :10]
    precision = (LABELS[300:][nearest] == LABELS[:300, None]).mean()
    assert precision > (0.5 if network else 0.4)  # chance is 0.1

    hasher.save(tmp_path / "model")
    stored = Hasher.load(tmp_path / "model")
    assert (stored.encode(images) == codes).all()
    assert stored.fingerprint == hasher.fingerprint and stored.training == hasher.training
    assert repr(stored) == repr(hasher)


def varied_images() -> Pixels:
    """Return digits, noise and uniform images."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    uniform = np.linspace(0, 255, 10).astype(np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    return np.concatenate([DIGITS[:250], noise, uniform])


def test_codes_are_the_same_alone_and_in_any_batch(hasher: Hasher) -> None:
    images = varied_images()
    expected = hasher.encode(images)
    for size in (1, 7, 256):
        assert (in_batches(hasher, images, size) == expected).all()
    assert (hasher.encode(images[::-1])[::-1] == expected).all()
    assert (on_two_threads(hasher, images) == expected).all()


def outputs(hasher: Hasher, images: Pixels, *, exact: bool, together: bool) -> NDArray[Any]:
    """Return the values that the head compares with its thresholds, (n, bits), without treatment of ambiguous ones."""
    runtime, head = hasher._runtime, hasher._parts()[2]
    rows = [images] if together else [images[i : i + 1] for i in range(len(images))]
    values: list[NDArray[Any]] = [(runtime.exact if exact else runtime.outputs)(row[..., None]) for row in rows]
    return np.concatenate([head.project(row) for row in values])


def with_threshold(hasher: Hasher, threshold: NDArray[Any]) -> Hasher:
    preprocessing, member, head = hasher._parts()
    other = Hasher(hasher.model, hasher.bits, hasher.head, **hasher.settings)
    other._fitted = preprocessing, member, replace(head, threshold=threshold.astype(np.float64))
    return other


@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
@pytest.mark.parametrize("exact", [False, True], ids=["float32", "float64"])
def test_codes_are_the_same_with_outputs_on_the_threshold(hasher: Hasher, exact: bool, together: bool) -> None:
    images = DIGITS[:64]
    values = outputs(hasher, images, exact=exact, together=together)
    threshold = values[range(32), range(32)]  # bit j on the output of image j
    on_threshold = with_threshold(hasher, threshold)
    codes = on_threshold.encode(images)
    for size in (1, 7, 31):
        assert (in_batches(on_threshold, images, size) == codes).all()
    assert (on_two_threads(on_threshold, images) == codes).all()
    if exact:  # an output on the threshold is not above it
        assert not np.unpackbits(codes, axis=1)[range(32), range(32)].any()


def test_codes_are_the_same_with_large_rounding_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate float32 sums that differ between batches by more than on any real machine."""

    class Rough(Member):
        def outputs(self, x: Tensor) -> Tensor:
            values: Tensor = self.encoder(x)
            return values * (1 + 1e-6 * min(len(x), 100)) if x.dtype == torch.float32 else values

    monkeypatch.setitem(MODELS, "rough", Rough)
    hasher = fit("rough", "mlp", DIGITS)
    images = DIGITS[:64]
    for together in (True, False):
        threshold = outputs(hasher, images, exact=False, together=together)[range(32), range(32)]
        on_threshold = with_threshold(hasher, threshold)
        bits = [outputs(hasher, images, exact=False, together=t) > threshold for t in (True, False)]
        assert (bits[0] != bits[1]).any()  # a float32 comparison alone would give different codes
        codes = on_threshold.encode(images)
        for size in (1, 7, 31):
            assert (in_batches(on_threshold, images, size) == codes).all()


def test_codes_are_the_same_if_a_projection_gives_only_rounding_errors() -> None:
    """Images of doubled pixels, and grey images with three channels, have components that are 0 up to rounding."""
    doubled = DIGITS[:300].repeat(2, 1).repeat(2, 2)
    coloured = DIGITS[:300, ..., None].repeat(3, 3)
    coloured[0, 0, 0] = 255, 0, 0
    for images in (doubled, coloured):
        hasher = Hasher("pca", 80).fit(images)
        codes = hasher.encode(images)
        assert (in_batches(hasher, images, 1) == codes).all()
        assert (in_batches(hasher, images, 7) == codes).all()
        bits = np.unpackbits(codes, axis=1)
        assert not bits[1:, 66:].any() and bits[:, :50].any(0).all()


def test_codes_do_not_depend_on_precision_settings_of_the_process(small: Hasher) -> None:
    images = DIGITS[:300]
    expected = small.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert (small.encode(images) == expected).all()
    torch.set_float32_matmul_precision("medium")
    try:
        assert (small.encode(images) == expected).all()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_threads_do_not_reset_each_others_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is a setting of the process: no thread may restore it while another still encodes."""
    tf32, intervals = set(), set()

    class Watching(Member):
        def outputs(self, x: Tensor) -> Tensor:
            tf32.add(torch.backends.cudnn.allow_tf32)
            intervals.add(sys.getswitchinterval())
            outputs: Tensor = self.encoder(x)
            tf32.add(torch.backends.cudnn.allow_tf32)
            return outputs

    monkeypatch.setitem(MODELS, "watching", Watching)
    hasher = fit("watching", "conv", DIGITS[:200], steps=2)
    torch.set_num_threads(2)
    torch.backends.cudnn.allow_tf32 = True  # as it is by default
    before = True, 2, sys.getswitchinterval()
    intervals.clear()  # those of the training
    expected = hasher.encode(DIGITS[:200])
    wrong = []

    def encode() -> None:
        for i in range(0, 200, 10):
            if (
                hasher.encode_pixels(DIGITS[i : i + 10, ..., None], single_thread=i % 20 == 0) != expected[i : i + 10]
            ).any():
                wrong.append(i)

    threads = [threading.Thread(target=encode) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and tf32 == {False} and intervals == {SWITCH_INTERVAL} != {before[2]}
    assert (torch.backends.cudnn.allow_tf32, torch.get_num_threads(), sys.getswitchinterval()) == before
    after = []
    new = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
    new.start()
    new.join()
    torch.set_num_threads(1)
    assert after == [2]


def test_a_single_thread_uses_no_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Member):
        def outputs(self, x: Tensor) -> Tensor:
            seen.append((x.dtype, torch.get_num_threads()))
            outputs: Tensor = self.encoder(x)
            return outputs

    seen: list[tuple[torch.dtype, int]] = []
    monkeypatch.setitem(MODELS, "counting", Counting)
    hasher = fit("counting", "mlp", DIGITS[:100], steps=2)
    threshold = outputs(hasher, DIGITS[:1], exact=True, together=True)[0]  # ambiguous, so computed again in float64
    hasher = with_threshold(hasher, threshold)
    torch.set_num_threads(2)
    try:
        few, many = DIGITS[:4, ..., None], np.repeat(DIGITS[:4, ..., None], 300, axis=0)
        assert few.nbytes < SMALL_BATCH < many.nbytes  # which decides where nobody else does
        for pixels, single_thread, threads in ((many, True, 1), (many, False, 2), (few, True, 1), (few, False, 1)):
            seen.clear()
            hasher.encode_pixels(pixels, single_thread=single_thread)
            assert set(seen) == {(torch.float32, threads), (torch.float64, threads)}
    finally:
        torch.set_num_threads(1)


def test_labels_are_read_only_by_members_that_learn_from_them() -> None:
    for name, labels, reason in (
        ("ortho", False, "model 'ortho' learns from labels: add --labels"),
        ("cvae", False, "model 'cvae' learns from labels"),
        ("contrastive", True, "model 'contrastive' learns without labels: leave --labels out"),
        ("pca", NAMES, "model 'pca' learns without labels"),
    ):
        with pytest.raises(HashretError, match=reason):
            Hasher(name, 16).fit(DIGITS, steps=1, labels=labels)
    with pytest.raises(HashretError, match="model 'stacked' learns from labels"):
        Hasher("stacked", 16, fine_tune=True).fit(DIGITS, steps=1)
    with pytest.raises(HashretError, match="0 different labels, and training needs at least two"):
        Hasher("ortho", 16).fit(DIGITS, steps=1, labels=True)


@pytest.mark.parametrize(
    ("extra", "reason"), [(1, "only 100 images for the 101 labels"), (-1, "more images than the 99 labels")]
)
def test_labels_must_be_as_many_as_images(extra: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Hasher("ortho", 16).fit(DIGITS[:100], steps=1, labels=[i % 2 for i in range(100 + extra)])


def test_labels_of_the_source_equal_those_passed_in() -> None:
    settings: dict[str, Any] = {"network": "mlp", "width": 2}
    hashers = [
        Hasher("ortho", 16, **settings).fit("digits", steps=5, labels=labels)
        for labels in (True, NAMES, [None, *NAMES[1:]], LABELS.tolist())
    ]
    assert hashers[0].fingerprint == hashers[1].fingerprint == hashers[3].fingerprint != hashers[2].fingerprint
    assert hashers[0].training["classes"] == [str(i) for i in range(10)]
    assert hashers[0].settings["classes"] == 10


def test_codes_are_learned_from_labels() -> None:
    """Images of noise have no similarity to learn from."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    labels = [None if i % 3 == 2 else i % 2 for i in range(60)]
    hasher = Hasher("ortho", 32, network="mlp", width=8, crop=1.0, rotation=0.0, reconstruction=0.0)
    codes = hasher.fit(noise, steps=300, labels=labels).encode(noise)
    within, between = list[int](), list[int]()
    for i, j in combinations([i for i in range(60) if labels[i] is not None], 2):
        distance = hamming(codes[i : i + 1], codes[j : j + 1])[0, 0]
        (within if labels[i] == labels[j] else between).append(distance)
    assert np.mean(within) + 5 < np.mean(between)


def test_explicit_and_initial_settings_override_recommended_ones() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(10_000, 4, 4, 3), dtype=np.uint8)
    defaults = Hasher("contrastive", 8).settings
    few = Hasher("contrastive", 8).fit(images[:200], steps=1)
    assert few.settings == defaults
    recommended = MODELS["contrastive"].recommended_settings((3, 4, 4), 10_000)
    many = Hasher("contrastive", 8, whole=0.5, network="mlp").fit(images, steps=1)
    assert many.settings == defaults | recommended | {"whole": 0.5, "network": "mlp"}
    continued = Hasher("contrastive", 8, temperature=0.3).fit(images, steps=0, init=few)
    assert continued.settings == few.settings | {"temperature": 0.3}
    tuned = Hasher("stacked", 8, fine_tune=True).fit(DIGITS[:200], steps=1, labels=[str(i % 2) for i in range(200)])
    with pytest.raises(HashretError, match="model 'stacked' learns from labels: add --labels"):
        Hasher("stacked", 8).fit(DIGITS[:200], steps=1, init=tuned)


def test_a_member_is_initialised_from_another_of_the_same_network() -> None:
    stacked = fit("stacked", "mlp", DIGITS, steps=60)
    settings: dict[str, Any] = {"network": "mlp", "width": 8}
    initialised = Hasher("binary", 32, **settings).fit(DIGITS, steps=1, learning_rate=0.0, init=stacked)
    mine, theirs = initialised._tensors(), stacked._tensors()
    for name in ("encoder.1.weight", "encoder.7.bias", "decoder.0.weight"):
        assert (mine[f"member.{name}"] == theirs[f"member.{name}"]).all()
    for other in ({"network": "conv"}, {"width": 4}):
        with pytest.raises(HashretError, match="has another network: train both with the same bits, size"):
            Hasher("binary", 32, **settings | other).fit(DIGITS, steps=1, init=stacked)


def test_every_form_of_an_image_gives_the_same_code(tmp_path: Path) -> None:
    hasher = fit("itq", "", COLOUR, 16)
    expected = hasher.encode(COLOUR[:6])
    assert expected.shape == (6, 2) and expected.dtype == np.uint8 and len(np.unique(expected, axis=0)) > 1
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    pictures = [Image.fromarray(image) for image in COLOUR[:6]]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    forms: list[Any] = [
        list(COLOUR[:6]),
        iter(COLOUR[:6]),
        pictures,
        paths,
        [str(path) for path in paths],
        [path.read_bytes() for path in paths],
        [COLOUR[0], pictures[1], paths[2], str(paths[3]), paths[4].read_bytes(), COLOUR[5]],
        np.concatenate([COLOUR[:6], np.full((6, 8, 8, 1), 255, np.uint8)], 3),  # opaque
        np.asfortranarray(COLOUR[:6]),
        COLOUR[5::-1][::-1],
    ]
    for images in forms:
        assert (hasher.encode(images) == expected).all()
    for image in (pictures[0], paths[0], str(paths[0]), paths[0].read_bytes()):
        assert (hasher.encode(image) == expected[:1]).all()
    grey = [DIGITS[0], DIGITS[0, ..., None], DIGITS[0, ..., None].repeat(3, 2), Image.fromarray(DIGITS[0])]
    assert len({bytes(code) for code in hasher.encode(grey)}) == 1
    assert hasher.encode(DIGITS[:3]).shape == (3, 2)
    empty: list[Any] = [[], DIGITS[:0], iter(())]
    for images in empty:
        assert hasher.encode(images).shape == (0, 2)


def test_images_of_any_sizes_are_one_batch(small: Hasher) -> None:
    generator = np.random.default_rng(0)
    sizes = [(1, 1), (8, 8), (300, 20), (7, 400), (16, 16)]
    images = [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    codes = small.encode(images)
    assert codes.shape == (5, 2)
    assert (codes == np.concatenate([small.encode([image]) for image in images])).all()


def test_prepared_images_have_the_same_codes_margins_and_errors_as_images(tmp_path: Path) -> None:
    hasher = fit("ae", "mlp", DIGITS, bits=16, steps=60)
    large = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    Image.fromarray(large).save(tmp_path / "large.png")
    images: list[Any] = [
        DIGITS[0],
        tmp_path / "large.png",
        255 - DIGITS[1],
        large,
        Image.fromarray(DIGITS[2]),
        DIGITS[0],
    ]
    prepared = hasher.prepare(iter(images))
    contents = [(tmp_path / "large.png").read_bytes(), large, *(DIGITS[i] for i in (0, 2))]
    assert [prepared.digests[i] for i in (1, 3, 5, 4)] == [sha256(content) for content in contents]
    assert len(prepared) == 6 and len(set(prepared.digests)) == 5
    assert prepared.pixels.shape == (6, 8, 8, 1) and prepared.pixels.dtype == np.uint8
    assert (hasher.encode(prepared) == hasher.encode(images)).all()
    assert (hasher.margins(prepared)[0] == hasher.encode(images)).all()
    assert (hasher.margins(prepared)[1] == hasher.margins(images)[1]).all()
    assert hasher.outliers(prepared) == hasher.outliers(images)
    assert hasher.outliers(prepared)[0::5] == [False, False]  # digits
    assert True in hasher.outliers(prepared)
    assert Hasher("lsh", 16).fit(DIGITS).outliers(prepared) == [False] * 6
    empty = hasher.prepare([])
    assert hasher.encode(empty).shape == (0, 2) and hasher.outliers(empty) == [] == empty.digests
    with pytest.raises(HashretError, match="empty file"):
        hasher.prepare([DIGITS[0], b""])
    with pytest.raises(ValueError, match="pixels must be"):
        hasher.encode(PreparedImages(COLOUR[:2], ["", ""], hasher.fingerprint))


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (DIGITS[0], r"\(n, h, w\) or \(n, h, w, c\), not \(8, 8\)"),
        (DIGITS[None, None], "shape"),
        (np.array("a.png"), "shape"),
        (DIGITS[:2].astype(np.float32), "uint8"),
        (DIGITS[:2].astype(np.int64), "uint8"),
        (np.zeros((2, 8, 8, 2), np.uint8), "uint8"),
        (np.zeros((2, 0, 8), np.uint8), "uint8"),
        ([DIGITS[0].tolist()], "not list"),
        ([None], "not NoneType"),
        (None, "not NoneType"),
        (5, "not int"),
        ([b""], "empty file"),
        (b"no image", "no format"),
        ("nowhere.png", "cannot be read"),
        ([DIGITS[0], Path("nowhere.png")], "cannot be read"),
        (torch.zeros(2, 8, 8), "not Tensor"),
    ],
    ids=str,
)
def test_other_inputs_are_refused(small: Hasher, images: Any, reason: str) -> None:
    with pytest.raises((ValueError, HashretError), match=reason):
        small.encode(images)


def test_pixels_of_another_size_are_refused(small: Hasher) -> None:
    floats: Any = DIGITS[:2, ..., None].astype(np.float32)
    for wrong in (DIGITS[:2], DIGITS[:2, :4, :, None], COLOUR[:2], floats):
        with pytest.raises(ValueError, match=r"uint8 \('n', 8, 8, 1\), not (uint8|float32) \(2, "):
            small.encode_pixels(wrong)


def test_a_hasher_that_is_not_fitted_is_refused(tmp_path: Path) -> None:
    calls: list[Callable[[Hasher], Any]] = [
        lambda hasher: hasher.encode(DIGITS),
        lambda hasher: hasher.fingerprint,
        lambda hasher: hasher.save(tmp_path / "a" / "model"),
    ]
    for call in calls:
        with pytest.raises(HashretError, match="is not fitted: call fit, or Hasher.load"):
            call(Hasher())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"model": "none"}, "no model 'none'; choose one of ae, .*itq"),
        ({"head": "none"}, "no head 'none'; choose one of sign, "),
        ({"head": ""}, "no head ''"),
        ({"bits": 12}, "multiple of 8"),
        ({"bits": 2048}, "multiple of 8"),
        ({"bits": 64.0}, "multiple of 8"),
        ({"beta": 1.0}, "'contrastive' has no setting 'beta'; it has network=conv, .*temperature=0.1"),
        ({"model": "lsh", "width": 3}, "'lsh' has no setting 'width'; it has none"),
        ({"width": "wide"}, "'width' is a int such as 0, not 'wide'"),
        ({"width": 2.0}, "'width' is a int"),
        ({"width": True}, "'width' is a int"),
        ({"width": -1}, "width 1 or more"),
        ({"width": 10**30}, "less than 2²⁴"),
        ({"latent": 2**24}, "less than 2²⁴"),
        ({"network": "none"}, "no network 'none'; choose one of mlp, conv"),
        ({"network": 3}, "'network' is a str"),
        ({"temperature": "hot"}, "'temperature' is a float such as 0.1, not 'hot'"),
        ({"temperature": float("nan")}, "'temperature' is a float"),
        ({"temperature": float("inf")}, "'temperature' is a float"),
        ({"temperature": 10**400}, "'temperature' is a float"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"whole": 1.5}, "whole from 0 to 1, not 0.1, 50.0, 1.0, 1.0 and 1.5"),
    ],
    ids=str,
)
def test_unknown_names_and_settings_are_refused_with_a_list(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Hasher(**wrong)


def test_a_network_beyond_all_memory_is_refused_before_it_is_built() -> None:
    for settings in ({"width": 2**24 - 1}, {"network": "mlp", "latent": 2**24 - 1}, {"network": "mlp", "width": 3000}):
        with pytest.raises(HashretError, match="weights is too large"):
            Hasher("ae", 32, "itq", **settings).fit(DIGITS, steps=1, size=(64, 64))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"steps": 1, "epochs": 1}, "give one of budget, steps and epochs"),
        ({"steps": 1, "budget": "2m"}, "give one of"),
        ({"steps": -1}, "steps must be .* not -1"),
        ({"budget": "soon"}, "not 'soon'"),
        ({"seed": -1}, "seed must be .* not -1"),
        ({"seed": 1.5}, "seed must be"),
        ({"size": (0, 5)}, "not 0"),
        ({"limit": 0}, "limit must be at least 1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["ae", "lsh"])
def test_impossible_values_are_refused(name: str, wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Hasher(name, 32).fit(DIGITS[:50], **wrong)


def test_options_by_name_override_the_options_object() -> None:
    settings: dict[str, Any] = {"network": "mlp", "width": 1}
    options = TrainingOptions(steps=3, seed=1, batch=50, limit=200)
    by_value, by_name, changed = (
        Hasher("ae", 16, **settings).fit(open_source("digits"), options),
        Hasher("ae", 16, **settings).fit("digits", steps=3, seed=1, batch=50, limit=200),
        Hasher("ae", 16, **settings).fit("digits", options, steps=2, seed=0),
    )
    assert by_value.fingerprint == by_name.fingerprint != changed.fingerprint
    assert by_value.training["images"] == 200
    assert (changed.training["steps"], changed.training["seed"], changed.training["batch"]) == (2, 0, 50)
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        Hasher("lsh", 16).fit(DIGITS, step=3)
    with pytest.raises(FrozenInstanceError):
        options.steps = 4  # type: ignore[misc]


@pytest.mark.parametrize("name", MODELS)
def test_too_few_images_are_refused(tmp_path: Path, name: str) -> None:
    labelled = MODELS[name].labelled
    too_few = "one image is not enough|needs at least as many images|training needs at least two"
    with pytest.raises(HashretError, match=too_few):
        Hasher(name, 32).fit(DIGITS[:1], steps=1, labels=["a"] if labelled else False)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(HashretError, match="has no images"):
        Hasher(name, 32).fit(tmp_path, labels=labelled)


def test_a_head_that_cannot_be_fitted_is_refused_before_the_training() -> None:
    for model, head, settings in (("vae", "itq", {}), ("vae", "sign", {"latent": 16}), ("pca", "pca", {})):
        with pytest.raises(HashretError, match=f"head '{head}'"):
            Hasher(model, 64, head, **settings).fit(DIGITS[:60], steps=10**9)
    assert Hasher("ae", 16, "itq", latent=24, network="mlp", width=1).fit(DIGITS[:60], steps=1).bits == 16


def test_a_head_is_fitted_to_a_random_sample_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.concatenate([np.zeros((400, 64, 64), np.uint8), np.full((400, 64, 64), 255, np.uint8)])
    # Adding 1 wraps 255 to 0, in half of the white pixels.
    images += np.random.default_rng(0).integers(0, 2, images.shape, np.uint8)
    monkeypatch.setattr("hashret.training.fitting.MAX_HEAD_VALUES", 4096 * 100)
    hasher = Hasher("pca", 8).fit(images)
    first = np.unpackbits(hasher.encode(images), axis=1)[:, 0]
    assert abs(int(first[:400].sum()) - int(first[400:].sum())) == 400


def test_a_second_fit_replaces_the_first_and_a_failed_one_does_not() -> None:
    hasher = Hasher("pca", 16).fit(DIGITS[:500])
    first, codes = hasher.fingerprint, hasher.encode(DIGITS)
    with pytest.raises(HashretError):
        hasher.fit(DIGITS[:3])
    assert hasher.fingerprint == first and (hasher.encode(DIGITS) == codes).all()
    hasher.fit(COLOUR[:500])
    again = Hasher("pca", 16).fit(COLOUR[:500])
    assert hasher.fingerprint == again.fingerprint != first
    assert (hasher.encode(COLOUR) == again.encode(COLOUR)).all()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("2m", 120), ("1.5h", 5400), (" 2 m ", 120), (30, 30), (0.5, 0.5), ("0.25s", 0.25)],
)
def test_durations_are_parsed(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "m", "2d", "-3", "0", "0m", "1e3", "1h30m", "nan", "inf", "2 m s", None, True, -1]
)
def test_invalid_durations_are_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="90s, 2m or 1h, not"):
        parse_duration(text)


def fingerprint_of(hasher: Hasher) -> str:
    hasher.__dict__.pop("fingerprint", None)
    return hasher.fingerprint


def test_the_fingerprint_covers_everything_that_determines_codes(tmp_path: Path, small: Hasher) -> None:
    small.save(tmp_path / "model")
    expected = small.fingerprint
    assert re.fullmatch("[0-9a-f]{64}", expected)
    hasher = Hasher.load(tmp_path / "model")
    preprocessing, member, head = hasher._parts()
    arrays = {name: tensor.numpy() for name, tensor in member.state_dict().items()} | head.tensors()
    for name, array in arrays.items():
        flat = array.reshape(-1)
        before = flat[-1].copy()
        flat[-1] += 1
        assert fingerprint_of(hasher) != expected, name
        flat[-1] = before
        assert fingerprint_of(hasher) == expected, name
    for other in (ImagePreprocessing(8, 9, 1), ImagePreprocessing(9, 8, 1), ImagePreprocessing(8, 8, 3)):
        hasher._fitted = other, member, head
        assert fingerprint_of(hasher) != expected
    hasher._fitted = preprocessing, member, head
    for attribute, value in (("model", "ae"), ("bits", 32), ("head", "sign"), ("settings", {})):
        before = getattr(hasher, attribute)
        setattr(hasher, attribute, value)
        assert fingerprint_of(hasher) != expected, attribute
        setattr(hasher, attribute, before)
    hasher._training = {"source": "elsewhere"}
    assert fingerprint_of(hasher) == expected


def test_equal_models_have_equal_fingerprints(tmp_path: Path, small: Hasher) -> None:
    np.save(tmp_path / "digits.npy", DIGITS)
    again = Hasher("vae", 16, network="mlp", width=1).fit(tmp_path / "digits.npy", steps=5)
    assert again.fingerprint == small.fingerprint and again.training["source"] != small.training["source"]
    other = Hasher("vae", 16, network="mlp", width=1).fit(DIGITS, steps=5, seed=1)
    assert other.fingerprint != small.fingerprint


def test_a_stored_model_loads_after_a_setting_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Hasher
) -> None:
    """A new setting of a member changes neither the fingerprints nor the codes of older models."""
    small.save(tmp_path / "model")

    class Newer(VariationalAutoencoder):
        def __init__(self, *args: Any, option: bool = False, **parts: Any) -> None:
            super().__init__(*args, **parts)

    monkeypatch.setitem(MODELS, "vae", Newer)
    stored = Hasher.load(tmp_path / "model")
    assert stored.fingerprint == small.fingerprint
    assert (stored.encode(DIGITS) == small.encode(DIGITS)).all()
    stored.save(tmp_path / "again")
    assert Hasher.load(tmp_path / "again").fingerprint == small.fingerprint


GOLDEN: dict[str, list[str]] = {
    "pca-16": ["3f4a", "c6b1", "cefd", "016a", "ad55", "058e", "8662", "78cf", "4c06", "3bd6"],
    "vae-mlp-16": ["00f9", "7b0f", "f826", "a8b5", "d3c5", "c8f7", "c74c", "7daa", "3a23", "c787"],
    "binary-conv-16": ["49b6", "49b2", "0936", "41b2", "43b2", "49b7", "49b2", "49b2", "49b2", "4172"],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_models_give_golden_codes(name: str) -> None:
    """If this fails, all stored collections are incompatible: fix the code, never these codes."""
    hasher = Hasher.load(STORED / name)
    twice = DIGITS[8].repeat(2, 0).repeat(2, 1)
    inputs = [*DIGITS[:8], twice, COLOUR[9].repeat(5, 1)]  # the last two are resized, and one of them is in colour
    assert to_hex(hasher.encode(inputs)) == GOLDEN[name]


@pytest.fixture
def folder(tmp_path: Path, small: Hasher) -> Path:
    small.save(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_folder_has_its_files_and_fields(folder: Path, small: Hasher) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    config = json.loads((folder / "config.json").read_text())
    assert config["fingerprint"] == small.fingerprint and config["format"] == FORMAT == 1
    assert config["preprocessing"] == {"height": 8, "width": 8, "channels": 1}
    assert config["settings"] == {
        "network": "mlp",
        "likelihood": "bernoulli",
        "latent": 0,
        "width": 1,
        "weights": "",
        "beta": 1.0,
    }
    held_out = {"reconstruction", "kl", "elbo", "log_likelihood"}
    assert config["training"]["steps"] == 5 and config["training"]["held_out"].keys() == held_out
    card = (folder / "README.md").read_text()
    assert small.fingerprint in card and "8 × 8 × 1" in card and "| steps | 5 |" in card


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change tensors and update the fingerprint, so that only checks of the tensors themselves can fail."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    fields = {key: config[key] for key in ("format", "model", "bits", "head", "settings", "preprocessing")}
    from hashlib import sha256

    digest = sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    change_config(folder, fingerprint=digest.hexdigest())


def test_fingerprints_of_changed_tensors_are_computed_correctly(folder: Path, small: Hasher) -> None:
    change_tensors(folder, lambda tensors: None)
    assert Hasher.load(folder).fingerprint == small.fingerprint


@pytest.mark.parametrize("path", ["nowhere", ".", "model/config.json", "x" * 300, "null\0byte"])
def test_other_folders_are_refused(folder: Path, path: str) -> None:
    with pytest.raises(HashretError, match="is no model folder: make one with|is damaged"):
        Hasher.load(folder.parent / path)


def truncate(name: str, stop: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:stop])

    return damage


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "truncated weights": truncate("model.safetensors", -1),
    "a header of weights": truncate("model.safetensors", 300),
    "empty weights": truncate("model.safetensors", 0),
    "truncated config": truncate("config.json", -20),
    "empty config": truncate("config.json", 0),
    "a flipped bit": flip_a_bit,
    "config in UTF-16": lambda f: (f / "config.json").write_text((f / "config.json").read_text(), "utf-16"),
    "deep config": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "endless number": lambda folder: (folder / "config.json").write_text('{"format": ' + "9" * 5000 + "}"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_is_refused(folder: Path, damage: Callable[[Path], Any]) -> None:
    damage(folder)
    with pytest.raises(HashretError, match="is no model folder|is damaged|was changed since") as refusal:
        Hasher.load(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "ae"},
        {"model": "none"},
        {"model": ["vae"]},
        {"model": None},
        {"bits": 8},
        {"bits": 24},
        {"bits": "16"},
        {"bits": 16.0},
        {"head": "sign"},
        {"head": "itq"},
        {"head": {}},
        {"settings": {}},
        {"settings": None},
        {"settings": ["width"]},
        {"settings": {"network": "mlp", "width": 1}},
        {"settings": {"network": "mlp", "width": 2}},
        {"settings": {"network": "mlp", "width": 2**23}},
        {"settings": {"network": "mlp", "width": 10**18}},
        {"settings": {"network": "conv", "width": 1}},
        {"settings": {"bits": 16, "self": 1}},
        {"preprocessing": {"height": 8, "width": 8, "channels": 3}},
        {"preprocessing": {"height": 10_000, "width": 10_000, "channels": 1}},
        {"preprocessing": {"height": 2**40, "width": 2**40, "channels": 1}},
        {"preprocessing": {"height": 8.0, "width": 8, "channels": 1}},
        {"preprocessing": {"height": 8, "width": 8}},
        {"preprocessing": ["height", "width", "channels"]},
        {"training": None},
        {"training": "long"},
        {"fingerprint": "0" * 64},
        {"fingerprint": None},
        {"format": "1"},
        {"format": None},
        {"format": 0},
    ],
    ids=str,
)
def test_a_config_that_was_changed_is_refused(folder: Path, changed: dict[str, Any]) -> None:
    change_config(folder, **changed)
    with pytest.raises(HashretError, match="is damaged|was changed since|too large") as refusal:
        Hasher.load(folder)
    assert "\n" not in str(refusal.value)


def test_a_missing_part_of_the_config_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key in config:
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        with pytest.raises(HashretError, match="is damaged|was changed since"):
            Hasher.load(folder)


def test_a_model_of_a_newer_format_is_refused(folder: Path) -> None:
    change_config(folder, format=FORMAT + 1, model="from the future", settings=None)
    with pytest.raises(HashretError, match="was made by a newer hashret: upgrade hashret to read it"):
        Hasher.load(folder)


def fill(name: str, value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1)[0].fill_(value)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.__setitem__(name, tensor)


WEIGHT = "member.encoder.1.weight"  # (16, 64)
WRONG_TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "a missing weight": (rf"{WEIGHT} is None, not \(\(16, 64\)", lambda tensors: tensors.pop(WEIGHT)),
    "a missing threshold": ("head.threshold is None", lambda tensors: tensors.pop("head.threshold")),
    "an extra weight": ("member.other is .*, not None", put("member.other", torch.zeros(3))),
    "an extra tensor of a head": ("head.other is .*, not None", put("head.other", torch.zeros(3))),
    "an extra tensor": ("other is .*, not None", put("other", torch.zeros(3))),
    "another shape": (f"{WEIGHT} is", put(WEIGHT, torch.zeros(64, 16))),
    "another type": (f"{WEIGHT} is", put(WEIGHT, torch.zeros(16, 64).half())),
    "a narrow threshold": ("head.threshold is", put("head.threshold", torch.zeros(8).double())),
    "a scalar scale": ("head.scale is", put("head.scale", torch.tensor(1.0).double())),
    "a float32 threshold": ("head.threshold is", put("head.threshold", torch.zeros(16))),
    "a projection without a mean": ("head.mean is None", put("head.projection", torch.eye(16).double())),
    "NaN weights": (f"{WEIGHT} has numbers that are not finite", fill(WEIGHT, float("nan"))),
    "infinite weights": (f"{WEIGHT} has numbers", fill(WEIGHT, float("inf"))),
    "a NaN threshold": ("head.threshold has numbers", fill("head.threshold", float("nan"))),
    "a zero scale": ("head.scale has numbers that are not positive", fill("head.scale", 0.0)),
    "a negative scale": ("head.scale has numbers that are not positive", fill("head.scale", -1.0)),
}


@pytest.mark.parametrize(("reason", "change"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_tensors_are_refused(folder: Path, reason: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    change_tensors(folder, change)
    with pytest.raises(HashretError, match=rf"is damaged \({reason}.*: restore it or train again"):
        Hasher.load(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_over_a_model_replaces_it(folder: Path, small: Hasher) -> None:
    other = Hasher("lsh", 16).fit(DIGITS)
    other.save(folder)
    assert Hasher.load(folder).fingerprint == other.fingerprint
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    (folder.parent / "empty").mkdir()
    small.save(folder.parent / "empty")
    assert Hasher.load(folder.parent / "empty").fingerprint == small.fingerprint


def test_saving_over_anything_else_is_refused(tmp_path: Path, small: Hasher) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("photos/cat.jpg", "project/README.md", "project/.git", "settings/config.json", "more/config.json",
                 "more/model.safetensors", "more/README.md", "more/notes"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = files(tmp_path)
    for name in ("file", "photos", "project", "settings", "more", "."):
        with pytest.raises(HashretError, match="exists and is no model folder: choose another path"):
            small.save(tmp_path / name)
    (tmp_path / "project" / ".git").unlink()
    with pytest.raises(HashretError, match="exists and is no model folder"):
        small.save(tmp_path / "project")  # a README alone does not make a model folder
    (tmp_path / "project" / ".git").write_text("mine")
    assert files(tmp_path) == before


@pytest.mark.parametrize("max_bytes", [0, 1_000, 9_000])
@pytest.mark.parametrize("over", [True, False], ids=["over another", "new"])
def test_a_model_that_does_not_fit_on_the_disk_leaves_everything_as_it_was(
    folder: Path, small: Hasher, max_bytes: int, over: bool
) -> None:
    target = folder if over else folder.parent / "other"
    before = files(folder.parent)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            small.save(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(folder.parent) == before and Hasher.load(folder).fingerprint == small.fingerprint
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_model_is_not_lost_when_the_disk_fails_at_the_last_moment(
    folder: Path, small: Hasher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(written: Path, target: Path) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("hashret.durable.replace_durably", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        Hasher("lsh", 16).fit(DIGITS[:20]).save(folder)
    assert Hasher.load(folder).fingerprint == small.fingerprint
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_files_left_by_a_killed_process_are_replaced(folder: Path, small: Hasher) -> None:
    for suffix in ("new", "old"):
        shutil.copytree(folder, folder.with_name(f".model.{'0' * 16}.{suffix}"))
    small.save(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_model_can_be_saved_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Hasher
) -> None:
    monkeypatch.chdir(tmp_path)
    small.save("a/../model")
    assert Hasher.load("model").fingerprint == small.fingerprint
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    small.save(".")
    assert Hasher.load(tmp_path / "empty").fingerprint == small.fingerprint


def test_a_source_may_have_any_name(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9 | \xe2\x82\xac")
    source.mkdir()
    for i in range(5):
        Image.fromarray(DIGITS[i]).save(source / f"{i}.png")
    hasher = Hasher("lsh", 16).fit(source)
    hasher.save(tmp_path / "model")
    assert Hasher.load(tmp_path / "model").training["source"] == f"{source}/"


@pytest.mark.parametrize("head", ["itq", "anchor-graph"])
def test_another_head_can_be_fitted_to_the_same_network(head: str) -> None:
    settings: dict[str, Any] = {"network": "mlp", "width": 2}
    trained = Hasher("contrastive", 64, **settings).fit(DIGITS, steps=20)
    other = Hasher("contrastive", 16, head, **settings).fit(DIGITS, steps=0, init=trained)
    mine, theirs = other.member.state_dict(), trained.member.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    x = to_input(trained.preprocessing.batch(DIGITS[..., None]), torch.device("cpu"))
    rows = split(len(DIGITS), 0)[0]
    with torch.no_grad():
        values = trained.member.outputs(x).numpy()
    expected = HEADS[head](values[rows], 16, 0).margins(values) > 0
    assert (pack(expected) == other.encode(DIGITS)).all(1).mean() > 0.99
    assert other.training["steps"] == 0


@pytest.mark.parametrize("name", ["contrastive", "vae", "itq", "anchor-graph"])
def test_margins_are_distances_from_the_thresholds(name: str) -> None:
    hasher = fit(name, "mlp" if MODELS[name].trainable else "", DIGITS, width=4)
    images = varied_images()
    codes, margins = hasher.margins(images)
    assert margins.dtype == np.float32 and margins.shape == (len(images), 32)
    assert (codes == hasher.encode(images)).all()
    assert ((margins > 0) == np.unpackbits(codes, axis=1)).all()
    x = to_input(hasher.preprocessing.batch(images[..., None]), torch.device("cpu")).double()
    head = hasher._parts()[2]
    with torch.no_grad():
        exact = head.margins(copy.deepcopy(hasher.member).double().outputs(x).numpy())
    assert margins == pytest.approx(exact, rel=1e-6, abs=1e-7)
    _, spread = hasher.margins(DIGITS)
    if name in ("vae", "itq"):  # scales of an anchor graph are larger, because of rounding
        assert spread.std(0) == pytest.approx(np.ones(32), abs=0.05)
    for size in (1, 7):
        parts = [hasher.margins(images[i : i + size])[1] for i in range(0, len(images), size)]
        assert np.concatenate(parts) == pytest.approx(margins, rel=1e-6)
    assert [len(part) for part in hasher.margins([])] == [0, 0]


def test_small_and_large_images_keep_their_order() -> None:
    """Small images are decoded sequentially, large ones in threads."""
    rng = np.random.default_rng(0)
    sizes = [8, 200, 8, 8, 300, 250, 8]
    small = rng.integers(0, 256, (len(sizes), 8, 8), np.uint8)
    images = [np.asarray(Image.fromarray(s).resize((n, n))) for s, n in zip(small, sizes, strict=True)]
    hasher = Hasher("lsh", 32).fit(rng.integers(0, 256, (50, 8, 8), np.uint8))
    one_by_one = np.concatenate([hasher.encode([image]) for image in images])
    assert (hasher.encode(images) == one_by_one).all() and len(np.unique(one_by_one, axis=0)) == len(images)
