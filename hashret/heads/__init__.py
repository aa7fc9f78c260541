"""Heads by name: how real numbers become bits. NumPy alone.

Every head projects an output to one number for each bit; the bit is 1 where that lies above the bit's threshold. Heads
differ in what they project by and in how that is fitted. A threshold lies midway between two neighbouring training
values, never on one, so that no training image's bit hangs on a rounding error. A new head is one file and one line.
"""

from collections.abc import Callable

from hashret.errors import HashretError, choose, format_count
from hashret.heads import anchor_graph, anchor_itq, linear
from hashret.heads.head import Head, median, sign
from hashret.heads.products import Floats

__all__ = ["HEADS", "Head", "check_head"]

HEADS: dict[str, Callable[[Floats, int, int], Head]] = {  # of training values (n, d), the number of bits, and a seed
    "sign": sign,
    "median": median,
    "lsh": linear.lsh,
    "pca": linear.pca,
    "itq": linear.itq,
    "anchor-graph": anchor_graph.anchor_graph,
    "anchor-itq": anchor_itq.anchor_itq,
}


def check_head(head: str, images: int, numbers: int, bits: int) -> None:
    """Raises HashretError if `head` cannot make `bits` bits of so many images with so many numbers each."""
    choose(HEADS, head, "head")
    if images < 2:
        raise HashretError("one image is not enough to learn from: give a source with at least two images")
    if head in ("sign", "median") and numbers != bits:
        raise HashretError(
            f"head {head!r} makes one bit of every number, and {format_count(numbers, 'number')} cannot give {bits} "
            f"bits: choose --head itq, or as many numbers as bits with --set latent={bits}"
        )
    if head in ("pca", "itq") and min(images, numbers) < bits:
        lack = format_count(images, "image") if images < bits else f"{format_count(numbers, 'number')} an image"
        raise HashretError(
            f"head {head!r} needs at least as many images, and numbers an image, as bits: {lack} cannot give "
            f"{bits} bits; choose fewer bits or --head lsh"
        )
