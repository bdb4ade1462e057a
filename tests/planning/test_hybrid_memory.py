"""KV cache and recurrent state of hybrid models, equal to the byte to what llama-server says that it allocates.

Tiny files of each architecture, all weights zero, with sizes that llama.cpp's log shows without rounding.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from gguf import GGUFWriter
from pascaline.cards import load_card
from pascaline.engines.llama_cpp import LlamaCppEngine
from pascaline.models.gguf import read_gguf
from support.instance import free_port
from support.planning import request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HIDDEN, FEED, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 64, 128, 300, 4, 2, 16
INNER, STATE, GROUPS, RANK, KERNEL, COLUMNS = 1024, 128, 4, 8, 5, 257
CONTEXT, REQUESTS = 512, 4
LOAD_SECONDS = 30.0
BYTE_TOKENS = 256
ROUNDING_BYTES = 2**20 // 200 + 1
"""The log has two decimals of MiB. Jamba's inner size must be twice its hidden one, which gives no round number."""
LOADED = "model loaded"
SIZE = re.compile(r"(llama_kv_cache|llama_memory_recurrent): size =\s+([\d.]+) MiB")
ATTENTION = {0: False, 1: True, 2: False, 3: False, 4: False}
"""Layer -> whether it attends, in the architectures that alternate as they like."""


class Writer:
    """A GGUF file of zeros."""

    def __init__(self, path: Path, architecture: str, layers: int) -> None:
        self.file, self.architecture, self.layers = GGUFWriter(path, architecture), architecture, layers
        for key, value in {
            "block_count": layers,
            "context_length": 4096,
            "embedding_length": HIDDEN,
            "attention.head_count": HEADS,
            "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM,
            "rope.dimension_count": HEAD_DIM,
            "vocab_size": VOCAB,
        }.items():
            self.number(key, value)
        for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
            self.file.add_float32(f"{architecture}.{key}", 1e-5)
        self._tokenizer()
        self.zeros("token_embd.weight", VOCAB, HIDDEN)

    def number(self, key: str, value: int) -> None:
        self.file.add_uint32(f"{self.architecture}.{key}", value)

    def per_layer(self, key: str, values: list[int]) -> None:
        self.file.add_array(f"{self.architecture}.{key}", values)

    def zeros(self, name: str, *shape: int) -> None:
        self.file.add_tensor(name, np.zeros(shape, dtype=np.float32))

    def norms(self, layer: int, *names: str) -> None:
        for name in names:
            self.zeros(f"blk.{layer}.{name}", HIDDEN)

    def attention(self, layer: int, *, norms: bool = False, gated: bool = False) -> None:
        prefix = f"blk.{layer}.attn_"
        self.zeros(f"{prefix}q.weight", HEADS * HEAD_DIM * (2 if gated else 1), HIDDEN)
        for name in ("k", "v"):
            self.zeros(f"{prefix}{name}.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        self.zeros(f"{prefix}output.weight", HIDDEN, HEADS * HEAD_DIM)
        for name in ("q", "k") if norms else ():
            self.zeros(f"{prefix}{name}_norm.weight", HEAD_DIM)

    def feed_forward(self, layer: int, *names: str) -> None:
        for name in names or ("gate", "up", "down"):
            shape = (HIDDEN, FEED) if name == "down" else (FEED, HIDDEN)
            self.zeros(f"blk.{layer}.ffn_{name}.weight", *shape)

    def mamba_sizes(self, *, inner: int = INNER, groups: int = GROUPS) -> None:
        sizes = {"conv_kernel": KERNEL, "inner_size": inner, "state_size": STATE, "time_step_rank": RANK}
        for key, value in (sizes | ({"group_count": groups} if groups else {})).items():
            self.number(f"ssm.{key}", value)

    def mamba2(self, layer: int) -> None:
        prefix, channels = f"blk.{layer}.ssm_", INNER + 2 * GROUPS * STATE
        self.zeros(f"{prefix}in.weight", INNER + channels + RANK, HIDDEN)
        self.zeros(f"{prefix}conv1d.weight", channels, KERNEL)
        self.zeros(f"{prefix}conv1d.bias", channels)
        self.zeros(f"{prefix}dt.bias", RANK)
        self.zeros(f"{prefix}a", RANK, 1)
        self.zeros(f"{prefix}d", RANK, 1)
        self.zeros(f"{prefix}norm.weight", GROUPS, INNER // GROUPS)
        self.zeros(f"{prefix}out.weight", HIDDEN, INNER)

    def close(self) -> None:
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_tensors_to_file()
        self.file.close()

    def _tokenizer(self) -> None:
        words = [f"t{index}" for index in range(VOCAB - BYTE_TOKENS - 3)]
        self.file.add_tokenizer_model("llama")
        self.file.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(BYTE_TOKENS)), *words])
        self.file.add_token_scores([0.0] * VOCAB)
        self.file.add_token_types([2, 3, 3, *[6] * BYTE_TOKENS, *[1] * len(words)])

    def experts(self, layer: int) -> None:
        """Four experts, of which two compute each token, and one that computes all."""
        shapes = {
            "gate_inp.weight": (4, HIDDEN),
            "gate_exps.weight": (4, 32, HIDDEN),
            "up_exps.weight": (4, 32, HIDDEN),
            "down_exps.weight": (4, HIDDEN, 32),
            "gate_shexp.weight": (32, HIDDEN),
            "up_shexp.weight": (32, HIDDEN),
            "down_shexp.weight": (HIDDEN, 32),
        }
        for name, shape in shapes.items():
            self.zeros(f"blk.{layer}.ffn_{name}", *shape)

    def next_token(self, layer: int) -> None:
        """What a layer that predicts a further token has besides."""
        self.zeros(f"blk.{layer}.nextn.eh_proj.weight", HIDDEN, 2 * HIDDEN)
        self.norms(layer, "nextn.enorm.weight", "nextn.hnorm.weight", "nextn.shared_head_norm.weight")

    def output(self) -> None:
        self.zeros("output_norm.weight", HIDDEN)
        self.zeros("output.weight", VOCAB, HIDDEN)


def lfm2(path: Path) -> None:
    """Short convolutions in layers 0 and 2."""
    writer = Writer(path, "lfm2", 4)
    writer.number("feed_forward_length", FEED)
    writer.per_layer("attention.head_count_kv", [0, KV_HEADS, 0, KV_HEADS])
    writer.number("shortconv.l_cache", COLUMNS)
    writer.zeros("token_embd_norm.weight", HIDDEN)
    for layer in range(4):
        writer.norms(layer, "attn_norm.weight", "ffn_norm.weight")
        writer.feed_forward(layer)
        if layer % 2:
            writer.attention(layer, norms=True)
        else:
            writer.zeros(f"blk.{layer}.shortconv.conv.weight", HIDDEN, COLUMNS)
            writer.zeros(f"blk.{layer}.shortconv.in_proj.weight", 3 * HIDDEN, HIDDEN)
            writer.zeros(f"blk.{layer}.shortconv.out_proj.weight", HIDDEN, HIDDEN)
    writer.close()


def nemotron_h(path: Path) -> None:
    """Mamba 2, attention, MLP, Mamba 2: the third keeps nothing."""
    writer = Writer(path, "nemotron_h", 4)
    writer.per_layer("attention.head_count_kv", [0, KV_HEADS, 0, 0])
    writer.per_layer("feed_forward_length", [0, 0, FEED, 0])
    writer.mamba_sizes()
    writer.output()
    for layer in range(4):
        writer.norms(layer, "attn_norm.weight")
        if layer == 1:
            writer.attention(layer)
        elif layer == 2:
            writer.feed_forward(layer, "up", "down")
        else:
            writer.mamba2(layer)
    writer.close()


def falcon_h1(path: Path) -> None:
    """Every layer attends and keeps a state."""
    writer = Writer(path, "falcon-h1", 4)
    writer.number("feed_forward_length", FEED)
    writer.number("attention.head_count_kv", KV_HEADS)
    writer.mamba_sizes()
    writer.output()
    for layer in range(4):
        writer.norms(layer, "attn_norm.weight", "ffn_norm")
        writer.attention(layer)
        writer.mamba2(layer)
        writer.feed_forward(layer)
    writer.close()


def jamba(path: Path) -> None:
    """Mamba 1 in four of five layers."""
    writer = Writer(path, "jamba", 5)
    writer.number("feed_forward_length", FEED)
    writer.per_layer("attention.head_count_kv", [KV_HEADS if attends else 0 for attends in ATTENTION.values()])
    inner = 2 * HIDDEN
    writer.mamba_sizes(inner=inner, groups=0)
    writer.output()
    shapes = {
        "in.weight": (2 * inner, HIDDEN),
        "conv1d.weight": (inner, KERNEL),
        "conv1d.bias": (inner,),
        "x.weight": (RANK + 2 * STATE, inner),
        "dt_norm.weight": (RANK,),
        "dt.weight": (inner, RANK),
        "dt.bias": (inner,),
        "b_norm.weight": (STATE,),
        "c_norm.weight": (STATE,),
        "a": (inner, STATE),
        "d": (inner,),
        "out.weight": (HIDDEN, inner),
    }
    for layer, attends in ATTENTION.items():
        writer.norms(layer, "attn_norm.weight", "ffn_norm.weight")
        writer.feed_forward(layer)
        if attends:
            writer.attention(layer)
        else:
            for name, shape in shapes.items():
                writer.zeros(f"blk.{layer}.ssm_{name}", *shape)
    writer.close()


def qwen3next(path: Path) -> None:
    """Gated delta nets in layers 0 and 2, whose tensors include attn_qkv."""
    writer = Writer(path, "qwen3next", 4)
    numbers = {"attention.head_count_kv": KV_HEADS, "full_attention_interval": 2, "expert_count": 4}
    numbers |= {"expert_used_count": 2, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 32}
    for key, value in numbers.items():
        writer.number(key, value)
    writer.mamba_sizes()
    writer.output()
    keys = STATE * GROUPS
    delta = {
        "attn_qkv.weight": (2 * keys + INNER, HIDDEN),
        "attn_gate.weight": (INNER, HIDDEN),
        "ssm_conv1d.weight": (2 * keys + INNER, KERNEL),
        "ssm_dt.bias": (RANK,),
        "ssm_a": (RANK,),
        "ssm_ba.weight": (2 * RANK, HIDDEN),
        "ssm_norm.weight": (INNER // RANK,),
        "ssm_out.weight": (HIDDEN, INNER),
    }
    for layer in range(4):
        writer.norms(layer, "attn_norm.weight", "post_attention_norm.weight")
        writer.experts(layer)
        writer.zeros(f"blk.{layer}.ffn_gate_inp_shexp.weight", HIDDEN)
        if layer % 2:
            writer.attention(layer, norms=True, gated=True)
        else:
            for name, shape in delta.items():
                writer.zeros(f"blk.{layer}.{name}", *shape)
    writer.close()


def glm45(path: Path) -> None:
    """GLM-4.5: a dense layer, two with experts, and one that predicts a further token and keeps nothing."""
    writer = Writer(path, "glm4moe", 4)
    numbers = {"attention.head_count_kv": KV_HEADS, "feed_forward_length": FEED, "nextn_predict_layers": 1}
    numbers |= {"expert_count": 4, "expert_used_count": 2, "expert_shared_count": 1, "expert_feed_forward_length": 32}
    for key, value in (numbers | {"leading_dense_block_count": 1}).items():
        writer.number(key, value)
    writer.output()
    for layer in range(4):
        writer.norms(layer, "attn_norm.weight", "post_attention_norm.weight")
        writer.attention(layer)
        if layer:
            writer.experts(layer)
            writer.zeros(f"blk.{layer}.exp_probs_b.bias", 4)
        else:
            writer.feed_forward(layer)
    writer.next_token(3)
    writer.close()


def qwen35(path: Path, *, experts: bool = False, predicting: int = 1, interval: int | None = 2) -> None:
    """Qwen3.5: gated delta nets, attention in the last layer of each interval, and a layer that predicts a token."""
    layers = 4 + predicting
    writer = Writer(path, "qwen35moe" if experts else "qwen35", layers)
    numbers = {"attention.head_count_kv": KV_HEADS, "feed_forward_length": FEED, "nextn_predict_layers": predicting}
    numbers |= {"full_attention_interval": interval} if interval else {}
    sizes = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    for key, value in (numbers | (sizes | {"expert_shared_feed_forward_length": 32} if experts else {})).items():
        writer.number(key, value)
    writer.per_layer("rope.dimension_sections", [4, 2, 2, 0])
    writer.mamba_sizes()
    writer.output()
    keys, values = STATE * GROUPS, STATE * RANK
    delta = {
        "attn_qkv.weight": (2 * keys + values, HIDDEN),
        "attn_gate.weight": (values, HIDDEN),
        "ssm_conv1d.weight": (2 * keys + values, KERNEL),
        "ssm_dt.bias": (RANK,),
        "ssm_a": (RANK,),
        "ssm_beta.weight": (RANK, HIDDEN),
        "ssm_alpha.weight": (RANK, HIDDEN),
        "ssm_norm.weight": (STATE,),
        "ssm_out.weight": (HIDDEN, values),
    }
    for layer in range(layers):
        writer.norms(layer, "attn_norm.weight", "post_attention_norm.weight")
        if experts:
            writer.experts(layer)
            writer.zeros(f"blk.{layer}.ffn_gate_inp_shexp.weight", HIDDEN)
        else:
            writer.feed_forward(layer)
        if layer >= 4 or (layer + 1) % (interval or 4) == 0:
            writer.attention(layer, norms=True, gated=True)
        else:
            for name, shape in delta.items():
                writer.zeros(f"blk.{layer}.{name}", *shape)
    for layer in range(4, layers):
        writer.next_token(layer)
    writer.close()


def qwen35moe(path: Path) -> None:
    """Likewise with experts."""
    qwen35(path, experts=True)


def qwen35_alone(path: Path) -> None:
    """Without a prediction layer, and with llama.cpp's default interval."""
    qwen35(path, predicting=0, interval=None)


def allocated(model: Path) -> int:
    """Bytes of KV cache and recurrent state by llama-server's own log, which it writes while it loads."""
    program = shutil.which("llama-server")
    if program is None:
        pytest.skip("no llama-server on PATH")
    flags = ("-c", str(CONTEXT * REQUESTS), "-np", str(REQUESTS), "-t", "1", "--no-warmup", "--port", str(free_port()))
    sizes, line = dict[str, float](), ""
    with subprocess.Popen(
        [program, "-m", model, *flags, "-v"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        late = threading.Timer(LOAD_SECONDS, server.kill)
        late.start()
        assert server.stdout is not None
        for line in server.stdout:
            if match := SIZE.search(line):
                sizes[match[1]] = float(match[2])
            if LOADED in line:
                break
        late.cancel()
        server.kill()
    assert LOADED in line, line
    return round(sum(sizes.values()) * 2**20)


@pytest.mark.parametrize(
    ("make", "rounding"),
    [
        (lfm2, 0),
        (nemotron_h, 0),
        (falcon_h1, 0),
        (jamba, ROUNDING_BYTES),
        (qwen3next, 0),
        (glm45, 0),
        (qwen35, 0),
        (qwen35moe, 0),
        (qwen35_alone, ROUNDING_BYTES),
    ],
)
@pytest.mark.timeout(LOAD_SECONDS * 4)
def test_the_plan_is_what_llama_server_allocates(make: Callable[[Path], None], rounding: int, tmp_path: Path) -> None:
    path = tmp_path / f"{make.__name__}.gguf"
    make(path)
    spec = read_gguf(path)
    asked = request(
        load_card("tesla-p4"),
        engine="llama.cpp",
        context_length=CONTEXT,
        max_running_requests=REQUESTS,
        kv_dtype="fp16",
    )
    assert abs(LlamaCppEngine.memory.pool_of(spec, asked).n_bytes - allocated(path)) <= rounding
