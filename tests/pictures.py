"""Images, image files and a folder of image files that several test files share."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
JPEG_OF_TEXT = b"Dear diary, this is no photo."
sides = st.integers(1, 40)
shapes = st.one_of(st.tuples(sides, sides), st.tuples(sides, sides, st.sampled_from([1, 3, 4])))
pixel_arrays = shapes.flatmap(lambda shape: arrays(np.uint8, shape))


def smooth(height: int, width: int, channels: int = 3) -> Pixels:
    """Return a smooth colour image whose corners all differ."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [255 * x, 255 * y, 127 + 127 * np.sin(7 * x + 3 * y)]
    return np.stack(planes[:channels], axis=-1).astype(np.uint8)


def save(image: Image.Image | Pixels, format_name: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of an image file in this format."""
    file = io.BytesIO()
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    image.save(file, format_name, **options)
    return file.getvalue()


def picture(seed: int, height: int = 20, width: int = 30, channels: int = 3) -> Pixels:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, channels), np.uint8)
    image = Image.fromarray(coarse[..., 0] if channels == 1 else coarse).resize((width, height))
    return np.asarray(image).reshape(height, width, channels)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


TREE = {
    "b.png": save(picture(1)),
    "a/z.JPG": save(picture(2), "JPEG"),
    "a/deep/er/x.gif": save(picture(3), "GIF"),
    "a.jpeg": save(picture(4), "JPEG"),
    "a-b/broken.jpg": JPEG_OF_TEXT,
    "Zoë/ünï.webp": save(picture(5), "WEBP"),
}
PASSED_OVER = {"notes.txt": b"no image", "a/jpg": b"", "a/.hidden.png": save(picture(6)), "a/x.jpg.part": b""}
