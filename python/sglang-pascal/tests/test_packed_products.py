"""Packed matrices on the CPU give the products of the layer that they were made from: in a real SGLang."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 products for this CPU"
)

SCRIPT = """
import json
import torch
from sglang.srt.platforms import current_platform
current_platform.device_name
from sglang.srt.layers.linear import ReplicatedLinear
from sglang_pascal.packed_products import PackedLinearMethod, pack_products

def layer_of(columns, rows, dtype=torch.bfloat16, bias=False):
    layer = ReplicatedLinear(columns, rows, bias=bias, params_dtype=dtype)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape))
    return layer

def largest_error(columns, outputs, bias):
    layer = layer_of(columns, outputs, bias=bias)
    inputs = [torch.randn(rows, columns).bfloat16() for rows in (1, 2, 8, 9, 130)]
    expected = [layer(x)[0] for x in inputs]
    assert pack_products(layer) == 1
    found = [layer(x)[0] for x in inputs]
    assert all(y.dtype == torch.bfloat16 for y in found)
    exact = columns ** 0.5
    return max(((a - b).abs().max() / exact).item() for a, b in zip(found, expected))

torch.manual_seed(0)
layer = layer_of(16, 8)
x, output = torch.ones(3, 16, dtype=torch.bfloat16), torch.zeros(3, 8, dtype=torch.bfloat16)
plain = layer(x)[0]
pack_products(layer)
written = layer.quant_method.apply_into(layer, x, output)
others = torch.nn.ModuleList([layer_of(8, 8, torch.float32), torch.nn.Linear(8, 8, dtype=torch.bfloat16)])
twice = torch.nn.ModuleList([layer_of(8, 8)])
print(json.dumps({
    "errors": [largest_error(*shape, bias) for shape in ((576, 960), (33, 7), (1, 1)) for bias in (False, True)],
    "shape": layer(torch.zeros(2, 3, 16, dtype=torch.bfloat16))[0].shape,
    "written": written is output and torch.allclose(output, plain, rtol=0.01, atol=0.01),
    "packed": isinstance(layer.quant_method, PackedLinearMethod),
    "left of the plain matrix": layer.weight.numel(),
    "others": [pack_products(others), *(module.weight.numel() for module in others)],
    "twice": [pack_products(twice), pack_products(twice)],
}))
"""


@pytest.fixture(scope="module")
def facts(in_sglang):
    """A process of its own: the script changes SGLang for its whole life."""
    return in_sglang.run(SCRIPT)


def test_products_are_those_of_the_plain_layer(facts):
    """Within one rounding to bfloat16 (8 bits), for every shape, with and without bias."""
    assert max(facts["errors"]) <= 2**-6, facts["errors"]


def test_leading_dimensions_stay(facts):
    assert facts["shape"] == [2, 3, 8]


def test_the_result_can_be_written_to_a_tensor(facts):
    assert facts["written"]


def test_the_plain_matrix_is_freed(facts):
    assert facts["packed"]
    assert facts["left of the plain matrix"] == 0


def test_other_types_and_layers_stay(facts):
    assert facts["others"] == [0, 64, 64]


def test_packing_twice_changes_nothing(facts):
    assert facts["twice"] == [1, 0]
