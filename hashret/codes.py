"""The code format: bits ↔ bytes ↔ hex, and Hamming distance.

A batch of codes is ``uint8`` of shape ``(n, bits // 8)``, C-contiguous, in the bit order of ``numpy.packbits``: bit 0
of a code is the most significant bit of its first byte. ``bits`` is a multiple of 8 from 8 to 1024. As text a code is
lower-case hex. Stored codes are a file format, which does not change.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]

MIN_BITS, MAX_BITS = 8, 1024


def check_bits(bits: int) -> int:
    """Return `bits`; raise ValueError unless a code can have so many."""
    if not isinstance(bits, int) or isinstance(bits, bool) or bits % 8 or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be a multiple of 8 from {MIN_BITS} to {MAX_BITS}, not {bits!r}")
    return bits


def check_codes(codes: Any, bits: int | None = None) -> Codes:
    """Return `codes`; raise ValueError unless it is a batch of codes, of `bits` bits if given."""
    if not isinstance(codes, np.ndarray) or codes.dtype != np.uint8:
        found = codes.dtype if isinstance(codes, np.ndarray) else type(codes).__name__
        raise ValueError(f"codes must be a uint8 array of shape (n, bits // 8), not {found}")
    if codes.ndim != 2:
        raise ValueError(f"codes must have shape (n, bits // 8), not {codes.shape}")
    if bits is None:
        check_bits(codes.shape[1] * 8)
    elif codes.shape[1] * 8 != check_bits(bits):
        raise ValueError(f"codes must have {bits} bits, not {codes.shape[1] * 8}")
    if not codes.flags.c_contiguous:
        raise ValueError("codes must be C-contiguous; pass numpy.ascontiguousarray(codes)")
    return codes


def pack(bits: NDArray[np.bool_]) -> Codes:
    """Return codes, uint8 (n, bits // 8), from a Boolean array (n, bits); raise ValueError for another array."""
    if not isinstance(bits, np.ndarray) or bits.dtype != np.bool_ or bits.ndim != 2:
        raise ValueError("bits must be a Boolean array of shape (n, bits)")
    check_bits(bits.shape[1])
    return np.packbits(bits, axis=1)


def unpack(codes: Codes) -> NDArray[np.bool_]:
    """Return the bits, bool (n, bits), of a batch of codes: the inverse of `pack`."""
    return np.unpackbits(check_codes(codes), axis=1).view(np.bool_)


def to_hex(codes: Codes) -> list[str]:
    """Return each code as lower-case hex text of bits / 4 digits."""
    return [code.tobytes().hex() for code in check_codes(codes)]


def from_hex(texts: str | list[str], bits: int | None = None) -> Codes:
    """Return codes, uint8 (n, bits // 8), from one hex text or several of equal length.

    Raise ValueError for text that is not hex, of a length that no code has, or not of `bits` bits if given.
    """
    texts = [texts] if isinstance(texts, str) else texts
    rows = []
    for text in texts:
        try:
            rows.append(bytes.fromhex(text))
        except ValueError:
            raise ValueError(f"{text!r} is not a code: a code is written in hex digits") from None
        if len(rows[-1]) * 2 != len(text) or len(rows[-1]) != len(rows[0]):
            raise ValueError(f"{text!r} is not a code of {len(rows[0]) * 8} bits")
    width = len(rows[0]) if rows else (bits or MIN_BITS) // 8
    return check_codes(np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), width).copy(), bits)


def hamming(a: Codes, b: Codes) -> NDArray[np.int32]:
    """Return the Hamming distances, int32 (n, m), between every code of `a` (n) and every code of `b` (m).

    This is brute force, for small batches and for checking indexes. Raise ValueError if the widths differ.
    """
    check_codes(b, check_codes(a).shape[1] * 8)
    out = np.empty((len(a), len(b)), np.int32)
    for row, code in zip(out, a, strict=True):
        np.bitwise_count(code ^ b).sum(axis=1, dtype=np.int32, out=row)
    return out
