"""Bits that depend on the image and the model alone, although float32 sums differ from batch to batch.

An image with an output nearer to its threshold than `DOUBT` training standard deviations is computed again in float64;
`rounding` measures how far float32 is from float64, so that heads can be fitted whose margins never differ by as much.
"""

import numpy as np
from numpy.typing import NDArray

from hashret.data.contents import Inputs
from hashret.heads import Head
from hashret.runtime import Runtime, batch_slices

AMBIGUOUS_MARGIN = 1e-4
# In float64 a bit is 1 above the threshold and this much more: an output placed on the threshold itself, where even
# float64 sums may fall to either side, is 0 in every batch.
TIE_TOLERANCE = 1e-9


def bits_of(runtime: Runtime, head: Head, pixels: Inputs, single_thread: bool = False) -> NDArray[np.bool_]:
    """The bits, (n, bits), of images. With `alone` the calling thread does all the work."""
    bits = np.empty((len(pixels), len(head.threshold)), np.bool_)
    ambiguous = np.empty(len(pixels), np.bool_)
    for rows in batch_slices(pixels):
        margins = head.margins(runtime.outputs(pixels[rows], single_thread))
        bits[rows] = margins > 0
        ambiguous[rows] = (np.abs(margins) < AMBIGUOUS_MARGIN).any(1)
    again = np.flatnonzero(ambiguous)
    for rows in batch_slices(pixels, len(again)):  # together, for a pass over one or two costs as much
        bits[again[rows]] = head.margins(runtime.exact(pixels[again[rows]], single_thread)) > TIE_TOLERANCE
    return bits


def margins_of(runtime: Runtime, head: Head, pixels: Inputs) -> NDArray[np.float32]:
    """The margins, (n, bits), of images, computed in float64."""
    margins = np.empty((len(pixels), len(head.threshold)), np.float32)
    for rows in batch_slices(pixels):
        margins[rows] = head.margins(runtime.exact(pixels[rows]))
    return margins


def rounding(runtime: Runtime, head: Head, pixels: Inputs) -> NDArray[np.float64]:
    """By how much, (bits), the margins of these images, of one pass, differ at most between float32 and float64."""
    exact = head.margins(runtime.exact(pixels))
    largest: NDArray[np.float64] = np.abs(head.margins(runtime.outputs(pixels)) - exact).max(0)
    return largest
