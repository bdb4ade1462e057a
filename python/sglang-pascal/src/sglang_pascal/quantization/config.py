"""SGLang's quantisation configuration `gguf` on this platform: types come from the file's header."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from sglang_pascal.names import QUANTIZATION
from sglang_pascal.quantization.method import QuantizedEmbeddingMethod, QuantizedLinearMethod

"""Value of `--quantization`."""


class PascalGgufConfig(QuantizationConfig):  # type: ignore[misc]  # SGLang publishes no types
    """Gives each layer its method; the loader binds it to the file's matrices."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PascalGgufConfig:
        """SGLang's constructor; its argument is empty for this quantisation."""
        del config
        return cls()

    def get_name(self) -> str:
        """Return the name on the command line."""
        return QUANTIZATION

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return float16 and float32, which the kernels read, and on the CPU also bfloat16."""
        return [torch.float16, torch.float32] + ([] if torch.cuda.is_available() else [torch.bfloat16])

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 60, for compute capability 6.0."""
        return 60

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return none: everything is in the GGUF file."""
        return []

    def get_scaled_act_names(self) -> list[str]:
        """Return none."""
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a linear or embedding layer; None for any other layer."""
        del prefix
        if isinstance(layer, LinearBase):
            return QuantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return QuantizedEmbeddingMethod()
        return None
