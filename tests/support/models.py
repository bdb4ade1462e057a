"""Makes models for tests: complete small GGUF files with random weights, and sparse ones of the size of real models.

    write_gguf(path, tiny("qwen3"), "Q4_K_M")                  a few hundred KiB, random weights, all tensors
    write_gguf(path, SHAPES["llama-2-7b"], "Q4_K_M", sparse=True)   4.08 GB that take a few MiB on disk, zero weights

The files are written by the gguf package, so that the readers under test meet another program's output.
The choice of tensor types follows llama.cpp's src/llama-quant.cpp (llama_tensor_get_type_impl).
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a decoder-only model, in the names of pascaline.models.spec."""

    architecture: str
    name: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    merges: int = 0
    """Merges of the tokeniser; 0 writes scores, as sentencepiece models have them."""
    tied_embeddings: bool = False
    rope_freqs: bool = False
    """Llama 3.1 and newer carry a tensor of RoPE factors."""
    sliding_window: int | None = None
    rope_theta: float = 10000.0


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            architecture="llama",
            name="llama-2-7b",
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=11008,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            vocab_size=32000,
            context_length=4096,
        ),
        Shape(
            architecture="llama",
            name="llama-3.1-8b",
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=14336,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=128256,
            context_length=131072,
            merges=280147,
            rope_freqs=True,
            rope_theta=500000.0,
        ),
        Shape(
            architecture="llama",
            name="mistral-7b",
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=14336,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=32000,
            context_length=32768,
        ),
        Shape(
            architecture="qwen2",
            name="qwen2.5-7b",
            num_hidden_layers=28,
            hidden_size=3584,
            intermediate_size=18944,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            vocab_size=152064,
            context_length=32768,
            merges=151387,
            rope_theta=1000000.0,
        ),
        Shape(
            architecture="qwen3",
            name="qwen3-4b",
            num_hidden_layers=36,
            hidden_size=2560,
            intermediate_size=9728,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=151936,
            context_length=40960,
            merges=151387,
            tied_embeddings=True,
            rope_theta=1000000.0,
        ),
        Shape(
            architecture="qwen3",
            name="qwen3-8b",
            num_hidden_layers=36,
            hidden_size=4096,
            intermediate_size=12288,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=151936,
            context_length=40960,
            merges=151387,
            rope_theta=1000000.0,
        ),
        Shape(
            architecture="gemma2",
            name="gemma-2-9b",
            num_hidden_layers=42,
            hidden_size=3584,
            intermediate_size=14336,
            num_heads=16,
            num_kv_heads=8,
            head_dim=256,
            vocab_size=256000,
            context_length=8192,
            tied_embeddings=True,
            sliding_window=4096,
        ),
        Shape(
            architecture="gemma3",
            name="gemma-3-4b",
            num_hidden_layers=34,
            hidden_size=2560,
            intermediate_size=10240,
            num_heads=8,
            num_kv_heads=4,
            head_dim=256,
            vocab_size=262144,
            context_length=131072,
            tied_embeddings=True,
            sliding_window=1024,
            rope_theta=1000000.0,
        ),
    )
}
"""Real models, as their config.json describes them."""

PUBLISHED_BYTES = {
    ("llama-2-7b", "Q4_K_M"): 4_081_004_224,
    ("llama-2-7b", "Q8_0"): 7_161_089_728,
    ("llama-3.1-8b", "Q4_K_M"): 4_920_739_232,
    ("llama-3.1-8b", "Q6_K"): 6_596_011_424,
    ("llama-3.1-8b", "Q8_0"): 8_540_775_840,
    ("mistral-7b", "Q4_K_M"): 4_368_438_944,
    ("qwen2.5-7b", "Q4_K_M"): 4_683_074_240,
    ("qwen3-4b", "Q4_K_M"): 2_497_280_256,
    ("qwen3-8b", "Q4_K_M"): 5_027_784_512,
    ("gemma-2-9b", "Q4_K_M"): 5_761_057_728,
    ("gemma-3-4b", "Q4_K_M"): 2_489_757_856,
}
"""Sizes of the files on Hugging Face: TheBloke's llama-2 and mistral v0.1, bartowski's llama-3.1, qwen2.5 and gemma-2,
Qwen's and unsloth's qwen3, ggml-org's gemma-3."""

_TINY = Shape(
    architecture="llama",
    name="tiny",
    num_hidden_layers=4,
    hidden_size=256,
    intermediate_size=512,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    vocab_size=384,
    context_length=2048,
)


def tiny(architecture: str, **changes: object) -> Shape:
    """A shape of a few hundred thousand weights whose rows every tensor type can hold (multiples of 256)."""
    gemma = architecture.startswith("gemma")
    shape = replace(
        _TINY,
        architecture=architecture,
        name=f"tiny-{architecture}",
        tied_embeddings=gemma,
        sliding_window=128 if gemma else None,
        num_hidden_layers=8 if gemma else 4,
    )
    return replace(shape, **changes)  # type: ignore[arg-type]  # the caller's keywords are fields of Shape


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """All tensors of a model, rows first, in the order in which llama.cpp's converter writes them."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.vocab_size, shape.hidden_size)}
    if shape.rope_freqs:
        found["rope_freqs.weight"] = (shape.head_dim // 2,)
    for layer in range(shape.num_hidden_layers):
        found |= {f"blk.{layer}.{name}": size for name, size in _layer_shapes(shape).items()}
    found["output_norm.weight"] = (shape.hidden_size,)
    if not shape.tied_embeddings:
        found["output.weight"] = (shape.vocab_size, shape.hidden_size)
    return found


def tensor_types(shape: Shape, mixture: str) -> dict[str, str]:
    """The type of each tensor in a mixture (`Q4_K_M`, `Q6_K`, `F16`, …), as llama-quantize chooses it."""
    types = {}
    for name, size in tensor_shapes(shape).items():
        kind = "F32" if len(size) == 1 else _matrix_type(shape, mixture, name)
        types[name] = _FALLBACK[kind] if size[-1] % _block(kind)[0] else kind
    return types


def write_gguf(
    path: Path,
    shape: Shape,
    mixture: str = "F16",
    *,
    types: dict[str, str] | None = None,
    sparse: bool = False,
    seed: int = 0,
    metadata: dict[str, int | float | str | list[int]] | None = None,
) -> Path:
    """Write a complete GGUF file and return its path.

    `types` overrides the type of single tensors; `sparse` leaves the weights as a hole in the file (all zero), with
    RoPE's factors in it; `metadata` adds keys or replaces those of the shape.
    """
    chosen = tensor_types(shape, mixture) | (types or {})
    writer = _Writer(path, shape.architecture)
    _add_metadata(writer, shape, mixture, metadata or {})
    add_tokenizer(writer, shape)
    for name, size in tensor_shapes(shape).items():
        kind = GGMLQuantizationType[chosen[name]]
        row = gguf.quant_shape_to_byte_shape(size, kind)
        raw = kind not in _PLAIN
        writer.add_tensor_info(
            name,
            row if raw else size,
            np.dtype(np.uint8 if raw else _PLAIN[kind]),
            math.prod(row) if raw else math.prod(size) * np.dtype(_PLAIN[kind]).itemsize,
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if sparse:
        _extend(writer, {"rope_freqs.weight": _llama3_factors(shape)})
    else:
        random = np.random.default_rng(seed)
        for name, size in tensor_shapes(shape).items():
            known = name == "rope_freqs.weight"
            writer.write_tensor_data(_llama3_factors(shape) if known else random_tensor(random, size, chosen[name]))
    writer.close()
    return path


def random_tensor(random: np.random.Generator, size: tuple[int, ...], kind: str) -> np.ndarray:
    """Random weights of about 0.02, as the bytes of a tensor type."""
    number = GGMLQuantizationType[kind]
    if number in _PLAIN or kind in _QUANTIZED_HERE:
        scale = 1.0 if len(size) == 1 else 0.02
        weights = (random.standard_normal(size, dtype=np.float32) * scale).astype(np.float32)
        return gguf.quantize(weights, number)
    elements, n_bytes = _block(kind)
    blocks = random.integers(0, 256, (math.prod(size) // elements, n_bytes), dtype=np.uint8)
    # The half-precision scales of a block must be small numbers: random bytes would be infinite or not a number.
    for at, value in BLOCK_SCALES[kind].items():
        halves = np.full((len(blocks), 1), value, dtype=np.float16) * random.uniform(0.5, 1.5, (len(blocks), 1))
        blocks[:, at : at + 2] = halves.astype(np.float16).view(np.uint8)
    return blocks.reshape(*size[:-1], -1)


_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
_QUANTIZED_HERE = frozenset({"BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"})
# Where a block's half-precision scales stand, and a size of theirs that makes weights of about 0.02.
BLOCK_SCALES = {
    "Q2_K": {80: 0.003, 82: 0.003},
    "Q3_K": {108: 0.0005},
    "Q4_K": {0: 0.0001, 2: 0.0005},
    "Q5_K": {0: 0.00005, 2: 0.0005},
    "Q6_K": {208: 0.00001},
    "IQ4_NL": {0: 0.0003},
    "IQ4_XS": {0: 0.00001},
    "IQ3_S": {0: 0.0001},
    "IQ2_S": {0: 0.0001},
}
# The type that takes the place of one whose blocks do not divide the row.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# Mixture -> the type of most matrices.
_BASE = {
    "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
}


def _llama3_factors(shape: Shape) -> np.ndarray:
    """RoPE factors as Llama 3.1 has them: 1 for waves shorter than 2048 positions, 8 beyond 8192, between them mixed."""
    waves = 2 * np.pi * shape.rope_theta ** (np.arange(0, shape.head_dim, 2) / shape.head_dim)
    mixed = 1 / (1 / 8 + (1 - 1 / 8) * np.clip((8192 / waves - 1) / (4 - 1), 0, 1))
    return mixed.astype(np.float32)


def _block(kind: str) -> tuple[int, int]:
    return gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def _layer_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, heads, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    found = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (heads, hidden),
        "attn_k.weight": (kv, hidden),
        "attn_v.weight": (kv, hidden),
        "attn_output.weight": (hidden, heads),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (shape.intermediate_size, hidden),
        "ffn_up.weight": (shape.intermediate_size, hidden),
        "ffn_down.weight": (hidden, shape.intermediate_size),
    }
    if shape.architecture == "qwen2":
        found |= {"attn_q.bias": (heads,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if shape.architecture in ("qwen3", "gemma3"):
        found |= {"attn_q_norm.weight": (shape.head_dim,), "attn_k_norm.weight": (shape.head_dim,)}
    if shape.architecture in ("gemma2", "gemma3"):
        found |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    return found


def _matrix_type(shape: Shape, mixture: str, name: str) -> str:
    base = _BASE.get(mixture, mixture)
    if mixture not in _BASE and mixture != "Q4_0":
        return base
    if name == "output.weight" or (shape.tied_embeddings and name == "token_embd.weight"):
        return "Q6_K"
    if mixture.endswith("_K_M") and name.endswith(("attn_v.weight", "ffn_down.weight")):
        return _better_type(mixture, name, int(name.split(".")[1]), shape.num_hidden_layers)
    if mixture == "Q3_K_M" and name.endswith("attn_output.weight"):
        return "Q4_K"
    return base


def _better_type(mixture: str, name: str, layer: int, layers: int) -> str:
    """The type of the two matrices per layer that the _M mixtures give more bits."""
    if mixture == "Q3_K_M":
        first = 2 if "attn_v" in name else layers // 16
        return "Q5_K" if layer < first else "Q4_K"
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return "Q6_K" if more else _BASE[mixture]


def _add_metadata(
    writer: GGUFWriter, shape: Shape, mixture: str, extra: dict[str, int | float | str | list[int]]
) -> None:
    arch = shape.architecture
    ftype = {"F32": "ALL_F32"}.get(mixture, f"MOSTLY_{mixture}")
    values: dict[str, int | float | str | list[int]] = {
        "general.name": shape.name,
        "general.file_type": int(LlamaFileType[ftype]),
        f"{arch}.block_count": shape.num_hidden_layers,
        f"{arch}.context_length": shape.context_length,
        f"{arch}.embedding_length": shape.hidden_size,
        f"{arch}.feed_forward_length": shape.intermediate_size,
        f"{arch}.attention.head_count": shape.num_heads,
        f"{arch}.attention.head_count_kv": shape.num_kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.rope.freq_base": shape.rope_theta,
    }
    if arch == "llama":
        values |= {"llama.rope.dimension_count": shape.head_dim, "llama.vocab_size": shape.vocab_size}
    if arch in ("qwen3", "gemma2", "gemma3") or shape.head_dim * shape.num_heads != shape.hidden_size:
        values |= {f"{arch}.attention.key_length": shape.head_dim, f"{arch}.attention.value_length": shape.head_dim}
    if shape.sliding_window:
        values[f"{arch}.attention.sliding_window"] = shape.sliding_window
    for key, value in (values | extra).items():
        add_value(writer, key, value)


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a key: a number in the 32-bit type that llama.cpp's converter gives it, a text or a list."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_tokenizer(writer: GGUFWriter, shape: Shape) -> None:
    """A vocabulary of the right length whose first tokens are the bytes, so that any text can be encoded."""
    tokens, scores_or_merges, types = _vocabulary(shape.vocab_size, shape.merges)
    if shape.merges:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2" if shape.architecture.startswith("qwen") else "llama-bpe")
        writer.add_token_list(tokens)
        writer.add_token_merges(scores_or_merges)
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores_or_merges)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")


class _PackedOnce(list[Any]):
    """A list that `_Writer` packs once: the gguf package takes a second for a large vocabulary."""

    packed = b""


class _Writer(GGUFWriter):
    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        if not isinstance(val, _PackedOnce):
            return super()._pack_val(val, vtype, add_vtype, sub_type)
        val.packed = val.packed or super()._pack_val(val, vtype, add_vtype, sub_type)
        return val.packed


@functools.lru_cache(maxsize=6)
def _vocabulary(size: int, merges: int) -> tuple[_PackedOnce, _PackedOnce, _PackedOnce]:
    """Return tokens, merges (without any: scores) and types."""
    if merges:
        tokens = [*_byte_characters(), *(f"Ġt{i:x}" for i in range(size - 256))]
        # Each merge makes a token of the vocabulary; if there are more merges than tokens, some come twice.
        made = [16 + i % (size - 272) for i in range(merges)]
        pairs = [f"Ġt{token >> 4:x} {token & 15:x}" for token in made]
        return _PackedOnce(tokens), _PackedOnce(pairs), _PackedOnce([1] * size)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    rest = [f"▁t{i:x}" for i in range(size - 259)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(rest))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(rest)
    return _PackedOnce(["<unk>", "<s>", "</s>", *bytes_, *rest]), _PackedOnce(scores), _PackedOnce(types)


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-ins of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _extend(writer: GGUFWriter, known: dict[str, np.ndarray]) -> None:
    """Make the file as long as its tensors say, and write only the known ones of them."""
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    end = file.tell()
    for name, info in writer.tensors[0].items():
        if name in known:
            file.seek(end)
            file.write(known[name].tobytes())
        end += writer.ggml_pad(info.nbytes, writer.data_alignment)
    file.flush()
    os.truncate(file.fileno(), end)


def split_gguf(path: Path, parts: int) -> list[Path]:
    """Write a GGUF file as this number of parts beside it, named as llama-gguf-split names them, and remove it.

    Tensors go to the parts in the opposite order, so that no part holds what its place suggests.
    """
    reader = gguf.GGUFReader(path)
    tensors = reader.tensors[::-1]
    share = math.ceil(len(tensors) / parts)
    names = [path.with_name(f"{path.stem}-{part + 1:05d}-of-{parts:05d}.gguf") for part in range(parts)]
    for part, name in enumerate(names):
        writer = GGUFWriter(name, "")
        writer.kv_data[0].clear()
        for field in reader.fields.values() if part == 0 else ():
            if not field.name.startswith("GGUF."):
                writer.add_key_value(field.name, field.contents(), field.types[0], *field.types[1:2])
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[part * share : (part + 1) * share]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.unlink()
    return names
