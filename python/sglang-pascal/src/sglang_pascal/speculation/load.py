"""The cost of a further row in a step on a device, and the most rows of one step.

Up to this number of rows, a product takes only the time of reading the weights; each further row adds its own time.
`pascaline` computes the number for a card and a model, and passes it in a variable.
"""

from __future__ import annotations

import os
from typing import Final

from sglang_pascal.errors import PluginError
from sglang_pascal.kernels.formats import SPECULATIVE_COLUMNS
from sglang_pascal.names import DECODE_BITS_VARIABLE, ROWS_VARIABLE
from sglang_pascal.quantization.precision import activation_bits

_CPU_ROWS: Final = 16
_ROW_COST: Final = {"cpu": 0.2, "cuda": 0.04}
"""Time of a further row as a share of a step's time; benchmarks/speculation.py measures it."""


def most_rows(device: str) -> int:
    """Return the most rows of one step, all requests together. Raises PluginError if the variable has a wrong value."""
    value = os.environ.get(ROWS_VARIABLE)
    if value is None:
        return _CPU_ROWS if device == "cpu" else SPECULATIVE_COLUMNS * 8 // activation_bits(DECODE_BITS_VARIABLE)
    if not value.isdecimal() or not 0 < int(value) <= 4096:
        raise PluginError(f"{ROWS_VARIABLE} is {value!r}, must be a number from 1 to 4096; unset it for the default")
    return int(value)


def row_cost(device: str) -> float:
    """Return the time of a further row as a share of the time of a step without drafts."""
    return _ROW_COST[device]
