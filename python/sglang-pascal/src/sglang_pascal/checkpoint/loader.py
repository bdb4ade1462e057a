"""SGLang's model loader for `--load-format pascal_gguf`: streams a prepared folder's tensors, one after the other.

With `--quantization gguf`, matrices stay as they are in the file, and the layers that hold them repack them; without
it, every tensor is dequantised when it is read.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.model_loader.weight_utils import default_weight_loader

from sglang_pascal.checkpoint.completeness import Completeness
from sglang_pascal.checkpoint.dequantize import dequantized
from sglang_pascal.checkpoint.prepare import open_prepared
from sglang_pascal.checkpoint.read_ahead import ReadAhead
from sglang_pascal.checkpoint.weights import raw_tensors
from sglang_pascal.names import QUANTIZATION
from sglang_pascal.quantization.binding import bind
from sglang_pascal.quantization.progress import LoadingProgress
from sglang_pascal.quantization.weight_table import WeightTable, summary

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from sglang_pascal.checkpoint.gguf_file import GgufFile

"""Value of `--load-format`."""

logger = logging.getLogger(__name__)


class PascalGgufLoader(DefaultModelLoader):  # type: ignore[misc]  # SGLang publishes no types
    """Builds the model as the default loader does, but takes its weights from the prepared folder's GGUF file."""

    def __init__(self, load_config: Any) -> None:
        # The default loader refuses unknown extra configuration; here there is none.
        self.load_config = load_config

    def download_model(self, model_config: Any) -> None:
        """Download nothing: the folder names a local file. Check that it exists and is unchanged."""
        open_prepared(Path(model_config.model_path))

    def _get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the stream that `load_model` of the base class passes to the model's `load_weights`.

        Layers are bound here, not in the stream: `load_weights` lists the parameters before it asks for a tensor.
        """
        file = open_prepared(Path(model_config.model_path))
        held = bind(model, WeightTable(file)) if model_config.quantization == QUANTIZATION else []
        logger.info("weights held: %s", summary(held) or f"all dequantised to {model_config.dtype}")
        return _streamed(file, {matrix.name for matrix in held}, model_config.dtype)

    def load_weights_and_postprocess(self, model: torch.nn.Module, weights: Any, target_device: torch.device) -> None:
        """Load as the base class does, and check that every parameter of the model got weights."""
        completeness = Completeness(model, default_weight_loader)
        self.load_weights_only(model, weights, target_device)
        completeness.require()
        self.postprocess_weights(model, target_device)


def _streamed(file: GgufFile, keep: set[str], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the file's tensors, one after the other, with a progress bar. keep: those to yield as raw rows."""
    read_ahead = ReadAhead(file)
    with LoadingProgress(sum(info.n_bytes for info in file.tensors.values())) as progress:

        def count(n_bytes: int) -> None:
            progress.add(n_bytes)
            read_ahead.add(n_bytes)

        yield from dequantized(raw_tensors(file), dtype, keep=keep, on_bytes=count)
