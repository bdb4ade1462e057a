"""The number of bits with which activations are multiplied, for prompts and for decode steps.

8 bits: one int8 with a scale for 32 values, as llama.cpp has everywhere. A small model loses by it: 4 % of the most
likely tokens of a prompt change on SmolLM2-135M. 16 bits: a second int8 holds what the rounding of the first lost; no
token changes. This is free while few requests decode, because reading the weights takes the time; prompts, and many
requests, take nearly twice as long. `pascaline` decides it for a model and a card (`activation_bits`); 16 is the
default here.
"""

from __future__ import annotations

import functools
import os
from typing import Any, Final

from sglang_pascal.errors import PluginError
from sglang_pascal.kernels.formats import ACTIVATION_BITS
from sglang_pascal.names import DECODE_BITS_VARIABLE, PREFILL_BITS_VARIABLE

_DEFAULT: Final = "16"


@functools.cache
def activation_bits(variable: str) -> int:
    """Return the bits that a variable names; it is read once per process."""
    value = os.environ.get(variable, _DEFAULT)
    if value not in map(str, ACTIVATION_BITS):
        raise PluginError(f"{variable} is {value!r}, must be 8 or 16; unset it for {_DEFAULT}")
    return int(value)


def activations_are_16_bit() -> bool:
    """Whether activations of the forward pass that runs now have 16 bits.

    It depends only on whether the pass is a decode step, so a row's bits do not depend on the batch.
    """
    return activation_bits(DECODE_BITS_VARIABLE if _is_decode() else PREFILL_BITS_VARIABLE) == 16


def _is_decode() -> bool:
    """Our attention backends know what they planned last; another's passes, and none, count as decode steps."""
    from sglang.srt.model_executor import forward_context  # here, because `sglang-pascal info` reads the variables too

    if not forward_context.has_forward_context():
        return True
    backend: Any = forward_context.get_attn_backend()
    return bool(getattr(backend, "is_decode", True))
