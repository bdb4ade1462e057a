"""Parts of speculation by themselves: slots for several steps, the relay between steps, tokenizers, arguments."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gguf_acceptance.vocabulary import difference
from sglang_pascal.checkpoint.prepare import prepare
from sglang_pascal.errors import PluginError
from sglang_pascal.speculation.slots import Growth, growths, prepare_for_decode

pytestmark = pytest.mark.filterwarnings("ignore:Only CUDA")  # of SGLang's imports
WIDTH = 8


def test_slots_are_reserved_before_a_step_might_not_fit():
    """The step whose result is unknown had one row, the next one may have eight."""
    assert growths([(100, 109), (100, 108), (50, 50)], width=WIDTH, in_flight=1) == [
        Growth(1, 108, 116),
        Growth(2, 50, 66),
    ]
    assert growths([(100, 116)], width=WIDTH, in_flight=WIDTH) == []
    assert growths([(100, 115)], width=WIDTH, in_flight=WIDTH) == [Growth(0, 115, 116)]


def decode_batch(n, monkeypatch):
    from sglang.srt.mem_cache import allocation, allocation_sizing

    taken = [0]

    def take(_cache, number):
        taken[0] += number
        return torch.arange(taken[0] - number, taken[0]) + 1000

    monkeypatch.setattr(allocation, "alloc_token_slots", take)
    monkeypatch.setattr(allocation_sizing, "get_alloc_len_per_decode", lambda: WIDTH)
    requests = [
        SimpleNamespace(decode_batch_idx=0, kv=SimpleNamespace(kv_committed_len=10 + i, kv_allocated_len=10 + i))
        for i in range(n)
    ]
    return SimpleNamespace(
        reqs=requests,
        enable_overlap=True,
        token_to_kv_pool_allocator=SimpleNamespace(page_size=1),
        maybe_evict_swa=lambda: None,
        sampling_info=SimpleNamespace(penalizer_orchestrator=SimpleNamespace(is_required=False)),
        spec_info=SimpleNamespace(in_flight=1),
        tree_cache=None,
        seq_lens_cpu=None,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(n, 64, dtype=torch.int32)),
        req_pool_indices=torch.arange(n).flip(0),
    )


def test_every_position_of_a_step_has_a_slot_of_its_own(monkeypatch):
    batch = decode_batch(3, monkeypatch)
    table, allocations = batch.req_to_token_pool.req_to_token, []
    for _ in range(20):
        prepare_for_decode(None, batch)
        allocations.append(tuple(each.kv.kv_allocated_len for each in batch.reqs))
        for row, request in enumerate(batch.reqs):
            first = 10 + row
            slots = table[batch.req_pool_indices[row], first : request.kv.kv_committed_len + 1 + WIDTH]
            assert (slots >= 1000).all()
            request.kv.kv_committed_len += 1
    assert len(set(table[table > 0].tolist())) == int((table > 0).sum())
    assert len(set(allocations)) <= 4
    assert batch.max_seq_len_host == max(allocations[-1])
    assert batch.reqs[0].decode_batch_idx == 20


@pytest.mark.parametrize("change", [{"enable_overlap": False}, {"page_size": 16}])
def test_sglang_s_own_reservation_stays_where_ours_does_not_fit(monkeypatch, change):
    batch = decode_batch(1, monkeypatch)
    batch.enable_overlap = change.get("enable_overlap", True)
    batch.token_to_kv_pool_allocator.page_size = change.get("page_size", 1)
    asked = []
    prepare_for_decode(asked.append, batch)
    assert asked == [batch]


@pytest.fixture
def relay():
    from sglang_pascal.speculation.algorithm import ChainAlgorithm
    from sglang_pascal.speculation.relay import ChainRelay

    pool = SimpleNamespace(req_to_token=torch.zeros(6, 32, dtype=torch.int32))
    return ChainRelay(torch.device("cpu"), ChainAlgorithm("X", None), pool, False, False)


def payload(tokens, lens=None):
    lens = None if lens is None else torch.tensor(lens, dtype=torch.int32)
    return SimpleNamespace(accept_tokens=torch.tensor(tokens, dtype=torch.int32), accept_lens=lens)


def newest(relay, rows):
    carried = SimpleNamespace(future_indices=torch.tensor(rows))
    relay._resolve_spec_extras(SimpleNamespace(spec_info=carried))
    return carried.newest.tolist()


def test_the_newest_token_is_relayed_whatever_the_step_before_was(relay):
    relay.stash(torch.tensor([2, 4]), payload([[7], [8]]))
    assert newest(relay, [4, 2]) == [8, 7]
    relay.stash(torch.tensor([4, 5]), payload([[1, 2, 3, 0], [4, 5, 6, 9]], [3, 1]))
    assert newest(relay, [2, 4, 5]) == [7, 3, 4]
    tokens, lens = relay.runs(torch.tensor([5, 4]))
    assert (tokens.tolist(), lens.tolist()) == ([[4, 5, 6, 9], [1, 2, 3, 0]], [1, 3])


def test_without_a_step_before_there_is_nothing_to_relay(relay):
    for carried in (None, SimpleNamespace(future_indices=None), SimpleNamespace(future_indices=torch.zeros(0).long())):
        relay._resolve_spec_extras(SimpleNamespace(spec_info=carried))
        assert not hasattr(carried, "newest")


KEYS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("draft", "expected"),
    [
        ({}, None),
        ({"eos_token_id": 2}, None),
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama', the model's is 'gpt2'"),
        ({"tokens": ["a", "b"]}, "it has 2 tokens, the model has 3"),
        ({"tokens": ["a", "x", "c"]}, "token 1 is 'x', the model's is 'b'"),
        ({"tokens": None}, "tokenizer.ggml.tokens cannot be read"),
    ],
)
def test_the_first_difference_of_two_tokenizers_is_named(draft, expected):
    assert difference(KEYS, KEYS | {f"tokenizer.ggml.{key}": value for key, value in draft.items()}) == expected


def arguments(**changes):
    neutral = {
        "speculative_algorithm": "PASCAL_DRAFT",
        "speculative_num_draft_tokens": None,
        "speculative_draft_model_path": None,
        "model_path": "/m",
    }
    return SimpleNamespace(**neutral | changes)


def test_a_draft_model_s_arguments_are_checked(tiny_model, builtin_gguf, tmp_path):
    from sglang_pascal.speculation.algorithm import check_draft_arguments

    with pytest.raises(PluginError, match="--speculative-draft-model-path is missing"):
        check_draft_arguments(arguments())
    with pytest.raises(PluginError, match=r"PASCAL_DRAFT: --tp-size is 2, must be 1"):
        check_draft_arguments(arguments(tp_size=2))
    for name, path in (("model", builtin_gguf), ("other", tiny_model("llama").path)):
        prepare(path, tmp_path / name)
    same = {"model_path": str(tmp_path / "model")}
    check_draft_arguments(arguments(**same, speculative_draft_model_path=str(tmp_path / "model")))
    with pytest.raises(PluginError, match=r"other\" has another tokenizer than the model: .*; choose a smaller model"):
        check_draft_arguments(arguments(**same, speculative_draft_model_path=str(tmp_path / "other")))


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_what_is_missing_of_all_requests_is_computed_in_few_passes_and_in_order(most):
    from sglang_pascal.speculation.draft_model import Span, chunks

    missing = [Span(0, 5, 9), Span(2, 0, 12), Span(3, 7, 8)]
    passes = list(chunks(missing, most))
    tokens = [(span.row, place) for spans in passes for span in spans for place in range(span.first, span.end)]
    assert tokens == [(span.row, place) for span in missing for place in range(span.first, span.end)]
    sizes = [sum(span.end - span.first for span in spans) for spans in passes]
    assert sizes[:-1] == [most] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= most
    assert all(len({span.row for span in spans}) == len(spans) for spans in passes)


def test_a_new_request_expects_of_a_draft_model_what_it_did_for_others():
    from sglang_pascal.speculation.texts import Texts

    def request(rid):
        parameters = SimpleNamespace(max_new_tokens=50)
        return SimpleNamespace(
            rid=rid, origin_input_ids_unpadded=list(range(9)), output_ids=[], sampling_params=parameters
        )

    texts, bad = Texts(100), request("bad")
    texts.prefilled([bad])
    text = texts.running([bad])[0]
    hopeful, _ = text.guess(7)
    for _ in range(10):
        text.launched(8, hopeful)
        text.settle(text.before_check + 1)
    texts.prefilled([request("new")])
    expected, _ = texts.running([request("new")])[0].guess(7)
    assert expected.first < 0.2 < 0.7 < hopeful.first


@pytest.mark.parametrize("width", [1, 4])
def test_logits_are_constrained_as_sglang_does_without_speculation(width):
    """Each row of a request as its only row. SGLang's order: additive, scaling, grammar, bias."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang_pascal.speculation.verification import _constrain

    n, vocabulary = 3, 11
    generator = torch.Generator().manual_seed(1)
    info = SamplingBatchInfo.__new__(SamplingBatchInfo)
    info.penalizer_orchestrator = info.grammar_mask = None
    info.acc_additive_penalties = torch.randn(n, vocabulary, generator=generator)
    info.acc_scaling_penalties = 1 + torch.rand(n, vocabulary, generator=generator)
    info.logit_bias = torch.randn(n, vocabulary, generator=generator)
    logits = torch.randn(n, width, vocabulary, generator=generator)
    expected = logits.clone()
    for row in range(width):
        info.apply_logits_bias(expected[:, row])
    tokens = torch.zeros(n, width, dtype=torch.long)
    _constrain(SimpleNamespace(sampling_info=info, has_grammar=False), logits, tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
