"""The models that both engines are given, and what must come of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from support.differential.tiny import ABSENT, Tiny
from support.differential.vocabularies import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER,
    byte_level,
    sentencepiece,
    sentencepiece_without_bytes,
    texts_beyond,
    with_tokens,
    without,
    word_pieces,
)

Outcome = Literal["agree", "both refuse", "SGLang refuses"]

EXACT: Final = 2e-5
"""Float32 on both sides, summed in another order."""
GELU: Final = 3e-3
"""llama.cpp looks up Gemma's GELU in a table of 16-bit numbers."""
DEEP_GELU: Final = 1e-2
"""The same through 46 or 62 layers."""
HALF: Final = 1e-3
"""llama.cpp rounds the activations to float16 in front of a float16 matrix."""
BFLOAT: Final = 2e-2
"""Likewise to bfloat16, which has 8 bits."""
EIGHT_BITS: Final = 8e-2
"""llama.cpp rounds the activations to 8 bits in front of a quantised matrix."""
NOT_COMPOSED: Final = "llama.cpp does not compose characters, as the model's own tokenizer does"
COMPOSED: Final = ("e\u0301 and \u1e9b\u0323", "caf\u00e9 na\u00efve \u212b")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model."""

    name: str
    model: Tiny
    outcome: Outcome = "agree"
    why: str = ""
    """Why SGLang does not serve what llama.cpp serves, or why llama.cpp is wrong in `wrong` and `texts`."""
    wrong: str = ""
    """A row whose values llama.cpp computes for this model too, although it should compute others."""
    texts: tuple[str, ...] = ()
    """Texts that llama.cpp cuts wrongly."""
    ends: tuple[int, ...] = ()
    """Tokens at which llama.cpp stops in addition, wrongly."""
    same_as: str = ""
    """A row whose values this one must have; every other two rows must have different values."""
    flags: tuple[str, ...] = ()
    """Further flags of SGLang."""
    tolerance: float = EXACT
    """Largest difference of log-probabilities, as a root mean square relative to their own spread."""
    fast: bool = False
    """Part of the fast subset."""


LLAMA: Final = Tiny()
QWEN2: Final = Tiny(architecture="qwen2", biases=("attn_q", "attn_k", "attn_v"), seed=1)
QWEN3: Final = Tiny(architecture="qwen3", head_dim=32, seed=2)
GEMMA2: Final = Tiny(
    architecture="gemma2",
    head_dim=32,
    layers=4,
    tied=True,
    vocabulary=sentencepiece(add_space_prefix=False),
    seed=3,
)
GEMMA3: Final = replace(GEMMA2, architecture="gemma3", layers=7, seed=4)
WIDE: Final = Tiny(hidden=256, feed=512, heads=4, kv_heads=2, head_dim=64, seed=5)
"""Its rows hold whole blocks of 256 weights."""


def row(name: str, model: Tiny, **options: Any) -> Row:
    """A row with changes of a model."""
    changes = {key: options.pop(key) for key in tuple(options) if key in Tiny.__dataclass_fields__}
    if "keys" in changes:
        changes["keys"] = dict(model.keys) | changes["keys"]
    if model.architecture.startswith("gemma"):
        options.setdefault("tolerance", GELU)
    return Row(name=name, model=replace(model, **changes), **options)


STRUCTURES: Final = (
    row("llama, grouped queries", LLAMA, fast=True),
    row("llama, a key head for each query head", LLAMA, kv_heads=4),
    row("llama, one key head", LLAMA, kv_heads=1),
    row("llama, tied", LLAMA, tied=True),
    row(
        "llama, biases in attention",
        LLAMA,
        biases=("attn_q", "attn_k", "attn_v", "attn_output"),
    ),
    row(
        "llama, biases without an output bias",
        LLAMA,
        biases=("attn_q", "attn_k", "attn_v"),
        outcome="SGLang refuses",
        why="SGLang's Llama has a bias on all four projections or on none",
    ),
    row("llama, heads of 24", LLAMA, head_dim=24),
    row("llama, heads of 40", LLAMA, head_dim=40),
    row("llama, heads of 80", LLAMA, head_dim=80),
    row("llama, three heads", LLAMA, hidden=96, heads=3, kv_heads=3, head_dim=20),
    row("llama, six heads on two", LLAMA, hidden=96, heads=6, kv_heads=2),
    row(
        "llama, heads that do not divide the width",
        LLAMA,
        heads=3,
        kv_heads=3,
        outcome="SGLang refuses",
        why="transformers accepts no such configuration",
    ),
    row("llama, one layer", LLAMA, layers=1),
    row(
        "llama, a size of heads that follows from the width",
        LLAMA,
        keys={".attention.key_length": ABSENT, ".attention.value_length": ABSENT},
        same_as="llama, grouped queries",
    ),
    row(
        "llama, as many key heads as query heads for want of a key",
        LLAMA,
        kv_heads=4,
        keys={".attention.head_count_kv": ABSENT},
        same_as="llama, a key head for each query head",
    ),
    row("llama, another epsilon", LLAMA, keys={".attention.layer_norm_rms_epsilon": 0.1}),
    row(
        "llama, sizes for each layer",
        LLAMA,
        keys={
            ".attention.head_count": [4, 4],
            ".attention.head_count_kv": [2, 2],
            ".feed_forward_length": [96, 96],
        },
        same_as="llama, grouped queries",
    ),
    row(
        "llama, with a pooling that only embeddings use",
        LLAMA,
        keys={".pooling_type": 3},
        same_as="llama, grouped queries",
    ),
    row(
        "qwen2",
        QWEN2,
        fast=True,
        vocabulary=byte_level("qwen2"),
        texts=COMPOSED,
        why=NOT_COMPOSED,
    ),
    row("qwen2, tied", QWEN2, tied=True),
    row("qwen3", QWEN3, fast=True),
    row("qwen3, tied", QWEN3, tied=True),
    row("qwen3, one key head", QWEN3, kv_heads=1),
    row("gemma2", GEMMA2, fast=True),
    row("gemma2, one key head", GEMMA2, kv_heads=1),
    row(
        "gemma2, a window of one",
        GEMMA2,
        keys={".attention.sliding_window": 1},
        outcome="SGLang refuses",
        why="SGLang takes a window of one position for none",
    ),
    row("gemma2, a window of 13", GEMMA2, keys={".attention.sliding_window": 13}),
    row(
        "gemma2, caps and window for want of keys",
        GEMMA2,
        keys={
            ".attn_logit_softcapping": ABSENT,
            ".final_logit_softcapping": ABSENT,
            ".attention.sliding_window": ABSENT,
        },
    ),
    row("gemma2, as deep as the 27B", GEMMA2, layers=46, heads=2, tolerance=DEEP_GELU),
    row("gemma2, untied", GEMMA2, tied=False, outcome="both refuse"),
    row("gemma3", GEMMA3, fast=True),
    row("gemma3, as deep as the 27B", GEMMA3, layers=62, heads=2, tolerance=DEEP_GELU),
    row(
        "gemma3, every second layer",
        GEMMA3,
        keys={".attention.sliding_window_pattern": 2},
    ),
    row(
        "gemma3, a pattern layer by layer",
        GEMMA3,
        keys={
            ".attention.sliding_window_pattern": [
                True,
                False,
                True,
                True,
                False,
                True,
                True,
            ]
        },
    ),
    row(
        "gemma3, another base in sliding layers",
        GEMMA3,
        keys={".rope.freq_base_swa": 500.0, ".rope.freq_base": 1e6},
    ),
    row(
        "gemma3, scaled positions",
        GEMMA3,
        keys={".rope.scaling.type": "linear", ".rope.scaling.factor": 8.0},
    ),
    row("gemma3, a cap of logits", GEMMA3, keys={".final_logit_softcapping": 3.0}),
    row(
        "gemma3, untied",
        GEMMA3,
        tied=False,
        outcome="SGLang refuses",
        why="SGLang's Gemma 3 has no output matrix of its own",
    ),
    row(
        "gemma3, no window",
        GEMMA3,
        keys={".attention.sliding_window": ABSENT},
        outcome="SGLang refuses",
        why="SGLang's Gemma 3 needs a window",
    ),
)


def llama3_factors(head_dim: int, base: float, factor: float) -> np.ndarray:
    """Frequency factors of Llama 3.x: 1 for waves of up to 2048 positions, `factor` from 8192 on."""
    waves = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    share = np.clip((8192 / waves - 1) / 3, 0, 1)
    return (1 / ((1 - share) / factor + share)).astype(np.float32)


def scaled(**keys: Any) -> dict[str, Any]:
    """Keys of rope.scaling."""
    return {f".rope.scaling.{key}": value for key, value in keys.items()}


YARN: Final = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
POSITIONS: Final = (
    row(
        "no base",
        LLAMA,
        keys={".rope.freq_base": ABSENT},
        same_as="llama, grouped queries",
    ),
    row("a large base", LLAMA, keys={".rope.freq_base": 1e6}),
    row("linear", LLAMA, keys=scaled(type="linear", factor=4.0), fast=True),
    row(
        "linear by the old key",
        LLAMA,
        keys={".rope.scale_linear": 4.0},
        same_as="linear",
    ),
    row(
        "linear by both keys",
        LLAMA,
        keys={".rope.scale_linear": 2.0} | scaled(factor=4.0),
        same_as="linear",
    ),
    row("a factor without a type", LLAMA, keys=scaled(factor=4.0), same_as="linear"),
    row(
        "a type without a factor",
        LLAMA,
        keys=scaled(type="linear"),
        same_as="llama, grouped queries",
    ),
    row(
        "a factor of zero",
        LLAMA,
        keys=scaled(type="linear", factor=0.0),
        same_as="llama, grouped queries",
    ),
    row("a factor below one", LLAMA, keys=scaled(type="linear", factor=0.5)),
    row(
        "a factor that is not used",
        LLAMA,
        keys=scaled(type="none", factor=4.0),
        same_as="llama, grouped queries",
    ),
    row("yarn", LLAMA, keys=scaled(**YARN), fast=True),
    row(
        "yarn, the context for want of an original one",
        LLAMA,
        keys=scaled(type="yarn", factor=4.0),
    ),
    row(
        "yarn, by the old key",
        LLAMA,
        keys={".rope.scale_linear": 4.0} | scaled(type="yarn", original_context_length=64),
        same_as="yarn",
    ),
    row(
        "yarn, bounds",
        LLAMA,
        keys=scaled(**YARN, yarn_beta_fast=8.0, yarn_beta_slow=2.0),
        wrong="yarn",
        why="llama.cpp reads YaRN's bounds for other architectures alone",
    ),
    row("yarn, attn_factor", LLAMA, keys=scaled(**YARN, attn_factor=1.3)),
    row(
        "yarn, another factor of attention",
        LLAMA,
        keys=scaled(**YARN, yarn_attn_factor=0.8),
        outcome="SGLang refuses",
        why="llama.cpp does not read it for these architectures",
    ),
    row(
        "yarn, a factor of attention of one by another key",
        LLAMA,
        keys=scaled(**YARN, yarn_attn_factor=1.0),
        same_as="yarn",
    ),
    row(
        "yarn, its whole share by name",
        LLAMA,
        keys=scaled(**YARN, yarn_ext_factor=1.0),
        same_as="yarn",
    ),
    row(
        "yarn, half a share",
        LLAMA,
        keys=scaled(**YARN, yarn_ext_factor=0.5),
        outcome="SGLang refuses",
        why="SGLang computes YaRN whole",
    ),
    row(
        "yarn, a multiplier",
        LLAMA,
        keys=scaled(**YARN, yarn_log_multiplier=0.1),
        outcome="SGLang refuses",
        why="the models of DeepSeek alone have one",
    ),
    row(
        "yarn without a factor",
        LLAMA,
        keys=scaled(type="yarn", original_context_length=64),
        outcome="SGLang refuses",
        why="the file was meant to scale, and does not say by what",
    ),
    row(
        "yarn, a factor of one",
        LLAMA,
        same_as="llama, grouped queries",
        keys=scaled(type="yarn", factor=1.0, original_context_length=64),
    ),
    row("yarn of qwen2", QWEN2, keys=scaled(**YARN)),
    row("yarn of qwen3", QWEN3, keys=scaled(**YARN)),
    row("linear of qwen2", QWEN2, keys=scaled(type="linear", factor=4.0)),
    row("yarn of gemma3", GEMMA3, keys=scaled(**YARN)),
    row(
        "linear of gemma2",
        GEMMA2,
        keys=scaled(type="linear", factor=4.0),
        outcome="SGLang refuses",
        why="SGLang's Gemma 2 scales no positions",
    ),
    row(
        "llama3, a factor of 8",
        LLAMA,
        head_dim=32,
        keys={".rope.freq_base": 5e5},
        tensors={"rope_freqs.weight": llama3_factors(32, 5e5, 8.0)},
        fast=True,
    ),
    row(
        "llama3, a factor of 32",
        LLAMA,
        head_dim=32,
        keys={".rope.freq_base": 5e5},
        tensors={"rope_freqs.weight": llama3_factors(32, 5e5, 32.0)},
    ),
    row(
        "factors of another rule",
        LLAMA,
        tensors={"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)},
        outcome="SGLang refuses",
        why="SGLang has Llama 3's rule alone",
    ),
    row(
        "llama3 beside linear",
        LLAMA,
        keys=scaled(type="linear", factor=2.0),
        tensors={"rope_freqs.weight": llama3_factors(16, 1e4, 8.0)},
        outcome="SGLang refuses",
        why="SGLang scales in one way alone",
    ),
    row(
        "llama3 under qwen2",
        QWEN2,
        tensors={"rope_freqs.weight": llama3_factors(16, 1e4, 8.0)},
        outcome="both refuse",
    ),
    row(
        "longrope",
        LLAMA,
        keys=scaled(type="longrope", factor=4.0, original_context_length=64),
        tensors={
            f"rope_factors_{length}.weight": np.linspace(1, 4, 8, dtype=np.float32) for length in ("long", "short")
        },
        outcome="SGLang refuses",
        why="SGLang has longrope for Phi 3 alone",
    ),
    row(
        "a type that nobody knows",
        LLAMA,
        keys=scaled(type="spiral", factor=4.0),
        outcome="both refuse",
    ),
    row(
        "half of a head is rotated, llama",
        LLAMA,
        keys={".rope.dimension_count": 8},
        outcome="both refuse",
    ),
    row(
        "half of a head is rotated, qwen3",
        QWEN3,
        keys={".rope.dimension_count": 16},
        outcome="both refuse",
    ),
)

PADDED: Final = {f"[PAD{index}]": UNUSED for index in range(5)}
OWN_MARKS: Final = "transformers takes bos, eos and the unknown token for special whatever their types are"
VOCABULARIES: Final = (
    row("SentencePiece", LLAMA, vocabulary=sentencepiece(), fast=True),
    row(
        "SentencePiece without a prefix",
        LLAMA,
        vocabulary=sentencepiece(add_space_prefix=False),
    ),
    row(
        "SentencePiece without bos",
        LLAMA,
        vocabulary=sentencepiece(add_bos_token=False),
    ),
    row("SentencePiece with eos", LLAMA, vocabulary=sentencepiece(add_eos_token=True)),
    row(
        "SentencePiece, ids by default",
        LLAMA,
        vocabulary=without(sentencepiece(), "bos_token_id", "eos_token_id", "unknown_token_id"),
    ),
    row("SentencePiece, padded", LLAMA, vocabulary=with_tokens(sentencepiece(), PADDED)),
    row(
        "SentencePiece without types",
        LLAMA,
        vocabulary=without(sentencepiece(), "token_type"),
        texts=("<s>hello</s> <unk> <pad> <s>",),
        why=OWN_MARKS,
    ),
    row(
        "SentencePiece without scores",
        LLAMA,
        vocabulary=without(sentencepiece(), "scores"),
        outcome="SGLang refuses",
        why="without scores the order of merges is lost",
    ),
    row("BPE, llama-bpe", LLAMA, vocabulary=byte_level("llama-bpe"), fast=True),
    row("BPE, llama3", LLAMA, vocabulary=byte_level("llama3")),
    row("BPE, llama-v3", LLAMA, vocabulary=byte_level("llama-v3")),
    row(
        "BPE, llama-bpe without bos",
        LLAMA,
        vocabulary=byte_level("llama-bpe", add_bos_token=False),
    ),
    row(
        "BPE, qwen2",
        LLAMA,
        vocabulary=byte_level("qwen2"),
        texts=COMPOSED,
        why=NOT_COMPOSED,
    ),
    row(
        "BPE, deepseek-r1-qwen",
        QWEN2,
        vocabulary=byte_level("deepseek-r1-qwen", add_bos_token=True),
        texts=COMPOSED,
        why=NOT_COMPOSED,
    ),
    row("BPE, smollm", LLAMA, vocabulary=byte_level("smollm")),
    row(
        "BPE, tekken",
        LLAMA,
        vocabulary=byte_level("tekken"),
        texts=COMPOSED[:1],
        why="llama.cpp's rule cuts marks off their letters, which the model's own does not",
    ),
    row("BPE, default", LLAMA, vocabulary=byte_level("default"), fast=True),
    row("BPE, no rule", LLAMA, vocabulary=byte_level(None)),
    row(
        "BPE, a rule that nobody knows",
        LLAMA,
        vocabulary=byte_level("klingon"),
        outcome="both refuse",
    ),
    row(
        "BPE of another family under qwen2",
        QWEN2,
        vocabulary=byte_level("gpt-2", add_bos_token=True, add_eos_token=True),
    ),
    row(
        "BPE with bos and eos",
        LLAMA,
        vocabulary=byte_level("gpt-2", add_bos_token=True, add_eos_token=True),
    ),
    row("BPE, padded", LLAMA, vocabulary=with_tokens(byte_level("gpt-2"), PADDED)),
    row(
        "BPE without types",
        LLAMA,
        vocabulary=without(byte_level("gpt-2"), "token_type"),
        texts=("<s>hello</s> <unk> <pad> <s>",),
        why=OWN_MARKS,
    ),
    row(
        "BPE without bos and unknown",
        LLAMA,
        vocabulary=without(byte_level("gpt-2"), "bos_token_id", "unknown_token_id"),
    ),
    row(
        "BPE, ends of a turn and of a message",
        LLAMA,
        vocabulary=with_tokens(
            byte_level("gpt-2", eot_token_id=3, eom_token_id=4),
            {"<|eot_id|>": CONTROL, "<|eom_id|>": CONTROL},
        ),
    ),
    row(
        "BPE, end tokens of normal type",
        LLAMA,
        vocabulary=with_tokens(byte_level("gpt-2"), {"<|eot_id|>": NORMAL, "<end_of_turn>": NORMAL}),
    ),
    row(
        "BPE, many end tokens",
        LLAMA,
        vocabulary=with_tokens(
            byte_level("gpt-2"),
            dict.fromkeys(
                (
                    "<|endoftext|>",
                    "<EOT>",
                    "<|end_of_text|>",
                    "<|return|>",
                    "<end_of_utterance>",
                    "<eos>",
                    "[EOS]",
                    "<|eot|>",
                ),
                CONTROL,
            ),
        ),
    ),
    row(
        "BPE without merges",
        LLAMA,
        vocabulary=without(byte_level("gpt-2"), "merges"),
        outcome="both refuse",
    ),
    row(
        "BPE, a token twice",
        LLAMA,
        vocabulary=with_tokens(byte_level("gpt-2"), {"th": NORMAL}),
        outcome="both refuse",
    ),
    row(
        "BPE, an empty token",
        LLAMA,
        vocabulary=with_tokens(byte_level("gpt-2"), {"": NORMAL}),
    ),
    row(
        "BPE, an added token within another",
        LLAMA,
        vocabulary=with_tokens(byte_level("gpt-2"), {"<tool>b": USER, "<too": USER}),
    ),
    row(
        "SentencePiece, added words",
        LLAMA,
        vocabulary=with_tokens(sentencepiece(), {"hello": USER, "\u2581thing": USER}),
    ),
    row(
        "word pieces",
        LLAMA,
        vocabulary=word_pieces(),
        outcome="SGLang refuses",
        why="only encoders have them",
    ),
    row(
        "more rows than tokens",
        LLAMA,
        tensors={"token_embd.weight": (600, 64), "output.weight": (600, 64)},
        outcome="both refuse",
    ),
    row(
        "SentencePiece without bytes",
        LLAMA,
        vocabulary=sentencepiece_without_bytes(),
        texts=texts_beyond(sentencepiece_without_bytes()),
        why="llama.cpp fails at a character that is no token, where the model's own tokenizer has one for unknown ones",
    ),
    row(
        "BPE without eos",
        LLAMA,
        vocabulary=without(byte_level("gpt-2"), "eos_token_id"),
        ends=(11,),
        why="llama.cpp takes token 11 for eos, which is GPT-2's",
    ),
    row(
        "BPE, tokens that part files",
        LLAMA,
        vocabulary=with_tokens(
            byte_level("gpt-2"),
            {"<|fim_pad|>": CONTROL, "<|repo_name|>": NORMAL, "<|file_sep|>": USER},
        ),
    ),
    row(
        "BPE, ends of a channel",
        LLAMA,
        vocabulary=with_tokens(
            byte_level("gpt-2"),
            dict.fromkeys(("<|end|>", "<|return|>", "<|call|>"), CONTROL),
        ),
    ),
    row(
        "BPE, a token that is added in capitals",
        LLAMA,
        vocabulary=with_tokens(byte_level("gpt-2"), {"Hello": USER, " and ": USER}),
    ),
)


AS_IN_THE_FILE: Final = ("--quantization", "gguf")
"""Matrices stay in the file's types, as on a GPU."""
MIXED: Final = {
    "*attn_q*": "Q8_0",
    "*attn_k*": "Q4_1",
    "*attn_v*": "Q6_K",
    "*gate*": "Q4_0",
    "*up*": "Q5_K",
    "*": "Q5_0",
}
WITH_FLOATS: Final = {
    "*attn_q*": "F16",
    "*attn_k*": "Q8_0",
    "*gate*": "BF16",
    "*up*": "Q5_K",
    "token*": "F16",
    "*": "F32",
}
FLOATS: Final = {"F16": HALF, "BF16": BFLOAT}
QUANTISED: Final = (
    "Q8_0",
    "Q5_1",
    "Q5_0",
    "Q4_1",
    "Q4_0",
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "Q3_K",
    "Q2_K",
    "IQ4_NL",
    "IQ4_XS",
    "IQ3_S",
    "IQ2_S",
)


def typed(kind: str, tolerance: float) -> Row:
    """All matrices of one type."""
    return row(
        f"type {kind}",
        WIDE,
        types={"*": kind},
        flags=AS_IN_THE_FILE,
        tolerance=tolerance,
        fast=kind in ("Q8_0", "Q4_K"),
    )


TYPES: Final = (
    *(typed(kind, tolerance) for kind, tolerance in FLOATS.items()),
    *(typed(kind, EIGHT_BITS) for kind in QUANTISED),
    row(
        "types mixed in one layer",
        WIDE,
        types=MIXED,
        flags=AS_IN_THE_FILE,
        tolerance=EIGHT_BITS,
    ),
    row(
        "types mixed with floats",
        WIDE,
        types=WITH_FLOATS,
        flags=AS_IN_THE_FILE,
        tolerance=EIGHT_BITS,
    ),
    row("types mixed, dequantised", WIDE, types=MIXED, tolerance=EIGHT_BITS),
    row(
        "types mixed, tied",
        WIDE,
        types=MIXED,
        tied=True,
        flags=AS_IN_THE_FILE,
        tolerance=EIGHT_BITS,
    ),
    row(
        "types mixed, rows of another order",
        WIDE,
        architecture="qwen3",
        types=MIXED,
        flags=AS_IN_THE_FILE,
        tolerance=EIGHT_BITS,
    ),
)

REFUSALS: Final = (
    row(
        "a tensor is missing",
        LLAMA,
        tensors={"blk.1.ffn_up.weight": ABSENT},
        outcome="both refuse",
        fast=True,
    ),
    row(
        "a tensor too many",
        LLAMA,
        tensors={"blk.0.extra.weight": (8, 8)},
        outcome="both refuse",
    ),
    row(
        "a transposed matrix",
        LLAMA,
        tensors={"blk.0.ffn_up.weight": (64, 96)},
        outcome="both refuse",
    ),
    row(
        "a norm too short",
        LLAMA,
        tensors={"blk.0.attn_norm.weight": (32,)},
        outcome="both refuse",
    ),
    row(
        "experts",
        LLAMA,
        keys={".expert_count": 4, ".expert_used_count": 2},
        outcome="both refuse",
    ),
    row(
        "no number of layers",
        LLAMA,
        keys={".block_count": ABSENT},
        outcome="both refuse",
    ),
    row("no width", LLAMA, keys={".embedding_length": ABSENT}, outcome="both refuse"),
    row(
        "no epsilon",
        LLAMA,
        keys={".attention.layer_norm_rms_epsilon": ABSENT},
        outcome="both refuse",
    ),
    row("no context", LLAMA, keys={".context_length": ABSENT}, outcome="both refuse"),
    row(
        "no vocabulary",
        LLAMA,
        keys={"tokenizer.ggml.tokens": ABSENT},
        outcome="both refuse",
    ),
    row(
        "no kind of tokenizer",
        LLAMA,
        keys={"tokenizer.ggml.model": ABSENT},
        outcome="both refuse",
    ),
    row(
        "a kind of tokenizer that nobody knows",
        LLAMA,
        keys={"tokenizer.ggml.model": "runes"},
        outcome="both refuse",
    ),
    row(
        "a key that nobody knows",
        LLAMA,
        keys={".attention.twist": 3},
        outcome="SGLang refuses",
        why="llama.cpp reads only the keys that it knows",
    ),
    row(
        "value heads of another size",
        LLAMA,
        keys={".attention.value_length": 8},
        tensors={f"blk.{n}.attn_{t}.weight": s for n in (0, 1) for t, s in (("v", (16, 64)), ("output", (64, 32)))},
        outcome="both refuse",
    ),
    row(
        "key heads that differ between layers",
        LLAMA,
        keys={".attention.head_count_kv": [2, 4]},
        tensors={"blk.1.attn_k.weight": (64, 64), "blk.1.attn_v.weight": (64, 64)},
        outcome="both refuse",
    ),
    row(
        "an id beyond the vocabulary",
        LLAMA,
        vocabulary=byte_level("gpt-2", eos_token_id=99999),
        outcome="SGLang refuses",
        why="llama.cpp takes its own default id with a warning",
    ),
    row(
        "types too few",
        LLAMA,
        vocabulary=byte_level("gpt-2", token_type=[1, 2, 3]),
        outcome="both refuse",
    ),
    row(
        "a merge of no tokens",
        LLAMA,
        vocabulary=byte_level("gpt-2", merges=["t h", "xx yy"]),
        outcome="SGLang refuses",
        why="llama.cpp reads merges as texts",
    ),
    row(
        "attention that looks ahead",
        LLAMA,
        keys={".attention.causal": False},
        outcome="SGLang refuses",
        why="these are causal models",
    ),
    row("no layers", LLAMA, keys={".block_count": 0}, outcome="both refuse"),
    row("no heads", LLAMA, keys={".attention.head_count": 0}, outcome="both refuse"),
)

TABLE: Final = (*STRUCTURES, *POSITIONS, *VOCABULARIES, *TYPES, *REFUSALS)
