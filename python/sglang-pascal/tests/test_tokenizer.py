"""The tokenizer out of a GGUF file cuts text as the model's own does."""

from __future__ import annotations

import pytest
import transformers
from sglang_pascal.checkpoint.gguf_file import GgufFile
from sglang_pascal.checkpoint.prepare import prepare
from sglang_pascal.checkpoint.tokenizer import PRE_TOKENIZERS, build_tokenizer, tokenizer_config
from sglang_pascal.compat import prepared_tokenizer, resolved_tokenizer
from sglang_pascal.errors import CheckpointError
from tokenizers import Tokenizer, models, pre_tokenizers

NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "tabs\tand\nnew\r\nlines\n\n\n",
    "don't can't I'LL we've",
    "1234567890 3.14 0x7f 1,000,000",
    "na\u00efve caf\u00e9 e\u0301 \u212b",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\U0001f469\u200d\U0001f680 \U0001f1eb\U0001f1f7",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|><|im_start|>",
    "def f(x):\n    return x**2  # comment\n",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "\x00\x01\x7f\ufffd",
    "a" * 300,
    "!?!?!?... --- ***",
]


@pytest.fixture(scope="module")
def builtin(builtin_gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("builtin") / "out"
    prepare(builtin_gguf, folder)
    return folder


@pytest.fixture(scope="module")
def metadata(builtin_gguf):
    return GgufFile(builtin_gguf).metadata


@pytest.fixture(scope="module")
def built(metadata):
    return build_tokenizer(metadata)


@pytest.fixture(scope="module")
def loaded(builtin):
    """By transformers, which SGLang uses."""
    return transformers.AutoTokenizer.from_pretrained(builtin)


@pytest.fixture(scope="module")
def published(metadata):
    """Digits one by one, then GPT-2's rule, then merges in order: built here by hand from the library's parts."""
    reference = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])},
            [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
        )
    )
    reference.add_special_tokens(
        [
            token
            for token, kind in zip(
                metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True
            )
            if kind == 3
        ]
    )
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return reference


@pytest.mark.parametrize("text", NASTY)
def test_text_comes_back_unchanged(text, built):
    assert built.decode(built.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", NASTY)
def test_what_sglang_loads_is_what_was_built(text, loaded, built):
    """transformers reads the folder without changing the rules."""
    assert loaded(text)["input_ids"] == built.encode(text).ids


@pytest.mark.parametrize("text", NASTY)
def test_the_builtin_model_cuts_as_its_publisher_says(text, published, built):
    assert built.encode(text).ids == published.encode(text).ids


def test_special_tokens_are_single_and_hidden_when_asked(loaded):
    ids = loaded("<|im_start|>user<|im_end|>")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert loaded.decode(ids, skip_special_tokens=True) == "user"


def test_the_chat_template_is_the_files_own(loaded):
    text = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def byte_level(pre, **changes):
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", "\u00c3\u00a9"]
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["1 2", "12 3", "\u00c3 \u00a9"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    } | changes


def pieces(metadata, text):
    return build_tokenizer(metadata).encode(text).tokens


class TestByteLevel:
    @pytest.mark.parametrize(
        ("pre", "expected"),
        [
            ("gpt-2", ["123", "4"]),
            ("default", ["123", "4"]),
            ("smollm", ["1", "2", "3", "4"]),
            ("qwen2", ["1", "2", "3", "4"]),
            ("llama-bpe", ["<s>", "123", "4"]),
            ("tekken", ["<s>", "1", "2", "3", "4"]),
        ],
    )
    def test_digits(self, pre, expected):
        assert pieces(byte_level(pre), "1234") == expected

    @pytest.mark.parametrize(
        ("pre", "expected"), [("default", ["12", "'", "s", "'", "s"]), ("gpt-2", ["12", "'s", "'s"])]
    )
    def test_the_default_rule_is_llama_cpps(self, pre, expected):
        """It takes punctuation off before it looks for contractions."""
        tokens = byte_level(pre)["tokenizer.ggml.tokens"] + ["'s"]
        changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["1 2", "' s"]}
        assert pieces(byte_level(pre, **changes), "12's's") == expected

    def test_an_end_of_turn_is_one_token_whatever_its_type(self):
        tokens = [*byte_level("gpt-2")["tokenizer.ggml.tokens"], "<|im_end|>"]
        assert pieces(byte_level("gpt-2", **{"tokenizer.ggml.tokens": tokens}), "1<|im_end|>") == ["1", "<|im_end|>"]

    def test_the_unknown_token_is_one_token(self):
        kinds = byte_level("gpt-2")["tokenizer.ggml.token_type"]
        assert pieces(byte_level("gpt-2", **{"tokenizer.ggml.token_type": [2, *kinds[1:]]}), "<s>") == ["<s>"]

    def test_qwen2_composes_characters_first(self):
        assert pieces(byte_level("qwen2"), "e\u0301") == ["\u00c3\u00a9"]
        assert pieces(byte_level("gpt-2"), "e\u0301") != ["\u00c3\u00a9"]

    def test_the_file_decides_about_bos_and_eos(self):
        add = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
        assert pieces(byte_level("qwen2", **add), "1") == ["<s>", "1", "</s>"]
        assert pieces(byte_level("llama-bpe", **{"tokenizer.ggml.add_bos_token": False}), "1") == ["1"]
        assert tokenizer_config(byte_level("qwen2", **add))["add_bos_token"] is True

    @pytest.mark.parametrize("pre", PRE_TOKENIZERS)
    @pytest.mark.parametrize(
        "text", [text for text in NASTY if text == text.encode().decode() and "\u0301" not in text]
    )
    def test_no_rule_loses_text(self, pre, text):
        tokenizer = build_tokenizer(byte_level(pre, **{"tokenizer.ggml.add_bos_token": False}))
        expected = text.replace("\u212b", "\u00c5") if PRE_TOKENIZERS[pre].nfc else text
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == expected

    def test_an_unknown_rule_is_refused(self):
        with pytest.raises(CheckpointError) as error:
            build_tokenizer(byte_level("klingon"))
        assert str(error.value) == f'tokenizer.ggml.pre is "klingon"; supported are {", ".join(PRE_TOKENIZERS)}'

    def test_an_unknown_family_is_refused(self):
        with pytest.raises(CheckpointError) as error:
            build_tokenizer(byte_level("gpt-2", **{"tokenizer.ggml.model": "bert"}))
        assert str(error.value) == 'tokenizer.ggml.model is "bert"; supported are gpt2 and llama'


class TestServedTokenizer:
    """SGLang's way to load a tokenizer, wrapped."""

    def test_a_prepared_folder_of_qwen2_keeps_the_files_own_rule(self, tiny_model, tmp_path):
        """Without the wrapper, transformers would split its digits, as Qwen's own tokenizer does."""
        prepare(tiny_model("qwen2").path, tmp_path / "out")
        found = prepared_tokenizer(lambda *_: pytest.fail("not asked"), str(tmp_path / "out"), trust_remote_code=False)
        file = GgufFile(tiny_model("qwen2").path)
        assert file.metadata["tokenizer.ggml.pre"] == "gpt-2"
        for text in NASTY:
            assert found(text)["input_ids"] == build_tokenizer(file.metadata).encode(text).ids
        assert found.eos_token == "</s>"
        assert resolved_tokenizer(lambda *_: pytest.fail("not asked"), str(tmp_path / "out")) is found
        # By itself, and for the next one who asks, it is another object: SGLang may change what it gets.
        another = resolved_tokenizer(lambda *_: pytest.fail("not asked"), tmp_path / "out")
        assert another is not found
        assert another.get_vocab() == found.get_vocab()

    @pytest.mark.parametrize("load", [prepared_tokenizer, resolved_tokenizer])
    def test_another_folder_is_loaded_as_before(self, load, tmp_path):
        found = load(lambda *given, **named: (given, named), str(tmp_path), 1, revision="x")
        assert found == ((str(tmp_path), 1), {"revision": "x"})


def sentencepiece(**changes):
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", "a", "b", "c", "ab", "bc", "\u2581a", "\u2581ab"]
    scores = {"ab": -3.0, "bc": -1.0, "\u2581a": -2.0, "\u2581ab": -4.0}
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [scores.get(word, -10.0) for word in words],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 8,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


class TestSentencePiece:
    def test_the_best_score_is_joined_first(self):
        assert pieces(sentencepiece(), "abc") == ["<s>", "\u2581a", "bc"]

    def test_a_leading_space_is_added_unless_the_file_says_not(self):
        assert pieces(sentencepiece(), "ab") == ["<s>", "\u2581ab"]
        assert pieces(sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}), "ab") == ["<s>", "ab"]

    def test_unknown_characters_become_bytes(self):
        assert pieces(sentencepiece(), "\u00e9") == ["<s>", "\u2581", "<0xC3>", "<0xA9>"]

    @pytest.mark.parametrize("prefix", [True, False])
    @pytest.mark.parametrize("text", [text for text in NASTY if text])
    def test_no_text_is_lost(self, text, prefix):
        tokenizer = build_tokenizer(sentencepiece(**{"tokenizer.ggml.add_space_prefix": prefix}))
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
