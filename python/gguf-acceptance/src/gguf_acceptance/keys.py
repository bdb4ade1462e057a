"""Every metadata key that can change what a model computes: used, known to be harmless, or a reason to refuse.

A key that is in no table is refused by its name: its meaning is unknown, so it cannot be ignored.
Sources: the format's own documentation (ggml's docs/gguf.md) and llama.cpp's loader (load_hparams, vocab.load).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .header import Unread, is_int, is_number, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .header import Header, Verdict

ARCHITECTURES: Final = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
"""Values of `general.architecture` that are served; Mistral files call themselves llama."""


class Key(NamedTuple):
    """What is known about one key."""

    kind: str
    """Type of its value: a name of KINDS, or `any` for a key whose value is not used."""
    why: str
    """What it is used for, or why it can be ignored."""
    neutral: tuple[Any, ...] = ()
    """For an unused key: the values that change nothing. Every other value is refused."""


_INTEGERS: Final = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
KINDS: Final[dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "int": ("a whole number", is_int),
    "layers": (
        "a whole number, or one for each layer",
        lambda value: is_int(value) or (isinstance(value, list) and all(map(is_int, value))),
    ),
    "float": ("a finite number", is_number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "text": (
        "a string",
        lambda value: isinstance(value, str) or (isinstance(value, Unread) and value.kind == "string"),
    ),
    "texts": ("an array of strings", lambda value: _is_array(value, str, ("string",))),
    "ints": ("an array of whole numbers", lambda value: _is_array(value, int, _INTEGERS)),
    "floats": ("an array of numbers", lambda value: _is_array(value, float, ("float32", "float64"))),
    "pattern": (
        "a whole number, or an array of booleans",
        lambda value: is_int(value) or _is_array(value, bool, ("bool",)) or _is_array(value, int, _INTEGERS),
    ),
    "any": ("", lambda _: True),
}
"""Name -> (how a message calls it, whether a value is one)."""

_COMMON: Final = {
    "block_count": Key("int", "number of layers"),
    "context_length": Key("int", "longest context"),
    "embedding_length": Key("int", "width of the model"),
    "feed_forward_length": Key("layers", "width of the feed-forward layers"),
    "attention.head_count": Key("layers", "query heads"),
    "attention.head_count_kv": Key("layers", "key and value heads; as many as query heads if it is absent"),
    "attention.key_length": Key("int", "size of a head; width / heads if it is absent"),
    "attention.value_length": Key("int", "size of a value head, which must be that of a key head"),
    "attention.layer_norm_rms_epsilon": Key("float", "epsilon of the norms"),
    "rope.freq_base": Key("float", "base of the rotation; 10000 if it is absent"),
    "rope.dimension_count": Key("int", "rotated dimensions of a head, which must be all of them"),
    "rope.scale_linear": Key("float", "old spelling of rope.scaling.factor"),
    "rope.scaling.type": Key("text", "kind of scaling; linear if there is only a factor"),
    "rope.scaling.factor": Key("float", "factor of the scaling"),
    "rope.scaling.original_context_length": Key("int", "context before YaRN; context_length if it is absent"),
    "rope.scaling.attn_factor": Key("float", "multiplies YaRN's magnitude"),
    "rope.scaling.yarn_attn_factor": Key("float", "llama.cpp does not read it for these architectures", (1.0,)),
    "rope.scaling.yarn_beta_fast": Key("float", "YaRN's upper bound of the ramp; 32 if it is absent"),
    "rope.scaling.yarn_beta_slow": Key("float", "YaRN's lower bound of the ramp; 1 if it is absent"),
    "rope.scaling.yarn_ext_factor": Key("float", "YaRN's share, which must be whole"),
    "rope.scaling.yarn_log_multiplier": Key("float", "not computed by SGLang's models of these architectures", (0.0,)),
    "rope.scaling.alpha": Key("float", "NTK scaling, which these architectures do not have", (0.0,)),
    "rope.scaling.finetuned": Key("any", "says how the model was trained, changes nothing"),
    "rope.dimension_sections": Key("any", "sections of rotated dimensions, which text models do not have"),
    "vocab_size": Key("any", "the number of tokens decides, as in llama.cpp"),
    "tensor_data_layout": Key("any", "names the converter's order of rows; llama.cpp does not read it"),
    "attention.layer_norm_epsilon": Key("any", "epsilon of another kind of norm, which these architectures lack"),
    "attention.causal": Key("bool", "these are causal models", (True,)),
    "attention.scale": Key("float", "must be the one of the architecture", (0.0,)),
    "attention.max_alibi_bias": Key("float", "these architectures have no ALiBi", (0.0,)),
    "attention.clamp_kqv": Key("float", "these architectures clamp nothing", (0.0,)),
    "attention.shared_kv_layers": Key("int", "every layer has keys and values of its own", (0,)),
    "attention.sliding_window": Key("int", "this architecture attends to everything in SGLang", (0,)),
    "use_parallel_residual": Key("bool", "attention and feed-forward follow each other", (False,)),
    "expert_count": Key("int", "SGLang serves no mixture of experts from such a file", (0,)),
    "expert_used_count": Key("int", "SGLang serves no mixture of experts from such a file", (0,)),
    "nextn_predict_layers": Key("int", "layers that predict further tokens are not served", (0,)),
    "pooling_type": Key("int", "SGLang takes the vector of the last token, or none", (0, 3)),
}
_UNUSED: Final = Key("any", "not a key of the architecture", (None,))
_GEMMA: Final = {
    "attention.sliding_window": Key("int", "window of the sliding layers"),
    "final_logit_softcapping": Key("float", "cap of the logits"),
}
ARCHITECTURE_KEYS: Final[dict[str, dict[str, Key]]] = {
    "llama": _COMMON,
    "qwen2": _COMMON,
    "qwen3": _COMMON,
    "gemma2": _COMMON
    | _GEMMA
    | {
        "attn_logit_softcapping": Key("float", "cap of the attention scores"),
        "attention.sliding_window_pattern": Key("int", "every second layer attends to everything", (2,)),
    },
    "gemma3": _COMMON
    | _GEMMA
    | {
        "attn_logit_softcapping": Key("float", "Gemma 3 caps no attention scores", (0.0,)),
        "attention.sliding_window_pattern": Key("pattern", "which layers slide; five of six if it is absent"),
        "rope.freq_base_swa": Key("float", "base of the rotation in sliding layers; 10000 if it is absent"),
        "attention.key_length_swa": Key("int", "size of a head in sliding layers, which must be that of all"),
        "attention.value_length_swa": Key("int", "size of a head in sliding layers, which must be that of all"),
        "rope.dimension_count_swa": Key("int", "rotated dimensions in sliding layers, which must be all"),
    },
}
"""By architecture: the keys that start with its name, without that prefix."""
DEFAULTS: Final[dict[str, dict[str, float]]] = {
    "gemma2": {"attention.sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {"attention.sliding_window_pattern": 6},
}
"""llama.cpp's defaults for keys that a file of the architecture leaves out (llama-model.cpp, llama-hparams.h)."""
REQUIRED: Final[dict[str, tuple[str, ...]]] = {"gemma3": ("attention.sliding_window",)}
"""Required keys of an architecture, in addition to the sizes that all need."""
AT_LEAST: Final = {
    "attention.layer_norm_rms_epsilon": 0.0,
    "attention.sliding_window": 2,  # SGLang takes a window of one position for none
    "attention.sliding_window_pattern": 1,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
}
"""Lowest values of keys that are used."""
SAME_AS_HEAD: Final = (
    "attention.value_length",
    "rope.dimension_count",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "rope.dimension_count_swa",
)
"""Keys whose value must be the size of a head."""

TEMPLATE_PREFIX: Final = "tokenizer.chat_template."
_NOT_IN_TEXT: Final = "only marks places in a text; tokens are made the same way without it"
_FILLING: Final = ("prefix", "suffix", "middle", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")
OTHER_KEYS: Final = {
    "tokenizer.ggml.model": Key("text", "kind of tokenizer"),
    "tokenizer.ggml.pre": Key("text", "how text is split before it is merged; default if it is absent"),
    "tokenizer.ggml.tokens": Key("texts", "vocabulary"),
    "tokenizer.ggml.token_type": Key("ints", "kind of each token; all normal if it is absent"),
    "tokenizer.ggml.scores": Key("floats", "order of SentencePiece's merges"),
    "tokenizer.ggml.merges": Key("texts", "merges of byte-level BPE"),
    "tokenizer.ggml.bos_token_id": Key("int", "starts a text"),
    "tokenizer.ggml.eos_token_id": Key("int", "ends a text"),
    "tokenizer.ggml.eot_token_id": Key("int", "ends a turn"),
    "tokenizer.ggml.eom_token_id": Key("int", "ends a message"),
    "tokenizer.ggml.eos_token_ids": Key("ints", "all tokens that end a text"),
    "tokenizer.ggml.unknown_token_id": Key("int", "token for text that is not in the vocabulary"),
    "tokenizer.ggml.padding_token_id": Key("int", "fills a batch"),
    "tokenizer.ggml.add_bos_token": Key("bool", "whether a text starts with bos"),
    "tokenizer.ggml.add_eos_token": Key("bool", "whether a text ends with eos"),
    "tokenizer.ggml.add_space_prefix": Key("bool", "whether SentencePiece puts a space in front"),
    "tokenizer.ggml.add_sep_token": Key("bool", "a generating model has no separator", (False,)),
    "tokenizer.ggml.remove_extra_whitespaces": Key("any", "llama.cpp reads it for Unigram vocabularies only"),
    "tokenizer.ggml.precompiled_charsmap": Key("any", "llama.cpp reads it for Unigram vocabularies only"),
    "tokenizer.ggml.token_type_count": Key("any", "counts segments of encoder models"),
    "tokenizer.ggml.seperator_token_id": Key("any", _NOT_IN_TEXT),
    "tokenizer.ggml.separator_token_id": Key("any", _NOT_IN_TEXT),
    "tokenizer.ggml.cls_token_id": Key("any", _NOT_IN_TEXT),
    "tokenizer.ggml.mask_token_id": Key("any", _NOT_IN_TEXT),
    **{
        f"tokenizer.ggml.fim_{part}_token_id": Key("any", _NOT_IN_TEXT)
        for part in ["pre", "suf", "mid", "pad", "rep", "sep"]
    },
    **{f"tokenizer.ggml.{part}_token_id": Key("any", _NOT_IN_TEXT) for part in ("prefix", "suffix", "middle")},
    "tokenizer.huggingface.json": Key("any", "says again what the keys of tokenizer.ggml say"),
    "tokenizer.chat_template": Key("text", "the chat template"),
    "tokenizer.chat_templates": Key("texts", "names of further chat templates"),
    "split.no": Key("int", "which part of a split model a file is"),
    "split.count": Key("int", "number of parts"),
    "split.tensors.count": Key("int", "tensors of all parts"),
    "quantize.imatrix.file": Key("any", "says how the file was quantised"),
    "quantize.imatrix.dataset": Key("any", "says how the file was quantised"),
    "quantize.imatrix.entries_count": Key("any", "says how the file was quantised"),
    "quantize.imatrix.chunks_count": Key("any", "says how the file was quantised"),
}
"""Keys of NAMESPACES, whole."""
NAMESPACES: Final = ("tokenizer.", "split.", "quantize.", "rope.")
"""Prefixes, besides the architecture's own, under which every key must be known. `general.` describes the file."""


def check_keys(header: Header, architecture: str, verdict: Verdict) -> None:
    """Refuse keys that are unknown, of the wrong type, or unused with a value that changes something."""
    for key, value in header.metadata.items():
        known = _known(key, architecture)
        if known is not None:
            _check_value(key, known, value, verdict)
        elif key.startswith((f"{architecture}.", *NAMESPACES)):
            verdict.refuse(_unknown(key))
    for key, least in AT_LEAST.items():
        value = header.number(f"{architecture}.{key}")
        if value is not None and value < least and not ARCHITECTURE_KEYS[architecture].get(key, _UNUSED).neutral:
            verdict.refuse(f'"{architecture}.{key}" is {value:g}, must be at least {least:g}')
    _check_pattern(header, architecture, verdict)
    for key in REQUIRED.get(architecture, ()):
        if f"{architecture}.{key}" not in header.metadata:
            verdict.refuse(f'metadata key "{architecture}.{key}" is missing; convert the model again')
    for key, value in DEFAULTS.get(architecture, {}).items():
        if f"{architecture}.{key}" not in header.metadata:
            verdict.default(f"{architecture}.{key}", f"{value:g}")


def check_common_keys(metadata: Mapping[str, Any], verdict: Verdict) -> None:
    """Refuse values of the wrong type under keys that every architecture has, element by element."""
    for key, value in metadata.items():
        if key in OTHER_KEYS:
            _check_value(key, OTHER_KEYS[key], value, verdict)


def _check_pattern(header: Header, architecture: str, verdict: Verdict) -> None:
    key = f"{architecture}.attention.sliding_window_pattern"
    pattern, layers = header.metadata.get(key), header.metadata.get(f"{architecture}.block_count")
    if isinstance(pattern, list | Unread) and len(pattern) != layers:
        verdict.refuse(f'"{key}" has {len(pattern)} elements, must have one for each of {layers} layers')


def _known(key: str, architecture: str) -> Key | None:
    if key.startswith(f"{architecture}."):
        return ARCHITECTURE_KEYS[architecture].get(key.removeprefix(f"{architecture}."))
    if key.startswith(TEMPLATE_PREFIX):
        return OTHER_KEYS["tokenizer.chat_template"]
    return OTHER_KEYS.get(key)


def _unknown(key: str) -> str:
    if ".vision." in key or ".mm." in key:
        return f"metadata key {quoted(key)} is of a vision model, which is not served from one file"
    if ".expert_" in key:
        return f"metadata key {quoted(key)} is of a mixture of experts, which is not served under this architecture"
    return (
        f"metadata key {quoted(key)} is unknown: it may change what the model computes; "
        "convert the model again, or serve the file with llama.cpp"
    )


def _check_value(key: str, known: Key, value: object, verdict: Verdict) -> None:
    expected, is_one = KINDS[known.kind]
    if not is_one(value):
        verdict.refuse(f"metadata key {quoted(key)} is {_shown(value)}, must be {expected}")
    elif known.neutral and value not in known.neutral:
        allowed = " or ".join(map(repr, known.neutral))
        verdict.refuse(f"metadata key {quoted(key)} is {_shown(value)}, must be {allowed} or absent: {known.why}")


def _shown(value: object) -> str:
    if isinstance(value, Unread):
        return f"a value of type {value.kind}"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_array(value: object, element: type, names: tuple[str, ...]) -> bool:
    if isinstance(value, Unread):
        return value.kind == "array" and value.element in names
    if not isinstance(value, list):
        return False
    if element is float:
        return all(map(is_number, value))
    return all(type(each) is element for each in value)
