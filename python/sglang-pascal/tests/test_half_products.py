"""Products of float16 weights that nobody quantised: which layers get our kernel, and what it computes for them."""

from __future__ import annotations

import pytest

SCRIPT = """
import json
import torch
from sglang.srt.platforms import current_platform
current_platform.device_name
from sglang.srt.layers import logits_processor
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang_pascal import half_products

asked = []
multiply = half_products.matmul_half
def recorded(x, weight, **options):
    asked.append(len(x))
    return multiply(x, weight, **options)
half_products.matmul_half = recorded

def filled(layer):
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) / 8)
    return layer

def linear(columns, rows, bias=False, dtype=torch.float16):
    return filled(ReplicatedLinear(columns, rows, bias=bias, params_dtype=dtype))

def largest_error(layer, columns):
    inputs = [torch.randn(rows, columns).half() for rows in (1, 2, 16, 17)] + [torch.randn(2, 3, columns).half()]
    expected = [layer(x)[0] for x in inputs]
    assert half_products.use_half_products(layer, "cpu") == 1
    found = [layer(x)[0] for x in inputs]
    assert all(y.dtype == torch.float16 and y.shape == z.shape for y, z in zip(found, expected))
    return max((a - b).abs().max().item() for a, b in zip(found, expected))

torch.manual_seed(0)
errors, counts = [], []
for columns, bias in ((64, False), (64, True), (36, True)):
    asked.clear()
    errors.append(largest_error(linear(columns, 24, bias), columns))
    counts.append(list(asked))
layer, x, output = linear(64, 8), torch.randn(3, 64).half(), torch.zeros(3, 8).half()
plain = layer(x)[0]
half_products.use_half_products(layer, "cpu")
written = layer.quant_method.apply_into(layer, x, output)
head = filled(VocabParallelEmbedding(64, 32, params_dtype=torch.float16, enable_tp=False))
before = torch.nn.functional.linear(x[:, :32], head.weight)
row = head.quant_method.embedding(head, torch.tensor([3]))
half_products.use_half_products(head, "cpu")
asked.clear()
method = head.quant_method
others = torch.nn.ModuleList([linear(8, 8, dtype=torch.float32), torch.nn.Linear(8, 8).half()])
twice = torch.nn.ModuleList([linear(8, 8)])
print(json.dumps({
    "errors": errors,
    "rows that our kernel got": counts,
    "written": written is output and torch.allclose(output, plain, atol=0.01),
    "asked for logits": logits_processor.should_apply_lm_head_quant_method(head, method),
    "logits": torch.allclose(method.apply(head, x[:, :32]), before, atol=0.01) and asked == [3],
    "lookup": torch.equal(method.embedding(head, torch.tensor([3])), row),
    "others": half_products.use_half_products(others, "cpu"),
    "twice": [half_products.use_half_products(twice, "cpu"), half_products.use_half_products(twice, "cpu")],
    "elsewhere": half_products.use_half_products(linear(8, 8)),
}))
"""


@pytest.fixture(scope="module")
def facts(in_sglang):
    return in_sglang.run(SCRIPT)


def test_products_are_those_of_the_layer(facts):
    assert max(facts["errors"]) <= 2e-3
    assert facts["written"]


def test_our_kernel_gets_a_decode_steps_rows_and_whole_loads(facts):
    """17 rows are a prompt's; 36 columns are not a whole number of loads."""
    assert facts["rows that our kernel got"] == [[1, 2, 16, 6], [1, 2, 16, 6], []]


def test_the_output_matrix_gets_it_too(facts):
    assert facts["asked for logits"]
    assert facts["logits"]
    assert facts["lookup"]


def test_other_layers_stay_as_they_are(facts):
    assert (facts["others"], facts["twice"], facts["elsewhere"]) == (0, [1, 0], 0)


def test_gemma_3_rotates_without_a_product_of_matrices(in_sglang):
    found = in_sglang.run("""
import json
import torch
from transformers import Gemma3TextConfig
from sglang.srt.models.gemma3_causal import Gemma3RotaryEmbedding
from sglang_pascal.fused_layers import fuse
config = Gemma3TextConfig(hidden_size=256, num_attention_heads=4, head_dim=64)
config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
model = torch.nn.Sequential(Gemma3RotaryEmbedding(config))
rotary, positions = model[0], torch.tensor([[0, 1, 5000, 131071]])
expected = rotary(torch.zeros(1).half(), positions)
fuse(model)
with torch.profiler.profile() as profiler:
    found = rotary(torch.zeros(1).half(), positions)
print(json.dumps({
    "equal": all(torch.equal(a, b) for a, b in zip(found, expected)),
    "type": str(found[0].dtype), "shape": found[0].shape,
    "products": [event.key for event in profiler.key_averages() if event.key in ("aten::bmm", "aten::mm")],
}))
""")
    assert found == {"equal": True, "type": "torch.float16", "shape": [1, 4, 64], "products": []}
