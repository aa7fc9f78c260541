"""Bits that depend only on the image and the model, although float32 sums depend on the batch.

An image with an output nearer to its threshold than `AMBIGUOUS_MARGIN` training standard deviations is computed again
in float64. `rounding_errors` measures how far float32 margins are from float64 margins, so that heads can be fitted
whose margins never differ by as much.
"""

import numpy as np
from numpy.typing import NDArray

from hashret.data.contents import Inputs
from hashret.heads import Head
from hashret.runtime import Runtime, batch_slices

AMBIGUOUS_MARGIN = 1e-4
# In float64 a bit is 1 only if its margin exceeds this tolerance: an output on the threshold, where even float64 sums
# may fall on either side, is 0 in every batch.
TIE_TOLERANCE = 1e-9


def compute_bits(runtime: Runtime, head: Head, pixels: Inputs, single_thread: bool = False) -> NDArray[np.bool_]:
    """Return the bits, (n, bits), of images. With `single_thread` only the calling thread works."""
    bits = np.empty((len(pixels), len(head.threshold)), np.bool_)
    ambiguous = np.empty(len(pixels), np.bool_)
    for rows in batch_slices(pixels):
        margins = head.margins(runtime.outputs(pixels[rows], single_thread))
        bits[rows] = margins > 0
        ambiguous[rows] = (np.abs(margins) < AMBIGUOUS_MARGIN).any(1)
    recomputed = np.flatnonzero(ambiguous)
    for rows in batch_slices(pixels, len(recomputed)):  # together: a pass over one or two images takes as long
        images = recomputed[rows]
        bits[images] = head.margins(runtime.exact(pixels[images], single_thread)) > TIE_TOLERANCE
    return bits


def compute_margins(runtime: Runtime, head: Head, pixels: Inputs) -> NDArray[np.float32]:
    """Return the margins, (n, bits), of images, computed in float64."""
    margins = np.empty((len(pixels), len(head.threshold)), np.float32)
    for rows in batch_slices(pixels):
        margins[rows] = head.margins(runtime.exact(pixels[rows]))
    return margins


def rounding_errors(runtime: Runtime, head: Head, pixels: Inputs) -> NDArray[np.float64]:
    """Return the largest differences, (bits), between the float32 and float64 margins of one batch of images."""
    exact = head.margins(runtime.exact(pixels))
    errors: NDArray[np.float64] = np.abs(head.margins(runtime.outputs(pixels)) - exact).max(0)
    return errors
