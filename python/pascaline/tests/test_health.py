"""The state machine and the judge: rules over all states, and over any history of counters and probes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pascaline.engines import Progress
from pascaline.serving.health import ANSWERING, Health, Judge, State, backoff_seconds

STATES = st.sampled_from(State)
ENDS = {State.DRAINING, State.FAILED, State.STOPPED}
STALL = 45.0


def follows(before: State, after: State) -> bool:
    try:
        return Health(before, 0.0, "").to(after, 1.0, "").state is after
    except ValueError:
        return False


class TestHealth:
    def test_a_change_carries_time_and_reason(self) -> None:
        health = Health(State.PLANNED, 1.0, "starting up").to(State.STARTING, 2.0, "the engine is loading")
        assert health == Health(State.STARTING, 2.0, "the engine is loading")

    @given(STATES)
    def test_the_same_state_keeps_its_time_and_reason(self, state: State) -> None:
        health = Health(state, 1.0, "why")
        assert health.to(state, 2.0, "another") is health

    def test_a_way_that_does_not_exist_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"^no way from stopped to ready$"):
            Health(State.STOPPED, 0.0, "").to(State.READY, 1.0, "")

    @pytest.mark.parametrize("state", [state for state in State if state not in ENDS])
    def test_every_running_state_can_be_drained_fail_and_lose_its_gpu(self, state: State) -> None:
        assert all(follows(state, end) for end in (State.DRAINING, State.FAILED, State.STOPPED, State.GPU_LOST))

    def test_readiness_comes_only_after_a_start(self) -> None:
        assert {state for state in State if follows(state, State.READY)} == {State.STARTING, State.READY, State.BUSY}

    def test_an_unresponsive_engine_never_answers_again_without_a_restart(self) -> None:
        assert not any(follows(State.UNRESPONSIVE, state) for state in ANSWERING | {State.STARTING})

    @given(st.lists(STATES, max_size=20))
    def test_nothing_leads_back_from_the_end(self, wishes: list[State]) -> None:
        health, seen = Health(State.PLANNED, 0.0, ""), [State.PLANNED]
        for now, state in enumerate(wishes):
            if follows(health.state, state):
                health = health.to(state, float(now), "")
                seen.append(health.state)
        for before, after in itertools.pairwise(seen):
            if before in ENDS and before is not after:
                assert after in {State.STOPPED, State.FAILED}

    def test_every_state_can_be_reached(self) -> None:
        reached = {State.PLANNED}
        for _ in State:
            reached |= {state for before in reached for state in State if follows(before, state)}
        assert reached == set(State)


class TestJudge:
    def test_an_engine_without_work_is_ready(self) -> None:
        judge = Judge(STALL, last_sign=0.0)
        judge.observe(1.0, Progress(10, 0, 0))
        assert judge.verdict(2.0) == (State.READY, "a generation succeeded")

    @pytest.mark.parametrize(("running", "queued"), [(1, 0), (0, 1), (3, 4)])
    def test_an_engine_with_work_is_busy(self, running: int, queued: int) -> None:
        judge = Judge(STALL, last_sign=0.0)
        judge.observe(1.0, Progress(10, running, queued))
        assert judge.verdict(2.0) == (State.BUSY, "requests are running")

    def test_the_limit_itself_is_not_beyond_it(self) -> None:
        judge = Judge(STALL, last_sign=0.0, progress=Progress(10, 2, 1))
        assert judge.verdict(STALL)[0] is State.BUSY
        assert judge.verdict(STALL + 1) == (State.UNRESPONSIVE, "no token for 46 s while 3 requests wait")

    def test_silence_without_work_is_told_as_that(self) -> None:
        assert Judge(STALL, last_sign=0.0).verdict(100.0) == (State.UNRESPONSIVE, "no token for 100 s")

    def test_counters_that_cannot_be_read_are_no_sign_of_life(self) -> None:
        judge = Judge(STALL, last_sign=0.0)
        judge.observe(STALL + 1, None)
        assert judge.verdict(STALL + 1)[0] is State.UNRESPONSIVE

    def test_a_restarted_counter_is_a_sign_of_life(self) -> None:
        judge = Judge(STALL, last_sign=0.0, progress=Progress(1000, 1, 0))
        judge.observe(40.0, Progress(5, 1, 0))
        assert judge.last_sign == 40.0

    @given(st.lists(st.integers(1, int(STALL)), min_size=1, max_size=50), st.integers(1, 8))
    def test_while_counters_move_it_is_busy_however_long_the_answer_takes(self, waits: list[int], running: int) -> None:
        judge, now = Judge(STALL, last_sign=0.0), 0.0
        for tokens, wait in enumerate(waits):
            assert judge.verdict(now + wait)[0] is (State.BUSY if tokens else State.READY)
            now += wait
            judge.observe(now, Progress(tokens, running, 0))
        assert judge.verdict(now)[0] is State.BUSY

    @given(
        st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.booleans()), max_size=50),
        st.integers(0, 3),
    )
    def test_it_is_unresponsive_exactly_when_the_last_sign_is_too_old(
        self, history: list[tuple[int, bool, bool]], running: int
    ) -> None:
        judge, now, tokens, sign = Judge(STALL, last_sign=0.0, progress=Progress(0, running, 0)), 0.0, 0, 0.0
        for wait, moved, probed in history:
            now += wait
            tokens += moved
            judge.observe(now, Progress(tokens, running, 0))
            if probed:
                judge.probed(now)
            sign = now if moved or probed else sign
            assert (judge.verdict(now)[0] is State.UNRESPONSIVE) == (now - sign > STALL)

    @given(st.floats(0.1, 60.0), st.floats(0.0, 120.0))
    def test_a_probe_is_wanted_after_an_interval_without_a_sign(self, interval: float, silence: float) -> None:
        assert Judge(STALL, last_sign=0.0).wants_probe(silence, interval) == (silence >= interval)


class TestMissedTime:
    """Time in which the supervisor itself stood still says nothing of the engine."""

    def test_it_is_not_counted_as_silence(self) -> None:
        judge = Judge(STALL, last_sign=0.0)
        judge.missed(1000.0)
        assert judge.verdict(1000.0 + STALL)[0] is State.READY
        assert judge.verdict(1001.0 + STALL)[0] is State.UNRESPONSIVE


class TestBackoff:
    def test_it_doubles_up_to_the_cap(self) -> None:
        assert [backoff_seconds(n, 1.0, 60.0) for n in range(9)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]

    @given(st.integers(0, 10**9), st.floats(0.1, 10.0), st.floats(10.0, 600.0))
    def test_it_never_exceeds_the_cap_and_never_shrinks(self, restarts: int, base: float, cap: float) -> None:
        wait = backoff_seconds(restarts, base, cap)
        assert 0 <= wait <= cap
        assert wait <= backoff_seconds(restarts + 1, base, cap)
