"""`pascaline doctor`: finds out what keeps a host from serving, and says what to do."""

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
  pascaline doctor --instance emily.toml    settings that nothing runs yet
  pascaline doctor --instance http://127.0.0.1:30001   what that agent says
  pascaline doctor --report bug.txt         one file for a bug report, without keys, names and addresses

Every finding has evidence and a remedy: a NixOS option on NixOS, a command elsewhere. docs/doctor.md lists all checks.

exit codes: 0 nothing worse than a piece of information, 10 a warning, 1 a failure; others as everywhere"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--instance", metavar="NAME|URL|FILE", help="instance to examine: unit, agent or TOML file")
    parser.add_argument("--json", action="store_true", help="all findings as JSON")
    parser.add_argument("--all", action="store_true", help="show what is well and what was skipped, too")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write everything to one redacted text file")
    parser.add_argument("--docs", action="store_true", help="print docs/doctor.md and examine nothing")
    add_settings_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Examine the host and print what was found."""
    if arguments.docs:
        print(doctor_page(), end="")
        return ExitCode.OK
    from pascaline.doctor import examine, worst
    from pascaline.doctor.collect import Question, collect
    from pascaline.doctor.machine import Machine
    from pascaline.doctor.report import dump, to_text, write_report

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
    """Return the exit code of the worst verdict."""
    from pascaline.doctor.verdicts import Verdict

    return {Verdict.FAILURE: ExitCode.FAILED, Verdict.WARNING: ExitCode.WARNED}.get(verdict, ExitCode.OK)


def _progress(part: str | None) -> None:
    """Show on a terminal what is being looked at; None: clear it."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K" if part is None else f"\r\033[Klooking at the {part} …")
        sys.stderr.flush()


def doctor_page() -> str:
    """Return docs/doctor.md."""
    from pascaline.doctor.checks import ALL_CHECKS
    from pascaline.doctor.checks.cases import CASES, GROUP

    lines = [_PAGE_HEAD]
    for group, checks in groupby(ALL_CHECKS, key=lambda check: check.group):
        lines += [f"## {group}", "", *_table("check", "what should hold", "how it is looked at", "remedy")]
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
and a remedy: a NixOS option where the host is NixOS, else a command. This page is printed by `pascaline doctor --docs`.

| verdict | means | exit code |
|---|---|---|
| `ok` | it is as it should be | 0 |
| `skipped` | it does not apply here, or cannot be learned here; the evidence says why | 0 |
| `info` | nothing is wrong, but there is something to know or to gain | 0 |
| `warning` | it works slower or less safely than it should, or will stop to | 10 |
| `failure` | serving fails, or is wrong | 1 |

The exit code is the worst verdict's. Without `--all` only `info` and worse are printed, the worst last. `--json`
prints all of them, in a layout with a version. `--report FILE` writes the findings and all that was read into one text
file without keys, user and host names, addresses, UUIDs and serial numbers; of variables that are none of the engine's
it has the names only. Read it before you publish it: no rule finds everything.

Nothing is changed on the host, and nothing but loopback is spoken to unless the settings name another address. NVML is
asked in a process that is killed when the driver hangs, and no program gets more than a bounded time.
"""
_CASES_HEAD = (
    "Each is the worst of the checks that look for its causes, with their evidence and the remedy of the worst."
)
