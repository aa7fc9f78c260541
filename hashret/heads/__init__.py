"""Heads by name: the last step from real numbers to bits, in NumPy alone.

Every head projects an output to one number per bit; the bit is 1 if the number lies above the bit's threshold. Heads
differ in the projection and how it is fitted. A threshold is the midpoint between two neighbouring training values,
never a value, so that rounding errors flip no bit of a training image. A new head is one file and one entry of `HEADS`.
"""

from collections.abc import Callable

from hashret.errors import HashretError, choose, format_count
from hashret.heads import anchor_graph, anchor_itq, linear
from hashret.heads.head import Head, median, sign
from hashret.heads.products import Floats

__all__ = ["HEADS", "Head", "check_head"]

HEADS: dict[str, Callable[[Floats, int, int], Head]] = {  # from training outputs (n, d), the number of bits and a seed
    "sign": sign,
    "median": median,
    "lsh": linear.lsh,
    "pca": linear.pca,
    "itq": linear.itq,
    "anchor-graph": anchor_graph.anchor_graph,
    "anchor-itq": anchor_itq.anchor_itq,
}


def check_head(head: str, images: int, dim: int, bits: int) -> None:
    """Raise HashretError if `head` cannot make `bits` bits from so many images with `dim` outputs each."""
    choose(HEADS, head, "head")
    if images < 2:
        raise HashretError("one image is not enough to learn from: give a source with at least two images")
    if head in ("sign", "median") and dim != bits:
        raise HashretError(
            f"head {head!r} makes one bit of every number, and {format_count(dim, 'number')} cannot give {bits} bits: "
            f"choose --head itq, or as many numbers as bits with --set latent={bits}"
        )
    if head in ("pca", "itq") and min(images, dim) < bits:
        shortage = format_count(images, "image") if images < bits else f"{format_count(dim, 'number')} an image"
        raise HashretError(
            f"head {head!r} needs at least as many images, and numbers an image, as bits: {shortage} cannot give "
            f"{bits} bits; choose fewer bits or --head lsh"
        )
