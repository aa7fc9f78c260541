"""What models can do besides codes: `hashret.tasks.generation`, `hashret.tasks.restoration` and their pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from hashret import plots
from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.models import MODELS
from hashret.tasks import generation, restoration

DIGITS: NDArray[np.uint8] = (load_digits().images * 15.9375).astype(np.uint8)  # (1797, 8, 8)
NAMES = [str(label) for label in load_digits().target]
PIXELS = DIGITS[..., None]


def fit(name: str, steps: int = 250, **settings: Any) -> Hasher:
    head = settings.pop("head", None)
    labels: Any = NAMES if MODELS[name].labelled else False
    settings = {"network": "mlp", "width": 8} | settings
    return Hasher(name, 32, head, **settings).fit(DIGITS, steps=steps, labels=labels)


@pytest.fixture(scope="module")
def vae() -> Hasher:
    return fit("vae", beta=0.5)


@pytest.fixture(scope="module")
def cvae() -> Hasher:
    return fit("cvae", steps=500, latent=8, head="lsh")


def squared_errors(images: NDArray[Any], reconstructions: NDArray[Any]) -> NDArray[np.float64]:
    difference = (images.astype(np.float64) - reconstructions) / 255
    return np.asarray((difference**2).reshape(len(images), -1).sum(1))


def nearest_label(images: NDArray[np.uint8]) -> list[str]:
    """Return the label of the digit that is nearest to each image."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    distances = ((flat[:, None] - DIGITS.reshape(1, -1, 64)) ** 2).sum(-1)
    return [NAMES[i] for i in distances.argmin(1)]


def test_reconstructions_are_like_the_images(vae: Hasher) -> None:
    reconstructions = generation.reconstruct(vae, PIXELS[:300])
    assert reconstructions.shape == (300, 8, 8, 1) and reconstructions.dtype == np.uint8
    errors = vae.errors(PIXELS[:300])
    assert errors == pytest.approx(squared_errors(PIXELS[:300], reconstructions), abs=0.02)
    assert errors.mean() < 0.6 * squared_errors(PIXELS[:300], PIXELS.mean(0)).mean()
    assert vae.errors(PIXELS[:0]).shape == (0,)
    assert generation.reconstruct(vae, PIXELS[:0]).shape == (0, 8, 8, 1)


def test_an_image_unlike_those_of_the_training_is_an_outlier(vae: Hasher, tmp_path: Path) -> None:
    assert sum(vae.outliers(DIGITS)) <= len(DIGITS) // 20  # of those held out
    assert vae.outliers(255 - DIGITS[:20]) == [True] * 20
    Image.fromarray(255 - DIGITS[0]).save(tmp_path / "negative.png")
    assert vae.outliers([tmp_path / "negative.png", DIGITS[3]]) == [True, False]
    assert Hasher("pca", 16).fit(DIGITS).outliers(255 - DIGITS[:2]) == [False, False]
    with pytest.raises(HashretError, match="model 'pca' has no network to reconstruct images"):
        Hasher("pca", 16).fit(DIGITS).errors(PIXELS[:2])


def test_samples_are_like_digits_and_reproducible(vae: Hasher) -> None:
    drawn = generation.sample(vae, 50)
    assert drawn.shape == (50, 8, 8, 1) and (drawn == generation.sample(vae, 50)).all()
    assert (drawn != generation.sample(vae, 50, seed=1)).any()
    edges = drawn[:, :, [0, -1]].mean() / drawn[:, :, 3:5].mean()  # digits have dark sides
    assert edges < 0.35
    assert len(np.unique(drawn, axis=0)) == 50


def test_conditional_samples_are_of_their_class(cvae: Hasher) -> None:
    for label in ("0", "4", "7"):
        found = nearest_label(generation.sample(cvae, 30, label=label))
        assert sum(name == label for name in found) > 20
    with pytest.raises(HashretError, match="no label 'cat'; the model knows 0, 1, 2"):
        generation.sample(cvae, 1, label="cat")


def test_interpolations_begin_and_end_with_the_images(vae: Hasher) -> None:
    pair = PIXELS[[0, 1]]
    way = generation.interpolate(vae, pair, 7)
    assert way.shape == (7, 8, 8, 1)
    ends = generation.reconstruct(vae, pair)
    assert abs(way[[0, -1]].astype(int) - ends).max() <= 1
    steps = np.abs(np.diff(way.astype(int), axis=0)).reshape(6, -1).sum(1)
    assert (steps > 0).all() and steps.max() < np.abs(way[0].astype(int) - way[-1]).sum()


def test_a_traversal_changes_one_latent_dimension_at_a_time(vae: Hasher) -> None:
    decoded: list[Tensor] = []
    decoder = vae.member.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0]))
    images = generation.traverse(vae, PIXELS[:1], [3, 5], 4)
    decoder.remove()
    assert images.shape == (8, 8, 8, 1)
    changing = (decoded[-1] != decoded[-1][:1]).any(0).nonzero()[:, 0].tolist()
    assert changing == [3, 5]
    assert decoded[-1][:4, 3].tolist() == pytest.approx([-3, -1, 1, 3])
    with pytest.raises(HashretError, match="no latent dimension 32: choose from 0 to 31"):
        generation.traverse(vae, PIXELS[:1], [32])


def test_a_manifold_has_two_dimensions(vae: Hasher) -> None:
    flat = fit("vae", steps=20, latent=2, head="lsh")
    images = generation.manifold(flat, 5)
    assert images.shape == (25, 8, 8, 1)
    with pytest.raises(HashretError, match="a manifold needs two latent dimensions"):
        generation.manifold(vae)


def test_tasks_that_a_model_cannot_do_are_refused() -> None:
    ae, pca = fit("ae", steps=2), Hasher("pca", 16).fit(DIGITS)
    with pytest.raises(HashretError, match="model 'ae' has no prior to sample from: train vae"):
        generation.sample(ae, 1)
    with pytest.raises(HashretError, match="model 'pca' has no network"):
        generation.reconstruct(pca, PIXELS[:1])
    for wrong in (ae, fit("denoising", steps=2, corruption="downscaling")):
        with pytest.raises(HashretError, match="trained for it: hashret train SOURCE --model denoising"):
            restoration.denoise(wrong, PIXELS[0])
    with pytest.raises(HashretError, match="set corruption=downscaling"):
        restoration.upscale(fit("denoising", steps=2), PIXELS[0])
    with pytest.raises(HashretError, match="model 'vae' is not conditional on labels"):
        generation.sample(fit("vae", steps=2), 1, label="0")


def photo(height: int, width: int, channels: int = 1) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[:height, :width] / 12
    return np.stack([128 + 120 * np.sin(rows + c) * np.cos(columns) for c in range(channels)], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def denoiser() -> Hasher:
    big = photo(160, 160)[..., 0]
    tiles = np.stack([big[i : i + 16, j : j + 16] for i in range(0, 144, 6) for j in range(0, 144, 6)])
    settings: dict[str, Any] = {"corruption": "gaussian", "strength": 0.2, "network": "mlp", "width": 16}
    return Hasher("denoising", 32, **settings).fit(tiles, steps=400)


@pytest.mark.parametrize("size", [(50, 37), (16, 16), (5, 90), (3, 3)])
def test_images_of_any_size_are_denoised(denoiser: Hasher, size: tuple[int, int]) -> None:
    clean = photo(*size)
    noisy = (clean + np.random.default_rng(0).normal(0, 0.2 * 255, clean.shape)).clip(0, 255).astype(np.uint8)
    better = restoration.denoise(denoiser, noisy)
    assert better.shape == clean.shape and better.dtype == np.uint8
    if min(size) >= 16:
        error, before = ((image.astype(float) - clean).std() for image in (better, noisy))
        assert error < 0.5 * before


def test_tiles_leave_no_seams() -> None:
    """A model that changes nothing gives the image back, whatever its size."""
    tiles = photo(16, 16)[None, ..., 0].repeat(50, 0)
    hasher = Hasher("denoising", 8, network="mlp", width=1).fit(tiles, steps=1)
    hasher.member.reconstruct = lambda x: x  # type: ignore[method-assign]
    for size in ((16, 16), (17, 40), (100, 61), (9, 30)):
        image = photo(*size)
        assert (restoration.denoise(hasher, image) == image).all()


def test_an_upscaled_image_has_twice_the_sides_and_the_channels_of_the_model() -> None:
    tiles = np.stack([photo(16, 16, 3)] * 40)
    hasher = Hasher("denoising", 8, corruption="downscaling", network="mlp", width=1).fit(tiles, steps=1)
    assert restoration.upscale(hasher, photo(20, 13, 3)).shape == (40, 26, 3)
    assert restoration.upscale(hasher, photo(20, 13)).shape == (40, 26, 3)


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return min(pixels.shape[:2]) > 80 and bool(pixels.std() > 5)


@pytest.mark.parametrize("n", [1, 7, 23])
def test_pictures_of_images_are_written(tmp_path: Path, n: int) -> None:
    plots.pairs(PIXELS[:n], PIXELS[-n:], tmp_path / "pairs.png", NAMES[:n], ("image", "reconstruction"))
    plots.grid(PIXELS[:n].repeat(3, -1), 5, tmp_path / "grid.png", NAMES[:n])
    assert all(is_picture(path) for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("labels", [None, [None] * 300, NAMES[:300], ["x", None, "y"] * 100], ids=str)
def test_pictures_of_codes_are_written(tmp_path: Path, vae: Hasher, labels: list[str | None] | None) -> None:
    codes = vae.encode_pixels(PIXELS[:300])
    plots.scatter(generation.latents(vae, PIXELS[:300])[:, :2], labels, tmp_path / "latents.png", "latents")
    plots.distances(codes, labels, tmp_path / "distances.png")
    plots.bits(codes, tmp_path / "bits.png")
    plots.bits(codes * 0, tmp_path / "constant.png")
    plots.curves(vae.training["curve"], tmp_path / "losses.png")
    assert all(is_picture(path) for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("count", [1, 12, 40])
def test_the_legend_of_latents_lies_within_the_picture_whatever_the_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Warnings, of characters that the font lacks and of a layout that does not fit, are errors in tests."""
    odd = ["_hidden", "$x$", "x$y", "\u732b cat", "two\nlines", "a\ttab", "w" * 300, ""]
    classes = (odd + [f"a class of images with a rather long name, number {i}" for i in range(count)])[-count:]
    figures: list[Any] = []
    save = plots._save

    def recorded(figure: Any, path: Any) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", recorded)
    points = np.random.default_rng(0).normal(size=(200, 2))
    plots.scatter(points, [classes[i % count] for i in range(200)], tmp_path / "latents.png", "latents")
    plots.scatter(points, [odd[i % 8] for i in range(200)], tmp_path / "odd.png", "latents")
    assert [len(figure.legends[0].get_texts()) for figure in figures] == [count, 8]
    for figure in figures:
        legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
        assert legend.x0 >= axes.x1 and legend.x1 <= figure.bbox.x1
        assert legend.y0 >= 0 and legend.y1 <= figure.bbox.y1
        assert axes.width > 0.8 * axes.height
    texts = [text.get_text() for text in figures[1].legends[0].get_texts()]
    assert {"_hidden", r"\$x\$", r"x\$y", "\ufffd cat", "two lines", "a tab"} <= set(texts)
    assert max(map(len, texts)) == plots.MAX_LABEL


def test_a_training_records_its_curve(vae: Hasher) -> None:
    curve = vae.training["curve"]
    assert [point["step"] for point in curve][:3] == [2, 4, 6] and curve[-1]["step"] == 250
    assert all(set(point) == {"step", "reconstruction", "kl"} for point in curve)
    assert curve[-1]["reconstruction"] < 0.9 * curve[0]["reconstruction"]
