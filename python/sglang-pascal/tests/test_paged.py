"""The attention arithmetic against a naive float64 attention that loops over every token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_pascal.attention import paged

HEAD_DIM = 16
TOLERANCE = 2e-5
"""float32 against float64: a few hundred additions of values near 1."""


def naive_attention(query, keys, values, first_position, *, scaling, window=None, soft_cap=0.0):
    """query [E, H, D] at positions first_position.., keys and values [L, KV, D]; in float64."""
    query, keys, values = query.double(), keys.double(), values.double()
    n_rows, n_heads, _ = query.shape
    group = n_heads // keys.shape[1]
    output = torch.zeros(n_rows, n_heads, values.shape[-1], dtype=torch.float64)
    for row in range(n_rows):
        position = first_position + row
        first = 0 if window is None else max(0, position - window)
        for head in range(n_heads):
            seen_keys = keys[first : position + 1, head // group]
            scores = seen_keys @ query[row, head] * scaling
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            output[row, head] = scores.softmax(0) @ values[first : position + 1, head // group]
    return output


class Pool:
    """A pool with sequences scattered over it at random, as after a while of serving."""

    def __init__(self, lengths, n_kv_heads, dtype=torch.float32):
        generator = torch.Generator().manual_seed(7)
        n_slots = sum(lengths) + 5
        self.keys = torch.randn(n_slots, n_kv_heads, HEAD_DIM, generator=generator).to(dtype)
        self.values = torch.randn(n_slots, n_kv_heads, HEAD_DIM, generator=generator).to(dtype)
        order = torch.randperm(n_slots - 1, generator=generator)[: sum(lengths)] + 1
        self.req_to_token = torch.zeros(len(lengths) + 2, max(lengths) + 3, dtype=torch.int32)
        self.req_pool_indices = torch.arange(len(lengths)).flip(0) + 1
        self.slots = list(order.split(lengths))
        for request, slots in zip(self.req_pool_indices, self.slots, strict=True):
            self.req_to_token[request, : len(slots)] = slots.int()

    def sequence(self, index):
        return self.keys.double()[self.slots[index]], self.values.double()[self.slots[index]]


def prefill(pool, prefix_lens, new_lens, query, **options):
    window = options.pop("window", None)
    output = torch.full((query.shape[0], query.shape[1], HEAD_DIM), math.nan)
    parts = paged.plan_prefill(pool.req_to_token, pool.req_pool_indices, prefix_lens, new_lens, window)
    for part in parts:
        keys = paged.gather(pool.keys, part.slots, query.dtype)
        values = paged.gather(pool.values, part.slots, query.dtype)
        result = paged.attend(query[part.rows], keys, values, part.mask, **options).flatten(0, 1)
        rows = part.rows.flatten()
        if part.real_rows is not None:
            rows, result = rows[part.real_rows], result[part.real_rows]
        output[rows] = result
    return output


def check_prefill(prefix_lens, new_lens, n_heads=4, n_kv_heads=2, **options):
    pool = Pool([p + n for p, n in zip(prefix_lens, new_lens, strict=True)], n_kv_heads)
    query = torch.randn(sum(new_lens), n_heads, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    options.setdefault("scaling", 0.25)
    output = prefill(pool, prefix_lens, new_lens, query, **options)
    start = 0
    for index, (prefix, new) in enumerate(zip(prefix_lens, new_lens, strict=True)):
        expected = naive_attention(query[start : start + new], *pool.sequence(index), prefix, **options)
        torch.testing.assert_close(output[start : start + new].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
        start += new


class TestPrefill:
    @pytest.mark.parametrize("new", [1, 2, 255, 256, 257])
    def test_every_token_attends_to_itself_and_all_before_it(self, new):
        check_prefill([0], [new])

    @pytest.mark.parametrize("prefix", [1, 255, 256, 257])
    @pytest.mark.parametrize("new", [1, 17, 257])
    def test_a_chunk_sees_its_cached_prefix(self, prefix, new):
        check_prefill([prefix], [new])

    def test_ragged_batches_with_and_without_prefix_do_not_mix(self):
        check_prefill([0, 300, 5, 0, 64], [1, 3, 40, 257, 40])

    @pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(1, 1), (4, 4), (4, 1), (9, 3), (14, 2)])
    def test_query_heads_share_key_heads_in_order(self, n_heads, n_kv_heads):
        check_prefill([3, 0], [11, 30], n_heads, n_kv_heads)

    @pytest.mark.parametrize("window", [0, 1, 31, 256, 1000])
    def test_a_sliding_window_hides_what_is_further_back(self, window):
        check_prefill([0, 290], [40, 270], window=window)

    @pytest.mark.parametrize("soft_cap", [1.0, 50.0])
    def test_soft_cap_bounds_the_scores(self, soft_cap):
        check_prefill([10, 0], [5, 20], soft_cap=soft_cap, scaling=3.0)

    def test_soft_cap_and_window_together_as_in_gemma_2(self):
        check_prefill([100, 0], [30, 60], n_heads=8, n_kv_heads=4, soft_cap=50.0, window=16)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 70)), min_size=1, max_size=6), st.integers(0, 60))
    def test_any_mix_of_lengths(self, lengths, window):
        check_prefill([p for p, _ in lengths], [n for _, n in lengths], window=window)


class TestPlan:
    def areas(self, prefix, new):
        pool = Pool([prefix + new], 1)
        return sum(r.area for r in paged.plan_prefill(pool.req_to_token, pool.req_pool_indices, [prefix], [new], None))

    def test_a_chunk_costs_new_tokens_times_context(self):
        for prefix in (0, 512, 2048, 8192):
            assert self.areas(prefix, 512) <= 512 * (prefix + 512)

    def test_a_later_chunk_costs_linearly_more_not_quadratically(self):
        first, second, third = (self.areas(prefix, 512) for prefix in (1024, 2048, 3072))
        assert third - second == second - first == 512 * 1024

    def test_a_window_makes_the_cost_independent_of_the_prefix(self):
        pool = Pool([9000], 1)
        parts = paged.plan_prefill(pool.req_to_token, pool.req_pool_indices, [8488], [512], 128)
        assert sum(part.area for part in parts) <= 512 * (paged.QUERY_BLOCK + 128)

    def test_equal_prompts_become_one_rectangle(self):
        pool = Pool([30] * 8, 1)
        (part,) = paged.plan_prefill(pool.req_to_token, pool.req_pool_indices, [0] * 8, [30] * 8, None)
        assert part.mask.shape == (8, 1, 30, 30)
        assert part.real_rows is None

    def test_padding_stays_within_its_limit(self):
        new = [1, 2, 3, 5, 8, 13, 100, 250, 256, 300]
        spans = paged.spans_of([0] * len(new), new, None)
        for group in paged.group_spans(spans):
            area = len(group) * max(s.n_rows for s in group) * max(s.n_keys for s in group)
            assert area <= paged.MAX_PADDING * sum(s.n_rows * s.n_keys for s in group)

    def test_spans_cover_every_new_token_once(self):
        new = [1, 255, 256, 257, 700]
        spans = paged.spans_of([3] * len(new), new, None)
        rows = sorted(row for s in spans for row in range(s.first_row, s.first_row + s.n_rows))
        assert rows == list(range(sum(new)))


def decode(pool, lengths, query, columns, window=None, **options):
    table = pool.req_to_token[pool.req_pool_indices, :columns]
    slots, mask = paged.plan_decode(table, torch.tensor(lengths), window)
    keys = paged.gather(pool.keys, slots, query.dtype)
    values = paged.gather(pool.values, slots, query.dtype)
    return paged.attend(query[:, None], keys, values, mask, **options)[:, 0]


def check_decode(lengths, n_heads=4, n_kv_heads=2, columns=None, window=None, **options):
    pool = Pool(lengths, n_kv_heads)
    query = torch.randn(len(lengths), n_heads, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    options.setdefault("scaling", 0.25)
    output = decode(pool, lengths, query, columns or max(lengths), window, **options)
    for index, length in enumerate(lengths):
        expected = naive_attention(
            query[index : index + 1], *pool.sequence(index), length - 1, window=window, **options
        )
        torch.testing.assert_close(output[index : index + 1].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


class TestDecode:
    @pytest.mark.parametrize("length", [1, 2, 255, 256, 257])
    def test_the_new_token_sees_the_whole_sequence(self, length):
        check_decode([length])

    def test_ragged_batch(self):
        check_decode([1, 257, 3, 100])

    def test_columns_past_the_longest_sequence_change_nothing(self):
        check_decode([1, 40, 7], columns=43)

    @pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(1, 1), (4, 1), (9, 3), (14, 2)])
    def test_query_heads_share_key_heads_in_order(self, n_heads, n_kv_heads):
        check_decode([5, 33], n_heads, n_kv_heads)

    @pytest.mark.parametrize("window", [0, 1, 31])
    def test_a_sliding_window_hides_what_is_further_back(self, window):
        check_decode([1, 32, 33, 100], window=window)

    def test_soft_cap(self):
        check_decode([1, 32, 100], soft_cap=2.0, scaling=4.0)

    def test_a_padding_row_of_length_zero_gives_numbers(self):
        pool = Pool([4, 4], 1)
        query = torch.ones(2, 1, HEAD_DIM)
        assert decode(pool, [4, 0], query, 4, scaling=1.0).isfinite().all()

    def test_shapes_do_not_depend_on_lengths(self):
        pool = Pool([9, 9], 1)
        table = pool.req_to_token[pool.req_pool_indices]
        shapes = {
            tuple(t.shape for t in paged.plan_decode(table, torch.tensor(n), None)) for n in ([1, 1], [9, 2], [0, 9])
        }
        assert len(shapes) == 1


@pytest.mark.parametrize("pool_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_a_narrow_pool_gives_the_attention_of_its_rounded_values(pool_dtype):
    pool = Pool([20, 7], 2, pool_dtype)
    query = torch.randn(2, 4, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    output = decode(pool, [20, 7], query, 20, scaling=0.25)
    expected = torch.cat(
        [naive_attention(query[i : i + 1], *pool.sequence(i), n - 1, scaling=0.25) for i, n in enumerate([20, 7])]
    )
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_attention_does_not_repeat_keys_or_values(monkeypatch):
    """With 8 query heads on one key head, no tensor of 8 times the keys is made."""
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        seen.append((key.shape, key.untyped_storage().data_ptr()))
        return original(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    keys = torch.randn(1, 50, 1, HEAD_DIM)
    paged.attend(torch.randn(1, 1, 8, HEAD_DIM), keys, keys, torch.ones(1, 1, 1, 50, dtype=torch.bool), scaling=1.0)
    assert seen == [((1, 1, 50, HEAD_DIM), keys.untyped_storage().data_ptr())]
