"""Measure members of the family beside published figures, one row per run.

    python benchmarks/family.py ae30-2006 --train train-images-idx3-ubyte.gz --test t10k-images-idx3-ubyte.gz

Protocol: a member is trained with a fixed seed on the images of --train, except those that `training.loop.split` holds
out. The weights after the last step are measured on all images of --test. Each row has a default training length, which
--epochs, --budget or --steps override. The docstring of each row's function states its exceptions."""

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

TILE, TILES = 48, 8  # the side of a training tile, and tiles per photo
HELD_OUT = 10  # one photo in ten is measured, not trained on
BATCHES = {"batch": 256, "learning_rate": 3e-3}  # batch statistics are less noisy than those of 128 images
DRAWS = 5  # binarisations of each training image


class Line(NamedTuple):
    """A measured figure, other figures by their source, and the target; `what` is its title, a key of the JSON."""

    what: str
    ours: float
    outside: dict[str, float]
    target: str


def load(source: str) -> tuple[Pixels, NDArray[Any]]:
    """Return images of one size, uint8 (n, h, w, c), and their labels (n,)."""
    records = [(decode(record.read()).pixels, record.label) for record in open_source(source)]
    return np.stack([pixels for pixels, _ in records]), np.array([label for _, label in records])


def fit(args: argparse.Namespace, epochs: int, model: str, source: Any, bits: int = 32, **options: Any) -> Hasher:
    """Return a fitted hasher. `options` are settings of the member and arguments of `fit`; --set overrides them."""
    options |= args.set
    settings = {name: options.pop(name) for name in MODELS[model].defaults() if name in options}
    head = "lsh" if settings.get("latent", bits) != bits else None
    length = {name: value for name in ("epochs", "budget", "steps") if (value := getattr(args, name))}
    options = {"epochs": epochs, "seed": args.seed} | options
    if length:
        options = {name: value for name, value in options.items() if name != "epochs"} | length
    hasher = Hasher(model, bits, head, **settings).fit(source, **options)
    record = hasher.training
    rates = {name: value for name, value in options.items() if name in ("batch", "learning_rate", "weight_decay")}
    description = " ".join(f"{name}={value}" for name, value in (settings | rates).items())
    args.trainings.append(f"{model} {description}: {record['steps']:,} steps, {record['seconds']:.0f} s")
    return hasher


def batches(images: Pixels, size: int = 500) -> Iterator[Tensor]:
    return (to_input(images[start : start + size], default_device()) for start in range(0, len(images), size))


@torch.no_grad()
def apply_in_batches(function: Callable[[Tensor], Tensor], images: Pixels) -> NDArray[np.float32]:
    """Apply `function` to images (n, c, h, w) in [0, 1] in batches, with the same random numbers in each run."""
    torch.manual_seed(0)
    return torch.cat([function(x).cpu() for x in batches(images)]).numpy()


def pca(args: argparse.Namespace) -> list[Line]:
    """Measure the squared error of scikit-learn's principal components, by the same function as for members."""
    images, test_images = (load(source)[0] / 255 for source in (args.train, args.test))
    images, test_images = images.reshape(len(images), -1), test_images.reshape(len(test_images), -1)
    lines = []
    for components, outside in ((6, 32.65), (18, 19.69), (30, 13.87)):
        fitted = PCA(components, svd_solver="covariance_eigh").fit(images)
        error = squared_error(test_images, fitted.inverse_transform(fitted.transform(test_images)))
        lines.append(Line(f"PCA-{components}, squared error", error, {"PCA": outside}, f"{outside} ± 0.1"))
    return lines


def reconstruction_error(
    args: argparse.Namespace,
    epochs: int,
    latent: int,
    outside: dict[str, float],
    target: str,
    model: str = "ae",
    **options: Any,
) -> list[Line]:
    """Measure the squared error per test image with a bottleneck of `latent` real numbers. Training minimises the
    cross-entropy of the pixels, as in 2006: outputs within [0, 1] have smaller errors than unbounded ones."""
    hasher = fit(args, epochs, model, args.train, latent=latent, **{"likelihood": "bernoulli"} | BATCHES | options)
    test_images, _ = load(args.test)
    error = squared_error(
        apply_in_batches(lambda x: x, test_images), apply_in_batches(hasher.member.reconstruct, test_images)
    )
    return [Line(f"{latent} numbers, squared error", error, outside, target)]


def ae30_2006(args: argparse.Namespace, epochs: int = 100, target: str = "≤ 2.4") -> list[Line]:
    outside = {"2006": 3.00, "rebuild": 2.65, "PCA-30": 13.87}
    return reconstruction_error(args, epochs, 30, outside, target, network="deep", shift=1)


def ae30(args: argparse.Namespace) -> list[Line]:
    """Train longer with the network of 2006."""
    return ae30_2006(args, 203, "≤ 2.0")


def ae6(args: argparse.Namespace) -> list[Line]:
    """Regularise by noise instead of shifts: six dimensions cannot encode the shift of an image too."""
    outside = {"PCA-6": 32.65, "PCA-18": 19.69, "PCA-30": 13.87}
    noise: dict[str, Any] = {"corruption": "gaussian", "strength": 0.4}
    return reconstruction_error(args, 203, 6, outside, "≤ 12.0", "denoising", network="deep", **noise)


def vae(args: argparse.Namespace) -> list[Line]:
    """Measure the log-likelihood of binarised images: pixels are 1 with their intensity as probability (Burda et al.
    2016), drawn once for test images and `DRAWS` times for training images, instead of anew in every epoch."""

    def binarised(images: Pixels, seed: int) -> Pixels:
        drawn = np.random.default_rng(seed).random(images.shape, np.float32) * 255 < images
        return drawn * np.uint8(255)

    images, test_images = load(args.train)[0], binarised(load(args.test)[0], seed=1)
    draws = np.concatenate([binarised(images, seed=2 + i) for i in range(DRAWS)])
    hasher = fit(args, 40, "vae", draws, bits=40, network="mlp", width=32, learning_rate=6e-3, limit=len(draws))
    member = hasher.member
    assert isinstance(member, Variational)
    nll = -apply_in_batches(lambda x: member.log_likelihood(x, args.samples), test_images).mean()
    elbo = -apply_in_batches(lambda x: member.elbo(x, 1), test_images).mean()
    outside = {"VAE": 89.8, "IWAE": 86.8, "VAMP": 85.8}
    return [
        Line(f"−log-likelihood, {args.samples} samples", float(nll), outside, "≤ 88"),
        Line("−ELBO", float(elbo), {}, ""),
    ]


def denoise(args: argparse.Namespace) -> list[Line]:
    """Measure the mean PSNR in decibels of denoised images, beside the better of two median filters."""
    test_images, _ = load(args.test)
    clean = apply_in_batches(lambda x: x, test_images)
    lines = []
    for corruption in ("masking", "gaussian"):
        options: dict[str, Any] = {"corruption": corruption, "strength": 0.3, "network": "unet", "width": 8}
        member = fit(args, 8, "denoising", args.train, likelihood="gaussian", **options).member
        noisy = apply_in_batches(member.corrupt, test_images)
        restored = apply_in_batches(partial(restore, member), test_images)
        filtered = max(psnr(clean, median_filter(noisy, (1, 1, side, side)).clip(0, 1)) for side in (3, 5))
        outside = {"noisy": psnr(clean, noisy), "median": filtered}
        lines.append(Line(f"{corruption} 0.3, dB", psnr(clean, restored), outside, f"≥ {filtered + 4:.2f}"))
    return lines


def restore(member: Member, x: Tensor) -> Tensor:
    # `apply_in_batches` sets the seed, so the noise equals that of `corrupt` alone.
    return member.reconstruct(member.corrupt(x))


def super_resolution(args: argparse.Namespace) -> list[Line]:
    """Measure the mean PSNR in decibels of photos that were halved (bilinear, antialiased) and upscaled. The training
    set consists of tiles of photos at full resolution. Every tenth photo is held out and measured."""
    photos = [decode(record.read()).pixels for record in open_source(args.train)]
    photos = [np.broadcast_to(photo, (*photo.shape[:2], 3)) for photo in photos if min(photo.shape[:2]) >= TILE]
    rng = np.random.default_rng(args.seed)
    tiles = []
    for photo in (photo for i, photo in enumerate(photos) if i % HELD_OUT):
        for _ in range(TILES):
            top, left = (int(rng.integers(side - TILE + 1)) for side in photo.shape[:2])
            tiles.append(photo[top : top + TILE, left : left + TILE])
    options: dict[str, Any] = {"corruption": "downscaling", "network": "unet", "width": 8, "likelihood": "gaussian"}
    hasher = fit(args, 20, "denoising", np.stack(tiles), size=(TILE, TILE), batch=32, **options)
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
    baseline = statistics.fmean(bicubic)
    return [
        Line(f"×2, {len(ours)} photos, dB", statistics.fmean(ours), {"bicubic": baseline}, f"≥ {baseline + 0.5:.2f}"),
    ]


def stacked(args: argparse.Namespace) -> list[Line]:
    """Measure the classification error on test images of a network trained with few labels, after greedy pretraining on
    all images or from scratch. Each of three seeds draws its own labelled images, equally many per class."""
    (images, labels), (test_images, test_labels) = load(args.train), load(args.test)
    options: dict[str, Any] = {"bits": 64, "width": 48}
    lines = []
    for seed in range(args.seed, args.seed + 3):
        rng = np.random.default_rng(seed)
        per_class = args.labelled // len(np.unique(labels))
        rows = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)])
        pretrained = fit(args, 20, "stacked", images, seed=seed, **options)
        tuning: dict[str, Any] = {"labels": labels[rows].tolist(), "fine_tune": True, "pretrain": 0.0, "batch": 100}
        errors = []
        for init in (pretrained, None):
            hasher = fit(args, 100, "stacked", images[rows], seed=seed, init=init, **tuning, **options)
            predicted = apply_in_batches(partial(classify, hasher.member), test_images)
            errors.append(float((np.array(hasher.training["classes"])[predicted] != test_labels).mean()))
        lines.append(Line(f"{len(rows):,} labels, seed {seed}, error", errors[0], {"scratch": errors[1]}, "fewer"))
    return lines


def classify(member: Member, x: Tensor) -> Tensor:
    assert isinstance(member, StackedDenoisingAutoencoder) and member.classifier is not None
    return member.classifier(member.features(x)).argmax(1)  # type: ignore[no-any-return]


def ortho(args: argparse.Namespace) -> list[Line]:
    """Measure the mean average precision over all training images, ranked for each test image; ties are averaged."""
    (images, labels), (test_images, test_labels) = load(args.train), load(args.test)
    hasher = fit(args, 30, "ortho", args.train, labels=True, width=48, learning_rate=4e-3)
    score = mean_average_precision(hasher.encode(test_images), test_labels, hasher.encode(images), labels)
    return [Line("32 bits, mAP@all", score, {"MNIST": 0.99}, "MNIST ≥ 0.985, Fashion-MNIST ≥ 0.92")]


def speed(args: argparse.Namespace) -> list[Line]:
    """Measure milliseconds per step of `train` and of a bare loop over the same batches; check that losses agree."""
    images, _ = load(args.train)
    steps = args.steps or 60
    lines = []
    for network in ("mlp", "conv"):
        torch.manual_seed(args.seed)
        initial = MODELS["ae"]((images.shape[3], *images.shape[1:3]), 32, network=network)
        ours, bare = [], []
        for _ in range(5):
            member, other = copy.deepcopy(initial), copy.deepcopy(initial)
            training = train(member, images, TrainingOptions(steps=steps, seed=args.seed, compiled=args.compile))
            ours.append(1000 * training.seconds / steps)
            bare.append(1000 * bare_loop(other, images, steps, training.batch, args) / steps)
            x = next(batches(images))
            losses = [float(trained.eval().loss(x)["reconstruction"].detach()) for trained in (member, other)]
            assert abs(losses[0] / losses[1] - 1) < 0.01, f"the losses of the two loops differ: {losses}"
        baseline = statistics.median(bare)
        lines.append(
            Line(
                f"ae {network}, ms a step", statistics.median(ours), {"bare loop": baseline}, f"≤ {1.15 * baseline:.2f}"
            )
        )
    return lines


def bare_loop(member: Member, images: Pixels, steps: int, batch: int, args: argparse.Namespace) -> float:
    """Return the seconds that training steps take in plain PyTorch, with the images in memory as tensors."""
    data = torch.cat(list(batches(images)))
    rows, _ = split(len(images), args.seed)
    epochs = [np.random.default_rng((args.seed, i)).permutation(rows) for i in range(steps * batch // len(rows) + 2)]
    full = len(rows) // batch * batch  # images in the full batches of an epoch
    step_indices = [indices for epoch in epochs for indices in epoch[:full].reshape(-1, batch)][:steps]
    member.to(default_device()).train()
    defaults = member.training_defaults
    optimiser = torch.optim.AdamW(member.parameters(), defaults.learning_rate, weight_decay=defaults.weight_decay)

    def loss(x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(member.decoder(member.encoder(x)), x, reduction="sum") / len(x)

    forward = torch.compile(loss) if args.compile else loss
    start = time.monotonic()
    for step, indices in enumerate(step_indices):
        for group in optimiser.param_groups:
            group["lr"] = defaults.learning_rate * _schedule(step, steps)
        with torch.autocast(data.device.type, torch.bfloat16, enabled=in_bfloat16(data.device)):
            value = forward(data[indices])
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    float(value.detach())  # waits for a GPU
    return time.monotonic() - start


def to_value(text: str) -> Any:
    """Return the Python literal in the text, or the text if it is none."""
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
    parser.add_argument("--data", default="mnist", help="name of a data set; its parts :train and :test are used")
    parser.add_argument("--train", help="training images, instead of --data; for super-resolution, photos")
    parser.add_argument("--test", help="test images, instead of --data")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int)
    length.add_argument("--budget", help="time of each training, such as 10m")
    length.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the member, or an argument of `fit`",
    )
    parser.add_argument("--samples", type=int, default=200, help="samples of each posterior, in the row vae")
    parser.add_argument("--labelled", type=int, default=1000, help="labelled images, in the row stacked")
    parser.add_argument("--compile", action="store_true", help="compile both loops, in the row speed")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.train, args.test = args.train or f"{args.data}:train", args.test or f"{args.data}:test"
    args.set = {name: to_value(value) for name, _, value in (text.partition("=") for text in args.set)}
    args.trainings = []
    start = time.monotonic()
    lines = ROWS[args.row](args)
    record = {"row": args.row, "seed": args.seed, "threads": torch.get_num_threads(), "device": default_device().type}
    record |= {"seconds": round(time.monotonic() - start), "trainings": args.trainings}
    if args.json:
        print(json.dumps(record | {"lines": [line._asdict() for line in lines]}))
        return
    print(
        f"{args.row}, seed {args.seed}, {record['threads']} threads, {record['device']}, {record['seconds']} s in all"
    )
    print(*args.trainings, sep="\n")
    print(f"{'':32}{'ours':>10}  {'outside':52}target")
    for name, ours, published, target in lines:
        theirs = ", ".join(f"{value:.4g} ({source})" for source, value in published.items())
        print(f"{name:32}{ours:>10.4f}  {theirs:52}{target}")


if __name__ == "__main__":
    main()
