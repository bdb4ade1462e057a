"""The state machine and the judge: rules over all states, and over any history of counters and probes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pascaline.engines import Progress, WorkLimits
from pascaline.serving import health as health_module
from pascaline.serving.health import ANSWERING, FAILED_PROBES, Health, Judge, State, backoff_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

STATES = st.sampled_from(State)
ENDS = {State.DRAINING, State.FAILED, State.STOPPED}
STALL = 45.0
LACK = "[Errno 24] Too many open files"


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
        before = {state for state in State if follows(state, State.READY)}
        assert before == {State.STARTING, State.READY, State.BUSY, State.BLIND}

    def test_blind_is_only_one_that_was_ready(self) -> None:
        before = {state for state in State if follows(state, State.BLIND)}
        assert before == {State.READY, State.BUSY, State.BLIND}

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

    def test_the_table_in_the_docstring_is_the_truth(self) -> None:
        """Every transition that exists is in a row, and every row is a transition."""
        told = set()
        for line in (health_module.__doc__ or "").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == 3 and cells[0] not in ("from", "---"):
                told |= {(before, State(cells[1])) for before in _states(cells[0])}
        exist = {(before, after) for before in State for after in State if before is not after}
        assert told - {(state, state) for state in State} == {way for way in exist if follows(*way)}

    def test_every_state_can_be_reached(self) -> None:
        reached = {State.PLANNED}
        for _ in State:
            reached |= {state for before in reached for state in State if follows(before, state)}
        assert reached == set(State)


def _states(cell: str) -> set[State]:
    """The states of a cell of the table."""
    last = {State.DRAINING, State.FAILED, State.STOPPED}
    if cell.startswith("any"):
        left_out = {"any": set(), "any but the last three": last, "any but stopped": {State.STOPPED}}[cell]
        return set(State) - left_out
    return {State(name.strip()) for name in cell.split(",")}


LIMITS = WorkLimits(chunk=512, prefill=2 * 16384, prompts=18, decode=240)


def looking(judge: Judge, seconds: int, page: Callable[[int], Progress], probe_every: int = 0) -> State:
    """Look once a second at a page; test generations are sent and never answered."""
    for now in range(1, seconds + 1):
        if probe_every and now % probe_every == 0:
            judge.probe_failed(with_error=False)
            judge.probe_sent()
        judge.observe(now, page(now))
    return judge.verdict(float(seconds))[0]


class TestAnswers:
    """Where an engine counts what leaves, its work is no sign of life."""

    def test_a_long_prompt_is_waited_for(self) -> None:
        """150 s at 100 tokens a second, with nothing running or waiting, as SGLang says then."""
        judge = Judge(STALL, last_sign=0.0, progress=Progress(0, 0, 0, 0.0, prompts=0), limits=LIMITS)
        page = lambda now: Progress(512 * (now // 5), 0, 0, 0.0, prefill=512 * (now // 5), prompts=1)  # noqa: E731
        assert looking(judge, 150, page, probe_every=45) is State.READY

    def test_an_answer_that_is_not_streamed_is_waited_for(self) -> None:
        judge = Judge(STALL, last_sign=0.0, progress=Progress(0, 0, 0, 0.0), limits=LIMITS)
        page = lambda now: Progress(now // 20, 1, 0, 0.0, decode=now // 20, prompts=1)  # noqa: E731
        assert looking(judge, 200, page, probe_every=45) is State.BUSY

    @pytest.mark.parametrize("prompt", [1, 8, 60])
    def test_short_requests_whose_answers_are_lost(self, prompt: int) -> None:
        judge = Judge(STALL, last_sign=0.0, progress=Progress(0, 0, 0, 0.0, prompts=0), limits=LIMITS)
        page = lambda now: Progress(  # noqa: E731
            (prompt + 4) * now, 1, 0, 0.0, prefill=prompt * now, decode=4 * now, prompts=now
        )
        assert looking(judge, 2 * int(STALL) + 18, page, probe_every=45) is State.UNRESPONSIVE

    def test_an_idle_scheduler_computes_no_long_prompt(self) -> None:
        judge = Judge(STALL, last_sign=0.0, progress=Progress(0, 0, 0, 0.0, idle_seconds=0), limits=LIMITS)
        page = lambda now: Progress(now, 0, 0, 0.0, prefill=20 * now, idle_seconds=0.9 * now)  # noqa: E731
        assert looking(judge, int(STALL) + 1, page) is State.UNRESPONSIVE

    def test_what_the_test_generations_compute_excuses_nothing(self) -> None:
        judge = Judge(STALL, last_sign=0.0, progress=Progress(0, 0, 0, 0.0, prompts=0), limits=LIMITS)
        page = lambda now: Progress(3 * (now // 15), 0, 0, 0.0, prefill=3 * (now // 15), prompts=now // 15)  # noqa: E731
        assert looking(judge, int(STALL) + 1, page, probe_every=15) is State.UNRESPONSIVE

    def test_what_they_are_answered_within_the_engine_is_no_sign(self) -> None:
        """Counted as handed over, and yet they fail: what hands over to clients does not."""
        judge = Judge(STALL, last_sign=0.0, progress=Progress(0, 0, 0, 0.0), limits=LIMITS)
        assert looking(judge, 46, lambda now: Progress(0, 0, 0, 2.0 * (now // 15)), 15) is State.UNRESPONSIVE

    def test_errors_in_a_row_end_the_excuse(self) -> None:
        judge = Judge(STALL, last_sign=0.0, progress=Progress(0, 0, 0, 0.0, prompts=0), limits=LIMITS)
        page = lambda now: Progress(512 * now, 0, 0, 0.0, prefill=100 * now, prompts=1)  # noqa: E731
        assert looking(judge, 100, page) is State.READY
        for _ in range(FAILED_PROBES):
            judge.probe_failed(with_error=True)
        assert judge.verdict(100.0) == (
            State.UNRESPONSIVE,
            "no token for 100 s; 10000 tokens were computed and reached nobody; 3 test generations in a row failed",
        )

    def test_every_token_that_leaves_is_a_sign(self) -> None:
        judge = Judge(STALL, last_sign=0.0, progress=Progress(0, 1, 0, 0.0, prompts=0), limits=LIMITS)
        assert looking(judge, 1000, lambda now: Progress(now, 1, 0, float(now // 10), decode=now)) is State.BUSY


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

    def test_a_counter_that_falls_is_no_sign_of_life(self) -> None:
        """The process is the same; one that shows this and that page must not stay ready for ever."""
        judge = Judge(STALL, last_sign=0.0, progress=Progress(1000, 1, 0))
        for now in range(1, 60):
            judge.observe(now, Progress(5 if now % 2 else 1000, 1, 0))
        assert judge.verdict(60.0)[0] is State.UNRESPONSIVE
        judge.observe(61.0, Progress(1001, 1, 0))
        assert judge.last_sign == 61.0

    @given(st.lists(st.integers(1, int(STALL)), min_size=1, max_size=50), st.integers(1, 8))
    def test_while_counters_move_it_is_busy_however_long_the_answer_takes(self, waits: list[int], running: int) -> None:
        judge, now = Judge(STALL, last_sign=0.0, progress=Progress(0, running, 0)), 0.0
        for tokens, wait in enumerate(waits, 1):
            assert judge.verdict(now + wait)[0] is State.BUSY
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
    """Time in which the supervisor itself stood still says nothing about the engine."""

    def test_it_is_not_counted_as_silence(self) -> None:
        judge = Judge(STALL, last_sign=0.0)
        judge.missed(STALL, LACK)
        assert judge.verdict(2 * STALL)[0] is State.READY
        assert judge.verdict(2 * STALL + 1)[0] is State.UNRESPONSIVE

    def test_for_a_stall_timeout_it_withdraws_readiness_and_kills_nothing(self) -> None:
        judge = Judge(STALL, last_sign=0.0)
        for now in range(1, 10_000):
            judge.missed(1.0, LACK)
            judge.observe(now, None)
            assert judge.verdict(now)[0] is (State.READY if now <= STALL else State.BLIND)
        assert judge.verdict(10_000.0)[1] == (
            f"the engine could not be asked for 9999 s, because this process or host lacks something: {LACK}"
        )
        judge.observe(10_000.0, Progress(0, 0, 0))
        assert judge.verdict(10_000.0)[0] is State.BLIND  # counters alone are no answer
        judge.probed(10_001.0)
        assert judge.verdict(10_001.0) == (State.READY, "a generation succeeded")

    def test_an_engine_that_died_meanwhile_is_found_once_it_is_seen_again(self) -> None:
        judge = Judge(STALL, last_sign=0.0)
        judge.missed(1000.0, LACK)
        assert judge.verdict(1000.0 + STALL)[0] is State.BLIND
        assert judge.verdict(1001.0 + STALL)[0] is State.UNRESPONSIVE

    def test_what_is_lacking_now_and_then_blinds_nobody(self) -> None:
        judge = Judge(STALL, last_sign=0.0, progress=Progress(0, 1, 0))
        for now in range(1, 1000):
            if now % 30:
                judge.missed(1.0, LACK)
            else:
                judge.observe(now, Progress(now, 1, 0))
            assert judge.verdict(now)[0] is State.BUSY


class TestTestGenerationsThatWereNotSent:
    """What never reached the engine moved no counter of it, and says nothing about it."""

    @pytest.mark.parametrize("sent", [True, False])
    def test_answers_count_in_full_after_them(self, sent: bool) -> None:
        judge = Judge(STALL, last_sign=0.0, progress=Progress(0, 1, 0, answers=0.0))
        for _ in range(1000):
            judge.probe_sent()
            if sent:
                judge.probe_failed(with_error=False)
            else:
                judge.probe_not_sent()
        judge.observe(40.0, Progress(100, 1, 0, answers=100.0))
        judge.observe(41.0, Progress(200, 1, 0, answers=200.0))
        assert judge.last_sign == (0.0 if sent else 41.0)

    def test_they_neither_add_to_failures_nor_end_them(self) -> None:
        judge = Judge(STALL, last_sign=0.0)
        judge.probe_failed(with_error=True)
        judge.probe_sent()
        judge.probe_not_sent()
        assert judge.failed_probes == 1

    def test_one_more_than_was_sent_changes_nothing(self) -> None:
        """A sign of life forgets those that ended before it."""
        judge = Judge(STALL, last_sign=0.0)
        judge.probe_sent()
        judge.probed(1.0)
        judge.probe_not_sent()
        judge.probe_sent()
        assert judge._probes == 1


class TestBackoff:
    def test_it_doubles_up_to_the_cap(self) -> None:
        assert [backoff_seconds(n, 1.0, 60.0) for n in range(9)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]

    @given(st.integers(0, 10**9), st.floats(0.1, 10.0), st.floats(10.0, 600.0))
    def test_it_never_exceeds_the_cap_and_never_shrinks(self, restarts: int, base: float, cap: float) -> None:
        wait = backoff_seconds(restarts, base, cap)
        assert 0 <= wait <= cap
        assert wait <= backoff_seconds(restarts + 1, base, cap)
