"""What a check is, what it may find, and how bad that is."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pascaline.doctor.host import Host


class Verdict(StrEnum):
    """How a check ended, the worst last."""

    OK = "ok"
    SKIPPED = "skipped"
    """It does not apply to this host, or what it needs to know cannot be learned here; the evidence says which."""
    INFO = "info"
    """Nothing is wrong, but there is something to know, or to gain."""
    WARNING = "warning"
    """It works, slower or less safely than it should, or will stop to."""
    FAILURE = "failure"
    """Serving fails, or is wrong."""

    @property
    def severity(self) -> int:
        """0 for ok, growing."""
        return list(Verdict).index(self)


@dataclass(frozen=True, slots=True)
class Remedy:
    """What to do about a finding: on NixOS by an option where there is one, elsewhere by a command."""

    text: str
    command: str = ""
    """For a shell, by a user who may do it."""
    option: str = ""
    """A setting of the NixOS configuration, as it is written there."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    """The check's id."""
    title: str
    verdict: Verdict
    evidence: str
    """What was seen; for `skipped` why nothing could be."""
    remedy: Remedy | None = None
    """Only with info, warning and failure."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a check's function returns; `Check.examine` makes a Finding of it."""

    verdict: Verdict
    evidence: str
    remedy: Remedy | None = None
    """None: the check's own."""


@dataclass(frozen=True, slots=True)
class Check:
    """One question about a host. Its function is pure: all it knows is the Host."""

    id: str
    """Documented and stable: scripts and people refer to it."""
    group: str
    title: str
    """The rule that should hold, as a short sentence."""
    explanation: str
    """What is looked at and why, for docs/doctor.md."""
    remedy: Remedy
    judge: Callable[[Host], Result]

    def examine(self, host: Host) -> Finding:
        """Apply the check. One that fails is a finding too: on an ill host the others are needed all the more."""
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
    """The checks of one group, filled by its decorator."""

    def __init__(self, group: str) -> None:
        """group: heading of these checks."""
        super().__init__()
        self.group = group

    def check(
        self, name: str, title: str, remedy: str, *, command: str = "", option: str = ""
    ) -> Callable[[Callable[[Host], Result]], Callable[[Host], Result]]:
        """Make a check of a function; its docstring is the explanation."""

        def register(judge: Callable[[Host], Result]) -> Callable[[Host], Result]:
            explanation = " ".join((inspect.getdoc(judge) or "").split())
            self.append(Check(name, self.group, title, explanation, Remedy(remedy, command, option), judge))
            return judge

        return register


def ok(evidence: str) -> Result:
    """All is well."""
    return Result(Verdict.OK, evidence)


def skipped(reason: str) -> Result:
    """It could not be judged."""
    return Result(Verdict.SKIPPED, reason)


def info(evidence: str, remedy: Remedy | None = None) -> Result:
    """Worth knowing."""
    return Result(Verdict.INFO, evidence, remedy)


def warning(evidence: str, remedy: Remedy | None = None) -> Result:
    """Not as it should be."""
    return Result(Verdict.WARNING, evidence, remedy)


def failure(evidence: str, remedy: Remedy | None = None) -> Result:
    """Broken."""
    return Result(Verdict.FAILURE, evidence, remedy)
