"""Matrix products that run in the calling thread.

NumPy's BLAS computes large products with threads of its own, and cannot be limited to one thread for a single caller.
The other cores may be busy with other images; its threads then wait for each other a hundred times as long as a product
takes. OpenBLAS computes products of up to 2¹⁸ multiplications in the calling thread, but matrix-vector products only
below 9,216. Larger products are therefore cut into blocks, and those with a vector use `einsum`, which has no threads.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32 | np.float64]

MAX_MULTIPLICATIONS = 2**18  # of a block
BLOCK_DEPTH, BLOCK_ROWS = 256, 32  # of a block of a large matrix


def product(x: Floats, w: Floats) -> Floats:
    """Return x @ w for matrices (n, d) and (d, m), computed in the calling thread."""
    n, d, m = len(x), len(w), w.shape[1]
    if min(n, m) == 1:
        return _einsum(x, w)
    if n * d * m <= MAX_MULTIPLICATIONS:
        return x @ w
    rows = MAX_MULTIPLICATIONS // (d * m)
    if rows >= 4:
        return _by_rows(x, w, rows)
    columns = MAX_MULTIPLICATIONS // (BLOCK_ROWS * min(d, BLOCK_DEPTH))
    out = np.zeros((n, m), x.dtype)
    for k in range(0, d, BLOCK_DEPTH):
        for j in range(0, m, columns):
            out[:, j : j + columns] += _by_rows(x[:, k : k + BLOCK_DEPTH], w[k : k + BLOCK_DEPTH, j : j + columns])
    return out


def _by_rows(x: Floats, w: Floats, rows: int = BLOCK_ROWS) -> Floats:
    """Return x @ w, computed in blocks of `rows` rows: `matmul` on a stack calls BLAS for one block at a time."""
    whole = len(x) // rows * rows
    out = np.empty((len(x), w.shape[1]), x.dtype)
    np.matmul(x[:whole].reshape(-1, rows, x.shape[1]), w, out=out[:whole].reshape(-1, rows, w.shape[1]))
    rest = x[whole:]
    out[whole:] = _einsum(rest, w) if len(rest) == 1 else rest @ w
    return out


def _einsum(x: Floats, w: Floats) -> Floats:
    out: Floats = np.einsum("nd,dm->nm", x, w)
    return out
