"""Checks, their results, and how severe a result is."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pascaline.doctor.host import Host


class Verdict(StrEnum):
    """How a check ended, from best to worst."""

    OK = "ok"
    SKIPPED = "skipped"
    """The check does not apply to this host, or a fact that it needs is unknown here; the evidence says which."""
    INFO = "info"
    """Nothing is wrong, but the reader should know it or could gain from it."""
    WARNING = "warning"
    """It works, but slower or less safely than it should, or it will soon stop working."""
    FAILURE = "failure"
    """Serving fails, or gives wrong answers."""

    @property
    def severity(self) -> int:
        """0 for the best verdict, then ascending."""
        return list(Verdict).index(self)


@dataclass(frozen=True, slots=True)
class Remedy:
    """What to do about a finding: on NixOS by an option if there is one, elsewhere by a command."""

    text: str
    command: str = ""
    """Shell command, for a user with the necessary rights."""
    option: str = ""
    """A line of the NixOS configuration."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    """The id of the check."""
    title: str
    verdict: Verdict
    evidence: str
    """What was seen; for `skipped`, why the check could not be made."""
    remedy: Remedy | None = None
    """Set only for info, warning and failure."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a check's function returns; `Check.examine` makes a Finding of it."""

    verdict: Verdict
    evidence: str
    remedy: Remedy | None = None
    """None: the remedy of the check."""


@dataclass(frozen=True, slots=True)
class Check:
    """One question about a host. Its function is pure: it sees only the Host."""

    id: str
    """Documented and stable: scripts and people use it."""
    group: str
    title: str
    """The rule that should hold, as a short sentence."""
    explanation: str
    """What the check reads and why, for docs/doctor.md."""
    remedy: Remedy
    judge: Callable[[Host], Result]

    def examine(self, host: Host) -> Finding:
        """Apply the check. If it raises, that is a finding too: on a broken host the other checks matter even more."""
        try:
            result = self.judge(host)
        except Exception as error:
            words = f"this check failed: {type(error).__name__}: {error}"
            result = Result(Verdict.WARNING, words, Remedy("report it", "pascaline doctor --report bug.txt"))
        remedy = None
        if result.verdict.severity >= Verdict.INFO.severity:
            remedy = result.remedy or self.remedy
        return Finding(self.id, self.title, result.verdict, result.evidence, remedy)


class Checks(list[Check]):
    """The checks of one group; its decorator adds them."""

    def __init__(self, group: str) -> None:
        """group: heading above these checks."""
        super().__init__()
        self.group = group

    def check(
        self, name: str, title: str, remedy: str, *, command: str = "", option: str = ""
    ) -> Callable[[Callable[[Host], Result]], Callable[[Host], Result]]:
        """Turn a function into a check; its docstring is the explanation."""

        def register(judge: Callable[[Host], Result]) -> Callable[[Host], Result]:
            explanation = " ".join((inspect.getdoc(judge) or "").split())
            self.append(Check(name, self.group, title, explanation, Remedy(remedy, command, option), judge))
            return judge

        return register


def ok(evidence: str) -> Result:
    """Nothing is wrong."""
    return Result(Verdict.OK, evidence)


def skipped(reason: str) -> Result:
    """The check could not be made."""
    return Result(Verdict.SKIPPED, reason)


def info(evidence: str, remedy: Remedy | None = None) -> Result:
    """Worth knowing, but not wrong."""
    return Result(Verdict.INFO, evidence, remedy)


def warning(evidence: str, remedy: Remedy | None = None) -> Result:
    """Not as it should be, but serving works."""
    return Result(Verdict.WARNING, evidence, remedy)


def failure(evidence: str, remedy: Remedy | None = None) -> Result:
    """Serving fails."""
    return Result(Verdict.FAILURE, evidence, remedy)
