"""Seeds of requests in a batch, when batches merge, and min-p beside a seed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_pascal.plain_torch import sample_from_probs
from sglang_pascal.sampling_seed import (
    draw_filtered_with_seeds,
    draw_with_seeds,
    merge_seeds,
    seeds_of_requests,
    without_min_p,
)


def info(n, seed=None):
    class Info(SimpleNamespace):
        def __len__(self):
            return n

    return Info(sampling_seed=None if seed is None else torch.tensor(seed), device="cpu")


def batch(*seeds):
    return SimpleNamespace(reqs=[SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=s)) for s in seeds])


def seeds(*chosen):
    return seeds_of_requests(lambda cls, batch, size: info(len(batch.reqs)), object, batch(*chosen), 10).sampling_seed


def test_without_a_seed_nothing_changes():
    assert seeds(None, None) is None


def test_a_batch_with_a_seed_has_one_for_each_request():
    found = seeds(7, None, -3)
    assert (found.dtype, found[0].item(), found[2].item()) == (torch.int64, 7, -3)


def test_requests_without_a_seed_differ_from_one_another():
    found = seeds(1, None, None)
    assert found[1] != found[2]


def merged(left, right):
    def original(a, b):
        if a.sampling_seed is not None and b.sampling_seed is not None:
            a.sampling_seed = torch.cat([a.sampling_seed, b.sampling_seed])

    merge_seeds(original, left, right)
    return left.sampling_seed


@pytest.mark.parametrize(("left", "right"), [([5], None), (None, [5]), ([4], [5]), (None, None)])
def test_merged_batches_have_as_many_seeds_as_requests(left, right):
    found = merged(info(1, left), info(1, right))
    assert (found is None) == (left is right is None)
    assert found is None or (len(found) == 2 and {5} <= set(found.tolist()))


def test_min_p_removes_what_is_below_its_share_of_the_largest():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04]])
    kept = without_min_p(probs, torch.tensor([0.5, 0.05]))
    assert torch.equal(kept, torch.tensor([[0.5, 0.3, 0.0], [0.9, 0.06, 0.0]]))


class TestDraw:
    PROBS = torch.tensor([0.5, 0.25, 0.15, 0.1])

    def draws(self, seeds, positions, probs=PROBS):
        n = len(seeds)
        rows = probs.log().expand(n, -1)
        return draw_with_seeds(rows, torch.tensor(seeds), torch.tensor(positions)).flatten()

    def test_it_draws_by_the_probabilities(self):
        """Chi-squared with 3 degrees of freedom: below 16.3 in 999 of 1000 cases; the seeds are fixed."""
        for seeds, positions in ((range(20000), [7] * 20000), ([3] * 20000, range(20000))):
            found = torch.bincount(self.draws(list(seeds), list(positions)), minlength=4)
            expected = self.PROBS * 20000
            assert float(((found - expected) ** 2 / expected).sum()) < 16.3

    def test_what_has_no_probability_is_never_drawn(self):
        probs = torch.tensor([0.0, 1.0, 0.0])
        assert set(self.draws(list(range(500)), [1] * 500, probs).tolist()) == {1}

    def test_neighbouring_positions_of_a_seed_are_independent(self):
        drawn = self.draws([5] * 20000, list(range(20000)))
        pairs = torch.bincount(drawn[:-1] * 4 + drawn[1:], minlength=16)
        expected = (self.PROBS.view(-1, 1) * self.PROBS).flatten() * 19999
        assert float(((pairs - expected) ** 2 / expected).sum()) < 37.7  # 15 degrees of freedom, 999 of 1000

    @pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
    def test_any_seed_of_int64_will_do(self, seed):
        assert self.draws([seed], [0]).tolist() == self.draws([seed], [0]).tolist()


class TestFilteredDraw:
    ALL = 1 << 30
    """SGLang's top k of a request that has none."""

    def rows(self, n=200, vocabulary=300):
        generator = torch.Generator().manual_seed(1)
        return (torch.randn(n, vocabulary, generator=generator) * 2).softmax(-1), torch.arange(n), torch.arange(n) + 7

    def drawn(self, probs, seeds, positions, top_k=ALL, top_p=1.0):
        n = len(probs)
        return draw_filtered_with_seeds(probs, torch.full((n,), top_k), torch.full((n,), top_p), seeds, positions)

    def test_a_request_without_filters_draws_as_if_no_other_had_one(self):
        """SGLang takes the path with filters as soon as one request of a batch has a filter, a greedy one too."""
        probs, seeds, positions = self.rows()
        alone = draw_with_seeds(probs.log(), seeds, positions).flatten()
        assert self.drawn(probs, seeds, positions).tolist() == alone.tolist()
        top_ks = torch.tensor([self.ALL, 1] * 100)
        limits = (top_ks, torch.ones(200), torch.zeros(200), False, seeds, positions)
        beside = sample_from_probs(None, probs, *limits)
        assert beside.dtype == torch.int32
        assert beside[::2].tolist() == alone[::2].tolist()
        assert beside[1::2].tolist() == probs[1::2].argmax(-1).tolist()

    def test_a_seed_beside_min_p_is_not_disturbed(self):
        probs, seeds, positions = self.rows()
        alone = draw_with_seeds(probs.log(), seeds, positions).flatten()
        limits = (torch.full((200,), self.ALL), torch.ones(200), torch.tensor([0.0, 0.9] * 100), True, seeds, positions)
        beside = sample_from_probs(None, probs, *limits)
        assert beside[::2].tolist() == alone[::2].tolist()
        assert (probs.gather(1, beside.long()[:, None])[1::2] >= 0.9 * probs.amax(-1, keepdim=True)[1::2]).all()

    def test_of_equal_probabilities_the_first_is_the_top(self):
        probs = torch.tensor([[0.1, 0.3, 0.3, 0.3]]).expand(50, -1)
        assert set(self.drawn(probs, torch.arange(50), torch.zeros(50).long(), top_k=1).tolist()) == {1}

    def test_only_the_top_k_and_the_nucleus_are_drawn(self):
        probs = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).expand(500, -1)
        seeds, positions = torch.arange(500), torch.zeros(500).long()
        assert set(self.drawn(probs, seeds, positions, top_k=2).tolist()) == {1, 3}
        assert set(self.drawn(probs, seeds, positions, top_p=0.8).tolist()) == {1, 2, 3}
