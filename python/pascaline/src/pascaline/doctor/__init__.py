"""Finds out what keeps a host from serving and what to do about it: each check gives evidence, verdict and remedy.

machine    access to a machine's files, programs and services
collect    machine -> Host, which holds every known fact; evidence/ has one module per part
checks/    Host -> findings; pure functions
report     findings -> text for people, JSON, and a redacted file for a bug report
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.doctor.checks import ALL_CHECKS
from pascaline.doctor.checks.cases import judge_cases
from pascaline.doctor.verdicts import Finding, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.doctor.host import Host

__all__ = ["examine", "worst"]


def examine(host: Host) -> list[Finding]:
    """Apply every check, then judge the guide's cases by the findings."""
    findings = [check.examine(host) for check in ALL_CHECKS]
    return [*findings, *judge_cases(findings)]


def worst(findings: Sequence[Finding]) -> Verdict:
    """Return the worst verdict."""
    return max((finding.verdict for finding in findings), key=lambda verdict: verdict.severity, default=Verdict.OK)
