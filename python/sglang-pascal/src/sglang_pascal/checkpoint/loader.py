"""SGLang's model loader for `--load-format pascal_gguf`: a prepared folder's tensors, dequantised as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglang.srt.model_loader.loader import DefaultModelLoader

from sglang_pascal.checkpoint.dequantize import dequantized
from sglang_pascal.checkpoint.prepare import open_prepared
from sglang_pascal.checkpoint.weights import raw_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

LOAD_FORMAT: Final = "pascal_gguf"
"""Value of `--load-format`."""


class PascalGgufLoader(DefaultModelLoader):  # type: ignore[misc]  # SGLang publishes no types
    """Builds the model as the default loader does, but takes its weights from the prepared folder's GGUF file."""

    def __init__(self, load_config: Any) -> None:
        # The default loader refuses what it does not know in its extra configuration; here there is none to know.
        self.load_config = load_config

    def download_model(self, model_config: Any) -> None:
        """Nothing is downloaded: the folder names a local file. Checks that it is there and unchanged."""
        open_prepared(Path(model_config.model_path))

    def _get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """What `load_model` of the base class hands to the model's `load_weights`."""
        del model
        file = open_prepared(Path(model_config.model_path))
        return dequantized(raw_tensors(file), model_config.dtype)
