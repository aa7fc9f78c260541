"""What members of the family reach, beside figures from outside: one row a run.

    python benchmarks/family.py ae30-2006 --train train-images-idx3-ubyte.gz --test t10k-images-idx3-ubyte.gz

Protocol: a member learns from the images of --train, of which `training.loop.split` holds some out, with a fixed
seed, and the weights after its last step are measured on all images of --test. Each row has its own default length;
--epochs, --budget or --steps give another. What is particular to a row is said where it is computed, below."""

import argparse
import ast
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import median_filter
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

from hashret import Hasher
from hashret.data.images import decode
from hashret.data.sources import open_source
from hashret.evaluation.measures import mean_average_precision, psnr, squared_error
from hashret.models import MODELS, Member
from hashret.models.stacked import StackedDenoisingAutoencoder
from hashret.models.vae import Variational
from hashret.runtime.inputs import default_device, to_input
from hashret.tasks.restoration import upscale
from hashret.training.loop import _schedule, in_bfloat16, split, train
from hashret.training.options import TrainingOptions

Pixels = NDArray[np.uint8]

TILE, TILES = 48, 8  # the side of a tile of a photo to learn from, and how many a photo gives
HELD_OUT = 10  # one in so many photos is not learned from, but measured
BATCHES = {"batch": 256, "learning_rate": 3e-3}  # less noise in the normalisation than batches of 128 have
DRAWS = 5  # binarisations of each image to learn from


class Line(NamedTuple):
    what: str
    ours: float
    outside: dict[str, float]
    target: str


def load(source: str) -> tuple[Pixels, NDArray[Any]]:
    """Images of one size, (n, h, w, c), and their labels."""
    records = [(decode(record.read()).pixels, record.label) for record in open_source(source)]
    return np.stack([pixels for pixels, _ in records]), np.array([label for _, label in records])


def fit(asked: argparse.Namespace, epochs: int, model: str, source: Any, bits: int = 32, **how: Any) -> Hasher:
    """A fitted hasher; what of `how`, and of what --set says instead, is no setting of the member is for `fit`."""
    how |= asked.set
    settings = {name: how.pop(name) for name in MODELS[model].defaults() if name in how}
    head = "lsh" if settings.get("latent", bits) != bits else None
    given = {name: value for name in ("epochs", "budget", "steps") if (value := getattr(asked, name))}
    how = {"epochs": epochs, "seed": asked.seed} | how
    if given:
        how = {name: value for name, value in how.items() if name != "epochs"} | given
    hasher = Hasher(model, bits, head, **settings).fit(source, **how)
    told = hasher.training
    rates = {name: value for name, value in how.items() if name in ("batch", "learning_rate", "weight_decay")}
    settled = " ".join(f"{name}={value}" for name, value in (settings | rates).items())
    asked.trainings.append(f"{model} {settled}: {told['steps']:,} steps, {told['seconds']:.0f} s")
    return hasher


def batches(images: Pixels, size: int = 500) -> Iterator[Tensor]:
    return (to_input(images[start : start + size], default_device()) for start in range(0, len(images), size))


@torch.no_grad()
def through(function: Callable[[Tensor], Tensor], images: Pixels) -> NDArray[np.float32]:
    """`function` of the images in [0, 1], (n, c, h, w), a batch at a time, with the same random numbers in each run."""
    torch.manual_seed(0)
    return torch.cat([function(x).cpu() for x in batches(images)]).numpy()


def pca(asked: argparse.Namespace) -> list[Line]:
    """The squared error of scikit-learn's principal components, by the same function as that of members."""
    images, unseen = (load(source)[0] / 255 for source in (asked.train, asked.test))
    images, unseen = images.reshape(len(images), -1), unseen.reshape(len(unseen), -1)
    lines = []
    for components, outside in ((6, 32.65), (18, 19.69), (30, 13.87)):
        fitted = PCA(components, svd_solver="covariance_eigh").fit(images)
        error = squared_error(unseen, fitted.inverse_transform(fitted.transform(unseen)))
        lines.append(Line(f"PCA-{components}, squared error", error, {"PCA": outside}, f"{outside} ± 0.1"))
    return lines


def remembered(
    asked: argparse.Namespace,
    epochs: int,
    latent: int,
    outside: dict[str, float],
    target: str,
    model: str = "ae",
    **how: Any,
) -> list[Line]:
    """The squared error summed over a test image, through a bottleneck of `latent` real numbers. What is minimised is
    the cross-entropy of the pixels, as in 2006: its outputs are within [0, 1], and err less than unbounded ones."""
    hasher = fit(asked, epochs, model, asked.train, latent=latent, **{"likelihood": "bernoulli"} | BATCHES | how)
    unseen, _ = load(asked.test)
    error = squared_error(through(lambda x: x, unseen), through(hasher.member.reconstruct, unseen))
    return [Line(f"{latent} numbers, squared error", error, outside, target)]


def ae30_2006(asked: argparse.Namespace, epochs: int = 100, target: str = "≤ 2.4") -> list[Line]:
    outside = {"2006": 3.00, "rebuild": 2.65, "PCA-30": 13.87}
    return remembered(asked, epochs, 30, outside, target, network="deep", shift=1)


def ae30(asked: argparse.Namespace) -> list[Line]:
    """By any member: that with the network of 2006 gains most by learning for longer."""
    return ae30_2006(asked, 203, "≤ 2.0")


def ae6(asked: argparse.Namespace) -> list[Line]:
    """Six numbers have none to spare for where an image lies, as when it is moved; noise, which they cannot tell of,
    keeps the network from knowing images by heart too."""
    outside = {"PCA-6": 32.65, "PCA-18": 19.69, "PCA-30": 13.87}
    noise: dict[str, Any] = {"corruption": "gaussian", "strength": 0.4}
    return remembered(asked, 203, 6, outside, "≤ 12.0", "denoising", network="deep", **noise)


def vae(asked: argparse.Namespace) -> list[Line]:
    """Pixels are drawn as 0 or 1 with their intensity as the probability (Burda et al. 2016): one draw of the test
    images, with a fixed seed, and `DRAWS` of the training images, in place of a new one in every epoch."""

    def binarised(images: Pixels, seed: int) -> Pixels:
        drawn = np.random.default_rng(seed).random(images.shape, np.float32) * 255 < images
        return drawn * np.uint8(255)

    images, unseen = load(asked.train)[0], binarised(load(asked.test)[0], seed=1)
    draws = np.concatenate([binarised(images, seed=2 + i) for i in range(DRAWS)])
    hasher = fit(asked, 40, "vae", draws, bits=40, network="mlp", width=32, learning_rate=6e-3, limit=len(draws))
    member = hasher.member
    assert isinstance(member, Variational)
    nll = -through(lambda x: member.log_likelihood(x, asked.samples), unseen).mean()
    elbo = -through(lambda x: member.elbo(x, 1), unseen).mean()
    outside = {"VAE": 89.8, "IWAE": 86.8, "VAMP": 85.8}
    return [
        Line(f"−log-likelihood, {asked.samples} samples", float(nll), outside, "≤ 88"),
        Line("−ELBO", float(elbo), {}, ""),
    ]


def denoise(asked: argparse.Namespace) -> list[Line]:
    """The mean PSNR in decibels of images with noise, beside that of the better of two median filters."""
    unseen, _ = load(asked.test)
    clean = through(lambda x: x, unseen)
    lines = []
    for corruption in ("masking", "gaussian"):
        how: dict[str, Any] = {"corruption": corruption, "strength": 0.3, "network": "unet", "width": 8}
        member = fit(asked, 8, "denoising", asked.train, likelihood="gaussian", **how).member
        noisy = through(member.corrupt, unseen)
        restored = through(partial(restore, member), unseen)
        filtered = max(psnr(clean, median_filter(noisy, (1, 1, side, side)).clip(0, 1)) for side in (3, 5))
        outside = {"noisy": psnr(clean, noisy), "median": filtered}
        lines.append(Line(f"{corruption} 0.3, dB", psnr(clean, restored), outside, f"≥ {filtered + 4:.2f}"))
    return lines


def restore(member: Member, x: Tensor) -> Tensor:
    return member.reconstruct(member.corrupt(x))  # with the noise that `through` gives to `corrupt` alone


def super_resolution(asked: argparse.Namespace) -> list[Line]:
    """The mean PSNR in decibels of photos at twice the size of what they were halved to, by bilinear interpolation with
    antialiasing. Tiles of photos at their own resolution are learned from; every tenth photo is measured instead."""
    photos = [decode(record.read()).pixels for record in open_source(asked.train)]
    photos = [np.broadcast_to(photo, (*photo.shape[:2], 3)) for photo in photos if min(photo.shape[:2]) >= TILE]
    rng = np.random.default_rng(asked.seed)
    tiles = []
    for photo in (photo for i, photo in enumerate(photos) if i % HELD_OUT):
        for _ in range(TILES):
            top, left = (int(rng.integers(side - TILE + 1)) for side in photo.shape[:2])
            tiles.append(photo[top : top + TILE, left : left + TILE])
    how: dict[str, Any] = {"corruption": "downscaling", "network": "unet", "width": 8, "likelihood": "gaussian"}
    hasher = fit(asked, 20, "denoising", np.stack(tiles), size=(TILE, TILE), batch=32, **how)
    ours, bicubic = [], []
    for photo in photos[::HELD_OUT]:
        photo = photo[: photo.shape[0] // 2 * 2, : photo.shape[1] // 2 * 2]
        x = to_input(photo[None], torch.device("cpu"))
        half = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
        half = (half * 255).round() / 255
        twice = F.interpolate(half, scale_factor=2, mode="bicubic").clamp(0, 1)
        bicubic.append(psnr(photo[None] / 255, (twice * 255).round().permute(0, 2, 3, 1) / 255))
        low = (half[0] * 255).round().byte().permute(1, 2, 0).numpy()
        ours.append(psnr(photo[None] / 255, upscale(hasher, low)[None] / 255))
    plain = statistics.fmean(bicubic)
    return [
        Line(f"×2, {len(ours)} photos, dB", statistics.fmean(ours), {"bicubic": plain}, f"≥ {plain + 0.5:.2f}"),
    ]


def stacked(asked: argparse.Namespace) -> list[Line]:
    """The share of test images told wrongly, by a network that learned from few labels, after greedy pretraining on all
    images or from scratch. Each of three seeds draws its own labelled images, as many of each class."""
    (images, labels), (unseen, wanted) = load(asked.train), load(asked.test)
    how: dict[str, Any] = {"bits": 64, "width": 48}
    lines = []
    for seed in range(asked.seed, asked.seed + 3):
        rng = np.random.default_rng(seed)
        each = asked.labelled // len(np.unique(labels))
        rows = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:each] for c in np.unique(labels)])
        pretrained = fit(asked, 20, "stacked", images, seed=seed, **how)
        known: dict[str, Any] = {"labels": labels[rows].tolist(), "fine_tune": True, "pretrain": 0.0, "batch": 100}
        errors = []
        for init in (pretrained, None):
            hasher = fit(asked, 100, "stacked", images[rows], seed=seed, init=init, **known, **how)
            told = through(partial(classify, hasher.member), unseen)
            errors.append(float((np.array(hasher.training["classes"])[told] != wanted).mean()))
        lines.append(Line(f"{len(rows):,} labels, seed {seed}, error", errors[0], {"scratch": errors[1]}, "fewer"))
    return lines


def classify(member: Member, x: Tensor) -> Tensor:
    assert isinstance(member, StackedDenoisingAutoencoder) and member.classifier is not None
    return member.classifier(member.features(x)).argmax(1)  # type: ignore[no-any-return]


def ortho(asked: argparse.Namespace) -> list[Line]:
    """Mean average precision of all training images, ranked for each test image, with ties averaged."""
    (images, labels), (unseen, wanted) = load(asked.train), load(asked.test)
    hasher = fit(asked, 30, "ortho", asked.train, labels=True, width=48, learning_rate=4e-3)
    reached = mean_average_precision(hasher.encode(unseen), wanted, hasher.encode(images), labels)
    return [Line("32 bits, mAP@all", reached, {"MNIST": 0.99}, "MNIST ≥ 0.985, Fashion-MNIST ≥ 0.92")]


def speed(asked: argparse.Namespace) -> list[Line]:
    """Milliseconds a step of `train`, and of a bare loop with the same batches, whose losses have to be the same."""
    images, _ = load(asked.train)
    steps = asked.steps or 60
    lines = []
    for network in ("mlp", "conv"):
        torch.manual_seed(asked.seed)
        fresh = MODELS["ae"]((images.shape[3], *images.shape[1:3]), 32, network=network)
        ours, bare = [], []
        for _ in range(5):
            member, other = copy.deepcopy(fresh), copy.deepcopy(fresh)
            done = train(member, images, TrainingOptions(steps=steps, seed=asked.seed, compiled=asked.compile))
            ours.append(1000 * done.seconds / steps)
            bare.append(1000 * bare_loop(other, images, steps, done.batch, asked) / steps)
            x = next(batches(images))
            losses = [float(one.eval().loss(x)["reconstruction"].detach()) for one in (member, other)]
            assert abs(losses[0] / losses[1] - 1) < 0.01, f"the bare loop learned something else: {losses}"
        plain = statistics.median(bare)
        lines.append(
            Line(f"ae {network}, ms a step", statistics.median(ours), {"bare loop": plain}, f"≤ {1.15 * plain:.2f}")
        )
    return lines


def bare_loop(member: Member, images: Pixels, steps: int, batch: int, asked: argparse.Namespace) -> float:
    """Seconds of so many steps of PyTorch alone on images that are ready for it."""
    data = torch.cat(list(batches(images)))
    rows, _ = split(len(images), asked.seed)
    epochs = [np.random.default_rng((asked.seed, i)).permutation(rows) for i in range(steps * batch // len(rows) + 2)]
    picked = [part for epoch in epochs for part in epoch[: len(rows) // batch * batch].reshape(-1, batch)][:steps]
    member.to(default_device()).train()
    own = member.training_defaults
    optimiser = torch.optim.AdamW(member.parameters(), own.learning_rate, weight_decay=own.weight_decay)

    def loss(x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(member.decoder(member.encoder(x)), x, reduction="sum") / len(x)

    forward = torch.compile(loss) if asked.compile else loss
    began = time.monotonic()
    for step, indices in enumerate(picked):
        for group in optimiser.param_groups:
            group["lr"] = own.learning_rate * _schedule(step, steps)
        with torch.autocast(data.device.type, torch.bfloat16, enabled=in_bfloat16(data.device)):
            value = forward(data[indices])
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    float(value.detach())  # waits for a GPU
    return time.monotonic() - began


def to_value(text: str) -> Any:
    """A number where the text is one."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


ROWS = {
    "pca": pca,
    "ae30-2006": ae30_2006,
    "ae30": ae30,
    "ae6": ae6,
    "vae": vae,
    "denoise": denoise,
    "super-resolution": super_resolution,
    "stacked": stacked,
    "ortho": ortho,
    "speed": speed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--data", default="mnist", help="a data set by name, of which :train and :test are used")
    parser.add_argument("--train", help="a source instead; for super-resolution, of photos, some of which are held out")
    parser.add_argument("--test", help="a source instead")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int)
    length.add_argument("--budget", help="seconds, or a time such as 10m, for each training")
    length.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of a member, or of `fit`")
    parser.add_argument("--samples", type=int, default=200, help="of each image's posterior, for the row vae")
    parser.add_argument("--labelled", type=int, default=1000, help="images with labels, for the row stacked")
    parser.add_argument("--compile", action="store_true", help="both loops, for the row speed")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    asked.train, asked.test = asked.train or f"{asked.data}:train", asked.test or f"{asked.data}:test"
    asked.set = {name: to_value(value) for name, _, value in (text.partition("=") for text in asked.set)}
    asked.trainings = []
    began = time.monotonic()
    lines = ROWS[asked.row](asked)
    told = {"row": asked.row, "seed": asked.seed, "threads": torch.get_num_threads(), "device": default_device().type}
    told |= {"seconds": round(time.monotonic() - began), "trainings": asked.trainings}
    if asked.json:
        print(json.dumps(told | {"lines": [line._asdict() for line in lines]}))
        return
    print(f"{asked.row}, seed {asked.seed}, {told['threads']} threads, {told['device']}, {told['seconds']} s in all")
    print(*asked.trainings, sep="\n")
    print(f"{'':32}{'ours':>10}  {'outside':52}target")
    for what, ours, outside, target in lines:
        theirs = ", ".join(f"{value:.4g} ({name})" for name, value in outside.items())
        print(f"{what:32}{ours:>10.4f}  {theirs:52}{target}")


if __name__ == "__main__":
    main()
