"""Which model architectures each engine serves here, by the names that model files use."""

from __future__ import annotations

from pascaline.plugin import PLUGIN

SGLANG_GGUF = tuple(sorted(PLUGIN.architectures))
"""`general.architecture` of GGUF files that the plugin loads; Mistral files call themselves llama."""
SGLANG_HUGGING_FACE = tuple(sorted(PLUGIN.model_types))
"""`model_type` of config.json."""
