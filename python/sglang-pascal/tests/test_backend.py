"""SGLang's interface over the attention arithmetic: what a recorded graph relies on."""

from __future__ import annotations

import pytest

SCRIPT = """
import json, sys, types
import torch
from sglang.srt.platforms import current_platform
current_platform.device_name
from sglang_pascal.attention.backend import PascalAttentionBackend

torch.manual_seed(0)
SLOTS, KV, HEADS, DIM, CONTEXT = 40, 2, 4, 8, 16

class Pool:
    def __init__(self):
        self.keys, self.values = torch.randn(SLOTS, KV, DIM), torch.randn(SLOTS, KV, DIM)
    def get_kv_buffer(self, layer_id): return self.keys, self.values
    def scales_of(self, layer_id): return None, None
    def set_kv_buffer(self, layer, loc, k, v):
        self.keys[loc.loc], self.values[loc.loc] = k, v

def backend(device):
    runner = types.SimpleNamespace(
        device="cpu", token_to_kv_pool=Pool(), model_config=types.SimpleNamespace(context_len=CONTEXT),
        req_to_token_pool=types.SimpleNamespace(req_to_token=torch.randperm(SLOTS)[: 2 * CONTEXT].view(2, CONTEXT).int()))
    made = PascalAttentionBackend(runner)
    made._is_cpu = device == "cpu"  # the CUDA shapes, computed on the host
    return made

layer = types.SimpleNamespace(layer_id=0, tp_q_head_num=HEADS, qk_head_dim=DIM, v_head_dim=DIM, scaling=0.3,
                              logit_cap=0.0, sliding_window_size=-1, is_cross_attention=False)
mode = types.SimpleNamespace(is_decode=lambda: True, is_target_verify=lambda: False)
def batch(lengths, made):
    lengths = torch.tensor(lengths)
    requests = torch.arange(len(lengths))
    slots = made.req_to_token_pool.req_to_token[requests, lengths - 1].long()
    return types.SimpleNamespace(forward_mode=mode, seq_lens=lengths, req_pool_indices=requests, out_cache_loc=slots)

def step(made, b, q, k, v):
    made.init_forward_metadata(b)
    return made.forward_decode(q, k, v, layer, b)

q, k, v = torch.randn(2, HEADS * DIM), torch.randn(2, KV, DIM), torch.randn(2, KV, DIM)
torch.manual_seed(1); on_cpu = backend("cpu")
torch.manual_seed(1); on_cuda = backend("cuda")
a, b = step(on_cpu, batch([5, 16], on_cpu), q, k, v), step(on_cuda, batch([5, 16], on_cuda), q, k, v)
static = batch([1, 1], on_cuda)
step(on_cuda, static, q, k, v)                      # a warm-up
warm = on_cuda._plan
static.seq_lens.copy_(torch.tensor([5, 16]))         # what a replay does: same tensors, other lengths
static.out_cache_loc.copy_(batch([5, 16], on_cuda).out_cache_loc)
on_cuda.init_forward_metadata_in_graph(static)       # what the recording runs first
again = on_cuda.forward_decode(q, k, v, layer, static)
replay_plan = on_cuda._plan
fresh = step(on_cuda, batch([5, 16], on_cuda), q, k, v)
columns = {}
for name, made in (("cpu", on_cpu), ("cuda", on_cuda)):
    made.init_forward_metadata(batch([3, 7], made))
    columns[name] = made._plan.decode_slots.shape[1]
layer.is_cross_attention = True
try:
    step(on_cpu, batch([5, 16], on_cpu), q, k, v); refusal = None
except NotImplementedError as error:
    refusal = str(error)
print(json.dumps({
    "shape": list(a.shape), "same": torch.allclose(a, b, atol=1e-6), "replay": torch.allclose(again, fresh, atol=1e-6),
    "plan_is_new": replay_plan is not warm, "columns": columns, "refusal": refusal,
    "fill": on_cuda.get_cuda_graph_seq_len_fill_value(), "triton": on_cuda.support_triton(),
    "state": on_cuda.init_cuda_graph_state(4, 4),
}))
"""


@pytest.fixture(scope="module")
def facts(in_sglang):
    """A process of its own: the script changes SGLang for its whole life."""
    return in_sglang.run(SCRIPT)


def test_static_and_bucketed_shapes_give_the_same_numbers(facts):
    assert facts["shape"] == [2, 32]
    assert facts["same"]


def test_a_recording_does_not_read_what_a_warm_up_planned(facts):
    assert facts["plan_is_new"]
    assert facts["replay"]


def test_the_cpu_reads_to_the_longest_sequence_and_a_device_always_the_whole_context(facts):
    assert facts["columns"] == {"cpu": 7, "cuda": 16}


def test_cross_attention_is_refused(facts):
    assert facts["refusal"] == "attention backend 'pascal' serves decoder-only text models: no cross attention"


def test_graph_padding_has_length_one_and_no_triton_is_used(facts):
    assert (facts["fill"], facts["triton"], facts["state"]) == (1, False, None)
