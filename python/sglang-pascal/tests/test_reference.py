"""The references against what others wrote: gguf's dequantiser, torch's attention, and brute force."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_pascal import reference
from sglang_pascal.kernels.formats import FORMATS
from sglang_pascal.reference import (
    argmax_ref,
    attention_ref,
    dequantize_ref,
    half_matmul_ref,
    quantize_kv_ref,
    quantize_ref,
    quantized_matmul_ref,
    repack_ref,
    rms_norm_ref,
    rope_ref,
    silu_mul_ref,
    top_k_top_p_filter_ref,
    unrepack_ref,
)
from sglang_pascal.selftest import extreme_blocks, random_blocks

TYPES = sorted(FORMATS)
DOCUMENT = Path(__file__).parents[3] / "docs" / "kernels.md"
REFERENCES = {
    "repack": ["repack_ref"],
    "unrepack": ["unrepack_ref"],
    "dequantize": ["dequantize_ref"],
    "decode_matmul": ["quantized_matmul_ref"],
    "tile_matmul": ["quantized_matmul_ref"],
    "half_matmul": ["half_matmul_ref"],
    "attention_decode": ["attention_ref", "read_pool_ref"],
    "attention_prefill": ["attention_ref", "read_pool_ref"],
    "attention_combine": ["attention_ref", "quantize_ref"],
    "rope_and_store": ["rms_norm_ref", "rope_ref", "quantize_kv_ref"],
    "rms_norm_quantize": ["rms_norm_ref", "quantize_ref"],
    "silu_mul_quantize": ["silu_mul_ref", "quantize_ref"],
    "quantize": ["quantize_ref"],
    "top_k_top_p_filter": ["top_k_top_p_filter_ref"],
    "argmax": ["argmax_ref"],
}
"""Kernel, without its type and width -> what it computes, in this order."""


def test_every_kernel_has_a_reference():
    """The document's table is the compiler's, by another test; probes measure the card and compute nothing."""
    rows = [line.split("|")[1].strip() for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    kernels = {row for row in rows if any(row == name or row.startswith(f"{name}_") for name in REFERENCES)}
    others = {row for row in rows if "_" in row and not row.startswith("probe_") and " " not in row} - kernels
    assert {other for other in others if other not in FORMATS} == set()
    assert {name for name in REFERENCES if not any(kernel.startswith(name) for kernel in kernels)} == set()
    assert [name for names in REFERENCES.values() for name in names if not hasattr(reference, name)] == []


def test_float16_products_are_those_of_the_same_numbers_in_double():
    x, weights = torch.randn(3, 200).half(), torch.randn(7, 200).half()
    torch.testing.assert_close(half_matmul_ref(x, weights).double(), x.double() @ weights.double().T, rtol=0, atol=1e-4)


def test_the_largest_is_the_first_of_equals_and_a_nan_if_there_is_one():
    logits = torch.tensor([[1.0, 3.0, 3.0], [torch.inf, torch.nan, 0.0], [-torch.inf] * 3])
    assert argmax_ref(logits).tolist() == [1, 1, 0]


@pytest.mark.parametrize("tensor_type", TYPES)
class TestWeights:
    @pytest.mark.parametrize("blocks", ["random", "extreme"])
    def test_dequantised_values_are_those_of_the_gguf_package(self, tensor_type, blocks):
        raw = random_blocks(tensor_type, 7, 512, seed=3) if blocks == "random" else extreme_blocks(tensor_type)
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[tensor_type])
        # The order of two multiplications differs for some types: one rounding.
        np.testing.assert_allclose(dequantize_ref(raw, tensor_type).numpy(), expected, rtol=3e-7, atol=1e-12)

    @given(rows=st.integers(1, 70), blocks=st.integers(1, 24), seed=st.integers(0, 2**31))
    @settings(max_examples=25, deadline=None)
    def test_repacking_loses_nothing(self, tensor_type, rows, blocks, seed):
        columns = blocks * FORMATS[tensor_type].block_weights
        raw = random_blocks(tensor_type, rows, columns, seed)
        packed = repack_ref(raw, tensor_type)
        assert packed.numel() == FORMATS[tensor_type].packed_bytes(rows, columns)
        assert torch.equal(unrepack_ref(packed, tensor_type, rows, columns), raw)

    def test_repacking_adds_no_bytes_to_whole_groups_and_tiles(self, tensor_type):
        raw = random_blocks(tensor_type, 64, 1024)
        assert repack_ref(raw, tensor_type).numel() == raw.numel()

    def test_padding_is_zero_weights(self, tensor_type):
        form = FORMATS[tensor_type]
        packed = repack_ref(random_blocks(tensor_type, 33, 256), tensor_type)
        assert not dequantize_ref(unrepack_ref(packed, tensor_type, 64, 256), tensor_type)[33:].any()
        assert form.packed_bytes(33, 256) == 64 * form.row_bytes(256)


class TestActivations:
    def test_a_block_is_within_half_a_step(self):
        x = torch.randn(5, 512) * torch.logspace(-6, 6, 512)
        q, scales = quantize_ref(x)
        steps = scales[..., 0].repeat_interleave(32, dim=1)
        assert ((q * steps - x).abs() <= steps * 0.50001).all()
        assert (scales[..., 1] == scales[..., 0] * q.view(5, -1, 32).sum(-1)).all()

    def test_two_int8_are_16_bits(self):
        x = torch.randn(3, 256)
        q, scales = quantize_ref(x, is_16_bit=True)
        value = (q.view(2, 3, 8, 32) * scales.view(2, 3, 8, 1, 2)[..., 0]).sum(0).view(3, 256)
        step = scales[:3, :, 0].repeat_interleave(32, dim=1) / 256
        assert ((value - x).abs() <= step * 1.01).all(), "half a step below the largest, a whole one at 127.5 of 128"

    def test_the_scales_of_the_low_int8_are_of_both(self):
        q, scales = quantize_ref(torch.randn(3, 256), is_16_bit=True)
        whole = 256 * q[:3].int() + q[3:].int()
        assert (scales[3:, :, 0] == scales[:3, :, 0] / 256).all()
        assert (scales[3:, :, 1] == scales[3:, :, 0] * whole.view(3, 8, 32).sum(-1)).all()

    def test_a_product_of_two_int8_is_that_of_their_value(self):
        (q, scales), weights = quantize_ref(torch.randn(3, 256), is_16_bit=True), torch.randn(5, 256)
        value = ((256 * q[:3].double() + q[3:]).view(3, 8, 32) * scales[3:, :, :1].double()).view(3, 256)
        found = quantized_matmul_ref(q, scales, weights, is_16_bit=True)
        assert torch.allclose(found, value @ weights.double().T, rtol=1e-12)

    def test_columns_are_padded_with_zeros_to_a_tile(self):
        q, scales = quantize_ref(torch.ones(2, 40))
        assert q.shape == (2, 256)
        assert scales.shape == (2, 8, 2)
        assert not q[:, 40:].any()
        assert not scales[:, 2:].any()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_no_number_shows_in_the_scale_of_its_block(self, bad):
        x = torch.ones(1, 256)
        x[0, 40] = bad
        _, scales = quantize_ref(x)
        finite = torch.isfinite(scales[0, :, 0])
        assert finite.tolist() == [True, False, True, True, True, True, True, True]

    def test_a_block_of_zeros_has_scale_zero(self):
        q, scales = quantize_ref(torch.zeros(1, 256))
        assert not q.any()
        assert not scales.any()

    def test_the_product_is_that_of_the_dequantised_matrices(self):
        x, weights = torch.randn(3, 512), torch.randn(9, 512)
        q, scales = quantize_ref(x)
        exact = (q.double() * scales[..., 0].double().repeat_interleave(32, 1)) @ weights.double().T
        assert torch.allclose(quantized_matmul_ref(q, scales, weights), exact, rtol=1e-12, atol=1e-12)

    def test_norm_and_activation_are_those_of_torch(self):
        x, weight = torch.randn(4, 96), torch.randn(96)
        assert torch.allclose(rms_norm_ref(x, weight, 1e-5), F.rms_norm(x, (96,), weight, 1e-5), atol=1e-5)
        gate_up = torch.randn(4, 64)
        gate, up = gate_up.chunk(2, dim=-1)
        assert torch.allclose(silu_mul_ref(gate_up), F.silu(gate) * up, atol=1e-6)


class TestRope:
    def test_a_rotation_is_one_of_complex_numbers(self):
        x, positions = torch.randn(3, 2, 8), torch.tensor([0, 5, 63])
        angles = torch.arange(64)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
        turn = torch.polar(torch.ones(3, 4), angles[positions])[:, None]
        halves = torch.complex(x[..., :4], x[..., 4:]) * turn
        pairs = torch.view_as_complex(x.view(3, 2, 4, 2)) * turn
        neox, plain = (rope_ref(x, positions, cos_sin, is_neox=is_neox) for is_neox in (True, False))
        assert torch.allclose(neox, torch.cat([halves.real, halves.imag], -1), atol=1e-6)
        assert torch.allclose(plain, torch.view_as_real(pairs).flatten(-2), atol=1e-6)

    def test_dimensions_beyond_the_rotary_ones_stay(self):
        x = torch.randn(1, 1, 8)
        cos_sin = torch.tensor([[0.0, 1.0]])  # a quarter turn of two dimensions
        assert rope_ref(x, torch.tensor([0]), cos_sin, is_neox=True)[0, 0].tolist() == [
            -x[0, 0, 1].item(),
            x[0, 0, 0].item(),
            *x[0, 0, 2:].tolist(),
        ]


class TestAttention:
    @pytest.mark.parametrize(("new", "length"), [(1, 1), (1, 9), (4, 4), (3, 11)])
    @pytest.mark.parametrize("group", [1, 3])
    def test_it_is_torchs_with_the_mask_of_the_last_positions(self, new, length, group):
        query = torch.randn(new, 2 * group, 16, dtype=torch.float64)
        keys, values = (torch.randn(length, 2, 16, dtype=torch.float64) for _ in range(2))
        mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        expected = F.scaled_dot_product_attention(
            query.transpose(0, 1),
            *(t.repeat_interleave(group, 1).transpose(0, 1) for t in (keys, values)),
            attn_mask=mask,
            scale=0.3,
        )
        assert torch.allclose(attention_ref(query, keys, values, scale=0.3), expected.transpose(0, 1))

    def test_a_window_hides_what_is_further_back(self):
        query, keys, values = (torch.randn(6, 1, 8, dtype=torch.float64) for _ in range(3))
        out = attention_ref(query, keys, values, scale=1.0, window=2)
        assert torch.allclose(out[5], attention_ref(query[5:], keys[3:], values[3:], scale=1.0)[0])

    def test_a_window_of_zero_sees_itself(self):
        query, keys, values = (torch.randn(4, 1, 8, dtype=torch.float64) for _ in range(3))
        assert torch.allclose(attention_ref(query, keys, values, scale=1.0, window=0), values)

    def test_a_soft_cap_bounds_scores(self):
        query, keys = torch.full((1, 1, 4), 100.0), torch.full((2, 1, 4), 100.0, dtype=torch.float64)
        keys[1] *= -1
        values = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1).expand(2, 1, 4)
        out = attention_ref(query, keys, values, scale=1.0, soft_cap=1.0)
        assert out[0, 0, 0].item() == pytest.approx(1 / (1 + np.exp(-2.0)), rel=1e-9)

    def test_int8_keys_are_within_half_a_step_of_each_vector(self):
        x = torch.randn(10, 2, 64)
        q, scale = quantize_kv_ref(x)
        assert ((q * scale[..., None].float() - x).abs() <= scale[..., None].float() * 0.55).all()


class TestFilter:
    @given(seed=st.integers(0, 2**31), k=st.integers(1, 12), p=st.floats(0.05, 1.0), m=st.floats(0, 1))
    @settings(max_examples=50, deadline=None)
    def test_it_is_what_sorting_says(self, seed, k, p, m):
        probabilities = torch.rand(10, generator=torch.Generator().manual_seed(seed)).softmax(-1)
        result = top_k_top_p_filter_ref(
            probabilities[None], torch.tensor([k], dtype=torch.int32), torch.tensor([p]), torch.tensor([m])
        )[0]
        order = sorted(range(10), key=lambda i: -probabilities[i].item())
        kept, total = set(), 0.0
        for rank, i in enumerate(order):
            inside_p = p >= 1 or total < np.float32(p) * probabilities.double().sum().item()
            if rank < k and inside_p and probabilities[i] >= np.float32(m) * probabilities.max():
                kept.add(i)
            total += probabilities[i].item()
        assert set(result.nonzero().flatten().tolist()) == kept
        assert result.sum().item() == pytest.approx(1, abs=1e-6)
