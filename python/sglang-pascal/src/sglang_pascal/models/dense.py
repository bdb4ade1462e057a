"""SGLang's own classes for the architectures of `checkpoint.architectures`."""

from __future__ import annotations

from typing import Final

from sglang.srt.models.gemma2 import Gemma2ForCausalLM
from sglang.srt.models.gemma3_causal import Gemma3ForCausalLM
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM

EntryClass: Final = [LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM]
"""The name by which SGLang's registry finds them."""
