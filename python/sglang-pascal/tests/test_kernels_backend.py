"""The attention backend over the kernels' operations, by their reference on the CPU, against the one in plain torch."""

from __future__ import annotations

import pytest

SCRIPT = """
import json, types
import torch
from sglang.srt.platforms import current_platform
current_platform.device_name
import sglang.srt.model_executor.model_runner
from sglang_pascal.attention.backend import PascalAttentionBackend
from sglang_pascal.attention.kernels_backend import KernelAttentionBackend, Rotation
from sglang_pascal.attention.kv_pool import PascalKVPool
from sglang_pascal.errors import PluginError
from sglang_pascal.reference import rope_ref

SLOTS, KV, HEADS, DIM, CONTEXT = 200, 2, 6, 64, 64
mode = lambda is_decode: types.SimpleNamespace(is_decode=lambda: is_decode, is_target_verify=lambda: False)

def pool_of(dtype):
    return PascalKVPool(SLOTS, page_size=1, dtype=dtype, head_num=KV, head_dim=DIM, layer_num=2, device="cpu",
                        enable_memory_saver=False)

def backends(dtype):
    generator = torch.Generator().manual_seed(0)
    table = (torch.randperm(SLOTS, generator=generator)[: 3 * CONTEXT] + 1).view(3, CONTEXT).int()
    made = []
    for cls in (PascalAttentionBackend, KernelAttentionBackend):
        runner = types.SimpleNamespace(device="cpu", token_to_kv_pool=pool_of(dtype),
            model_config=types.SimpleNamespace(context_len=CONTEXT), req_to_token_pool=types.SimpleNamespace(req_to_token=table))
        made.append(cls(runner))
    return made, table

def layer_of(layer_id=0, window=-1, cap=0.0, cross=False):
    return types.SimpleNamespace(layer_id=layer_id, tp_q_head_num=HEADS, qk_head_dim=DIM, v_head_dim=DIM, scaling=0.125,
                                 logit_cap=cap, sliding_window_size=window, is_cross_attention=cross)

def batch_of(table, prefix, new, is_decode):
    prefix, new = torch.tensor(prefix), torch.tensor(new)
    requests = torch.arange(len(new))
    slots = torch.cat([table[r, p : p + n] for r, p, n in zip(requests, prefix, new)]).long()
    return types.SimpleNamespace(forward_mode=mode(is_decode), seq_lens=prefix + new, req_pool_indices=requests,
        out_cache_loc=slots, extend_prefix_lens_cpu=prefix.tolist(), extend_seq_lens_cpu=new.tolist(), extend_seq_lens=new)

def largest_difference(dtype, **options):
    made, table = backends(dtype)
    layer, worst = layer_of(**options), 0.0
    torch.manual_seed(1)
    for prefix, new, is_decode in (([0, 0, 0], [20, 1, 40], False), ([20, 1, 40], [3, 9, 1], False),
                                   ([23, 10, 41], [1, 1, 1], True), ([24, 11, 42], [1, 1, 1], True)):
        n = sum(new)
        q, k, v = torch.randn(n, HEADS * DIM), torch.randn(n, KV, DIM), torch.randn(n, KV, DIM)
        results = []
        for backend in made:
            batch = batch_of(table, prefix, new, is_decode)
            backend.init_forward_metadata(batch)
            forward = backend.forward_decode if is_decode else backend.forward_extend
            results.append(forward(q, k, v, layer, batch).float())
        worst = max(worst, float((results[0] - results[1]).abs().max()))
    return worst

facts = {"difference": {
    "float32": largest_difference(torch.float32), "window": largest_difference(torch.float32, window=8),
    "soft cap": largest_difference(torch.float32, cap=5.0), "int8": largest_difference(torch.int8, layer_id=1),
    "e5m2": largest_difference(torch.float8_e5m2),
}}

(_, backend), table = backends(torch.int8)
batch = batch_of(table, [0, 0, 0], [4, 2, 3], False)
backend.init_forward_metadata(batch)
layer, qkv, positions = layer_of(), torch.randn(9, (HEADS + 2 * KV) * DIM), torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2])
cos_sin = torch.randn(CONTEXT, DIM)
fused = backend.forward_fused(qkv, Rotation(positions, cos_sin, True), layer, quantized=False, is_16_bit=False)
q, k, v = qkv.split([HEADS * DIM, KV * DIM, KV * DIM], dim=1)
q, k = (rope_ref(x.reshape(9, -1, DIM), positions, cos_sin, is_neox=True) for x in (q, k))
(_, other), _ = backends(torch.int8)
other.init_forward_metadata(batch)
apart = other.forward_extend(q.flatten(1), k, v.reshape(9, KV, DIM), layer, batch)
facts["fused"] = float((fused - apart).abs().max())

pool = pool_of(torch.int8)
facts["bytes"] = int(sum(pool.get_kv_size_bytes()))
facts["scales"] = [list(scale.shape) for scale in pool.scales_of(1)]
facts["no scales"] = list(pool_of(torch.float16).scales_of(0))
facts["refusal"] = None
try:
    backend.forward_extend(q.flatten(1), k, v, layer_of(cross=True), batch)
except NotImplementedError as error:
    facts["refusal"] = str(error)
try:
    narrow = PascalKVPool(SLOTS, page_size=1, dtype=torch.float16, head_num=KV, head_dim=80, layer_num=2, device="cpu",
                          enable_memory_saver=False)
    KernelAttentionBackend(types.SimpleNamespace(device="cuda:0", token_to_kv_pool=narrow, req_to_token_pool=None,
                                                 model_config=types.SimpleNamespace(context_len=CONTEXT)))
except PluginError as error:
    facts["no kernel"] = str(error)
facts["graph"] = [backend.get_cuda_graph_seq_len_fill_value(), backend.support_triton(), backend.init_cuda_graph_state(4, 4)]

def chain_of(table, prefix, first, width):
    # A verification of width rows of each request, or of one row as a decode step.
    requests, prefix = torch.arange(len(prefix)), torch.tensor(prefix)
    slots = torch.cat([table[r, p + first : p + first + width] for r, p in zip(requests, prefix)]).long()
    decode = types.SimpleNamespace(is_decode=lambda: True, is_target_verify=lambda: False)
    verify = types.SimpleNamespace(is_decode=lambda: False, is_target_verify=lambda: True)
    return types.SimpleNamespace(
        forward_mode=decode if width == 1 else verify, seq_lens=prefix + (first + 1 if width == 1 else 0),
        req_pool_indices=requests, out_cache_loc=slots, input_ids=torch.zeros(len(prefix) * width, dtype=torch.long))

def chain_difference(index, prefix, window=-1, width=4):
    # The largest difference between rows verified together and the same tokens decoded one after the other.
    (together, table), (alone, _) = ((made[index], table) for made, table in (backends(torch.float32) for _ in range(2)))
    layer, n = layer_of(window=window), len(prefix)
    torch.manual_seed(2)
    for made, rows in ((together, torch.Generator().manual_seed(3)), (alone, torch.Generator().manual_seed(3))):
        q, k, v = (torch.randn(sum(prefix), *size, generator=rows) for size in ((HEADS * DIM,), (KV, DIM), (KV, DIM)))
        batch = batch_of(table, [0] * n, prefix, False)
        made.init_forward_metadata(batch)
        made.forward_extend(q, k, v, layer, batch)
    q, k, v = torch.randn(n, width, HEADS * DIM), torch.randn(n, width, KV, DIM), torch.randn(n, width, KV, DIM)
    batch = chain_of(table, prefix, 0, width)
    together.init_forward_metadata(batch)
    found = together.forward_extend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layer, batch).view(n, width, -1)
    worst = 0.0
    for row in range(width):
        batch = chain_of(table, prefix, row, 1)
        alone.init_forward_metadata(batch)
        expected = alone.forward_decode(q[:, row], k[:, row], v[:, row], layer, batch)
        worst = max(worst, float((found[:, row] - expected).abs().max()))
    return worst, together.is_decode

facts["chain"] = {
    name: [chain_difference(index, prefix, window) for prefix in ([20], [20, 5, 33]) for window in (-1, 8)]
    for index, name in enumerate(("torch", "kernels"))}
from sglang_pascal.attention.kernels_backend import _repeated
facts["repeated"] = [_repeated(torch.tensor(values), 3).is_contiguous() for values in ([7], [7, 8])]
facts["repeated"] += [_repeated(torch.tensor([7, 8]), 3).tolist()]
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(in_sglang):
    """A process of its own: the script changes SGLang for its whole life."""
    return in_sglang.run(SCRIPT, timeout=500)


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [("float32", 1e-5), ("window", 1e-5), ("soft cap", 1e-5), ("int8", 1e-5), ("e5m2", 1e-5)],
)
def test_both_backends_agree_over_chunks_and_steps(facts, case, tolerance):
    assert facts["difference"][case] < tolerance


def test_rotation_and_store_in_one_operation_are_those_of_two(facts):
    assert facts["fused"] < 1e-5


def test_an_int8_pool_takes_one_scale_per_token_and_head(facts):
    assert facts["bytes"] == 2 * 2 * 201 * 2 * (64 + 2)  # keys and values, layers, slots with the padding, heads
    assert facts["scales"] == [[201, 2], [201, 2]]
    assert facts["no scales"] == [None, None]


def test_cross_attention_is_refused(facts):
    assert facts["refusal"] == "attention backend 'pascal' serves decoder-only text models: no cross attention"


def test_a_model_that_no_kernel_reads_is_refused_before_it_is_asked(facts):
    assert facts["no kernel"].startswith("no attention kernel for a head_dim of 80, must be 64, 128, 256; choose ")


def test_graph_padding_has_length_one_and_no_triton_is_used(facts):
    assert facts["graph"] == [1, False, None]


def test_rows_verified_together_are_those_of_decoding_one_after_the_other(facts):
    """Of one request and of three, with a window and without: bit for bit on the kernels' side."""
    assert [(worst == 0, is_decode) for worst, is_decode in facts["chain"]["kernels"]] == [(True, True)] * 4
    assert [(worst < 1e-5, is_decode) for worst, is_decode in facts["chain"]["torch"]] == [(True, True)] * 4


def test_the_kernels_get_contiguous_indices(facts):
    """A view of one request would do for torch, not for a kernel."""
    assert facts["repeated"] == [True, True, [7, 7, 7, 8, 8, 8]]
