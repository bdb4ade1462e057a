"""A GGUF model is served as its file says, or refused in a sentence that names the key or the tensor."""

from __future__ import annotations

import math

import pytest
from gguf_acceptance import ARCHITECTURES, Header, Tensor, Unread, accept
from gguf_acceptance.dimensions import NO_WEIGHTS, read_dimensions
from gguf_acceptance.header import Verdict
from gguf_acceptance.keys import ARCHITECTURE_KEYS, OTHER_KEYS
from gguf_acceptance.rope import RopeError, llama3_factors, llama3_scaling, rope_scaling
from gguf_acceptance.vocabulary import PRE_TOKENIZERS, control_ids, end_ids, special_id
from sglang_pascal.checkpoint.tokenizer import PRE_TOKENIZERS as RULES
from support.sound_headers import TOKENS, WINDOW, whole


def refusals(changes: dict | None = None, drop: tuple[str, ...] = (), architecture: str = "llama", **tensors) -> str:
    """All reasons against a sound model with these changes, in one text."""
    metadata, found = whole(architecture)
    metadata = {key: value for key, value in (metadata | (changes or {})).items() if key not in drop}
    found = {name: tensor for name, tensor in (found | tensors).items() if name not in drop and tensor is not None}
    return "\n".join(accept(Header(metadata, found)).refusals)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestEveryArchitecture:
    def test_a_sound_model_is_accepted_without_a_word(self, architecture):
        verdict = accept(Header(*whole(architecture)))
        assert (verdict.refusals, verdict.notes) == ([], [])

    def test_every_missing_tensor_is_named(self, architecture):
        for name in whole(architecture)[1]:
            found = refusals(drop=(name,), architecture=architecture)
            if name == "output.weight":
                assert found == ""  # tied to the embedding
            else:
                assert found.startswith(f'tensor "{name}" is missing of the '), name

    def test_every_tensor_of_another_shape_is_named(self, architecture):
        for name, tensor in whole(architecture)[1].items():
            for shape in ((*tensor.shape[:-1], tensor.shape[-1] + 32), (*tensor.shape, 1), tensor.shape[::-1]):
                if shape != tensor.shape:
                    found = refusals(architecture=architecture, **{name: Tensor(tensor.tensor_type, shape)})
                    assert f'tensor "{name}" has shape {list(shape)}, must be ' in found

    def test_every_required_key_is_named(self, architecture):
        for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
            found = refusals(drop=(f"{architecture}.{key}",), architecture=architecture)
            assert f'metadata key "{architecture}.{key}" is missing' in found

    def test_every_key_of_another_type_is_named(self, architecture):
        metadata, _ = whole(architecture)
        for key in metadata:
            if key != "general.architecture":
                assert key in refusals({key: object()}, architecture=architecture), key

    def test_an_unknown_key_is_refused_by_name(self, architecture):
        found = refusals({f"{architecture}.attention.magic": 1.0}, architecture=architecture)
        assert f'metadata key "{architecture}.attention.magic" is unknown' in found

    def test_a_left_over_tensor_is_refused_by_name(self, architecture):
        found = refusals(architecture=architecture, **{"blk.0.extra.weight": Tensor("F32", (64,))})
        assert f'tensor "blk.0.extra.weight" is not part of architecture {architecture}' in found


def test_the_message_counts_what_else_is_missing():
    assert refusals(drop=("blk.0.ffn_up.weight", "blk.1.ffn_up.weight")) == (
        'tensor "blk.0.ffn_up.weight" and 1 more are missing of the 22 that architecture llama has; '
        "copy or download the file again, or convert the model again"
    )


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_a_type_that_holds_no_weights_is_refused(kind):
    found = refusals(**{"blk.1.ffn_up.weight": Tensor(kind, (96, 64))})
    assert found == f'tensor "blk.1.ffn_up.weight" of shape [96, 64] has type {kind}, which {NO_WEIGHTS[kind]}'


def test_a_file_without_tensors_holds_a_vocabulary():
    assert "no tensors" in "\n".join(accept(Header(whole()[0], {})).refusals)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("blk.0.ffn_gate_inp.weight", "mixture of experts"),
        ("v.blk.0.attn_q.weight", "vision part"),
        ("mm.0.weight", "vision part"),
        ("rope_factors_long.weight", "longrope"),
        ("cls.output.weight", "this variant"),
    ],
)
def test_a_left_over_tensor_says_what_it_is_of(name, word):
    found = refusals(**{name: Tensor("F32", (64,))})
    assert name in found
    assert word in found


def test_biases_of_llama_stand_on_all_four_projections():
    biases = {
        f"blk.{layer}.attn_{name}.bias": Tensor("F32", (rows,))
        for layer in range(2)
        for name, rows in {"q": 128, "k": 64, "v": 64, "output": 64}.items()
    }
    assert refusals(**biases) == ""
    assert 'tensor "blk.1.attn_output.bias" is missing' in refusals(drop=("blk.1.attn_output.bias",), **biases)


class TestNumbersPerLayer:
    def test_equal_ones_are_one_number(self):
        changes = {"llama.attention.head_count": [4, 4], "llama.attention.head_count_kv": [2, 2]}
        assert refusals(changes | {"llama.feed_forward_length": [96, 96]}) == ""

    def test_unequal_ones_are_refused_by_name(self):
        assert '"llama.attention.head_count_kv" differs between layers (2 and 4)' in refusals(
            {"llama.attention.head_count_kv": [2, 4]}
        )

    def test_too_few_are_refused_by_name(self):
        assert '"llama.feed_forward_length" has 1 elements, must have one for each of 2 layers' in refusals(
            {"llama.feed_forward_length": [96]}
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.value_length", 64),
        ("rope.dimension_count", 16),
        ("attention.causal", False),
        ("attention.clamp_kqv", 8.0),
        ("attention.sliding_window", 128),
        ("expert_count", 8),
        ("nextn_predict_layers", 1),
        ("pooling_type", 2),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("rope.scaling.yarn_attn_factor", 0.8),
        ("attention.head_count", 0),
        ("block_count", -1),
        ("attention.layer_norm_rms_epsilon", math.nan),
        ("rope.freq_base", -1.0),
    ],
)
def test_a_value_that_sglang_does_not_compute_is_refused_by_name(key, value):
    assert f'"llama.{key}"' in refusals({f"llama.{key}": value})


def test_a_base_that_the_file_does_not_give_is_llama_cpps_and_noted():
    metadata, tensors = whole()
    del metadata["llama.rope.freq_base"]
    verdict = accept(Header(metadata, tensors))
    assert verdict.refusals == []
    assert verdict.notes == ["the file does not say, so llama.cpp's defaults are taken: llama.rope.freq_base 10000"]


def test_gemma2s_caps_and_window_have_llama_cpps_defaults():
    metadata, tensors = whole("gemma2")
    for key in WINDOW | {"attn_logit_softcapping": 50.0}:
        del metadata[f"gemma2.{key}"]
    assert accept(Header(metadata, tensors)).defaults == [
        "gemma2.attention.sliding_window 4096",
        "gemma2.attn_logit_softcapping 50",
        "gemma2.final_logit_softcapping 30",
    ]


def test_gemma3s_window_has_none():
    found = refusals(drop=("gemma3.attention.sliding_window",), architecture="gemma3")
    assert found == 'metadata key "gemma3.attention.sliding_window" is missing; convert the model again'


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_a_window_of_one_position_is_refused(architecture):
    found = refusals({f"{architecture}.attention.sliding_window": 1}, architecture=architecture)
    assert found == f'"{architecture}.attention.sliding_window" is 1, must be at least 2'


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_gemma_has_no_output_matrix_of_its_own(architecture):
    found = refusals(architecture=architecture, **{"output.weight": Tensor("Q8_0", (8, 64))})
    assert found == (
        f'tensor "output.weight" is not part of architecture {architecture}: this variant of it is not supported'
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_that_do_not_divide_the_width(architecture):
    """transformers accepts such a configuration for Qwen alone, so SGLang would end while it starts."""
    metadata, _ = whole(architecture)
    changes = {f"{architecture}.attention.head_count": 3, f"{architecture}.attention.head_count_kv": 3}
    verdict = Verdict()
    read_dimensions(Header(metadata | changes, {}), architecture, verdict)
    expected = (
        f'"{architecture}.embedding_length" is 64, must be a multiple of the 3 heads: transformers accepts no other '
        f"configuration of {architecture}"
    )
    assert verdict.refusals == ([] if architecture.startswith("qwen") else [expected])


class TestVocabulary:
    @pytest.mark.parametrize("merges", [None, [], Unread("array", 0, "string")])
    def test_merges_that_are_missing_or_empty(self, merges):
        changes = {} if merges is None else {"tokenizer.ggml.merges": merges}
        drop = ("tokenizer.ggml.merges",) if merges is None else ()
        assert "tokenizer.ggml.merges is " in refusals(changes, drop)

    def test_a_merge_of_what_is_no_token(self):
        assert "tokenizer.ggml.merges[1] is 'ab x'" in refusals({"tokenizer.ggml.merges": ["a b", "ab x"]})

    @pytest.mark.parametrize("name", ["scores", "token_type"])
    def test_a_list_of_another_length_than_the_tokens(self, name):
        kind = "float32" if name == "scores" else "int32"
        found = refusals({f"tokenizer.ggml.{name}": Unread("array", 7, kind)})
        assert found == (
            f"tokenizer.ggml.{name} has 7 elements, must have one for each of 8 tokens; convert the model again"
        )

    def test_sentencepiece_needs_scores(self):
        changes = {"tokenizer.ggml.model": "llama"}
        assert "tokenizer.ggml.scores is missing" in refusals(changes, drop=("tokenizer.ggml.merges",))

    def test_an_unknown_pre_tokenizer_is_named(self):
        assert 'tokenizer.ggml.pre is "deepseek-llm"' in refusals({"tokenizer.ggml.pre": "deepseek-llm"})

    def test_an_unknown_family_is_named(self):
        assert "tokenizer.ggml.model is 'bert'" in refusals({"tokenizer.ggml.model": "bert"})

    def test_without_tokens_there_is_no_vocabulary(self):
        assert "tokenizer.ggml.tokens is missing" in refusals(drop=("tokenizer.ggml.tokens",))

    @pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom", "unknown", "padding"])
    def test_a_special_id_out_of_range_is_named(self, name):
        key = f"tokenizer.ggml.{name}_token_id"
        assert refusals({key: 8}) == f"{key} is 8, must be between 0 and 7 (the tokens), or absent"
        assert refusals({key: 7}) == ""

    @pytest.mark.parametrize("value", [0xFFFFFFFF, -1])
    def test_an_unset_id_is_none(self, value):
        assert refusals({"tokenizer.ggml.bos_token_id": value}) == ""
        assert special_id({"tokenizer.ggml.bos_token_id": value}, "bos") is None

    def test_all_end_tokens_end_a_generation(self):
        metadata = {f"tokenizer.ggml.{name}_token_id": number for name, number in (("eos", 7), ("eot", 3), ("eom", 5))}
        assert end_ids(metadata | {"tokenizer.ggml.eos_token_ids": [1, 7]}) == [1, 3, 5, 7]

    @pytest.mark.parametrize(
        ("texts", "expected"),
        [
            (["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"], [0, 2, 3, 4]),
            (["<|endoftext|>", "a", "</s>"], [0, 2, 4]),
            (["<|fim_pad|>", "[PAD]", "<|file_sep|>"], [0, 2, 4]),
            (["<|end|>", "<|return|>", "<|call|>"], [0, 3, 4]),
            (["<|end|>", "<|calls|>", "<|flush|>"], [0, 3, 4]),
            (["<|end|>", "<|call|>", "a"], [0, 2, 3]),
            (["</s>", "<|tool_response>", "a"], [0, 3]),
        ],
    )
    def test_texts_that_end_a_generation(self, texts, expected):
        """The sets are what llama-server reports for such vocabularies."""
        metadata = {"tokenizer.ggml.tokens": ["x", "y", *texts], "tokenizer.ggml.eos_token_id": 0}
        assert end_ids(metadata) == expected

    def test_a_key_names_the_token_between_files(self):
        metadata = {"tokenizer.ggml.tokens": ["x", "<|fim_pad|>"], "tokenizer.ggml.fim_pad_token_id": 0}
        assert end_ids(metadata) == [0]

    def test_control_tokens_are_those_of_the_type_and_those_that_end_a_generation(self):
        metadata = {"tokenizer.ggml.tokens": ["<unk>", "<s>", "a", "<|im_end|>", "b"]}
        assert control_ids(metadata) == {3}
        assert control_ids(metadata | {"tokenizer.ggml.token_type": [2, 3, 1, 1, 4]}) == {0, 1, 3}

    def test_a_token_twice_is_named(self):
        found = refusals({"tokenizer.ggml.tokens": [*TOKENS[:-1], "ab"]})
        assert found == "tokenizer.ggml.tokens[7] is 'ab', which is token 4 too; convert the model again"

    def test_sentencepiece_has_ids_by_default(self):
        assert [special_id({"tokenizer.ggml.model": "llama"}, name) for name in ("unknown", "bos", "eos")] == [0, 1, 2]

    def test_the_pre_tokenizers_are_those_that_have_a_rule(self):
        assert set(PRE_TOKENIZERS) == set(RULES)


def rope(architecture: str = "llama", **keys: object) -> dict:
    metadata = {f"{architecture}.rope.{key.replace('__', '.')}": value for key, value in keys.items()}
    return rope_scaling(metadata | {f"{architecture}.context_length": 4096}, architecture)


class TestRope:
    def test_none(self):
        for keys in ({}, {"scaling__type": "none"}, {"scaling__factor": 1.0}, {"scaling__factor": 0.0}):
            assert rope(**keys) == {"rope_type": "default"}
        assert rope(scaling__type="none", scaling__factor=4.0) == {"rope_type": "default"}

    def test_every_spelling_of_linear(self):
        linear = {"rope_type": "linear", "factor": 4.0}
        assert rope(scale_linear=4.0) == linear
        assert rope(scaling__factor=4.0) == linear
        assert rope(scaling__type="linear", scaling__factor=4.0) == linear
        assert rope(scaling__type="linear", scale_linear=4.0) == linear
        assert rope(scaling__factor=4.0, scale_linear=2.0) == linear

    def test_yarn_whole(self):
        keys = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 512}
        plain = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
        assert rope(**keys) == plain
        found = rope(**keys, scaling__attn_factor=0.5, scaling__yarn_beta_fast=64.0, scaling__yarn_beta_slow=2.0)
        assert found.pop("attention_factor") == pytest.approx(0.5 * (1 + 0.1 * math.log(4)))
        assert found == plain | {"attn_factor": 0.5, "beta_fast": 64.0, "beta_slow": 2.0}

    def test_yarn_without_an_original_context_takes_the_whole(self):
        assert rope(scaling__type="yarn", scaling__factor=2.0)["original_max_position_embeddings"] == 4096

    @pytest.mark.parametrize(
        ("keys", "named"),
        [
            ({"scaling__type": "longrope"}, "longrope"),
            ({"scaling__type": "dynamic", "scaling__factor": 2.0}, "dynamic"),
            ({"scaling__type": "yarn"}, "rope.scaling.factor"),
            ({"scaling__type": "yarn", "scaling__factor": -2.0}, "rope.scaling.factor"),
            ({"scaling__type": "yarn", "scaling__factor": 2.0, "scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor"),
            ({"scaling__factor": 4.0, "scaling__original_context_length": 512}, "original_context_length"),
            ({"scaling__type": "linear", "scaling__factor": 4.0, "scaling__yarn_beta_fast": 64.0}, "yarn_beta_fast"),
            ({"scaling__type": "linear", "scaling__factor": 4.0, "scaling__attn_factor": 0.5}, "attn_factor"),
            ({"scaling__attn_factor": 0.5}, "attn_factor"),
            ({"scaling__factor": "4"}, "rope.scaling.factor"),
        ],
    )
    def test_what_sglang_cannot_do_is_refused_by_name(self, keys, named):
        with pytest.raises(RopeError, match=named):
            rope(**keys)

    def test_sglangs_gemma2_scales_nothing(self):
        with pytest.raises(RopeError, match=r"gemma2\.rope\.scaling\.factor"):
            rope("gemma2", scaling__factor=4.0)

    @pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
    def test_llama3s_factors_give_its_settings(self, factor):
        found = llama3_scaling(llama3_factors(64, 500000.0, factor), 500000.0)
        assert (found["rope_type"], found["factor"]) == ("llama3", factor)

    @pytest.mark.parametrize("value", [0.0, -0.0, -1.0, math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("place", [0, 20, 31])
    def test_a_factor_by_which_nothing_can_be_divided_is_refused(self, value, place):
        factors = llama3_factors(64, 500000.0, 8.0)
        factors[place] = value
        with pytest.raises(
            RopeError, match=rf'"rope_freqs.weight" has the value {value:g} at place {place}, must be a'
        ):
            llama3_scaling(factors, 500000.0)

    @pytest.mark.parametrize("factors", [[1e-9] * 32, [1.0] * 31 + [8.0], [8.0] * 32, [1e30] * 32, [1.0, 0.5]])
    @pytest.mark.parametrize("theta", [1e-30, 10000.0, 1e30])
    def test_factors_of_another_rule_are_refused(self, factors, theta):
        with pytest.raises(RopeError, match=r"does not follow the Llama 3 rule|must be"):
            llama3_scaling(factors, theta)

    @pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
    def test_the_factors_are_of_32_bits(self, kind):
        found = refusals(**{"rope_freqs.weight": Tensor(kind, (16,))})
        assert found == f'tensor "rope_freqs.weight" has type {kind}, must be F32'

    def test_as_many_factors_as_half_a_head_has_dimensions(self):
        found = refusals(**{"rope_freqs.weight": Tensor("F32", (32,))})
        assert found == 'tensor "rope_freqs.weight" has shape [32], must be [16] by the metadata'

    def test_two_ways_at_once_are_refused(self):
        found = refusals({"llama.rope.scaling.factor": 4.0}, **{"rope_freqs.weight": Tensor("F32", (16,))})
        assert 'tensor "rope_freqs.weight" stands beside "llama.rope.scaling.factor"' in found


def test_every_key_says_why():
    for key in [*OTHER_KEYS.values(), *(key for keys in ARCHITECTURE_KEYS.values() for key in keys.values())]:
        assert key.why
