"""Pictures for the page: PNG or JPEG files of scaled items and of reconstructions."""

import io
import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hashret.collection import Collection
from hashret.data.images import decode
from hashret.errors import HashretError
from hashret.service.faults import to_request_fault

MAX_PNG_SIDE = 128  # pixels: up to this size pictures are PNG, which is lossless
MAX_CACHE_BYTES = 64 * 2**20


class Pictures:
    """The pictures of a collection, each as the bytes of a file and its media type, with a cache. Thread-safe."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, int], tuple[bytes, str]] = OrderedDict()

    def of_item(self, item_id: int, size: int) -> tuple[bytes, str]:
        """Return the image of an item with no side longer than `size` pixels.

        Raise NotFound, TooLarge, or Problem 422 if its file can no longer be decoded.
        """
        key = self._collection.get(item_id).sha256, size
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        content = self._collection.content(item_id)
        try:
            picture = encode_picture(decode(content, (size // 2, size // 2)).pixels, size)
        except HashretError as error:
            raise to_request_fault(error) from None
        with self._lock:
            self._cache[key] = picture
            while sum(len(data) for data, _ in self._cache.values()) > MAX_CACHE_BYTES:
                self._cache.popitem(last=False)
        return picture

    def reconstruction(self, image: bytes | int) -> tuple[bytes, str]:
        """Return the model's reconstruction of an uploaded image, or of an item by its id, at the input size."""
        from hashret.tasks.generation import reconstruct

        hasher = self._collection.hasher
        content = self._collection.content(image) if isinstance(image, int) else image
        try:
            pixels = hasher.preprocessing(content).pixels
            return encode_picture(reconstruct(hasher, pixels[None])[0], max(pixels.shape))
        except HashretError as error:
            raise to_request_fault(error) from None


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
