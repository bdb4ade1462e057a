"""`pascaline doctor`: finds out what keeps a host from serving, and says what to do about it."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.cli.options import add_settings_arguments, given_flags
from pascaline.errors import ExitCode, StorageError

if TYPE_CHECKING:
    import argparse

    from pascaline.doctor.verdicts import Check, Verdict

DESCRIPTION = """Examine this host: card, driver, engine, model, machine and instance.

  pascaline doctor                          this host, and its only instance if there is one
  pascaline doctor --instance emily         the unit pascaline-emily.service: its settings, plan, journal and health
  pascaline doctor --instance emily.toml    settings that no instance runs yet
  pascaline doctor --instance http://127.0.0.1:30001   the instance of that agent
  pascaline doctor --report bug.txt         one file for a bug report, without keys, names and addresses

Every finding has evidence and a remedy: a NixOS option on NixOS, a command elsewhere. docs/doctor.md lists all checks.

exit codes: 0 no warning and no failure, 10 a warning, 1 a failure; others as in every command"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--instance", metavar="NAME|URL|FILE", help="instance to examine: unit, agent or TOML file")
    parser.add_argument("--json", action="store_true", help="all findings as JSON")
    parser.add_argument("--all", action="store_true", help="also show checks that passed or were skipped")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write everything to one redacted text file")
    parser.add_argument("--docs", action="store_true", help="print docs/doctor.md and examine nothing")
    add_settings_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Examine the host and print the findings."""
    if arguments.docs:
        print(doctor_page(), end="")
        return ExitCode.OK
    from pascaline.doctor import examine, worst
    from pascaline.doctor.collect import Question, collect
    from pascaline.doctor.findings_report import dump, to_text, write_report
    from pascaline.doctor.machine import Machine

    machine = Machine()
    question = Question(arguments.instance, arguments.config, given_flags(arguments))
    host = collect(machine, question, _progress)
    _progress(None)
    findings = examine(host)
    verdict = worst(findings)
    if arguments.report:
        try:
            write_report(arguments.report, findings, machine.transcript)
        except OSError as error:
            raise StorageError(f"failed to write {str(arguments.report)!r}: {error.strerror}") from error
        print(f"pascaline doctor: wrote {arguments.report}; read it before you publish it", file=sys.stderr)
    if arguments.json:
        print(dump(findings, verdict))
    else:
        text = to_text(findings, is_nixos=host.system.is_nixos, everything=arguments.all, colour=sys.stdout.isatty())
        print(text, end="")
    return exit_code(verdict)


def exit_code(verdict: Verdict) -> ExitCode:
    """Return the exit code for the worst verdict."""
    from pascaline.doctor.verdicts import Verdict

    return {Verdict.FAILURE: ExitCode.FAILED, Verdict.WARNING: ExitCode.WARNED}.get(verdict, ExitCode.OK)


def _progress(part: str | None) -> None:
    """Show on a terminal which part is being examined; None clears the line."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K" if part is None else f"\r\033[Klooking at the {part} …")
        sys.stderr.flush()


def doctor_page() -> str:
    """Return docs/doctor.md."""
    from pascaline.doctor.checks import ALL_CHECKS
    from pascaline.doctor.checks.cases import CASES, GROUP

    lines = [_PAGE_HEAD]
    for group, checks in groupby(ALL_CHECKS, key=lambda check: check.group):
        lines += [f"## {group}", "", *_table("check", "what should hold", "how it is checked", "remedy")]
        lines += [*map(_row, checks), ""]
    lines += [f"## {GROUP}", "", _CASES_HEAD, "", *_table("case", "the guide's heading", "causes")]
    for case, (title, names) in CASES.items():
        lines.append(f"| `{case}` | {title} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines) + "\n"


def _table(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _row(check: Check) -> str:
    remedy = check.remedy
    remedies = [remedy.text, *(f"`{part}`" for part in (remedy.command, remedy.option) if part)]
    cells = (f"`{check.id}`", check.title, check.explanation, "<br>".join(remedies))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_PAGE_HEAD = """# `pascaline doctor`

Examines a host and says what keeps it from serving, or from serving well. Each check has an id, evidence, a verdict
and a remedy: a NixOS option on NixOS, a command elsewhere. `pascaline doctor --docs` prints this page.

| verdict | means | exit code |
|---|---|---|
| `ok` | the check passed | 0 |
| `skipped` | it does not apply here, or cannot be checked here; the evidence says why | 0 |
| `info` | nothing is wrong, but there is something to know or to gain | 0 |
| `warning` | serving works, but slower or less safely than it should, or it will stop working | 10 |
| `failure` | serving fails, or gives wrong results | 1 |

The exit code is that of the worst verdict. Without `--all` only `info` and worse are printed, the worst last. `--json`
prints all of them, in a versioned layout. `--report FILE` writes the findings and everything that was read into one
text file without keys, user and host names, addresses, UUIDs and serial numbers. Of variables that are not the engine's
it holds only the names. Read it before you publish it: no rule finds everything.

Doctor changes nothing on the host, and connects only to loopback unless the settings name another address. A separate
process asks NVML and is killed when the driver hangs; every program that doctor runs has a time limit.
"""
_CASES_HEAD = (
    "Each case has the worst verdict of the checks that look for its causes, their evidence, and the remedy of the "
    "worst one."
)
