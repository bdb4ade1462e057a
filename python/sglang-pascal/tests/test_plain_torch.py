"""Plain torch in place of SGLang's Triton kernels: in a real SGLang, against SGLang's own other forms of them."""

from __future__ import annotations

import pytest
import torch
from sglang_pascal.plain_torch import (
    apply_token_bitmask,
    row_logsumexp,
    row_logsumexp_topk,
    sample_from_probs,
    try_small_copy,
    write_slots,
)

SCRIPT = """
import json, os, types
import torch
from sglang.srt.platforms import current_platform
current_platform.device_name
import sglang.srt.model_executor.model_runner
from sglang_pascal.compat import shims_for
shims = {shim.name: shim for shim in shims_for("cuda") if shim.name in ("no torch.compile", "Triton kernels")}
before = {name: shim.is_applied() for name, shim in shims.items()}
for shim in shims.values():
    shim.apply()
import sglang.kernels.ops.memory.small_copy as small_copy
from sglang.srt.constrained import xgrammar_backend
from sglang.srt.layers import logsumexp, sampler
from sglang_pascal.plain_torch import draw_filtered
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from xgrammar import allocate_token_bitmask, apply_token_bitmask_inplace

torch.manual_seed(0)
logits, mask = torch.randn(3, 300), torch.randint(-2**31, 2**31 - 1, (3, 10), dtype=torch.int32)
ours, theirs = logits.clone(), logits.clone()
xgrammar_backend.apply_token_bitmask_inplace_triton(ours, mask)
apply_token_bitmask_inplace(theirs, mask, backend="cpu")

filtered = torch.zeros(2, 10, dtype=torch.int32)
xgrammar_backend.set_token_filter_triton(filtered, [3, 35, 299], 1)

table = torch.arange(20, dtype=torch.int32).view(2, 10)
last = allocation.get_last_loc_triton(table, torch.tensor([1, 0]), torch.tensor([3, 0]))

probs = (torch.randn(4, 1000) * 3).softmax(-1)
limits = [torch.tensor([5, 1 << 30, 40, 1], dtype=torch.int32), torch.tensor([1.0, 0.6, 0.9, 1.0]), torch.zeros(4)]
kept = probs.clone()
_, weights, ids, _ = sampler.top_k_top_p_min_p_sampling_from_probs_torch(
    kept, *limits, False, None, None, return_filtered_probs=True)
allowed = [set(i[w > 0].tolist()) for w, i in zip(weights, ids)]
drawn = [set() for _ in range(4)]
for _ in range(300):
    tokens = draw_filtered(probs, *limits[:2], None)
    for row, token in zip(drawn, tokens.tolist()):
        row.add(token)
def seeded(probs, min_p, seeds):
    n = len(seeds)
    rows = probs.expand(n, -1).clone() if len(probs) == 1 else probs
    limits = [torch.full((n,), rows.shape[1], dtype=torch.int32), torch.ones(n), torch.full((n,), min_p)]
    return sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        rows, *limits, min_p > 0, torch.tensor(seeds), torch.full((n,), 9)).flatten().tolist()

one = probs[:1]
print(json.dumps({
    "seeded": seeded(one, 0.2, range(400)),
    "seeded again": seeded(one, 0.2, range(400)),
    "seeded alone": [seeded(row[None], 0.0, [11])[0] for row in probs],
    "seeded together": seeded(probs, 0.0, [11] * 4),
    "above min-p": (one[0] >= 0.2 * one.max()).nonzero().flatten().tolist(),
    "before": before,
    "applied": {name: shim.is_applied() for name, shim in shims.items()},
    "dynamo": os.environ["TORCHDYNAMO_DISABLE"],
    "small": small_copy.try_small_copy([], []),
    "bitmask": torch.equal(ours, theirs),
    "filtered": [[32 * w + b for w in range(10) for b in range(32) if row[w] >> b & 1] for row in filtered.tolist()],
    "last": last.tolist(),
    "logsumexp": [part.tolist() for part in logsumexp.row_logsumexp_topk(torch.zeros(1, 4), 1)],
    "swa": SWATokenToKVPoolAllocator._free_swa_pages_cuda(
        types.SimpleNamespace(_free_swa_pages_none_cuda=lambda rows: rows + 1), 4),
    "outside": [sorted(got - want) for got, want in zip(drawn, allowed)],
    "counts": [len(got) for got in drawn],
    "token type": str(tokens.dtype),
}))
"""


@pytest.fixture(scope="module")
def facts(in_sglang):
    """A process of its own: the script changes SGLang for its whole life."""
    return in_sglang.run(SCRIPT)


def test_every_launcher_is_there_and_gets_replaced(facts):
    # A process without a card switches compilation off as well, when the plugin becomes active.
    assert facts["before"] == {"no torch.compile": True, "Triton kernels": False}
    assert set(facts["applied"].values()) == {True}, facts["applied"]


def test_nothing_is_compiled_for_a_device(facts):
    assert facts["dynamo"] == "1"


def test_inputs_of_a_recorded_step_are_copied_without_triton(facts):
    assert facts["small"] is False
    assert try_small_copy([torch.zeros(1)] * 2, [torch.ones(1)] * 2) is False


def test_a_grammars_mask_does_what_xgrammar_does(facts):
    assert facts["bitmask"]
    assert facts["filtered"] == [[], [3, 35, 299]]


def test_the_last_slot_and_pages_of_a_window_come_from_sglangs_own_torch_forms(facts):
    assert facts["last"] == [12, -1]
    assert facts["swa"] == 5


def test_log_probabilities_need_no_triton_either(facts):
    assert facts["logsumexp"][:3] == [[0.0], [pytest.approx(1.3862944)], [[0.0]]]


def test_sampling_draws_from_what_sglang_keeps(facts):
    assert facts["outside"] == [[], [], [], []]
    assert facts["counts"][0] == 5
    assert facts["counts"][3] == 1
    assert facts["token type"] == "torch.int32"


def test_a_seed_with_min_p_draws_only_what_min_p_leaves_and_always_the_same(facts):
    assert facts["seeded"] == facts["seeded again"]
    assert set(facts["seeded"]) == set(facts["above min-p"])


def test_a_row_with_a_seed_is_drawn_alone_as_in_a_batch(facts):
    assert facts["seeded alone"] == facts["seeded together"]


class TestBitmask:
    def test_logits_beyond_the_mask_stay(self):
        logits = torch.zeros(1, 40)
        apply_token_bitmask(logits, torch.tensor([[0b101]], dtype=torch.int32))
        assert (logits[0] == 0).nonzero().flatten().tolist() == [0, 2, *range(32, 40)]

    def test_only_the_named_rows_change(self):
        logits = torch.zeros(3, 32)
        apply_token_bitmask(logits, torch.zeros(3, 1, dtype=torch.int32), [1])
        assert torch.isinf(logits).all(-1).tolist() == [False, True, False]

    def test_the_sign_bit_is_a_token_too(self):
        logits = torch.zeros(32)
        apply_token_bitmask(logits, torch.tensor([-(2**31)], dtype=torch.int32))
        assert (logits == 0).nonzero().flatten().tolist() == [31]


class TestLogsumexp:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_log_probabilities_follow_from_it(self, dtype):
        x = (torch.randn(5, 1000, generator=torch.Generator().manual_seed(1)) * 10 + 200).to(dtype)
        largest, rest = row_logsumexp(x)
        torch.testing.assert_close((x.float() - largest[:, None]) - rest[:, None], x.float().log_softmax(-1))
        assert (largest.dtype, rest.dtype) == (torch.float32, torch.float32)

    def test_the_largest_values_come_with_it(self):
        x = torch.tensor([[1.0, 4.0, 2.0], [0.0, -1.0, 3.0]])
        largest, rest, values, columns = row_logsumexp_topk(x, 2)
        assert torch.equal(torch.stack([largest, rest]), torch.stack(row_logsumexp(x)))
        assert values.tolist() == [[4.0, 2.0], [3.0, 0.0]]
        assert columns.tolist() == [[1, 2], [2, 0]]

    def test_rows_without_finite_values_or_columns(self):
        largest, rest = row_logsumexp(torch.full((1, 3), -torch.inf))
        assert (largest.item(), rest.item()) == (-torch.inf, 0.0)
        largest, rest = row_logsumexp(torch.zeros(2, 0))
        assert (largest.tolist(), rest.tolist()) == ([-torch.inf] * 2, [0.0] * 2)


@pytest.mark.parametrize(
    "case",
    [
        {"max_top_k": 3},
        {"sampling_seed": torch.tensor([1]), "return_filtered_probs": True},
        {"return_filtered_probs": True},
        {"probs": torch.ones(1, 8, dtype=torch.float64)},
    ],
)
def test_sglangs_own_sampler_keeps_what_ours_has_no_form_of(case):
    more = {"max_top_k": None, "return_filtered_probs": False} | {
        k: v for k, v in case.items() if "_probs" in k or "max" in k
    }
    probs = case.get("probs", torch.ones(1, 8) / 8)
    limits = [torch.ones(1, dtype=torch.int32), torch.ones(1), torch.zeros(1), False, case.get("sampling_seed"), None]
    calls = []

    def original(*arguments, **named):
        calls.append((arguments, named))
        return torch.zeros(1, dtype=torch.int32)

    sample_from_probs(original, probs, *limits, **more)
    ((arguments, named),) = calls
    assert arguments[0] is probs
    assert named == more


def test_a_greedy_request_beside_others_gets_the_first_of_equal_tokens():
    """As argmax gives it in a batch of greedy requests; 16-bit logits are often equal."""
    probs = torch.tensor([[0.1, 0.3, 0.3, 0.3], [0.1, 0.3, 0.3, 0.3]])
    limits = (torch.tensor([1, 1 << 30]), torch.ones(2), torch.zeros(2), False, None, None)
    found = sample_from_probs(lambda *_, **__: torch.tensor([3, 2], dtype=torch.int32), probs, *limits)
    assert (found.tolist(), found.dtype) == ([1, 2], torch.int32)


@pytest.mark.parametrize("starts_and_ends", [[(5, 9)], [(0, 1)], [(3, 3)], [(2, 3), (0, 4), (6, 6)], [(1, 2), (7, 8)]])
def test_slots_of_new_positions_are_written_and_no_others(starts_and_ends):
    rows = [4, 1, 2][: len(starts_and_ends)]
    table = torch.full((5, 10), -1, dtype=torch.int32)
    expected, slot = table.clone(), 100
    for row, (start, end) in zip(rows, starts_and_ends, strict=True):
        expected[row, start:end] = torch.arange(slot, slot + end - start)
        slot += end - start
    starts, ends = (torch.tensor(values, dtype=torch.int32) for values in zip(*starts_and_ends, strict=True))
    write_slots(torch.tensor(rows), table, starts, ends, torch.arange(100, slot), len(rows))
    assert torch.equal(table, expected)
