"""The quantised weight types that have kernels: their blocks in a GGUF file, and their layout on the device.

`weights.cuh` and `repack.cu` describe the same layouts to the GPU; the selftest compares the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

GROUP_ROWS: Final = 32
"""Rows that a warp multiplies together, one per lane."""
TILE_COLUMNS: Final = 256
"""Weights of a row in one tile."""
STEP_COLUMNS: Final = 64
"""Weights of a row that a product takes at a time: a quarter of a tile."""
BLOCK: Final = 32
"""Activations that share a scale."""
ACTIVATION_BITS: Final = (8, 16)
"""Bits of activations: one int8, or two."""
RECORDED_BATCH_SIZES: Final = (*range(1, 15), 16, 17, 18, 20, 22, 24, 25, 26, 28, 32, 40, 48, 56, 64)
"""Decode batch sizes for which CUDA graphs are captured, up to the limit of concurrent requests. A size in between is
padded to the next. Up to 32 they are so close, and where a wider kernel begins have one of their own, that a request
more does not cost what a padded row does; above, tiles pad to the same sizes.
"""
PLANE_BYTES: Final = 16
"""Bytes of one row in one plane of a tile."""


@dataclass(frozen=True)
class Format:
    """One type. A row of a GGUF tensor is a sequence of blocks."""

    tensor_type: str
    """GGUF's name."""
    block_weights: int
    block_bytes: int
    has_min: bool
    """A block subtracts a minimum: products then need the sum of their activations."""
    half_scales: bool = False
    """16 weights share a scale, not 32."""
    most_rows_per_lane: int = 4
    """Most rows of a weight per lane of a decode product: a row's unpacked weights take registers."""

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight, including its share of the scales."""
        return self.block_bytes / self.block_weights

    @property
    def short_tiles(self) -> bool:
        """Whether the last tile of a row may have fewer columns; a block of 256 always fills its tile."""
        return self.block_weights < TILE_COLUMNS

    @property
    def record_columns(self) -> int:
        """Columns that are stored together: 256 for types with such blocks, 64 for others."""
        return STEP_COLUMNS if self.short_tiles else TILE_COLUMNS

    @property
    def record_row_bytes(self) -> int:
        """Bytes of one row in one record; the same as in the file."""
        return self.row_bytes(self.record_columns)

    @property
    def record_bytes(self) -> int:
        """Bytes of a record of 32 rows."""
        return self.record_row_bytes * GROUP_ROWS

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row in the file. `columns` is a multiple of `block_weights`."""
        return columns // self.block_weights * self.block_bytes

    def records(self, columns: int) -> int:
        """Return the number of records along a row."""
        return -(-columns // self.record_columns)

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a packed tensor: rows are padded to 32, columns to 64 (blocks of 256 need no padding)."""
        return -(-rows // GROUP_ROWS) * self.records(columns) * self.record_bytes


def tiles(columns: int) -> int:
    """Return the number of tiles along a row; the last may have fewer columns."""
    return -(-columns // TILE_COLUMNS)


def steps(columns: int) -> int:
    """Return the number of steps along a row."""
    return -(-columns // STEP_COLUMNS)


FORMATS: Final = {
    form.tensor_type: form
    for form in (
        Format("Q4_K", 256, 144, has_min=True),
        Format("Q5_K", 256, 176, has_min=True, most_rows_per_lane=3),
        Format("Q6_K", 256, 210, has_min=False, half_scales=True),
        Format("Q8_0", 32, 34, has_min=False),
        Format("Q4_0", 32, 18, has_min=False),
        Format("Q4_1", 32, 20, has_min=True),
    )
}
"""Type name -> format. Block sizes: ggml's `ggml-common.h`."""
SPECULATIVE_COLUMNS: Final = 16
"""Most int8 columns of x in a step that verifies drafts: up to this number, a product takes about as long as
reading the weights. An activation of 16 bits takes two columns."""
SPECULATIVE_WIDTHS: Final = (1, 2, 4, 8, 16)
"""Rows of one request in a step for which CUDA graphs are captured, up to the configured maximum."""
