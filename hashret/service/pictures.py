"""Pictures for the page: PNG or JPEG files of scaled items and of reconstructions."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hashret.collection import Collection
from hashret.collection.byte_cache import ByteCache
from hashret.data.contents import Content
from hashret.data.images import decode
from hashret.errors import HashretError, TooLarge
from hashret.results import Item
from hashret.service.faults import to_request_fault

MAX_PNG_SIDE = 128  # pixels: up to this size pictures are PNG, which is lossless
MAX_FILE_BYTES = 2**29  # of an item that is decoded for a picture
MAX_CACHED_BYTES = 64 * 2**20


class Pictures:
    """The pictures of a collection, each as the bytes of a file and its media type, with a cache. Thread-safe."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._cache = ByteCache[tuple[bytes, str]](MAX_CACHED_BYTES, lambda picture: len(picture[0]))

    def of_item(self, item_id: int, size: int) -> tuple[bytes, str]:
        """Return the image of an item with no side longer than `size` pixels.

        Raise NotFound, TooLarge, or Problem 422 if its file can no longer be decoded.
        """
        item = self._collection.get(item_id)
        key = item.sha256, size
        if (cached := self._cache.values().get(key)) is not None:
            return cached
        content = self._content(item)
        try:
            picture = encode_picture(decode(content, (size // 2, size // 2)).pixels, size)
        except HashretError as error:
            raise to_request_fault(error) from None
        self._cache.put(key, picture)
        return picture

    def reconstruction(self, image: bytes | int) -> tuple[bytes, str]:
        """Return the model's reconstruction of an uploaded image, or of an item by its id, at the input size."""
        from hashret.tasks.generation import reconstruct

        hasher = self._collection.hasher
        content = self._content(self._collection.get(image)) if isinstance(image, int) else image
        try:
            pixels = hasher.preprocessing(content).pixels
            return encode_picture(reconstruct(hasher, pixels[None])[0], max(pixels.shape))
        except HashretError as error:
            raise to_request_fault(error) from None

    def _content(self, item: Item) -> Content:
        if item.bytes > MAX_FILE_BYTES:
            size = f"{item.bytes / 2**20:,.0f} MiB, more than {MAX_FILE_BYTES / 2**20:,.0f}"
            raise TooLarge(f"the image of item {item.id} has {size}: open it at its path")
        return self._collection.content(item.id)


def encode_picture(pixels: NDArray[np.uint8], size: int) -> tuple[bytes, str]:
    """Return pixels (h, w, 1 | 3) as a file with no side longer than `size`, and its media type."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3)
    file = io.BytesIO()
    if max(image.size) <= MAX_PNG_SIDE:
        image.save(file, "PNG")
        return file.getvalue(), "image/png"
    image.save(file, "JPEG", quality=85)
    return file.getvalue(), "image/jpeg"
