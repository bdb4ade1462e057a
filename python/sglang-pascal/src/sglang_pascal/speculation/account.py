"""Decides whether drafts may be looked for, by the time that they have won and lost so far. Pure.

An interval between two launches is a sample of a plain step's time if no draft was looked for and no wait changed the
interval. Every other interval is booked: the tokens that it gave, against the plain steps that would have fitted into
its time. All costs of speculation are therefore counted: rows, looking for drafts, waiting for the device, computing
what a draft model lacks. Each number of running requests has an account. An account with nothing left stops
speculation. Each step adds a small share of a step to it, which bounds the loss; after trials in vain it adds less.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Final

from sglang_pascal.speculation.policy import Pace

ALLOWANCE: Final = 0.01
"""Steps that an account earns per step: the share of time that lookup may lose in the long run. The documented bound
is twice this, two percent."""
DEBT: Final = 4.0
"""Most steps by which an account is overdrawn. With the allowance, the cost of a pause of the machine is forgotten
after five hundred steps. A check that is always slow is not repeated: `Pace` remembers its time."""
CREDIT: Final = 2.0
"""Steps with which an account begins, and the most that it keeps of what it won. The next text may lose as much."""
PROBE: Final = 1.0
"""Steps that must be in an account before lookup is tried again: with the allowance, after a hundred plain steps."""
MOST_FAILURES: Final = 2
"""Trials in vain, one after the other, each of which halves what is earned. The first is free, and a new prompt
lets the count begin anew: texts differ."""
WORST: Final = 16.0
"""Most time that is booked for a check, in plain steps. More is a pause of the machine, not the cost of the check."""
FIRST: Final = 2.0
"""The same for the first check of each width."""
CLIPPED: Final = 3.0
"""The same for a step without a check, booked or sampled."""
LEAST_SAMPLES: Final = 3
MOST_SAMPLES: Final = 32
RENEWED: Final = 8
"""Numbers of samples of plain steps: needed for a first mean, used for a mean, and taken between two updates of it."""
STEPS_PER_CALIBRATION: Final = 512
"""Booked steps after which some plain ones are taken: a longer text makes all steps slower."""
SETTLING: Final = 2
"""Intervals after a wait that are not used as samples. A wait empties the device's queue; until it is full again, the
time between launches is only the host's."""


@dataclass
class _Plain:
    """Steps of one number of requests without speculation."""

    samples: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_SAMPLES))
    seconds: float | None = None
    """Their mean, with outliers clipped. None if there are too few samples."""
    n_samples: int = 0
    is_warm: bool = False
    """Whether the first step has passed. It is slow, because the device loads code."""

    def note(self, seconds: float) -> None:
        if not self.is_warm:
            self.is_warm = True
            return
        self.samples.append(seconds)
        self.n_samples += 1
        is_due = self.n_samples % RENEWED == 0 or len(self.samples) < MOST_SAMPLES
        if is_due and len(self.samples) >= LEAST_SAMPLES:
            most = CLIPPED * median(self.samples)
            self.seconds = fmean(min(sample, most) for sample in self.samples)


@dataclass
class _Account:
    """The balance of one number of running requests."""

    plain: _Plain = field(default_factory=_Plain)
    balance: float = CREDIT
    """Plain steps."""
    is_open: bool = True
    trial: float = 0.0
    """Plain steps that it took before the last check to compute what a draft model lacked."""
    failures: int = 0
    """How often it was closed since a check won something."""
    booked_steps: int = 0
    """Since the last calibration."""
    samples_wanted: int = LEAST_SAMPLES
    warm_widths: set[int] = field(default_factory=set)
    """Widths whose first check has passed. It is slow too: memory is allocated, and a recorded step is loaded."""

    def note(self, change: float) -> None:
        earned = ALLOWANCE / 2 ** max(0, self.failures - 1)
        most = CREDIT if self.is_open else max(CREDIT, self.trial)
        self.balance = max(-DEBT, min(most, self.balance + change + earned))
        if self.is_open and self.balance <= 0:
            self.is_open, self.failures = False, min(self.failures + 1, 1 + MOST_FAILURES)
        elif self.balance >= max(PROBE, self.trial):
            self.is_open = True


class Accounts:
    """One account for each number of running requests."""

    def __init__(self, row_cost: float, draft_cost: float = 0.0) -> None:
        """row_cost, draft_cost: see `Pace`."""
        self.pace = Pace(row_cost, draft_cost)
        self.won_seconds = 0.0
        """What speculation has won so far, seconds; negative if it has lost."""
        self._accounts: dict[int, _Account] = {}
        self._unsettled = 0

    def allows(self, n: int) -> bool:
        """Return whether drafts may be looked for, with n running requests."""
        account = self._accounts.setdefault(n, _Account())
        return account.is_open and not account.samples_wanted

    def has_hope(self, n: int) -> bool:
        """Return whether drafts may be looked for soon, with n running requests."""
        account = self._accounts.get(n)
        return account is None or account.is_open

    def prompted(self) -> None:
        """Note that there is a new text, with which trials may be less in vain."""
        for account in self._accounts.values():
            account.failures = min(account.failures, 1)

    def note(
        self, n: int, width: int, seconds: float, won: int, *, looked: bool, waited: bool, prepared: bool = False
    ) -> None:
        """Count the time from a launch to the next one.

        n, width: requests and rows per request of the step that was launched. won: its drafted tokens that were right.
        looked, waited: whether the host looked for drafts, and waited for the device, before the next launch.
        prepared: whether the time includes computing what a draft model lacked.
        """
        account = self._accounts.setdefault(n, _Account())
        self._unsettled = SETTLING if waited else max(0, self._unsettled - 1)
        self.pace.step(width)
        if width == 1 and not looked and not self._unsettled:
            self._sample(account, seconds)
        elif account.plain.seconds is not None:
            self._book(account, n, width, seconds, won, prepared=prepared)

    def _sample(self, account: _Account, seconds: float) -> None:
        account.plain.note(seconds)
        account.note(0.0)
        if account.plain.samples:
            account.samples_wanted = max(0, account.samples_wanted - 1)

    def _book(self, account: _Account, n: int, width: int, seconds: float, won: int, *, prepared: bool) -> None:
        plain = account.plain.seconds
        assert plain is not None
        took = min(seconds / plain, CLIPPED if width == 1 else WORST)
        if width > 1 and width not in account.warm_widths:
            account.warm_widths.add(width)
            took = min(took, FIRST)
        elif prepared:
            account.trial = max(0.0, took - self.pace.cost(n, width))
        elif width > 1:
            self.pace.note(n, width, took)
        account.failures = 0 if (n + won) / n > took and width > 1 else account.failures
        change = (n + won) / n - took
        self.won_seconds += change * plain
        account.note(change)
        account.booked_steps += 1
        if account.booked_steps == STEPS_PER_CALIBRATION:
            account.booked_steps, account.samples_wanted = 0, LEAST_SAMPLES
