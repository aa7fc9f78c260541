"""Pictures for the page: of items, scaled, and of what a model reconstructs of an image."""

import io
import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hashret.collection import Collection
from hashret.data.images import decode
from hashret.errors import HashretError
from hashret.service.faults import fault_of_image

SMALL = 128  # pictures of at most so many pixels a side go as PNG, which keeps each pixel
PICTURE_BYTES = 64 * 2**20  # of pictures that are kept ready


class Pictures:
    """The pictures of a collection, as the bytes of a file and its media type; many threads may ask at once."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], tuple[bytes, str]] = OrderedDict()

    def of_item(self, item_id: int, size: int) -> tuple[bytes, str]:
        """An item's image with no side longer than `size`; raises NotFound, TooLarge, or Problem 422 if it cannot be
        decoded any more."""
        key = self._collection.get(item_id).sha256, size
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        content = self._collection.content(item_id)
        try:
            picture = draw(decode(content, (size // 2, size // 2)).pixels, size)
        except HashretError as error:
            raise fault_of_image(error) from None
        with self._lock:
            self._kept[key] = picture
            while sum(len(data) for data, _ in self._kept.values()) > PICTURE_BYTES:
                self._kept.popitem(last=False)
        return picture

    def reconstruction(self, image: bytes | int) -> tuple[bytes, str]:
        """What the model reconstructs of an image, or of that of an item, in the size that it sees."""
        from hashret.tasks.generation import reconstruct

        hasher = self._collection.hasher
        content = self._collection.content(image) if isinstance(image, int) else image
        try:
            pixels = hasher.preprocessing(content).pixels
            return draw(reconstruct(hasher, pixels[None])[0], max(pixels.shape))
        except HashretError as error:
            raise fault_of_image(error) from None


def draw(pixels: NDArray[np.uint8], size: int) -> tuple[bytes, str]:
    """Pixels (h, w, 1 | 3) as a file with no side longer than `size`, and its media type."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3)
    file = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(file, "PNG")
        return file.getvalue(), "image/png"
    image.save(file, "JPEG", quality=85)
    return file.getvalue(), "image/jpeg"
