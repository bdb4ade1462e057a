"""The speed estimate: fitted to the measured points, within the error that it names, and going the right way."""

from __future__ import annotations

import pytest
from pascaline.cards import load_card
from pascaline.engines.data import SpeedPoint
from pascaline.planning import make_plan
from pascaline.planning.speed import calibration, calibration_for, kind_of, peak_macs, predicted, speed_points
from support.planning import LLAMA_2_7B, LLAMA_3_8B, P4, request

CONFIRMED = [point for point in speed_points() if point.confirmed and not point.mixture]
MIXTURES = [point for point in speed_points() if point.confirmed and point.mixture]
SHARES = calibration("llama.cpp")


class TestCalibration:
    def test_shares_are_of_the_peak(self) -> None:
        assert 0.5 < SHARES.bandwidth < 0.7
        assert 0 < SHARES.small_batch < SHARES.large_batch < 1
        assert SHARES.basis == "measured"

    @pytest.mark.parametrize("point", CONFIRMED, ids=lambda point: f"{point.card} {point.model} {point.batch}")
    def test_no_measured_point_is_far_off(self, point: object) -> None:
        """Three times the error that is shown."""
        kind = kind_of(point.batch)  # type: ignore[attr-defined]
        compute = float("inf") if kind == "bandwidth" else getattr(SHARES, kind)
        deviation = predicted(point, SHARES.bandwidth, compute) / point.tokens_per_second - 1  # type: ignore[arg-type, attr-defined]
        assert abs(deviation) <= 3 * SHARES.errors[kind]

    def test_errors_are_those_of_an_estimate_that_is_of_use(self) -> None:
        assert all(0 < error < 0.2 for error in SHARES.errors.values())

    def test_an_unmeasured_engine_says_so(self) -> None:
        found = calibration("sglang")
        assert found.basis == "estimated"
        assert set(found.errors.values()) == {0.35}

    def test_every_point_names_its_source_and_a_card(self) -> None:
        for point in speed_points():
            assert point.source
            assert load_card(point.card).number("bandwidth_bytes_per_second") > 0


class TestMixtures:
    """Mixtures of experts reach a third of a dense model's shares, and their points are few."""

    def test_they_are_fitted_apart(self) -> None:
        found = calibration("llama.cpp", mixture=True)
        assert found.bandwidth < 0.5 * SHARES.bandwidth
        assert found.large_batch < 0.5 * SHARES.large_batch
        assert 0 < found.small_batch < SHARES.small_batch
        assert calibration("llama.cpp") == SHARES

    def test_few_points_are_called_an_estimate(self) -> None:
        assert len(MIXTURES) == 3
        assert calibration("llama.cpp", mixture=True).basis == "estimated"
        assert calibration("sglang", mixture=True).errors["bandwidth"] == 0.5

    @pytest.mark.parametrize("point", MIXTURES, ids=lambda point: f"{point.model} {point.phase}")
    def test_every_point_lies_in_the_range(self, point: SpeedPoint) -> None:
        found = calibration("llama.cpp", mixture=True)
        kind = kind_of(point.batch)
        compute = float("inf") if kind == "bandwidth" else getattr(found, kind)
        expected, error = predicted(point, found.bandwidth, compute), found.errors[kind]
        assert expected * (1 - error) <= point.tokens_per_second <= expected * (1 + error)

    def test_a_card_that_multiplies_otherwise_is_an_estimate(self) -> None:
        """All points are of cards with dp4a; a P100 has none."""
        measured = calibration_for(load_card("tesla-p40"), "llama.cpp", mixture=False)
        assert measured == SHARES
        other = calibration_for(load_card("tesla-p100"), "llama.cpp", mixture=False)
        assert other.basis == "estimated"
        assert set(other.errors.values()) == {0.35}


class TestEstimate:
    def test_a_7b_on_a_p4_is_where_others_measured_it(self) -> None:
        """20 to 24 tok/s is what the published 4B and 9B figures of a P4 say of 7B to 8B in Q4_K_M."""
        plan = make_plan(LLAMA_3_8B, P4, request(engine="llama.cpp", max_running_requests=1, context_length=2048))
        assert plan.speed is not None
        assert 20 <= plan.speed.single.tokens_per_second <= 26
        assert plan.speed.single.low < plan.speed.single.tokens_per_second < plan.speed.single.high

    def test_more_requests_are_faster_together_and_slower_each(self) -> None:
        rates = []
        for n in (1, 2, 4, 8):
            plan = make_plan(LLAMA_3_8B, P4, request(max_running_requests=n, context_length=1024))
            assert plan.speed is not None
            rates.append(plan.speed.decode.tokens_per_second)
        assert rates == sorted(rates)
        each = [rate / n for rate, n in zip(rates, (1, 2, 4, 8), strict=True)]
        assert each == sorted(each, reverse=True)

    def test_a_longer_context_is_slower(self) -> None:
        rates = [
            make_plan(LLAMA_3_8B, P4, request(context_length=context, max_running_requests=1)).speed
            for context in (512, 4096, 8192)
        ]
        assert all(rate is not None for rate in rates)
        decoded = [rate.decode.tokens_per_second for rate in rates if rate is not None]
        assert decoded == sorted(decoded, reverse=True)

    def test_requests_decode_over_what_the_pool_holds(self) -> None:
        plan = make_plan(LLAMA_2_7B, P4, request(mem_fraction_static=0.9))
        assert plan.speed is not None
        assert plan.speed.decode.context == plan.kv_tokens // 4

    def test_a_card_without_dp4a_multiplies_in_fp32(self) -> None:
        p100, p40 = load_card("tesla-p100"), load_card("tesla-p40")
        assert peak_macs(p100) == 3584 * 1_303_000_000
        assert peak_macs(p40) == 4 * 3840 * 1_303_000_000

    def test_there_is_none_for_the_cpu(self) -> None:
        card = load_card("cpu")
        assert make_plan(LLAMA_3_8B, card, request(card, device="cpu", card_bytes=64 << 30)).speed is None
