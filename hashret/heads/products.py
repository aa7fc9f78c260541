"""Matrix products that keep to the calling thread.

NumPy's BLAS spreads a product over threads of its own where it is large enough, and has no switch for a single thread
that asks. Other cores may have work of their own; on busy ones its threads wait for each other a hundred times as long
as a product takes. OpenBLAS leaves products of up to 2¹⁸ multiplications to the thread that asks for them, but spreads
products with a vector from 9,216 on; so larger ones are cut into blocks, and vectors go by `einsum`, which has no
threads.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32 | np.float64]

LARGEST = 2**18  # multiplications
DEPTH, ROWS = 256, 32  # of a block of a large matrix


def product(x: Floats, w: Floats) -> Floats:
    """x @ w for matrices (n, d) and (d, m), by the calling thread."""
    n, d, m = len(x), len(w), w.shape[1]
    if min(n, m) == 1:
        return _without_threads(x, w)
    if n * d * m <= LARGEST:
        return x @ w
    rows = LARGEST // (d * m)
    if rows >= 4:
        return _by_rows(x, w, rows)
    columns = LARGEST // (ROWS * min(d, DEPTH))
    out = np.zeros((n, m), x.dtype)
    for k in range(0, d, DEPTH):
        for j in range(0, m, columns):
            out[:, j : j + columns] += _by_rows(x[:, k : k + DEPTH], w[k : k + DEPTH, j : j + columns], ROWS)
    return out


def _by_rows(x: Floats, w: Floats, rows: int) -> Floats:
    """x @ w, so many rows at a time: `matmul` asks BLAS for one product after the other."""
    whole = len(x) // rows * rows
    out = np.empty((len(x), w.shape[1]), x.dtype)
    np.matmul(x[:whole].reshape(-1, rows, x.shape[1]), w, out=out[:whole].reshape(-1, rows, w.shape[1]))
    rest = x[whole:]
    out[whole:] = _without_threads(rest, w) if len(rest) == 1 else rest @ w
    return out


def _without_threads(x: Floats, w: Floats) -> Floats:
    out: Floats = np.einsum("nd,dm->nm", x, w)
    return out
