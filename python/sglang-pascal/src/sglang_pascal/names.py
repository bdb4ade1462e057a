"""The names by which others address the plugin: arguments of SGLang, and variables. Importing it is cheap."""

from __future__ import annotations

from typing import Final

LOAD_FORMAT: Final = "pascal_gguf"
"""Value of `--load-format` for a prepared folder."""
QUANTIZATION: Final = "gguf"
"""Value of `--quantization` for weights that stay as they are in a GGUF file."""
ATTENTION_BACKENDS: Final = ("pascal", "pascal_kernels", "pascal_torch")
"""Values of `--attention-backend`; the first chooses one of the others by the device."""
PREFILL_BITS_VARIABLE: Final = "SGLANG_PASCAL_PREFILL_BITS"
DECODE_BITS_VARIABLE: Final = "SGLANG_PASCAL_DECODE_BITS"
"""Variables: with how many bits activations are multiplied in either phase (`quantization.precision`)."""
LOOKUP: Final = "PASCAL_LOOKUP"
"""Value of `--speculative-algorithm` for prompt lookup."""
DRAFT: Final = "PASCAL_DRAFT"
"""Value of `--speculative-algorithm` for a draft model, which `--speculative-draft-model-path` names."""
ROWS_VARIABLE: Final = "SGLANG_PASCAL_SPECULATIVE_ROWS"
"""Variable: most rows of a step that verifies drafts, all requests together (`speculation.load`)."""
WORKERS_VARIABLE: Final = "SGLANG_PASCAL_WORKERS"
"""Variable: with `spawn`, SGLang's workers are no copies of the server, but import everything anew (`orphans`)."""
ANY_MODEL_VARIABLE: Final = "SGLANG_PASCAL_ANY_MODEL"
"""Variable: with 1, a request may name any model (`openai_api`)."""
