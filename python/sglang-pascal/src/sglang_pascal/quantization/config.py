"""SGLang's quantisation configuration `gguf`, as this platform understands it: types come from the file's header."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from sglang_pascal.errors import PluginError
from sglang_pascal.quantization.method import QuantizedEmbeddingMethod, QuantizedLinearMethod

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sglang_pascal.quantization.table import WeightTable

NAME: Final = "gguf"
"""Value of `--quantization`."""
_table: ContextVar[WeightTable | None] = ContextVar("_table", default=None)


@contextmanager
def loading(table: WeightTable | None) -> Iterator[None]:
    """A configuration that SGLang makes within is one for this file; SGLang gives it no path."""
    token = _table.set(table)
    try:
        yield
    finally:
        _table.reset(token)


class PascalGgufConfig(QuantizationConfig):  # type: ignore[misc]  # SGLang publishes no types
    """Gives each layer its method."""

    def __init__(self, table: WeightTable | None) -> None:
        """table: None where SGLang only asks for properties of the quantisation."""
        super().__init__()
        self._table = table

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PascalGgufConfig:
        """SGLang's constructor; its argument is empty for this quantisation."""
        del config
        return cls(_table.get())

    def get_name(self) -> str:
        """As on the command line."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """bfloat16 on the CPU only: the kernels read float16 and float32."""
        return [torch.float16, torch.float32] + ([] if torch.cuda.is_available() else [torch.bfloat16])

    @classmethod
    def get_min_capability(cls) -> int:
        """6.0."""
        return 60

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Everything is in the GGUF file."""
        return []

    def get_scaled_act_names(self) -> list[str]:
        """None."""
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of a linear or embedding layer; None for any other."""
        if self._table is None:
            raise PluginError(f"--quantization {NAME} needs --load-format pascal_gguf and a prepared model folder")
        if isinstance(layer, LinearBase):
            return QuantizedLinearMethod(self._table.parts_of(prefix))
        if isinstance(layer, VocabParallelEmbedding):
            return QuantizedEmbeddingMethod(self._table.parts_of(prefix))
        return None
