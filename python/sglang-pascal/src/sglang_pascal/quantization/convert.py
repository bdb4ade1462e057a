"""Converts rows of types without kernels to the types in `storage.LOSSLESS`. All values stay the same, bit for bit.

Layouts of the blocks: ggml's `ggml-common.h`; codes and scales: `ggml-quants.c`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sglang_pascal.kernels.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Blocks = NDArray[np.uint8]

_Q5_0_BYTES: Final = 22
_IQ4_NL_BYTES: Final = 18
_Q3_K_BYTES: Final = 110
IQ4_NL_VALUES: Final = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8
)
"""The 16 values of IQ4_NL's codes: ggml's `kvalues_iq4nl`."""


def to_lossless(rows: NDArray[np.uint8], tensor_type: str) -> NDArray[np.uint8]:
    """Convert `[rows, bytes per row]` of a type in LOSSLESS to the type that it maps to."""
    block_bytes, convert = _CONVERTERS[tensor_type]
    return convert(rows.reshape(-1, block_bytes)).reshape(rows.shape[0], -1)


def _low_then_high(packed: Blocks) -> Blocks:
    """Unpack 16 bytes of nibbles to 32 codes: all low ones, then all high ones."""
    codes: Blocks = np.concatenate([packed & 15, packed >> 4], axis=1)
    return codes


def _q8_0(scales: Blocks, values: NDArray[np.int8]) -> Blocks:
    return np.concatenate([scales, values.view(np.uint8)], axis=1)


def _from_q5_0(blocks: Blocks) -> Blocks:
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    codes = _low_then_high(blocks[:, 6:]) | (fifth << 4)
    return _q8_0(blocks[:, :2], codes.astype(np.int8) - np.int8(16))


def _from_iq4_nl(blocks: Blocks) -> Blocks:
    return _q8_0(blocks[:, :2], IQ4_NL_VALUES[_low_then_high(blocks[:, 2:])])


def _from_q3_k(blocks: Blocks) -> Blocks:
    """Codes 0..7 minus 4 become codes 28..35 minus 32; scales 0..63 minus 32 fit int8."""
    codes = _q3_k_codes(blocks) + np.uint8(28)
    result = np.empty((len(blocks), FORMATS["Q6_K"].block_bytes), dtype=np.uint8)
    halves = codes.reshape(-1, 2, 4, 32)
    low, high = halves & 15, halves >> 4
    result[:, :128] = (low[:, :, :2] | (low[:, :, 2:] << 4)).reshape(-1, 128)
    result[:, 128:192] = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    result[:, 192:208] = _q3_k_scales(blocks)
    result[:, 208:] = blocks[:, 108:]
    return result


def _q3_k_codes(blocks: Blocks) -> Blocks:
    """Return `[n, 256]` codes 0..7: two bits from qs@32, the third from hmask@0 (one bit plane per 32 weights)."""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    low = (blocks[:, 32:96].reshape(-1, 2, 1, 32) >> shifts) & 3
    planes = np.arange(8, dtype=np.uint8)[:, None]
    third = (blocks[:, None, :32] >> planes) & 1
    codes: NDArray[Any] = low.reshape(-1, 256) | (third.reshape(-1, 256) << 2)
    return codes


def _q3_k_scales(blocks: Blocks) -> Blocks:
    """Return `[n, 16]` int8 as bytes: four low bits of each in scales@96, two high bits in the last four bytes."""
    packed = blocks[:, 96:108]
    low = _low_then_high(packed[:, :8])
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = ((packed[:, None, 8:] >> shifts) & 3).reshape(-1, 16)
    return ((low | high << 4).astype(np.int8) - np.int8(32)).view(np.uint8)


_CONVERTERS: Final[dict[str, tuple[int, Callable[[Blocks], Blocks]]]] = {
    "Q5_0": (_Q5_0_BYTES, _from_q5_0),
    "IQ4_NL": (_IQ4_NL_BYTES, _from_iq4_nl),
    "Q3_K": (_Q3_K_BYTES, _from_q3_k),
}
