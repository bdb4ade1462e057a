"""Hides the secrets that this process knows in all text that leaves it.

Code that reads a secret registers it (`read_secret`, `protect`). All text that is written, shown or sent passes through
`redact`: the log, the agent's answers, systemd's status, errors, reports. A value is found in its plain form and in the
forms in which programs print it: JSON, Python's repr, URLs, HTML, shell quotes, base64. A value beside a name such as
key or password is hidden too, since an engine may know secrets that this process does not.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import re
import shlex
import urllib.parse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

HIDDEN = "(secret)"
SHORTEST_SECRET = 4
"""Characters. A shorter value looks like an ordinary word, so it is hidden only beside its name."""
LONGEST_SECRET = 16 * 2**10
"""Characters of the longest secret, in any form, that a cut may not divide."""
SHORTEST_PART = 8
"""Characters. From this length, a value is hidden inside longer words too, and a variable's value can be a secret."""
PART_LINES = 8
"""Lines among which the next part of a divided value is looked for: a few processes write into one log."""

# A name whose value is secret. Names of token counts and key files do not match.
_SECRET_NAME = re.compile(r"(?i)(?:^|[-_])(?:key|token|secret|password|passphrase|credentials?)$")
# name=value, 'name': 'value', "name": "value", for names that always hold a secret.
_NAMED = re.compile(
    r"""(?ix)
    ( (?: api[-_]?key | hf[-_]token | access[-_]token | password | passphrase ) ["']? \s*[=:]\s* )
    (?! ["']? (?: none | null | true | false )\b )
    ( "[^"\n]+" | '[^'\n]+' | [^\s,;"'()\[\]{}]+ )"""
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)(?!\$)[\w.~+/=-]{4,}")
_LABEL = re.compile(r'="((?:[^"\\]|\\.)*)"')
# What a terminal does not show, except blanks: colours and other sequences, controls, marks without a width.
_UNSHOWN = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)
# What surrounds a line break that a program inserted: blanks, quotes, the frames of tables.
_FRAME = " \t\r'\"`│|┃\\+"
# What may stand between two characters of a wrapped value within one text: a line break, plain or as an escape.
_BREAK = r"""(?:[ \t\r'"`│|┃]*(?:\n|\\n)[ \t\r'"`│|┃]*)?"""


class Secrets:
    """Values that must not leave this process, and the forms in which they are printed."""

    def __init__(self) -> None:
        """Start without values."""
        self._values: set[str] = set()
        self._forms: list[str] = []
        self._patterns: list[re.Pattern[str]] = []
        self._broken: re.Pattern[str] | None = None
        self._wrapped: tuple[str, ...] = ()

    @property
    def values(self) -> frozenset[str]:
        """All known values."""
        return frozenset(self._values)

    @property
    def wrapped(self) -> tuple[str, ...]:
        """The forms of all known values that a program may break into lines."""
        return self._wrapped

    def add(self, value: str) -> None:
        """Hide this value from now on."""
        value = value.strip()
        if len(value) < SHORTEST_SECRET or value in self._values:
            return
        self._values.add(value)
        forms = sorted({form for each in self._values for form in _forms(each)}, key=len, reverse=True)
        # Most forms need only a plain search, which stays cheap for the thousands of lines that an engine writes.
        self._forms = [form for form in forms if _is_plain(form)]
        self._patterns = [re.compile(_searched(form)) for form in forms if not _is_plain(form)]
        once = {form for each in self._values for form in (each, *_escaped(each))}
        self._wrapped = tuple(sorted({form for each in self._values for form in _once_encoded(each)}))
        longest_first = sorted(once, key=len, reverse=True)
        self._broken = re.compile("|".join(_BREAK.join(map(re.escape, each)) for each in longest_first))

    def redact(self, text: str) -> str:
        """Return the text with HIDDEN in place of every known value, and of every value beside a secret's name.

        A text with a value that colours or other things that a terminal does not show divide loses those too.
        """
        if not text.isprintable() and (shown := _UNSHOWN.sub("", text)) != text:
            hidden = self._redact(shown)
            if hidden != shown:
                return hidden
        return self._redact(text)

    def _redact(self, text: str) -> str:
        for form in self._forms:
            text = text.replace(form, HIDDEN)
        for pattern in self._patterns:
            text = pattern.sub(HIDDEN, text)
        if self._broken is not None and ("\n" in text or "\\n" in text):
            text = self._broken.sub(HIDDEN, text)
        return _BEARER.sub(rf"\g<1>{HIDDEN}", _NAMED.sub(rf"\g<1>{HIDDEN}", text))


def _forms(value: str) -> Iterator[str]:
    """Yield a value in the forms that programs print, also escaped twice, such as JSON within a repr."""
    once = {value, *_escaped(value)}
    yield from once
    for form in once:
        yield from _escaped(form)
    encoded = value.encode()
    for code in (base64.b64encode, base64.urlsafe_b64encode):
        yield code(encoded).decode().rstrip("=")
        yield from (part for part in _within(code, encoded) if len(part) >= SHORTEST_PART)
    yield encoded.hex()
    yield encoded.hex().upper()


def _within(code: Callable[[bytes], bytes], value: bytes) -> Iterator[str]:
    """Yield what a value becomes inside a longer text in base64, such as "user:KEY".

    Left out are the digits at its ends that also hold bits of the text around it. Three bytes become four digits, so
    its place in the text decides between three forms.
    """
    for offset in range(3):
        digits = code(bytes(offset) + value).decode().rstrip("=")
        yield digits[-(-8 * offset // 6) : len(digits) - ((offset + len(value)) % 3 > 0)]


def _once_encoded(value: str) -> Iterator[str]:
    yield from (value, json.dumps(value)[1:-1], urllib.parse.quote(value, safe=""))
    for code in (base64.b64encode, base64.urlsafe_b64encode):
        yield code(value.encode()).decode().rstrip("=")


def _escaped(value: str) -> Iterator[str]:
    yield json.dumps(value)[1:-1]
    yield json.dumps(value)[1:-1].replace("/", "\\/")
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield repr(value)[1:-1]
    yield repr(value.encode())[2:-1]
    yield html.escape(value)
    quoted = shlex.quote(value)
    yield quoted[1:-1] if quoted.startswith("'") else quoted
    for code in (urllib.parse.quote, urllib.parse.quote_plus):
        yield code(value, safe="")
        yield code(value)


def _is_plain(form: str) -> bool:
    return len(form) >= SHORTEST_PART and "%" not in form


def _searched(form: str) -> str:
    # The hex digits of a URL may be lower case.
    part = re.sub(r"%([0-9A-F]{2})", lambda match: f"%(?i:{match[1]})", re.escape(form))
    return part if len(form) >= SHORTEST_PART else rf"(?<![0-9A-Za-z]){part}(?![0-9A-Za-z])"


SECRETS = Secrets()
"""The secrets of this process."""


def protect(value: str | None) -> None:
    """Keep a value out of everything that this process writes and sends from now on."""
    if value:
        SECRETS.add(value)


def protect_named(variables: Mapping[str, str]) -> None:
    """Protect the values of variables with a secret's name, such as HF_TOKEN."""
    for name, value in variables.items():
        if _SECRET_NAME.search(name) and len(value) >= SHORTEST_PART:
            protect(value)


def protect_arguments(arguments: Sequence[str]) -> None:
    """Protect the values of flags with a secret's name, such as --admin-api-key."""
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        flag, equals, value = argument.partition("=")
        if flag.startswith("-") and _SECRET_NAME.search(flag):
            protect(value if equals else following)


def read_secret(path: Path) -> str:
    """Return a file's content, without blanks around it, and protect it. Raises OSError, UnicodeDecodeError."""
    value = path.read_text(encoding="utf-8").strip()
    protect(value)
    return value


def read_api_key(path: Path) -> str:
    """Return the API key in a file, and protect it.

    Raises OSError or UnicodeDecodeError if the file cannot be read, ValueError with what is wrong if it holds no key:
    an empty one would let everybody in.
    """
    key = read_secret(path)
    if len(key.split()) != 1:
        found = "holds more than one word" if key else "is empty"
        raise ValueError(f"{found}, must hold one key and nothing else")
    if not (key.isascii() and key.isprintable()):
        raise ValueError("holds characters that an HTTP header cannot carry, must be printable ASCII")
    return key


def redact(text: str) -> str:
    """Return the text without secrets."""
    return SECRETS.redact(text)


def excerpt(text: str, most: int) -> str:
    """Return the first `most` characters of a text. Secrets are hidden first, so that none is cut in two.

    A text that is far longer is cut before it is searched, with room for the longest secret.
    """
    return redact(text[: most + LONGEST_SECRET])[:most]


def redact_all(value: Any) -> Any:
    """Return plain values (such as JSON) with secrets hidden in every text, names included."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact_all(name): redact_all(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(each) for each in value]
    return value


class LineRedactor:
    """Redacts a stream of lines, including values that are split across two or more lines.

    The first part is hidden if it has at least SHORTEST_SECRET characters, before the next line is known. Its rest is
    hidden wherever it stands in one of the next lines, such as behind a timestamp, with other processes' lines between.
    """

    def __init__(self, secrets: Secrets = SECRETS) -> None:
        """Start a stream; each stream needs its own redactor."""
        self._secrets = secrets
        self._begun: dict[str, int] = {}
        """Form of a value -> number of its first characters with which the lines so far ended."""
        self._open: dict[tuple[str, int], int] = {}
        """(form of a value, number of its first characters that were seen) -> lines in which more of it may come."""

    def __call__(self, line: str) -> str:
        """Return the line without secrets."""
        shown = line if line.isprintable() else _UNSHOWN.sub("", line)
        text = self._secrets.redact(shown)
        begun, self._begun = self._begun, {}
        hidden = text
        for form in self._secrets.wrapped:
            # Two forms may begin alike, and the line does not say which of them goes on.
            without, following = _without_parts(form, begun.get(form, 0), text)
            if following:
                self._begun[form] = following
            if without != text:
                hidden = without if hidden == text else _without_parts(form, begun.get(form, 0), hidden)[0]
        hidden = self._without_rests(hidden)
        return self._secrets.redact(line) if hidden == shown else hidden

    def _without_rests(self, text: str) -> str:
        """Return a line without what belongs to a value that an earlier line began, or that lacks its beginning."""
        waiting, self._open = self._open, {}
        for (form, seen), lines in waiting.items():
            without, more = _without_rest(form[seen:], text)
            if more:
                self._open[form, seen + more] = PART_LINES
            if without == text and lines > 1:
                self._open.setdefault((form, seen), lines - 1)
            text = without
        for form in self._secrets.wrapped:
            for missing in range(1, SHORTEST_SECRET):
                if len(form) - missing >= SHORTEST_PART:
                    text = text.replace(form[missing:], HIDDEN)
        for form, seen in self._begun.items():
            if seen >= SHORTEST_SECRET:
                self._open[form, seen] = PART_LINES
        return text


def _without_rest(rest: str, text: str) -> tuple[str, int]:
    """Return a line without the rest of a value, or its next part at the line's end, and how long that part is."""
    if len(rest) >= SHORTEST_SECRET and rest in text:
        return text.replace(rest, HIDDEN), 0
    part = _beginning(rest, text) if rest else 0
    if part < SHORTEST_SECRET:
        return text, 0
    head, _, tail = text.rpartition(rest[:part])
    return f"{head}{HIDDEN}{tail}", part


def _without_parts(form: str, begun: int, text: str) -> tuple[str, int]:
    """Return a line without the parts of a value's form, and the number of its first characters with which it ends.

    begun: that number of the line before.
    """
    rest = form[begun:]
    for body in _bodies(text) if begun else ():
        if body != rest and rest.startswith(body):
            return HIDDEN if body and begun + len(body) >= SHORTEST_SECRET else text, begun + len(body)
        if body.startswith(rest):
            if max(begun, len(rest)) >= SHORTEST_SECRET:
                text = text.replace(rest, HIDDEN, 1)
            break
    start = _beginning(form, text)
    if start >= SHORTEST_SECRET:
        head, _, tail = text.rpartition(form[:start])
        text = f"{head}{HIDDEN}{tail}"
    return text, start


def _bodies(line: str) -> tuple[str, str]:
    """Return the line's text twice: with quotes and frames, and without them."""
    return line.strip(), line.strip(_FRAME)


def _beginning(value: str, line: str) -> int:
    """Return the length of the longest proper prefix of `value` with which `line` ends; 0 without one."""
    return max(_end_with(value, body) for body in _bodies(line))


def _end_with(value: str, body: str) -> int:
    at = body.find(value[0], max(0, len(body) - len(value) + 1))
    while at >= 0:
        if value.startswith(body[at:]):
            return len(body) - at
        at = body.find(value[0], at + 1)
    return 0


class RedactingFormatter(logging.Formatter):
    """A formatter of the logging module that hides secrets in lines and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without secrets."""
        return redact(super().format(record))


def redact_labels(page: str) -> str:
    """Return a page in Prometheus' text format with secrets hidden in the values of its labels."""
    return _LABEL.sub(lambda match: f'="{redact(match[1])}"', page)
