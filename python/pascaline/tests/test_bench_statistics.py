"""Percentiles, intervals and significance, held against scipy's and numpy's figures and against chance itself."""

from __future__ import annotations

import itertools
import random
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pascaline.bench.statistics import (
    Estimate,
    holm,
    mean_estimate,
    percentile,
    percentile_estimates,
    student_cdf,
    student_quantile,
    welch,
)

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062047), (2, 4.3026527), (3.7, 2.8675207), (30, 2.0422725), (1e6, 1.9599664)]
)
def test_student_quantile_is_that_of_the_tables(freedom: float, quantile: float) -> None:
    """scipy.stats.t.ppf(0.975, freedom)."""
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-5)


@given(st.floats(-50, 50), st.floats(1, 200))
def test_student_distribution_is_symmetric_and_rises(t: float, freedom: float) -> None:
    assert student_cdf(t, freedom) + student_cdf(-t, freedom) == pytest.approx(1)
    assert student_cdf(t, freedom) <= student_cdf(t + 0.1, freedom) + 1e-12


@given(st.lists(numbers, min_size=1, max_size=50), st.floats(0, 1))
def test_percentile_lies_among_the_values(values: list[float], share: float) -> None:
    ordered = sorted(values)
    assert ordered[0] - 1e-6 <= percentile(ordered, share) <= ordered[-1] + 1e-6


def test_percentile_is_linear_between_neighbours() -> None:
    """numpy.percentile([1, 2, 4], [0, 25, 50, 90, 100])."""
    assert [percentile([1, 2, 4], share) for share in (0, 0.25, 0.5, 0.9, 1)] == pytest.approx([1, 1.5, 2, 3.6, 4])


def test_one_run_has_no_interval() -> None:
    assert mean_estimate([3.0]) == Estimate(3.0)
    assert percentile_estimates([[[3.0]]], [0.5]) == [Estimate(3.0)]


def test_equal_runs_have_an_interval_of_no_width() -> None:
    assert mean_estimate([3.0, 3.0, 3.0]) == Estimate(3.0, 3.0, 3.0)
    assert percentile_estimates([[[3.0], [3.0]], [[3.0]]], [0.5, 0.9]) == [Estimate(3.0, 3.0, 3.0)] * 2


def test_bootstrap_interval_holds_the_true_median_in_most_cases() -> None:
    """The interval is of 95 %: of 100 independent ones at least 85 hold the truth, but for 1 case in 10,000."""
    source = random.Random(7)
    held = 0
    for _ in range(100):
        runs = [[[source.expovariate(1.0)] for _ in range(30)] for _ in range(6)]
        estimate = percentile_estimates(runs, [0.5])[0]
        assert estimate.low is not None
        assert estimate.high is not None
        held += estimate.low <= 0.693147 <= estimate.high
    assert held >= 85


def test_welch_is_that_of_scipy() -> None:
    """scipy.stats.ttest_ind([1, 2, 3, 4.5], [2, 3.5, 4, 6, 7], equal_var=False)."""
    found = welch([1, 2, 3, 4.5], [2, 3.5, 4, 6, 7])
    assert found.p_value == pytest.approx(0.15162016503501077, abs=1e-9)
    assert found.ratio == pytest.approx(4.5 / 2.625)


def test_one_run_on_a_side_cannot_be_judged() -> None:
    assert welch([1.0], [2.0, 3.0]).p_value is None


def test_runs_without_any_noise_differ_surely_or_not_at_all() -> None:
    assert welch([2.0, 2.0], [2.0, 2.0]).p_value == 1.0
    assert welch([2.0, 2.0], [3.0, 3.0]).p_value == 0.0


def test_the_same_thing_measured_twice_differs_in_one_case_of_twenty() -> None:
    """2000 comparisons of samples of one distribution: 5 % of them, within what chance allows (4 sigma)."""
    source = random.Random(3)
    found = [
        welch([source.gauss(10, 1) for _ in range(4)], [source.gauss(10, 1) for _ in range(4)]).p_value or 0.0
        for _ in range(2000)
    ]
    share = sum(p < 0.05 for p in found) / len(found)
    assert 0.025 <= share <= 0.07


def test_a_true_difference_is_found() -> None:
    source = random.Random(5)
    slow, fast = NormalDist(100, 2), NormalDist(120, 2)
    sides = [[each.inv_cdf(source.random()) for _ in range(3)] for each in (slow, fast)]
    assert (welch(*sides).p_value or 0.0) < 0.05


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_never_lowers_a_p_value_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(before <= after <= 1 for before, after in zip(p_values, corrected, strict=True))
    pairs = sorted(zip(p_values, corrected, strict=True))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(pairs))


def test_holm_is_that_of_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
