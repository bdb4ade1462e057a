"""Pauses of the supervisor's own process: they do not count, and however many there are, the clock goes on."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pascaline.serving.awake_clock import LATE_TICKS, AwakeClock


def elapsed(waits: list[float], tick: float = 1.0) -> float:
    """What the clock shows of these times between its readings."""
    with pytest.MonkeyPatch.context() as patch:
        now = 1000.0
        patch.setattr(time, "monotonic", lambda: now)
        clock = AwakeClock(tick)
        began = clock.time()
        for wait in waits:
            now += wait
            clock.time()
        return clock.time() - began


@pytest.mark.parametrize(("waits", "shown"), [
    ([1.0] * 10, 10.0), ([0.01] * 100, 1.0), ([1.9] * 10, 19.0), ([5.0], 1.0), ([1.0, 8.0, 1.0], 3.0), ([3600.0] * 3, 3.0),
])  # fmt: skip
def test_a_pause_counts_as_a_tick(waits: list[float], shown: float) -> None:
    assert elapsed(waits) == pytest.approx(shown)


@given(st.lists(st.floats(0.0, 1000.0), max_size=50), st.floats(0.1, 10.0))
def test_it_goes_on_by_at_most_the_time_and_by_at_least_a_tick_for_each_late_reading(
    waits: list[float], tick: float
) -> None:
    shown = elapsed(waits, tick)
    assert shown <= sum(waits) + 1e-6
    assert shown >= sum(min(wait, tick) for wait in waits) - 1e-6
    assert shown <= LATE_TICKS * tick * len(waits) + 1e-6
