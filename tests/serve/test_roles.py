"""Roles: an embedding model in SGLang and one in llama.cpp, served for real, and what is refused in words."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from pascaline.errors import ExitCode
from support.instance import running
from support.models import tiny, write_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.instance import Instance

START_SECONDS = 400
PROMPTS = [[5], [9, 11, 40], list(range(20, 140))]
"""Token ids; the last one is longer than a chunk."""
CHUNK = 64
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SHAPE = tiny("qwen3", tied_embeddings=True, num_hidden_layers=2, context_length=256)


def embedding_model(path: Path) -> Path:
    """Qwen3-Embedding's shape: causal, tied, the last token's vector."""
    return write_gguf(path, SHAPE, "F16", metadata={"qwen3.pooling_type": 3})


def as_folder(path: Path, folder: Path) -> Path:
    """The same model as published in a folder: safetensors, tokenizer, and how sentence-transformers pools it."""
    import torch
    from safetensors.torch import save_file
    from sglang_pascal.checkpoint.prepare import prepare

    prepare(path, folder)
    tensors = {f"model.{_hf_name(t.name)}": torch.tensor(np.array(t.data)) for t in gguf.GGUFReader(path).tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    return folder


def reference(path: Path, prompts: list[list[int]]) -> np.ndarray:
    """The vectors by transformers: the last token's, of length 1."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    reader = gguf.GGUFReader(path)

    def number(key: str) -> float:
        value: float = reader.fields[f"qwen3.{key}"].contents()
        return value

    config = Qwen3Config(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=SHAPE.num_hidden_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        max_position_embeddings=SHAPE.context_length,
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
    )
    model = Qwen3Model(config).eval()
    model.load_state_dict({_hf_name(t.name): torch.tensor(np.array(t.data, dtype=np.float32)) for t in reader.tensors})
    with torch.no_grad():
        rows = [model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts]
    return np.array([(row / row.norm()).numpy() for row in rows])


def _hf_name(name: str) -> str:
    *layer, base, kind = name.split(".")
    return ".".join([*(["layers", layer[1]] if layer else []), NAMES[base], kind])


def vectors(instance: Instance, prompts: Any) -> np.ndarray:
    answer = instance.api("/v1/embeddings", {"model": "m", "input": prompts}, timeout=300)
    assert answer.status == 200, answer.text
    return np.array([each["embedding"] for each in answer.json["data"]])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedding_model(tmp_path_factory.mktemp("embed") / "m.gguf")


@pytest.fixture(scope="module", params=["file", "folder"])
def sglang(path: Path, request: pytest.FixtureRequest) -> Iterator[Instance]:
    settings = {
        "model": path if request.param == "file" else as_folder(path, path.with_name("folder")),
        "served_model_name": "m",
        "role": "embed",
        "device": "cpu",
        "dtype": "float32",
        "context_length": 200,
        "chunked_prefill_tokens": CHUNK,
        "start_timeout": START_SECONDS,
        "stall_timeout": 120,
    }
    with running(path.parent, **settings) as started:
        started.wait_for_state("ready", seconds=START_SECONDS)
        yield started


@pytest.mark.engine
@pytest.mark.slow("starts a real engine of its own")
@pytest.mark.timeout(1200)
class TestSglang:
    def test_vectors_are_those_of_transformers(self, sglang: Instance, path: Path) -> None:
        found = vectors(sglang, PROMPTS)
        np.testing.assert_allclose(found, reference(path, PROMPTS), atol=1e-4)
        again = np.concatenate([vectors(sglang, [ids]) for ids in PROMPTS])
        np.testing.assert_allclose(again, found, atol=1e-5)

    def test_a_text(self, sglang: Instance) -> None:
        [vector] = vectors(sglang, "the weather in Rome")
        assert math.isclose(float(np.linalg.norm(vector)), 1, abs_tol=1e-4)

    @pytest.mark.parametrize(
        ("endpoint", "body"),
        [
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
            ("/v1/completions", {"prompt": "Hello"}),
        ],
    )
    def test_text_is_refused_in_words(self, sglang: Instance, endpoint: str, body: dict[str, Any]) -> None:
        answer = sglang.api(endpoint, {"model": "m", **body})
        assert answer.status == 400
        assert answer.json["error"]["message"] == (
            "this server embeds texts and generates none: it answers requests for embeddings; ask another for text"
        )

    def test_the_agent_knows_the_role(self, sglang: Instance) -> None:
        health, plan = sglang.health(), sglang.agent("/plan").json
        assert (health["role"], health["parsers"]) == ("embed", None)
        assert (plan["role"], plan["kv_tokens"], plan["tokens_per_second"]) == ("embed", 200, None)
        assert health["last_probe"]["ok"]


BERT = {"bert.context_length": 64, "bert.embedding_length": 32, "bert.feed_forward_length": 64, "bert.block_count": 2}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(9601) + letter for letter in "abcdefghijklmnopqrstuvwxyz")]
WORDS += [*"abcdefghijklmnopqrstuvwxyz", chr(9601) + "1", chr(9601) + "rome", chr(9601) + "weather"]


def encoder(path: Path, *, pooling: int = 1) -> Path:
    """A tiny BERT with random weights, as llama.cpp's converter writes one."""
    random = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "bert")
    for key, number in BERT.items():
        writer.add_uint32(key, number)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(value=False)
    writer.add_uint32("bert.pooling_type", pooling)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * 5 + [1] * (len(WORDS) - 5))
    writer.add_token_type_count(2)
    for name, number in (
        ("bos", 2),
        ("eos", 3),
        ("unknown", 1),
        ("seperator", 3),
        ("padding", 0),
        ("cls", 2),
        ("mask", 4),
    ):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, shape in bert_tensors(ranks=pooling == 4).items():
        values = random.standard_normal(shape).astype(np.float32) * 0.1
        writer.add_tensor(name, values + 1 if name.endswith("norm.weight") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bert_tensors(*, ranks: bool) -> dict[str, tuple[int, ...]]:
    width, inner = BERT["bert.embedding_length"], BERT["bert.feed_forward_length"]
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(WORDS), width),
        "token_types.weight": (2, width),
        "position_embd.weight": (BERT["bert.context_length"], width),
        "token_embd_norm.weight": (width,),
        "token_embd_norm.bias": (width,),
    }
    for layer in range(BERT["bert.block_count"]):
        for name, rows, columns in (
            *((f"attn_{part}", width, width) for part in ("q", "k", "v", "output")),
            ("ffn_up", inner, width),
            ("ffn_down", width, inner),
        ):
            found |= {f"blk.{layer}.{name}.weight": (rows, columns), f"blk.{layer}.{name}.bias": (rows,)}
        for name in ("attn_output_norm", "layer_output_norm"):
            found |= {f"blk.{layer}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
    if ranks:
        found |= {
            "cls.weight": (width, width),
            "cls.bias": (width,),
            "cls.output.weight": (1, width),
            "cls.output.bias": (1,),
        }
    return found


@pytest.fixture(scope="module", params=["embed", "rerank"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    folder = tmp_path_factory.mktemp("bert")
    path = encoder(folder / "m.gguf", pooling=1 if request.param == "embed" else 4)
    with running(folder, model=path, role=request.param, engine="llama.cpp", device="cpu") as started:
        started.wait_for_state("ready")
        yield started
        assert started.stop() == ExitCode.OK


@pytest.mark.skipif(
    shutil.which("llama-server") is None, reason="llama-server is not on PATH (Debian: llama.cpp-tools)"
)
class TestLlamaCpp:
    def test_it_embeds_or_ranks(self, llama: Instance) -> None:
        if llama.settings["role"] == "embed":
            found = vectors(llama, ["rome", "weather", "a b c d " * 14])
            assert found.shape == (3, BERT["bert.embedding_length"])
            np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
        else:
            body = {"query": "rome", "documents": ["weather", "a b c"]}
            results = llama.api("/v1/rerank", body).json["results"]
            assert {each["index"] for each in results} == {0, 1}
        assert llama.health()["role"] == llama.settings["role"]
        assert llama.agent("/plan").json["kv_bytes"] == 0

    def test_text_is_refused(self, llama: Instance) -> None:
        answer = llama.api("/v1/completions", {"prompt": "a", "max_tokens": 1})
        assert answer.status >= 400
