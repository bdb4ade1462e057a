"""SGLang's model loader for `--load-format pascal_gguf`: a prepared folder's tensors, one after the other.

With `--quantization gguf` matrices stay as they are in the file and are repacked by the layers that hold them; without
it every tensor is dequantised as it is read.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglang.srt.model_loader.loader import DefaultModelLoader

from sglang_pascal.checkpoint.dequantize import dequantized
from sglang_pascal.checkpoint.prepare import open_prepared
from sglang_pascal.checkpoint.weights import raw_tensors
from sglang_pascal.quantization.config import NAME as QUANTIZATION
from sglang_pascal.quantization.config import loading
from sglang_pascal.quantization.method import held_matrices
from sglang_pascal.quantization.progress import LoadingProgress
from sglang_pascal.quantization.table import WeightTable, summary

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

LOAD_FORMAT: Final = "pascal_gguf"
"""Value of `--load-format`."""

logger = logging.getLogger(__name__)


class PascalGgufLoader(DefaultModelLoader):  # type: ignore[misc]  # SGLang publishes no types
    """Builds the model as the default loader does, but takes its weights from the prepared folder's GGUF file."""

    def __init__(self, load_config: Any) -> None:
        # The default loader refuses what it does not know in its extra configuration; here there is none to know.
        self.load_config = load_config

    def download_model(self, model_config: Any) -> None:
        """Nothing is downloaded: the folder names a local file. Checks that it is there and unchanged."""
        open_prepared(Path(model_config.model_path))

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """SGLang's hook; gives the quantisation configuration, if one is asked for, the file's types."""
        is_quantized = model_config.quantization == QUANTIZATION
        table = WeightTable(open_prepared(Path(model_config.model_path))) if is_quantized else None
        with loading(table):
            model: torch.nn.Module = super().load_model(model_config=model_config, device_config=device_config)
        return model

    def _get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """What `load_model` of the base class hands to the model's `load_weights`."""
        file = open_prepared(Path(model_config.model_path))
        held = held_matrices(model)
        logger.info("weights held: %s", summary(held) or f"all dequantised to {model_config.dtype}")
        total = sum(info.n_bytes for info in file.tensors.values())
        with LoadingProgress(total) as progress:
            keep = {matrix.name for matrix in held}
            yield from dequantized(raw_tensors(file), model_config.dtype, keep=keep, on_bytes=progress.add)
