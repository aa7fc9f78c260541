import re
from pathlib import Path

from command_line import Command
from PIL import Image


def test_tasks_of_models_other_than_codes(folder: Path, hashret: Command) -> None:
    small = ["--steps", 3, "--bits", 16, "--set", "network=mlp", "--set", "width=1", "-q"]
    assert hashret("train", "photos", "--model", "cvae", "--labels", "-o", "cvae", *small).code == 0
    for to, *corruption in (["clean"], ["wide", "--set", "corruption=downscaling"]):
        assert hashret("train", "photos", "--model", "denoising", *corruption, "-o", to, *small).code == 0
    first, second = sorted((folder / "photos").rglob("*.png"))[:2]
    result = hashret("model", "reconstruct", "photos", "-m", "cvae", "-n", 5)
    picture, error = result.out.splitlines()
    assert result.code == 0 and picture == "reconstructions.png" and result.err == ""
    assert re.fullmatch(r"reconstruction error [\d.]+ \(squared error summed over an image, mean of 5 images\)", error)
    assert hashret("model", "reconstruct", "photos", "-m", "cvae", "-n", 1).out.endswith(", mean of 1 image)\n")
    for line in (
        ["sample", "-o", "a.png", "--label", first.parent.name],
        ["sample", "-o", "b.png", "--between", first, second],
        ["sample", "-o", "c.png", "--traverse", first, "-n", 20],
    ):
        assert hashret("model", *line, "-m", "cvae") == (0, f"{line[2]}\n", "")
    result = hashret("model", "plot", "photos", "-m", "cvae", "-o", "plots/here")
    assert result.out.split() == [f"plots/here/{name}.png" for name in ("latents", "bits", "distances", "losses")]
    assert hashret("model", "denoise", first, "-m", "clean", "-q") == (0, f"{first.with_suffix('.denoised.png')}\n", "")
    result = hashret("model", "upscale", first, "-m", "wide", "-o", "large.png")
    assert result == (0, "large.png\n", f"upscaled {first} (8 × 8 to 16 × 16 pixels)\n")
    for picture in ("reconstructions.png", "a.png", "b.png", "c.png", *result.out.split(), "plots/here/bits.png"):
        with Image.open(picture) as image:
            image.load()
    for arguments, text in (
        (["sample", "-m", "cvae", "--label", "cat"], "there is no label 'cat'; the model knows"),
        (["sample", "-m", "cvae", "--manifold"], "a manifold needs two latent dimensions and a normal prior"),
        (["denoise", "broken.png", "-m", "clean"], "broken.png: no image"),
        (["denoise", first, "-m", "cvae"], "this takes a model that was trained for it"),
        (["reconstruct", "photos"], "model 'lsh' has no network to decode with"),
        (["reconstruct", "empty", "-m", "cvae"], "empty has no images"),
    ):
        result = hashret("model", *arguments)
        assert (result.code, result.out) == (1, "") and text in result.err and result.err.count("\n") == 1
    assert hashret("model", "sample", "-m", "cvae", "--manifold", "--between", first, second).code == 2
    assert hashret("train", "photos", "--model", "ortho", "-o", "x", *small).err == (
        "hashret: model 'ortho' learns from labels: add --labels\n"
    )
