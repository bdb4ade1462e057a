"""Whether lookup may work at all: by what it has won and lost so far, in measured time. Pure.

An interval between two launches is a sample of a plain step's time if no draft was looked for and no wait changed the
interval. Every other interval is booked: the tokens that it gave, against the plain steps that would have fitted into
its time. All costs of speculation are therefore counted: rows, looking for drafts, waiting for the device, computing
what a draft model lacks. Each number of running requests has an account, which can be spent down to zero. It earns a
small share of all steps, which bounds the loss; after trials in vain it earns less.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Final

from sglang_pascal.speculation.policy import Pace

ALLOWANCE: Final = 0.01
"""Steps earned per step: the share of time that lookup may lose in the long run. Half of the two percent promised."""
DEBT: Final = 4.0
"""Most steps that an account is overdrawn by: what a pause of the machine cost is forgotten after five hundred steps.
A check that always takes so long is not repeated: `Pace` knows."""
CREDIT: Final = 2.0
"""Steps with which an account begins, and the most that it keeps of what it won: what the next text may lose."""
PROBE: Final = 1.0
"""Steps that must be in an account before lookup is tried again: with the allowance, after a hundred plain steps."""
MOST_FAILURES: Final = 2
"""Trials in vain, one after the other, each of which halves what is earned. The first is free, and a new prompt
lets the count begin anew: texts differ."""
WORST: Final = 16.0
"""Most plain steps' time that a check is booked with: a pause of the machine is not the fault of a check."""
FIRST: Final = 2.0
"""The same for the first check of each width."""
CLIPPED: Final = 3.0
"""The same for a step without a check, booked or sampled."""
LEAST_SAMPLES: Final = 3
MOST_SAMPLES: Final = 32
RENEWED: Final = 8
"""Samples of plain steps: how many there must be, how many the mean is of, and after how many it is taken anew."""
STEPS_PER_CALIBRATION: Final = 512
"""Booked steps after which some plain ones are taken: a longer text makes all steps slower."""
SETTLING: Final = 2
"""Intervals after a wait that are no sample. A wait empties the device's queue; until it is full again, the time
between launches is the host's only."""


@dataclass
class _Plain:
    """Steps of one number of requests without speculation."""

    samples: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_SAMPLES))
    seconds: float | None = None
    """Their mean, without what is far off."""
    n_samples: int = 0
    is_warm: bool = False
    """The first step of a number of requests is slow: the device's code is loaded."""

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
    """Of one number of requests."""

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
    """The first check of a width is slow too: memory is taken, a recorded step is loaded."""

    def note(self, change: float) -> None:
        earned = ALLOWANCE / 2 ** max(0, self.failures - 1)
        most = CREDIT if self.is_open else max(CREDIT, self.trial)
        self.balance = max(-DEBT, min(most, self.balance + change + earned))
        if self.is_open and self.balance <= 0:
            self.is_open, self.failures = False, min(self.failures + 1, 1 + MOST_FAILURES)
        elif self.balance >= max(PROBE, self.trial):
            self.is_open = True


class Accounts:
    """By number of running requests."""

    def __init__(self, row_cost: float, draft_cost: float = 0.0) -> None:
        """row_cost, draft_cost: as `Pace` takes them."""
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

        n, width: of the step that was launched. won: drafted tokens of it that were right. looked, waited: whether
        drafts were looked for, and the device was waited for, before the next launch. prepared: whether the time is
        also that of computing what a draft model lacked.
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
