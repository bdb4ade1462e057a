"""Never slower by more than two percent, and faster where text repeats: over simulated devices and hosts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_pascal.speculation.account import ALLOWANCE, CREDIT, DEBT, PROBE, SETTLING, WORST, Accounts
from sglang_pascal.speculation.drafting import Drafter

PARAMETERS = SimpleNamespace(
    frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0, max_new_tokens=100_000
)
PROMISED = 0.02


@dataclass(frozen=True)
class Costs:
    """Milliseconds."""

    device: float
    """A step without drafts."""
    row: float
    """Each further row of a request, as a share of that."""
    host: float
    """SGLang's own work for a step."""
    check: float
    """The same for a check beyond that of a plain step."""
    look: float
    """Looking for drafts."""


@dataclass
class Request:
    rid: str
    origin_input_ids_unpadded: list
    output_ids: list = field(default_factory=list)
    sampling_params: SimpleNamespace = field(default_factory=lambda: PARAMETERS)


class Simulation:
    """SGLang's overlapping scheduler: it launches a step, then processes the one before."""

    def __init__(self, costs, follow, n):
        """follow(text) -> the next token."""
        self.costs, self.follow, self.now, self.device_free = costs, follow, 0.0, 0.0
        self.drafter = Drafter(
            widths=lambda n: [width for width in (1, 2, 4, 8) if width == 1 or n * width <= 16],
            most_rows=16,
            row_cost=0.04,
            context_length=10**9,
            clock=lambda: self.now,
        )
        looked = self.drafter._texts.running

        def running(requests):
            self.now += costs.look
            return looked(requests)

        self.drafter._texts.running = running
        self.widths = []
        self.admit(n)

    def admit(self, n):
        """Replace the running requests by n new ones."""
        self.requests = [Request(f"{len(self.widths)}-{i}", [i, 1, 2, 3]) for i in range(n)]
        self.texts = [[*request.origin_input_ids_unpadded, 4] for request in self.requests]
        self.runs = [[4]] * n
        self.drafter.prefilled(self.requests)
        self.late = list(zip(self.requests, self.runs, strict=True))
        self.now += self.costs.host
        self.device_free = max(self.now, self.device_free) + 10 * self.costs.device

    def step(self):
        plan = self.drafter.plan(self.requests, self.wait)
        self.widths.append(plan.width)
        for i, (n_drafts, drafts) in enumerate(zip(plan.n_drafts, plan.drafts, strict=True)):
            run = [self.follow(self.texts[i])]
            while len(run) <= n_drafts and drafts[len(run) - 1] == run[-1]:
                run.append(self.follow([*self.texts[i], *run]))
            self.texts[i] = [*self.texts[i], *run][-64:]
            self.runs[i] = run
        self.launch(plan.width)
        results, self.late = self.late, list(zip(self.requests, self.runs, strict=True))
        for request, run in results:
            request.output_ids.extend(run)

    def launch(self, width):
        costs = self.costs
        self.now += costs.host + (costs.check if width > 1 else 0)
        rows = len(self.requests) * (width - 1)
        before = self.device_free
        self.device_free = max(self.now, before) + costs.device * (1 + costs.row * rows)
        self.now = max(self.now, before)

    def wait(self):
        self.now = max(self.now, self.device_free)
        n_tokens = [
            len(request.origin_input_ids_unpadded) + len(request.output_ids) + (len(late[1]) if late else 0)
            for request, late in zip(self.requests, self.late, strict=True)
        ]
        return list(zip(n_tokens, self.runs, strict=True))

    def run(self, n_tokens):
        """Return the milliseconds until every request has generated a number of further tokens."""
        start = max(self.now, self.device_free)
        wanted = [len(request.output_ids) + n_tokens for request in self.requests]
        while any(len(request.output_ids) < n for request, n in zip(self.requests, wanted, strict=True)):
            self.step()
        return max(self.now, self.device_free) - start

    def plain(self, n_tokens):
        """Return the same without speculation."""
        return n_tokens * max(self.costs.device, self.costs.host)


def mixed(seed, share):
    """Text of which a share quotes what came before, and in which every fourth token begins like something earlier."""
    random_ = random.Random(seed)
    state = {"quoting": 0}

    def follow(text):
        if state["quoting"] > 0:
            state["quoting"] -= 1
            return text[-40] if len(text) > 40 else 1
        if random_.random() < share / 20:
            state["quoting"] = 20
        previous = text[-3:]
        for pair in ((1, 2), (2, 3)):
            if previous[-1] == pair[0]:
                return pair[1]
        return 1 if random_.random() < 0.3 else random_.randrange(1000, 10**6)

    return follow


def repeating(text):
    """Text that goes on with what came ten tokens ago."""
    return text[-10] if len(text) > 10 else len(text)


COSTS = st.builds(
    Costs,
    device=st.sampled_from([1.0, 5.0, 25.0]),
    row=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    host=st.sampled_from([0.5, 2.0, 4.0]),
    check=st.sampled_from([0.0, 2.0, 5.0]),
    look=st.sampled_from([0.0, 0.1, 0.5]),
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(costs=COSTS, n=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 3))
def test_no_device_is_slower_by_more_than_two_percent_whatever_the_text(costs, n, seed):
    simulation = Simulation(costs, mixed(seed, 0.0), n)
    n_tokens = 400
    took, plain = simulation.run(n_tokens), simulation.plain(n_tokens)
    overdraft = CREDIT + WORST  # the last check may be begun with an account that is nearly empty
    assert took <= plain * (1 + PROMISED) + overdraft * plain / n_tokens


@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize("device", [1.0, 25.0])
def test_text_that_never_repeats_takes_two_percent_more_at_most(device, n):
    """With a host that is slower than the device, and one that is not."""
    simulation = Simulation(Costs(device, row=0.05, host=1.8, check=2.0, look=0.2), len, n)
    simulation.run(100)
    assert simulation.run(400) <= simulation.plain(400) * (1 + PROMISED)


@pytest.mark.parametrize(("n", "best"), [(1, 8), (2, 8), (4, 4), (8, 2)])
def test_text_that_repeats_has_the_gain_of_the_widest_checks(n, best):
    costs = Costs(25.0, row=0.01, host=2.0, check=1.0, look=0.1)
    simulation = Simulation(costs, repeating, n)
    simulation.run(100)
    check = costs.device * (1 + costs.row * n * (best - 1)) + costs.host + costs.check + costs.look
    assert simulation.run(400) == pytest.approx(400 / best * check, rel=0.06)
    assert simulation.drafter.won_seconds > 0


def test_short_requests_one_after_the_other_have_the_gain():
    """The time of a prompt is no step's."""
    simulation = Simulation(Costs(25.0, row=0.01, host=2.0, check=1.0, look=0.1), repeating, 1)
    for _ in range(30):
        simulation.admit(1)
        simulation.run(40)
    assert simulation.widths.count(8) >= 3 * 28  # the text repeats after ten tokens
    assert simulation.drafter._accounts._accounts[1].plain.seconds == pytest.approx(25.0)


def test_a_machine_with_pauses_keeps_the_gain():
    """Steps of random lengths, and one in fifty that takes ten times as long for no reason."""
    random_ = random.Random(5)
    simulation = Simulation(Costs(25.0, row=0.02, host=2.0, check=1.0, look=0.1), repeating, 1)
    launch = simulation.launch

    def paused(width):
        launch(width)
        simulation.device_free += random_.choice([0.0, 3.0, 6.0])
        simulation.now += 250.0 if random_.random() < 0.02 else 0.0

    simulation.launch = paused
    simulation.run(100)
    simulation.widths.clear()
    simulation.run(1500)
    assert sum(width > 1 for width in simulation.widths) > 0.6 * len(simulation.widths)


def test_a_loss_switches_lookup_off_and_it_comes_back():
    accounts = Accounts(0.04)

    def plain(n_steps):
        for _ in range(n_steps):
            accounts.note(1, 1, 1.0, 0, looked=False, waited=False)

    assert not accounts.allows(1)  # nothing is known of plain steps yet
    plain(4)
    assert accounts.allows(1)
    accounts.note(1, 8, 1.0, 0, looked=True, waited=True)  # the first one
    accounts.note(1, 8, 3.5, 0, looked=True, waited=True)
    assert not accounts.allows(1)
    assert accounts.won_seconds == -2.5
    plain(SETTLING + round((PROBE - CREDIT + 2.5) / ALLOWANCE) - 5)
    assert not accounts.allows(1)
    plain(10)
    assert accounts.allows(1)


def test_what_was_won_is_not_kept_for_a_later_text():
    accounts = Accounts(0.04)
    for _ in range(4):
        accounts.note(2, 1, 1.0, 0, looked=False, waited=False)
    for _ in range(100):
        accounts.note(2, 8, 1.2, 14, looked=True, waited=True)
    assert accounts.won_seconds == pytest.approx(100 * 6.8)
    for _ in range(3):
        assert accounts.allows(2)
        accounts.note(2, 8, 1.9, 0, looked=True, waited=True)
    assert not accounts.allows(2)


def test_a_slow_first_check_and_a_pause_are_forgotten():
    accounts = Accounts(0.04)
    for _ in range(4):
        accounts.note(1, 1, 1.0, 0, looked=False, waited=False)
    accounts.note(1, 8, 100.0, 0, looked=True, waited=True)
    assert accounts.allows(1)
    assert accounts.pace.cost(1, 8) == pytest.approx(1.28)
    accounts.note(1, 8, 100.0, 0, looked=True, waited=True)
    assert not accounts.allows(1)
    for _ in range(round((DEBT + PROBE) / ALLOWANCE) + SETTLING):
        accounts.note(1, 1, 1.0, 0, looked=False, waited=False)
    assert accounts.allows(1)


def closed(trial):
    """An account that the first check with a draft model that lacked much has closed, after `trial` steps' time."""
    accounts = Accounts(0.04)
    for _ in range(4):
        accounts.note(1, 1, 1.0, 0, looked=False, waited=False)
    accounts.note(1, 8, 1.0, 0, looked=True, waited=True)  # the first one
    accounts.note(1, 8, trial + accounts.pace.cost(1, 8), 0, looked=True, waited=True, prepared=True)
    assert not accounts.allows(1)
    return accounts


def steps_until_open(accounts):
    for n in range(10_000):
        if accounts.allows(1):
            return n
        accounts.note(1, 1, 1.0, 0, looked=False, waited=False)
    raise AssertionError


def test_what_a_draft_model_lacks_is_tried_once_it_can_be_paid_for():
    accounts = closed(trial=10.0)
    assert accounts.pace.cost(1, 8) == pytest.approx(1.28)  # it is no sample of a check's time
    assert steps_until_open(accounts) == pytest.approx((DEBT + 10.0) / ALLOWANCE, rel=0.01)
    accounts.note(1, 8, 11.28, 7, looked=True, waited=True, prepared=True)
    assert accounts.allows(1)
    accounts.note(1, 8, 1.3, 7, looked=True, waited=True)
    assert accounts._accounts[1].balance == CREDIT


def test_trials_in_vain_become_rarer_until_one_wins_or_there_is_a_new_text():
    accounts = Accounts(0.04)
    for _ in range(4):
        accounts.note(1, 1, 1.0, 0, looked=False, waited=False)
    accounts.note(1, 8, 1.0, 0, looked=True, waited=True)

    def in_vain():
        accounts.note(1, 8, 4.0, 0, looked=True, waited=True)
        return steps_until_open(accounts)

    in_vain()
    earned = [3.0 / in_vain() for _ in range(4)]
    assert earned == pytest.approx([ALLOWANCE / 2, ALLOWANCE / 4, ALLOWANCE / 4, ALLOWANCE / 4], rel=0.02)
    accounts.note(1, 8, 2.0, 7, looked=True, waited=True)
    assert 2.0 / in_vain() == pytest.approx(ALLOWANCE, rel=0.02)
    in_vain()
    accounts.prompted()
    assert 3.0 / in_vain() == pytest.approx(ALLOWANCE / 2, rel=0.02)


def test_each_number_of_requests_has_an_account_of_its_own():
    accounts = Accounts(0.04)
    for n in (1, 8):
        for _ in range(4):
            accounts.note(n, 1, 1.0, 0, looked=False, waited=False)
    for _ in range(2):
        accounts.note(8, 2, 4.0, 0, looked=True, waited=True)
    assert (accounts.allows(1), accounts.allows(8)) == (True, False)


def test_plain_steps_are_measured_again_while_lookup_wins():
    simulation = Simulation(Costs(25.0, row=0.01, host=2.0, check=1.0, look=0.1), repeating, 1)
    simulation.run(8 * 1200)
    assert 10 < simulation.widths.count(1) < 30
