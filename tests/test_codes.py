import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hashret import codes

widths = st.integers(1, 128)


@given(widths.flatmap(lambda w: arrays(np.bool_, st.tuples(st.integers(0, 20), st.just(w * 8)))))
def test_pack_and_unpack_are_inverse(bits: np.ndarray) -> None:
    packed = codes.pack(bits)
    assert packed.shape == (len(bits), bits.shape[1] // 8)
    assert (codes.unpack(packed) == bits).all()


def test_the_stored_format_has_not_changed() -> None:
    bits = np.zeros((3, 16), np.bool_)
    bits[0, 0] = bits[1, 15] = bits[2, 8:12] = True
    packed = codes.pack(bits)
    assert packed.tolist() == [[128, 0], [0, 1], [0, 240]]
    assert codes.to_hex(packed) == ["8000", "0001", "00f0"]


@given(widths.flatmap(lambda w: arrays(np.uint8, st.tuples(st.integers(1, 20), st.just(w)))))
def test_hex_round_trip(batch: np.ndarray) -> None:
    texts = codes.to_hex(batch)
    assert all(text == text.lower() and len(text) == batch.shape[1] * 2 for text in texts)
    assert (codes.from_hex(texts) == batch).all()


@given(widths.flatmap(lambda w: st.tuples(*[arrays(np.uint8, st.tuples(st.integers(0, 8), st.just(w)))] * 2)))
def test_hamming_counts_differing_bits(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    expected = [[int.from_bytes(x.tobytes()) ^ int.from_bytes(y.tobytes()) for y in b] for x in a]
    assert codes.hamming(a, b).tolist() == [[value.bit_count() for value in row] for row in expected]
    assert codes.hamming(a, b).dtype == np.int32


@pytest.mark.parametrize("bits", [0, 4, 7, 12, 1032, -8, 8.0, True, "64"])
def test_impossible_widths_are_rejected(bits: object) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        codes.check_bits(bits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((2, 8), np.int8),
        np.zeros((2, 8), np.float32),
        np.zeros(8, np.uint8),
        np.zeros((2, 0), np.uint8),
        np.zeros((2, 129), np.uint8),
        np.zeros((2, 16), np.uint8)[:, ::2],
        np.zeros((8, 8), np.uint8, order="F"),
        [[0] * 8],
    ],
)
def test_another_dtype_width_or_order_is_rejected(batch: object) -> None:
    with pytest.raises(ValueError, match="codes must|bits must"):
        codes.check_codes(batch)


def test_a_batch_of_another_width_is_rejected() -> None:
    with pytest.raises(ValueError, match="must have 64 bits, not 32"):
        codes.check_codes(np.zeros((1, 4), np.uint8), 64)
    with pytest.raises(ValueError, match="must have 32 bits, not 64"):
        codes.hamming(np.zeros((1, 4), np.uint8), np.zeros((1, 8), np.uint8))


@pytest.mark.parametrize("text", ["zz", "0", "00 00", "", ["00", "0000"]])
def test_text_that_is_no_code_is_rejected(text: str | list[str]) -> None:
    with pytest.raises(ValueError, match="code|bits must"):
        codes.from_hex(text)
