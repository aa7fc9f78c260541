"""hashret model: tasks of models other than codes, each with a picture as its result."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashret.cli.common import (
    CollectionFolder,
    DataRoot,
    Quiet,
    Seed,
    Source,
    UsageError,
    check_parent,
    require_command,
    say,
)
from hashret.errors import HashretError, format_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hashret.data.contents import Inputs
    from hashret.hasher import Hasher

model = typer.Typer(name="model")

ModelFolder = Annotated[
    Path | None, typer.Option("-m", "--model", metavar="MODEL_DIR", help="The model. [default: the collection's]")
]
Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The picture to write.")]
OutBeside = Annotated[
    Path | None, typer.Option("-o", "--out", metavar="FILE", help="The image to write. [default: beside IMAGE]")
]


@model.callback(invoke_without_command=True)
def tasks(context: typer.Context) -> None:
    """Reconstruct, denoise, upscale, sample and plot with a model."""
    require_command(context)


def reconstruct(
    source: Source,
    out: Out = Path("reconstructions.png"),
    n: Annotated[int, typer.Option("-n", help="The number of images.", min=1, max=500)] = 20,
    model_dir: ModelFolder = None,
    collection: CollectionFolder = None,
    root: DataRoot = None,
    quiet: Quiet = False,
) -> int:
    """Draw images above their reconstructions, with the errors.

    Prints the path of the picture and the mean reconstruction error.
    """
    from hashret import plots
    from hashret.tasks import generation

    check_parent(out)
    hasher = load(model_dir, collection)
    pixels, _ = read(source, hasher, n, root)
    reconstructions = generation.reconstruct(hasher, pixels)
    errors = hasher.errors(pixels)
    plots.pairs(pixels, reconstructions, out, [f"{error:.2f}" for error in errors], ("image", "reconstruction"))
    print(out)
    images = format_count(len(errors), "image")
    print(f"reconstruction error {errors.mean():.3f} (squared error summed over an image, mean of {images})")
    return 0


def denoise(
    image: Image,
    out: OutBeside = None,
    model_dir: ModelFolder = None,
    collection: CollectionFolder = None,
    quiet: Quiet = False,
) -> int:
    """Denoise an image of any size with a `denoising` model."""
    from hashret.tasks.restoration import denoise

    return restore(denoise, "denoised", image, out, load(model_dir, collection), quiet)


def upscale(
    image: Image,
    out: OutBeside = None,
    model_dir: ModelFolder = None,
    collection: CollectionFolder = None,
    quiet: Quiet = False,
) -> int:
    """Double the resolution of an image of any size.

    The model is a `denoising` one that was trained with `--set corruption=downscaling`.
    """
    from hashret.tasks.restoration import upscale

    return restore(upscale, "upscaled", image, out, load(model_dir, collection), quiet)


def sample(
    out: Out = Path("samples.png"),
    n: Annotated[int, typer.Option("-n", help="The number of images.", min=1, max=1000)] = 60,
    label: Annotated[str | None, typer.Option(help="The class to sample from, for a cvae.")] = None,
    between: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--between", metavar="IMAGE IMAGE", help="Interpolate between two images."),
    ] = None,
    traverse: Annotated[
        Path | None,
        typer.Option("--traverse", metavar="IMAGE", help="Vary single latent variables of an image."),
    ] = None,
    manifold: Annotated[
        bool, typer.Option("--manifold", help="Decode a grid over both latent variables of a model with two.")
    ] = False,
    seed: Seed = 0,
    model_dir: ModelFolder = None,
    collection: CollectionFolder = None,
    quiet: Quiet = False,
) -> int:
    """Sample new images from a vae, cvae or bernoulli-vae.

    Or decode latent variables near given images: --between, --traverse, --manifold.
    """
    import numpy as np

    from hashret import plots
    from hashret.tasks import generation

    if sum((between is not None, traverse is not None, manifold)) > 1:
        raise UsageError("give one of --between, --traverse and --manifold")
    check_parent(out)
    hasher = load(model_dir, collection)
    if between is not None:
        pair = np.stack([pixels_of(path, hasher) for path in between])
        steps = generation.interpolate(hasher, pair, 10, label=label)
        plots.grid(np.concatenate([pair[:1], steps, pair[1:]]), 12, out, ["from", *[""] * 10, "to"])
    elif traverse is not None:
        variables = range(min(hasher.member.latent, max(1, n // 9)))
        steps = generation.traverse(hasher, pixels_of(traverse, hasher)[None], variables, label=label)
        plots.grid(steps, 9, out, [f"{i}: {step:+.1f}" for i in variables for step in np.linspace(-3, 3, 9)])
    elif manifold:
        plots.grid(generation.manifold(hasher, label=label), 20, out)
    else:
        plots.grid(generation.sample(hasher, n, label=label, seed=seed), min(n, 12), out)
    print(out)
    return 0


def plot(
    source: Source,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The folder of the plots.")] = Path("plots"),
    n: Annotated[int, typer.Option("-n", help="The number of images.", min=3, max=20000)] = 3000,
    tsne: Annotated[bool, typer.Option("--tsne", help="Project latents by t-SNE instead of PCA.")] = False,
    model_dir: ModelFolder = None,
    collection: CollectionFolder = None,
    root: DataRoot = None,
    quiet: Quiet = False,
) -> int:
    """Plot latents, bits, distances and loss curves.

    The labels of SOURCE are used for colours only.
    """
    from hashret import plots
    from hashret.tasks import generation

    hasher = load(model_dir, collection)
    pixels, labels = read(source, hasher, n, root)
    if len(pixels) < 3:
        raise HashretError(f"{source} has too few images to plot: give at least three")
    out.mkdir(parents=True, exist_ok=True)
    codes = hasher.encode_pixels(pixels)
    points, method = project(generation.latents(hasher, pixels), tsne)
    plots.scatter(points, labels, out / "latents.png", f"latents of {len(pixels):,} images{method}")
    plots.bits(codes, out / "bits.png")
    plots.distances(codes[:3000], labels[:3000], out / "distances.png")
    files = ["latents.png", "bits.png", "distances.png"]
    if hasher.training.get("curve"):
        plots.curves(hasher.training["curve"], out / "losses.png")
        files.append("losses.png")
    for name in files:
        print(out / name)
    return 0


def load(model_dir: Path | None, collection: Path | None) -> "Hasher":
    """Load the model of a folder, or else that of the collection."""
    from hashret.collection import Collection, locate
    from hashret.hasher import Hasher

    if model_dir is not None:
        return Hasher.load(model_dir)
    with Collection.open(locate(collection), read_only=True) as images:
        return images.hasher


def read(source: str, hasher: "Hasher", n: int, root: Path | None) -> tuple["NDArray[Any]", list[str | None]]:
    """Return at most n images of a source, drawn at random, as the model's inputs, and their labels."""
    from hashret.data.sample import sample
    from hashret.data.sources import open_source

    opened = open_source(source, data_root=root)
    hasher.preprocessing.check_source(opened, "give a SOURCE of those")
    drawn = sample(opened, size=hasher.preprocessing.size, limit=n)
    return hasher.preprocessing.batch(drawn.images), drawn.labels


def pixels_of(path: Path, hasher: "Hasher") -> "Inputs":
    """Return an image file as the model's input."""
    from hashret.data.contents import read_file

    try:
        return hasher.preprocessing(read_file(path)).pixels
    except HashretError as error:
        raise HashretError(f"{path}: {error}") from None


def restore(
    task: "Callable[[Hasher, NDArray[np.uint8]], NDArray[np.uint8]]",
    done: str,
    image: Path,
    out: Path | None,
    hasher: "Hasher",
    quiet: bool,
) -> int:
    """Write the restored image to `out`, or beside the image with the suffix `done`, and print the path."""
    from PIL import Image as Pillow

    from hashret.data.contents import read_file
    from hashret.data.images import decode
    from hashret.durable import Replacement

    try:
        pixels = decode(read_file(image)).pixels
    except HashretError as error:
        raise HashretError(f"{image}: {error}") from None
    out = out or image.with_suffix(f".{done}.png")
    image_format = Pillow.registered_extensions().get(out.suffix.lower())
    if image_format is None:
        raise HashretError(f"{out.name}: the suffix must be that of an image format, such as .png")
    check_parent(out)
    restored = task(hasher, pixels)
    with Replacement(out) as new:
        picture = Pillow.fromarray(restored[..., 0] if restored.shape[2] == 1 else restored)
        picture.save(new.path, image_format)
        new.commit()
    sizes = (f"{array.shape[1]} × {array.shape[0]}" for array in (pixels, restored))
    say(f"{done} {image} ({' to '.join(sizes)} pixels)", quiet)
    print(out)
    return 0


def project(latents: "NDArray[np.float32]", tsne: bool) -> tuple["NDArray[np.float32]", str]:
    """Project latents to two dimensions; return the points and the method, for a title."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if tsne:
        perplexity = min(30.0, (len(latents) - 1) / 3)
        return TSNE(perplexity=perplexity, random_state=0).fit_transform(latents), ", by t-SNE"
    if latents.shape[1] == 2:
        return latents, ""
    return PCA(2, random_state=0).fit_transform(latents), ", by their two principal components"
