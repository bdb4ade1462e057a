"""Findings as text for people, as JSON, and as one redacted file for a bug report."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import platform
import pwd
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline import __version__
from pascaline.doctor.verdicts import Finding, Verdict
from pascaline.redaction import redact as redact_secrets
from pascaline.redaction import redact_all

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pascaline.doctor.verdicts import Remedy

JSON_VERSION = 1
"""Version of the layout of --json; grows when a key is removed or changes its meaning."""
MARKS = {Verdict.OK: "✓", Verdict.SKIPPED: "·", Verdict.INFO: "i", Verdict.WARNING: "!", Verdict.FAILURE: "✗"}
COLOURS = {Verdict.INFO: "36", Verdict.WARNING: "33", Verdict.FAILURE: "31", Verdict.OK: "32", Verdict.SKIPPED: "90"}
MAX_PART_CHARACTERS = 20_000
"""Most characters of one recorded file or output in the report."""


def to_json(findings: Sequence[Finding], verdict: Verdict) -> dict[str, Any]:
    """Return the findings as plain values."""
    return {
        "version": JSON_VERSION,
        "pascaline": __version__,
        "verdict": verdict.value,
        "findings": [
            {
                "check": finding.check,
                "title": finding.title,
                "verdict": finding.verdict.value,
                "evidence": finding.evidence,
                "remedy": {
                    "text": finding.remedy.text,
                    "command": finding.remedy.command or None,
                    "option": finding.remedy.option or None,
                }
                if finding.remedy
                else None,
            }
            for finding in findings
        ],
    }


def to_text(findings: Sequence[Finding], *, is_nixos: bool, everything: bool = False, colour: bool = False) -> str:
    """Return lines for people, the worst finding last. `everything`: also those that are ok or skipped."""
    shown = [f for f in findings if everything or f.verdict.severity >= Verdict.INFO.severity]
    lines = []
    for finding in sorted(shown, key=lambda finding: finding.verdict.severity):
        mark = MARKS[finding.verdict]
        if colour:
            mark = f"\033[{COLOURS[finding.verdict]}m{mark}\033[0m"
        lines.append(f"{mark} {finding.check}: {finding.evidence}")
        if finding.remedy and finding.verdict.severity >= Verdict.INFO.severity:
            lines += [f"    {line}" for line in _remedy_lines(finding.remedy, is_nixos=is_nixos)]
    return redact_secrets("\n".join([*lines, summary(findings)]) + "\n")


def _remedy_lines(remedy: Remedy, *, is_nixos: bool) -> list[str]:
    what = remedy.option if is_nixos and remedy.option else remedy.command or remedy.option
    return [f"→ {remedy.text}", *([f"  {what}"] if what else [])]


def summary(findings: Sequence[Finding]) -> str:
    """Return the number of checks for each verdict, in one line."""
    counts = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    words = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in reversed(Verdict) if counts[verdict])
    return f"{len(findings)} checks: {words}"


def write_report(path: Path, findings: Sequence[Finding], transcript: Sequence[tuple[str, str]]) -> None:
    """Write the findings and everything that was read. Names, addresses, keys and serial numbers are removed."""
    head = f"pascaline {__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}\n"
    parts = [head, to_text(findings, is_nixos=False, everything=True)]
    for title, text in transcript:
        cut = text if len(text) <= MAX_PART_CHARACTERS else text[:MAX_PART_CHARACTERS] + "\n(cut)"
        parts.append(f"--- {title}\n{cut.rstrip()}\n")
    path.write_text(redact("\n".join(parts)), encoding="utf-8")


# A name whose value is a secret, as NAME=value, "name": "value", or --name value.
_SECRET = re.compile(
    r"""(?ix)
    ( (?P<flag>--)? [\w.-]*
      (?: key | token | secret | passw(?:or)?d | passphrase | credential | cookie | _(?:pwd|pass|pat)(?![a-z]) )
      [\w.-]* ["']?
      (?: \s*[=:]\s* | (?(flag)\s+|(?!)) ) )
    (?P<value> "[^"\n]*" | '[^'\n]*' | [^\s,;"']+ )"""
)
# The same words in a name that holds no secret: a path, a number, a count.
_NOT_SECRET = re.compile(r"(?i)tokens|tokenizer|token_usage|key_file|keyboard")
_PATTERNS = (
    (re.compile(r"\bGPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "GPU-(uuid)"),
    (re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "(uuid)"),
    (re.compile(r"(?<![0-9a-fA-F:])(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}(?![0-9a-fA-F:])"), "(mac)"),
    (re.compile(r"(?i)(serial['\"]?\s*[:=]\s*['\"]?)\w+"), r"\1(serial)"),
    (re.compile(r"(nvmlDeviceGetSerial'?\s*[:=]\s*'?)\w+"), r"\1(serial)"),
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?\w+)\s+[^\s\"']+"), r"\1 (secret)"),
    (re.compile(r"(?i)\bbearer\s+[^\s\"']+"), "Bearer (secret)"),
    (re.compile(r"\b(?:hf|sk|ghp|gho|ghs|github_pat|glpat|nvapi)[_-][A-Za-z0-9_-]{8,}"), "(secret)"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), "(secret)"),
    (re.compile(r"(://)[^/\s:@]+(?::[^/\s@]*)?@"), r"\1(user)@"),
    (re.compile(r"(https?://[^\s?\"']+)\?[^\s\"']*"), r"\1?(query)"),
    (re.compile(r"(?i)\b(user(?:name)?=)[^\s,;\"']+"), r"\1(user)"),
    (re.compile(r"(?m)^(/?/?)[\w.-]+(?=:?/\S* \S+ (?:nfs4?|cifs|smb3|9p) )"), r"\1(host)"),
    (re.compile(r"/(home|Users)/[^/\s:\"']+"), r"/\1/(user)"),
    (re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b"), "(mail)"),
)
_ADDRESS = re.compile(
    r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])|(?<![\w.:])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:])"
)

# As /proc/net/tcp and tcp6 write addresses, followed by a port.
_HEX_ADDRESS = re.compile(r"\b(?:[0-9A-F]{32}|[0-9A-F]{8})(?=:[0-9A-F]{4}\b)")
_HEX_LOOPBACK = re.compile(r"0+|0100007F|0{24}01000000|0{16}FFFF00000100007F")
_NOBODY = frozenset({"root", "nobody", "pascaline", "user", "nixos", "ubuntu", "debian"})
"""User names that identify nobody and are ordinary words."""
_FIRST_PERSON_UID = 1000


def redact(text: str, host_name: str | None = None, home: str | None = None, users: Sequence[str] | None = None) -> str:
    """Return the text without anything that identifies a person or host: keys, names, addresses, serial numbers, UUIDs.

    host_name, home, users: None = those of this host and user. Loopback addresses stay: they identify nobody.
    """
    text = redact_secrets(text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    text = _SECRET.sub(_hide, text)
    text = _ADDRESS.sub(_hide_address, text)
    text = _HEX_ADDRESS.sub(lambda match: match[0] if _HEX_LOOPBACK.fullmatch(match[0]) else "(address)", text)
    home = str(Path.home()) if home is None else home
    if home not in ("", "/"):
        text = text.replace(home, "~")
    host_name = socket.gethostname() if host_name is None else host_name
    # Logs contain the first part of a full name.
    for name in (host_name, host_name.partition(".")[0]):
        if name and name != "localhost":
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "(host)", text)
    for name in user_names(os.environ) if users is None else users:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "(user)", text)
    return text


def user_names(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the person who runs this, also under sudo; system accounts are not persons."""
    names = {environment.get(variable, "") for variable in ("USER", "LOGNAME", "SUDO_USER")}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(os.getuid()).pw_name)
    return sorted(name for name in names - _NOBODY - {""} if _is_person(name))


def _is_person(name: str) -> bool:
    try:
        return pwd.getpwnam(name).pw_uid >= _FIRST_PERSON_UID
    except KeyError:
        return True  # from a directory service that does not answer


def _hide(match: re.Match[str]) -> str:
    if _NOT_SECRET.search(match[1]) or match["value"] in ("null", "None", "-"):
        return match[0]
    return f"{match[1]}(secret)"


def _hide_address(match: re.Match[str]) -> str:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return match[0]
    return match[0] if address.is_loopback or address.is_unspecified else "(address)"


def dump(findings: Sequence[Finding], verdict: Verdict) -> str:
    """Return the JSON text of --json."""
    return json.dumps(redact_all(to_json(findings, verdict)), indent=2)
