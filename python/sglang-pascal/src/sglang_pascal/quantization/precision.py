"""The number of bits of the activations in products, for prompts and for decode steps.

8 bits: one int8 with a scale for 32 values, as in llama.cpp. A small model loses quality: 4 % of the most likely
tokens of a prompt change on SmolLM2-135M. 16 bits: a second int8 holds the rounding error of the first; no token
changes. This is free while few requests decode, because reading the weights takes longer; prompts, and many requests,
take nearly twice as long. `pascaline` chooses the number for a model and a card (`activation_bits`); the default here
is 16.
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
    """Return the number of bits in an environment variable, which is read once per process."""
    value = os.environ.get(variable, _DEFAULT)
    if value not in map(str, ACTIVATION_BITS):
        raise PluginError(f"{variable} is {value!r}, must be 8 or 16; unset it for {_DEFAULT}")
    return int(value)


def activations_are_16_bit() -> bool:
    """Whether activations have 16 bits in the current forward pass.

    It depends only on whether the pass is a decode step, so a row's bits do not depend on the batch.
    """
    return activation_bits(DECODE_BITS_VARIABLE if _is_decode() else PREFILL_BITS_VARIABLE) == 16


def _is_decode() -> bool:
    """Whether the pass is a decode step, by the plan of our attention backend; any other backend's counts as one."""
    from sglang.srt.model_executor import forward_context  # here, because `sglang-pascal info` reads the variables too

    if not forward_context.has_forward_context():
        return True
    backend: Any = forward_context.get_attn_backend()
    return bool(getattr(backend, "is_decode", True))
