"""ModelSpec of a GGUF model: translates metadata keys to our names and joins the parts of a split model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pascaline.errors import ModelError
from pascaline.models.ggml_types import FILE_TYPES, GUESSED_FILE_TYPE
from pascaline.models.gguf_header import GgufHeader, Metadata, read_header
from pascaline.models.gguf_split import check_hidden_size, check_parts, part_names
from pascaline.models.layers import differing, has_keys, has_state, layer_parts, most_common_heads, sliding_layer_ids
from pascaline.models.refusal import printable, shown
from pascaline.models.roles import ENCODERS, POOLINGS
from pascaline.models.source import Source, file_mode, open_file
from pascaline.models.spec import ModelSpec, TensorSpec

MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS of llama.cpp."""
MAX_SIZE = (1 << 31) - 1
"""Largest dimension or count; llama.cpp reads them as 32-bit numbers."""

# Period of full layers if the file does not name it (llama.cpp's src/llama-model.cpp, set_swa_pattern).
_SLIDING_PERIODS = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone-moe": 4,
    "exaone4": 4,
    "gemma-embedding": 6,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "llama4": 4,
    "olmo2": 4,
    "plamo3": 8,
    "smallthinker": 4,
}
_FULL_LAYER_FIRST = frozenset({"smallthinker"})
# The window if the file does not name it.
_SLIDING_WINDOWS = {"gemma2": 4096, "llama4": 8192, "smallthinker": 4096}
# Architectures whose files name a window that llama.cpp does not use.
_SLIDING_UNUSED = frozenset({"phi3", "phimoe"})

# Architectures of files that belong to a model but are not models.
_NO_MODELS = {
    "clip": "the projector of a vision model",
    "controlvector": "a control vector",
    "imatrix": "an importance matrix",
}
# Values of `general.type` of such files; `model` is one.
_TYPES = {
    "adapter": "a LoRA adapter",
    "controlvector": "a control vector",
    "imatrix": "an importance matrix",
    "mmproj": "the projector of a vision model",
}

OpenPart = Callable[[str], AbstractContextManager[Source]]
"""Opens the file of this name in the folder of the requested one."""


def read_gguf(path: Path | str) -> ModelSpec:
    """Read the header of a GGUF file, or of all parts if it is one part of a split model."""
    path = Path(path)
    return read_gguf_parts(path.name, lambda name: _open_beside(path, name), path.with_name)


def _open_beside(path: Path, name: str) -> AbstractContextManager[Source]:
    """Open the file of this name beside another; if it is missing, suggest a file with a similar name."""
    part = path.with_name(name)
    if part != path and file_mode(part) is None:
        alike = next((file.name for file in path.parent.iterdir() if file.name.lower() == name.lower()), None)
        hint = f" (there is {shown(alike)})" if alike else ""
        raise ModelError(
            f"failed to read {part}: there is no such file{hint}; put all parts into one folder, under the names that "
            "they were made with"
        )
    return open_file(part)


@contextmanager
def open_gguf(path: Path | str) -> Iterator[GgufHeader]:
    """The header of one open file, so that large values of its metadata (vocabulary, chat template) can be read."""
    with open_file(Path(path)) as source:
        yield read_header(source)


def read_gguf_parts(name: str, open_part: OpenPart, locate: Callable[[str], Path | str]) -> ModelSpec:
    """Read the model that the file of this name belongs to; `locate` gives the place of a part, for ModelSpec.files."""
    with open_part(name) as source:
        asked = read_header(source)
        names = part_names(name, asked)
        if names is None:
            return _spec((asked,), (locate(name),))
    headers = tuple(_read_part(open_part, part, index, len(names)) for index, part in enumerate(names))
    check_parts(headers, names)
    spec = _spec(headers, tuple(map(locate, names)))
    check_hidden_size(headers, spec.hidden_size)
    return spec


def _read_part(open_part: OpenPart, name: str, index: int, count: int) -> GgufHeader:
    try:
        with open_part(name) as source:
            return read_header(source, index)
    except ModelError as error:
        raise ModelError(f"part {index + 1} of {count} of the split model cannot be read: {error}") from error


def _spec(headers: tuple[GgufHeader, ...], files: tuple[Path | str, ...]) -> ModelSpec:
    metadata = headers[0].metadata
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    keys = _Keys(metadata, _architecture(metadata))
    layers = keys.count("block_count", maximum=MAX_LAYERS)
    hidden = keys.count("embedding_length")
    heads = keys.per_layer("attention.head_count", layers, default=[0] * layers)
    parts = layer_parts((tensor.name for tensor in tensors), layers)
    causal = _is_causal(keys)
    kv_heads = _kv_heads(keys, parts, heads) if causal else [0] * layers
    head_dim, v_head_dim = _head_dims(keys, hidden, max(heads))
    sliding = _sliding_layers(keys, layers)
    return ModelSpec(
        format="gguf",
        files=files,
        architecture=printable(keys.architecture),
        name=printable(_text(metadata, "general.name")),
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=max(keys.per_layer("feed_forward_length", layers, default=[0] * layers)),
        num_heads=max(heads),
        num_kv_heads=most_common_heads(kv_heads),
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        vocab_size=_vocab_size(keys, tensors),
        context_length=keys.count("context_length"),
        layer_kv_heads=differing(kv_heads),
        sliding_window=_sliding_window(keys) if sliding else None,
        sliding_layers=len(sliding),
        sliding_layer_ids=sliding,
        sliding_head_dim=keys.optional("attention.key_length_swa"),
        kv_lora_rank=keys.optional("attention.kv_lora_rank"),
        qk_rope_head_dim=keys.optional("rope.dimension_count") if keys.has("attention.kv_lora_rank") else None,
        num_experts=keys.optional("expert_count"),
        num_experts_per_token=keys.optional("expert_used_count"),
        moe_intermediate_size=keys.optional("expert_feed_forward_length"),
        ssm_state_size=keys.optional("ssm.state_size"),
        ssm_conv_kernel=keys.optional("ssm.conv_kernel"),
        ssm_inner_size=keys.optional("ssm.inner_size"),
        ssm_num_heads=keys.optional("ssm.time_step_rank"),
        ssm_num_groups=keys.optional("ssm.group_count"),
        state_layer_ids=tuple(layer for layer, own in enumerate(parts) if has_state(own)),
        shortconv_columns=keys.optional("shortconv.l_cache"),
        wkv_head_size=keys.optional("wkv.head_size"),
        token_shift_count=keys.optional("token_shift_count"),
        kda_head_dim=keys.optional("kda.head_dim"),
        tied_embeddings=all(tensor.name != "output.weight" for tensor in tensors),
        pooling=_pooling(keys),
        causal=causal,
        file_type=_file_type(metadata),
        file_bytes=sum(header.file_bytes for header in headers),
        tensors=tensors,
        metadata=metadata.plain(),
    )


@dataclass(frozen=True, slots=True)
class _Keys:
    """The metadata keys that start with the architecture's name."""

    metadata: Metadata
    architecture: str

    def full(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def has(self, key: str) -> bool:
        return self.full(key) in self.metadata

    def count(self, key: str, *, maximum: int = MAX_SIZE) -> int:
        """A required number, at least 1."""
        if not self.has(key):
            self.metadata.fail(f"metadata key {shown(self.full(key))} is missing")
        return _whole_number(self.metadata, self.full(key), 1, maximum, minimum=1)

    def optional(self, key: str) -> int | None:
        """A number, None if it is absent or 0."""
        return _whole_number(self.metadata, self.full(key), 0, MAX_SIZE, minimum=0) or None

    def per_layer(self, key: str, layers: int, default: list[int]) -> list[int]:
        """A number for each layer: stored as one for all, or as an array."""
        field = self.metadata.field(self.full(key))
        if field is None:
            return default
        if field.value_type != "array":
            return [_whole_number(self.metadata, self.full(key), 0, MAX_SIZE, minimum=0)] * layers
        values = self.array(key, layers)
        return [_checked(self.metadata, self.full(key), value, 0, MAX_SIZE) for value in values]

    def array(self, key: str, layers: int) -> list[object]:
        """An array with one element for each layer."""
        field = self.metadata.field(self.full(key))
        if field is None or field.count != layers or field.raw is None:
            length = field.count if field else 0
            self.metadata.fail(
                f"{shown(self.full(key))} has {length} elements, must have one for each of {layers} layers"
            )
        values = self.metadata.value(self.full(key))
        return list(values) if isinstance(values, list) else []


def _architecture(metadata: Metadata) -> str:
    kind = _text(metadata, "general.type") or "model"
    if kind != "model":
        what = _TYPES.get(kind, f"something of type {shown(kind)}")
        metadata.fail(f"it holds {what} (general.type {printable(kind)}), must be a model")
    if "adapter.type" in metadata:
        metadata.fail("it holds a LoRA adapter (adapter.type), must be a model")
    name = _text(metadata, "general.architecture")
    if name in _NO_MODELS:
        metadata.fail(f"it holds {_NO_MODELS[name]} (general.architecture {name}), must be a model")
    if not name:
        metadata.fail("metadata key 'general.architecture' is missing")
    return name


def _kv_heads(keys: _Keys, parts: list[frozenset[str]], heads: list[int]) -> list[int]:
    """KV heads that each layer stores: 0 in a layer without keys, even if the metadata gives all the same number."""
    layers = len(parts)
    found = keys.per_layer("attention.head_count_kv", layers, default=heads)
    interval = keys.optional("full_attention_interval")
    if interval:
        # qwen3next: only the last layer of each interval attends, the others are recurrent.
        found = [count if (layer + 1) % interval == 0 else 0 for layer, count in enumerate(found)]
    if any(map(has_state, parts)):
        found = [count if has_keys(own) else 0 for count, own in zip(found, parts, strict=True)]
    shared = min(keys.optional("attention.shared_kv_layers") or 0, layers)
    # The last layers, which predict further tokens, have cells only while they are used (llama.cpp, n_layer_nextn).
    without = max(shared, min(keys.optional("nextn_predict_layers") or 0, layers))
    return found[: layers - without] + [0] * without


def _is_causal(keys: _Keys) -> bool:
    value = keys.metadata.value(keys.full("attention.causal"))
    if value is not None and not isinstance(value, bool):
        keys.metadata.fail(f"{shown(keys.full('attention.causal'))} is {value!r}, must be true or false")
    return keys.architecture not in ENCODERS if value is None else value


def _pooling(keys: _Keys) -> str | None:
    """None if the file names none; llama.cpp lets its user choose then, and so does no setting here."""
    number = keys.optional("pooling_type")
    if number is None:
        return None
    if number >= len(POOLINGS):
        keys.metadata.fail(f"{shown(keys.full('pooling_type'))} is {number}, must be below {len(POOLINGS)}")
    return POOLINGS[number]


def _head_dims(keys: _Keys, hidden: int, heads: int) -> tuple[int, int]:
    """Sizes of a key and a value head; with MLA those before compression."""
    derived = hidden // heads if heads else 0
    key = keys.optional("attention.key_length_mla") or keys.optional("attention.key_length") or derived
    value = keys.optional("attention.value_length_mla") or keys.optional("attention.value_length") or derived
    return key, value


def _sliding_window(keys: _Keys) -> int | None:
    return keys.optional("attention.sliding_window") or _SLIDING_WINDOWS.get(keys.architecture)


def _sliding_layers(keys: _Keys, layers: int) -> tuple[int, ...]:
    if keys.architecture in _SLIDING_UNUSED or _sliding_window(keys) is None:
        return ()
    key = "attention.sliding_window_pattern"
    field = keys.metadata.field(keys.full(key))
    if field is not None and field.value_type == "array":
        return tuple(layer for layer, slides in enumerate(keys.array(key, layers)) if slides)
    # Without a pattern it is unknown which layers slide: counting all as full never plans too little memory.
    period = keys.optional(key) or _SLIDING_PERIODS.get(keys.architecture, 1)
    return sliding_layer_ids(layers, period, full_layer_first=keys.architecture in _FULL_LAYER_FIRST)


def _vocab_size(keys: _Keys, tensors: tuple[TensorSpec, ...]) -> int:
    """Rows of the embedding, which determine the size of the logits; without an embedding the vocabulary's length."""
    for tensor in tensors:
        if tensor.name == "token_embd.weight":
            return tensor.shape[0]
    tokens = keys.metadata.field("tokenizer.ggml.tokens")
    return tokens.count if tokens else keys.optional("vocab_size") or 0


def _file_type(metadata: Metadata) -> str | None:
    number = metadata.value("general.file_type")
    return FILE_TYPES.get(number & ~GUESSED_FILE_TYPE) if isinstance(number, int) else None


def _text(metadata: Metadata, key: str) -> str:
    field = metadata.field(key)
    if field is not None and field.value_type == "string" and field.raw is None:
        metadata.fail(f"{key} is longer than a name can be")
    value = metadata.value(key)
    if not isinstance(value, str | None):
        metadata.fail(f"{key} is {value!r}, must be a string")
    return value or ""


def _whole_number(metadata: Metadata, key: str, default: int, maximum: int, *, minimum: int = 0) -> int:
    field = metadata.field(key)
    if field is None:
        return default
    if field.value_type in ("array", "string"):
        metadata.fail(f"{shown(key)} is a value of type {field.value_type}, must be a whole number")
    return _checked(metadata, key, metadata.value(key), minimum, maximum)


def _checked(metadata: Metadata, key: str, value: object, minimum: int, maximum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        metadata.fail(f"{shown(key)} must be between {minimum} and {maximum}, got {value!r}")
    return value
