"""hashret model: what models can do besides codes, each with a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashret.cli.common import CollectionFolder, DataRoot, Quiet, Source, say
from hashret.errors import HashretError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hashret.data.contents import Inputs
    from hashret.hasher import Hasher

model = typer.Typer(name="model", help="Remember, restore, draw and plot images with a model.", no_args_is_help=True)

ModelFolder = Annotated[
    Path | None, typer.Option("-m", "--model", metavar="MODEL_DIR", help="The model: default the collection's.")
]
Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="Where the picture goes.")]
OutBeside = Annotated[
    Path | None, typer.Option("-o", "--out", metavar="FILE", help="Where the image goes: default beside IMAGE.")
]


def reconstruct(
    source: Source,
    out: Out = Path("reconstructions.png"),
    n: Annotated[int, typer.Option("-n", help="How many images.", min=1, max=500)] = 20,
    model_dir: ModelFolder = None,
    collection: CollectionFolder = None,
    root: DataRoot = None,
    quiet: Quiet = False,
) -> int:
    """Show images of SOURCE over what the model remembers of them, with the squared error."""
    from hashret import plots
    from hashret.tasks import generation

    hasher = load(model_dir, collection)
    pixels, _ = read(source, hasher, n, root)
    reconstructions = generation.reconstruct(hasher, pixels)
    errors = hasher.errors(pixels)
    plots.pairs(pixels, reconstructions, out, [f"{error:.2f}" for error in errors], ("image", "remembered"))
    print(f"{errors.mean():.3f}")
    say(f"is the mean squared error, summed per image, of {len(errors)} images; picture: {out}", quiet)
    return 0


def denoise(
    image: Image,
    out: OutBeside = None,
    model_dir: ModelFolder = None,
    collection: CollectionFolder = None,
    quiet: Quiet = False,
) -> int:
    """Take the noise from an image of any size, with a `denoising` model."""
    from hashret.tasks.restoration import denoise

    return restore(denoise, "denoised", image, out, load(model_dir, collection), quiet)


def upscale(
    image: Image,
    out: OutBeside = None,
    model_dir: ModelFolder = None,
    collection: CollectionFolder = None,
    quiet: Quiet = False,
) -> int:
    """Double the resolution of an image of any size, with a `denoising` model of `corruption=downscaling`."""
    from hashret.tasks.restoration import upscale

    return restore(upscale, "upscaled", image, out, load(model_dir, collection), quiet)


def sample(
    out: Out = Path("samples.png"),
    n: Annotated[int, typer.Option("-n", help="How many images.", min=1, max=1000)] = 60,
    label: Annotated[str | None, typer.Option(help="Of this class, for a cvae.")] = None,
    between: Annotated[
        tuple[Path, Path] | None, typer.Option("--between", metavar="IMAGE IMAGE", help="From one to the other.")
    ] = None,
    traverse: Annotated[
        Path | None, typer.Option("--traverse", metavar="IMAGE", help="What single latent numbers of it mean.")
    ] = None,
    manifold: Annotated[bool, typer.Option("--manifold", help="All that a model of two latent numbers draws.")] = False,
    seed: Annotated[int, typer.Option(help="Of all randomness.", min=0)] = 0,
    model_dir: ModelFolder = None,
    collection: CollectionFolder = None,
    quiet: Quiet = False,
) -> int:
    """Draw new images from a model with a prior (vae, cvae, bernoulli-vae), or walk through what it knows."""
    import numpy as np

    from hashret import plots
    from hashret.tasks import generation

    if sum((between is not None, traverse is not None, manifold)) > 1:
        raise typer.BadParameter("give one of --between, --traverse and --manifold")
    hasher = load(model_dir, collection)
    if between is not None:
        pair = np.stack([pixels_of(path, hasher) for path in between])
        steps = generation.interpolate(hasher, pair, 10, label=label)
        plots.grid(np.concatenate([pair[:1], steps, pair[1:]]), 12, out, ["from", *[""] * 10, "to"])
    elif traverse is not None:
        numbers = range(min(hasher.member.latent, max(1, n // 9)))
        steps = generation.traverse(hasher, pixels_of(traverse, hasher)[None], numbers, label=label)
        plots.grid(steps, 9, out, [f"{i}: {step:+.1f}" for i in numbers for step in np.linspace(-3, 3, 9)])
    elif manifold:
        plots.grid(generation.manifold(hasher, label=label), 20, out)
    else:
        plots.grid(generation.sample(hasher, n, label=label, seed=seed), min(n, 12), out)
    say(f"picture: {out}", quiet)
    return 0


def plot(
    source: Source,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where the pictures go.")] = Path("plots"),
    n: Annotated[int, typer.Option("-n", help="How many images.", min=3, max=20000)] = 3000,
    tsne: Annotated[bool, typer.Option("--tsne", help="Lay latents out by t-SNE instead of PCA.")] = False,
    model_dir: ModelFolder = None,
    collection: CollectionFolder = None,
    root: DataRoot = None,
    quiet: Quiet = False,
) -> int:
    """Plot latents, bits, distances and loss curves; labels of SOURCE only give colours."""
    from hashret import plots
    from hashret.tasks import generation

    hasher = load(model_dir, collection)
    pixels, labels = read(source, hasher, n, root)
    if len(pixels) < 3:
        raise HashretError(f"{source} has too few images to plot: give at least three")
    out.mkdir(parents=True, exist_ok=True)
    codes = hasher.encode_pixels(pixels)
    points, how = flattened(generation.latents(hasher, pixels), tsne)
    plots.scatter(points, labels, out / "latents.png", f"latents of {len(pixels):,} images{how}")
    plots.bits(codes, out / "bits.png")
    plots.distances(codes[:3000], labels[:3000], out / "distances.png")
    made = ["latents.png", "bits.png", "distances.png"]
    if hasher.training.get("curve"):
        plots.curves(hasher.training["curve"], out / "losses.png")
        made.append("losses.png")
    for name in made:
        print(out / name)
    return 0


def load(model_dir: Path | None, collection: Path | None) -> "Hasher":
    """The model asked for: a folder's, or the collection's."""
    from hashret.collection import Collection, locate
    from hashret.hasher import Hasher

    if model_dir is not None:
        return Hasher.load(model_dir)
    with Collection.open(locate(collection), read_only=True) as there:
        return there.hasher


def read(source: str, hasher: "Hasher", n: int, root: Path | None) -> tuple["NDArray[Any]", list[str | None]]:
    """At most n images of a source, as the model sees them, drawn from all over it, and their labels."""
    from hashret.data.sample import sample
    from hashret.data.sources import open_source

    opened = open_source(source, data_root=root)
    hasher.preprocessing.check_source(opened, "give a SOURCE of those")
    drawn = sample(opened, size=hasher.preprocessing.size, limit=n)
    return hasher.preprocessing.batch(drawn.images), drawn.labels


def pixels_of(path: Path, hasher: "Hasher") -> "Inputs":
    """An image file as the model sees it."""
    from hashret.data.contents import read_file

    try:
        return hasher.preprocessing(read_file(path)).pixels
    except HashretError as error:
        raise HashretError(f"{path}: {error}") from None


def restore(
    how: "Callable[[Hasher, NDArray[np.uint8]], NDArray[np.uint8]]",
    done: str,
    image: Path,
    out: Path | None,
    hasher: "Hasher",
    quiet: bool,
) -> int:
    """Write a better image beside the one there is."""
    from PIL import Image as Pillow

    from hashret.data.contents import read_file
    from hashret.data.images import decode

    try:
        pixels = decode(read_file(image)).pixels
    except HashretError as error:
        raise HashretError(f"{image}: {error}") from None
    better = how(hasher, pixels)
    out = out or image.with_suffix(f".{done}.png")
    Pillow.fromarray(better[..., 0] if better.shape[2] == 1 else better).save(out)
    say(f"from {pixels.shape[1]} × {pixels.shape[0]} to {better.shape[1]} × {better.shape[0]} pixels", quiet)
    print(out)
    return 0


def flattened(latents: "NDArray[np.float32]", tsne: bool) -> tuple["NDArray[np.float32]", str]:
    """Latents as points of a plane, and how that was done."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if tsne:
        perplexity = min(30.0, (len(latents) - 1) / 3)
        return TSNE(perplexity=perplexity, random_state=0).fit_transform(latents), ", by t-SNE"
    if latents.shape[1] == 2:
        return latents, ""
    return PCA(2, random_state=0).fit_transform(latents), ", by their two principal components"
