"""The shape of a model from Hugging Face's config.json, under all names that families use for the same number."""

from __future__ import annotations

from typing import NoReturn

from pascaline.models.layers import sliding_layer_ids
from pascaline.models.refusal import printable, refuse, shown

MAX_LAYERS = 1024
MAX_SIZE = (1 << 31) - 1

Json = dict[str, object]

# Defaults of transformers' configuration classes that published files leave out.
_DEFAULTS: dict[str, Json] = {
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4, "tie_word_embeddings": True},
    "gpt_oss": {"sliding_window": 128, "sliding_window_pattern": 2},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}

# Our name -> the names in config.json; the first one present wins.
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "multi_query_group_num", "num_kv_heads"),
    "context": ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "moe_topk", "moe_k"),
    "moe_intermediate": ("moe_intermediate_size",),
    "ssm_state": ("mamba_d_state", "ssm_state_size", "state_size", "linear_key_head_dim"),
    "ssm_conv": ("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim"),
    "ssm_inner": ("mamba_d_ssm", "mamba_intermediate_size"),
    "ssm_heads": ("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"),
    "ssm_groups": ("mamba_n_groups", "n_groups", "linear_num_key_heads"),
}

_NO_ATTENTION = frozenset({"linear_attention", "mamba", "recurrent", "conv"})


class HfConfig:
    """The text part of one config.json, checked value by value."""

    def __init__(self, file: str, root: Json) -> None:
        self._file = file
        self._root = root
        nested = root.get("text_config") or root.get("llm_config") or root.get("language_config") or {}
        if not isinstance(nested, dict):
            self._fail(f"text_config is {_value(nested)}, must be an object")
        own = {**root, **nested}
        self.model_type = self._text(own, "model_type") or self._text(root, "model_type")
        # A null takes no default: transformers' classes derive such a value from the others.
        absent = {key: value for key, value in _DEFAULTS.get(self.model_type, {}).items() if key not in own}
        self._values: Json = {**absent, **_given(root), **_given(nested)}

    @property
    def architecture(self) -> str:
        """`model_type` of the whole model: `gemma3` if the text part says `gemma3_text`."""
        return self._text(self._root, "model_type") or self.model_type

    @property
    def quantization(self) -> str | None:
        """Method by which the weights are quantised (`gptq`, `fp8`); None if the file names none."""
        for key in ("quantization_config", "compression_config"):
            for values in (self._root, self._values):
                if (content := values.get(key)) is not None:
                    if not isinstance(content, dict):
                        self._fail(f"{key} is {_value(content)}, must be an object")
                    return printable(self._text(content, "quant_method")) or "an unnamed method"
        return None

    def count(self, name: str) -> int:
        """A required number, at least 1."""
        value = self.optional(name)
        if value is None:
            self._fail(f"{' or '.join(_NAMES.get(name, (name,)))} is missing")
        return value

    def optional(self, name: str, maximum: int = MAX_SIZE) -> int | None:
        """A number, None if it is absent, null or 0."""
        for key in _NAMES.get(name, (name,)):
            if self._values.get(key) is not None:
                return self._number(key, self._values[key], maximum) or None
        return None

    def flag(self, key: str, *, default: bool) -> bool:
        """A true or false."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._fail(f"{key} is {_value(value)}, must be true or false")
        return value

    def has(self, key: str) -> bool:
        """Whether the file, or its family's default, gives this value."""
        return self._values.get(key) is not None

    def layer_count(self) -> int:
        """Number of layers."""
        if self.optional("layers", MAX_LAYERS) is None:
            return self.count("layers")
        return self.optional("layers", MAX_LAYERS) or 0

    def layer_types(self, layers: int) -> list[str] | None:
        """Type of each layer (`full_attention`, `sliding_attention`, `linear_attention`), None if the file has none."""
        value = self._values.get("layer_types") or self._values.get("layers_block_type")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers or not all(isinstance(kind, str) for kind in value):
            self._fail(f"layer_types must be a list of {layers} strings, one for each layer")
        return [str(kind) for kind in value]

    def sliding(self, layers: int) -> tuple[int, ...]:
        """The layers that use the sliding window."""
        window = self.optional("sliding_window")
        if window is None or not self.flag("use_sliding_window", default=True):
            return ()
        types = self.layer_types(layers)
        if types is not None:
            return tuple(layer for layer, kind in enumerate(types) if kind == "sliding_attention")
        if self.has("use_sliding_window"):
            # qwen2: layers from max_window_layers on slide.
            return tuple(range(self.optional("max_window_layers") or 0, layers))
        for key in ("sliding_window_pattern", "_sliding_window_pattern"):
            if self.has(key):
                return sliding_layer_ids(layers, self.optional(key) or 0)
        return tuple(range(layers))

    def kv_heads(self, layers: int, heads: int) -> list[int]:
        """KV heads that each layer stores."""
        count = self.optional("kv_heads") or (1 if self.flag("multi_query", default=False) else heads)
        types = self.layer_types(layers)
        found = [0 if types and types[layer] in _NO_ATTENTION else count for layer in range(layers)]
        interval = self.optional("full_attention_interval") if types is None else None
        if interval:
            found = [count if (layer + 1) % interval == 0 else 0 for layer in range(layers)]
        shared = min(self.optional("num_kv_shared_layers") or 0, layers)
        return found[: layers - shared] + [0] * shared

    def _number(self, key: str, value: object, maximum: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
            self._fail(f"{key} must be between 0 and {maximum}, got {_value(value)}")
        return value

    def _text(self, values: Json, key: str) -> str:
        value = values.get(key, "")
        if not isinstance(value, str):
            self._fail(f"{key} is {_value(value)}, must be a string")
        return value

    def _fail(self, cause: str) -> NoReturn:
        refuse(self._file, cause)


def _given(values: Json) -> Json:
    return {key: value for key, value in values.items() if value is not None}


def _value(value: object) -> str:
    """A value as messages show it; a container is named and not printed, because it may be deep or long."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return shown(str(value)).strip("'") if isinstance(value, int | float) else str(value)
