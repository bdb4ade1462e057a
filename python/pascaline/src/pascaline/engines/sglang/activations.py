"""The bits of activations in products with a GGUF file's matrices: what `auto` means, and how the plugin gets them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.errors import ConfigurationError
from pascaline.plugin import PLUGIN

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec
    from pascaline.settings import Settings

VARIABLES = {"prefill": PLUGIN.variables["prefill_bits"], "decode": PLUGIN.variables["decode_bits"]}
"""Phase -> the variable that passes its bits to sglang-pascal."""
WIDE_ENOUGH_FOR_8_BITS = 2048
"""Values per token (hidden_size) from which prompts have 8 bits: docs/results/activation-bits.md."""
MOST_REQUESTS_IN_16_BITS = 6
"""Requests up to which 16 bits keep most of 8 bits' speed where memory is no limit: docs/results/activation-bits.md."""


def activation_bits(settings: Settings, spec: ModelSpec, *, device: str) -> tuple[int | None, int | None]:
    """Return the bits in prompts and decode steps, with auto decided; None if there is no choice.

    Raises ConfigurationError if bits are set for weights that are not multiplied as int8.
    """
    chosen = settings.activation_bits
    if spec.format != "gguf":
        for phase, bits in (("prefill", chosen.prefill), ("decode", chosen.decode)):
            if bits != "auto":
                raise ConfigurationError(
                    f"activation_bits.{phase}: {bits} applies to a GGUF file's weights, "
                    f"but the model's are {spec.format}; leave it out"
                )
        return None, None
    small = 8 if device == "cuda" and spec.hidden_size >= WIDE_ENOUGH_FOR_8_BITS else 16
    few = settings.max_running_requests <= MOST_REQUESTS_IN_16_BITS
    prefill = small if chosen.prefill == "auto" else chosen.prefill
    decode = (16 if few else small) if chosen.decode == "auto" else chosen.decode
    return prefill, decode


def problems(settings: Settings) -> list[tuple[str, str]]:
    """Return (key, sentence) for every variable in `environment` that a setting controls."""
    return [
        (f"environment.{variable}", f"is set by activation_bits.{phase}, must be left out; set activation_bits.{phase}")
        for phase, variable in VARIABLES.items()
        if variable in settings.environment
    ]
