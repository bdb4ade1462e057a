"""Which model architectures each engine serves here, by the names that model files use."""

from __future__ import annotations

from gguf_acceptance import ARCHITECTURES

SGLANG_GGUF = tuple(sorted(ARCHITECTURES))
"""`general.architecture` of GGUF files that the plugin loads; Mistral files call themselves llama."""
SGLANG_HUGGING_FACE = ("gemma2", "gemma3", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""`model_type` of config.json."""
