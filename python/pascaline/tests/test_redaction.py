"""Secrets: hidden in every form in which a program may print them, and nothing else is."""

from __future__ import annotations

import base64
import html
import json
import logging
import shlex
import textwrap
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pascaline import redaction
from pascaline.redaction import (
    HIDDEN,
    SHORTEST_PART,
    SHORTEST_SECRET,
    LineRedactor,
    RedactingFormatter,
    Secrets,
    excerpt,
    protect_arguments,
    protect_named,
    read_secret,
    redact_all,
    redact_labels,
)

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "sk/Q+7é'\"\\&<%z=0123"
KEYS = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=["C", "Z"]), min_size=8)
FORMS = {
    "plain": str,
    "json": json.dumps,
    "json, not ascii": lambda key: json.dumps(key, ensure_ascii=False),
    "json with escaped slashes": lambda key: json.dumps(key).replace("/", "\\/"),
    "repr": repr,
    "repr of bytes": lambda key: repr(key.encode()),
    "json in a repr": lambda key: repr(json.dumps({"api_key": key})),
    "repr in json": lambda key: json.dumps(repr({"api_key": key})),
    "url": lambda key: f"/v1?x={urllib.parse.quote(key, safe='')}",
    "url, slashes kept": urllib.parse.quote,
    "url, small hex digits": lambda key: urllib.parse.quote(key, safe="").replace("%2F", "%2f"),
    "form": lambda key: urllib.parse.urlencode({"q": key}),
    "html": html.escape,
    "shell": shlex.quote,
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "hex": lambda key: key.encode().hex(),
    "bearer": lambda key: f"Authorization: Bearer {key}",
}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> Secrets:
    """The process's, empty."""
    fresh = Secrets()
    monkeypatch.setattr(redaction, "SECRETS", fresh)
    return fresh


def knowing(*values: str) -> Secrets:
    secrets = Secrets()
    for value in values:
        secrets.add(value)
    return secrets


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("key", ["sk-case-0123456789abcdef", KEY, "sesame"])
    def test_every_form_is_hidden(self, form: str, key: str) -> None:
        text = knowing(key).redact(f"before {FORMS[form](key)} after")
        assert text.startswith("before ")
        assert text.endswith(" after")
        assert HIDDEN in text
        assert key not in text
        assert FORMS[form](key).strip("'\"b") not in text

    @settings(deadline=None)
    @given(KEYS.filter(lambda key: key not in HIDDEN), st.sampled_from(sorted(FORMS)))
    def test_of_any_key(self, key: str, form: str) -> None:
        text = knowing(key).redact(f"({FORMS[form](key)})")
        assert key not in text
        assert urllib.parse.unquote_plus(text).find(key) == -1

    @pytest.mark.parametrize("before", ["", "u:", "user:", "user1:"])
    @pytest.mark.parametrize("after", ["", "@", "@h", "@ho"])
    @pytest.mark.parametrize("code", [base64.b64encode, base64.urlsafe_b64encode])
    def test_one_within_a_longer_text_in_base64(self, before: str, after: str, code: Callable[[bytes], bytes]) -> None:
        """As Basic authentication has it; at most the two digits at each end stay that it shares with other text."""
        shown = knowing(KEY).redact(f"Basic {code(f'{before}{KEY}{after}'.encode()).decode()}")
        digits = code(f"{before}{KEY}{after}".encode()).decode()
        assert HIDDEN in shown
        assert len(shown) - len(f"Basic {HIDDEN}") <= len(digits) - (len(KEY.encode()) * 4 // 3 - 2)

    def test_hex_in_capitals(self) -> None:
        assert knowing(KEY).redact(KEY.encode().hex().upper()) == HIDDEN

    def test_an_excerpt_cuts_none_in_two(self, secrets: Secrets) -> None:
        secrets.add(KEY)
        for before in range(40):
            assert KEY[:4] not in excerpt("x" * before + KEY + "y" * 10**6, 40)
        assert excerpt("x" * 10**6, 40) == "x" * 40

    def test_the_longer_of_two_is_hidden_whole(self) -> None:
        assert knowing("sesame-open", "sesame-open-wide").redact("x sesame-open-wide y") == f"x {HIDDEN} y"

    def test_a_short_one_is_hidden_as_a_word_and_not_within_words(self) -> None:
        secrets = knowing("ready")
        assert secrets.redact("'ready' already ready.") == f"'{HIDDEN}' already {HIDDEN}."

    @pytest.mark.parametrize("key", ["", "1", "abc"])
    def test_one_that_is_too_short_is_hidden_by_its_name_alone(self, key: str) -> None:
        secrets = knowing(key)
        assert secrets.redact(f"{key} 1 abc") == f"{key} 1 abc"
        if key:
            assert secrets.redact(f"api_key='{key}'") == f"api_key={HIDDEN}"

    @given(st.text())
    def test_twice_is_once(self, text: str) -> None:
        once = knowing(KEY).redact(text)
        assert knowing(KEY).redact(once) == once


class TestNames:
    @pytest.mark.parametrize(
        "text",
        [
            "server_args={'model_path': 'm', 'admin_api_key': 'XYZ', 'port': 1}",
            'ServerArgs(api_key="XYZ", port=1)',
            '{"api-key": "XYZ"}',
            "HF_TOKEN=XYZ",
            "Authorization: Bearer XYZ.abc/d==",
            "ssl_keyfile_password='XYZ'",
        ],
    )
    def test_an_unknown_value_is_hidden_where_it_is_named(self, text: str) -> None:
        found = Secrets().redact(text)
        assert "XYZ" not in found
        assert HIDDEN in found

    @pytest.mark.parametrize(
        "text",
        [
            "api_key=None, admin_api_key=None",
            '"api_key": null',
            "Prefill batch, #new-token: 128, #cached-token: 0, token usage: 0.02, tokenizer_path='m'",
            "api_key_file: failed to read /run/key: No such file or directory",
            "extra_args: --api-key is set by api_key_file, must be left out; set api_key_file instead",
            "no token for 46 s while 3 requests wait",
            'curl -H "Authorization: Bearer $(cat /run/key)"',
            "max_total_tokens=4096 key_value=3",
        ],
    )
    def test_what_holds_no_secret_stays(self, text: str) -> None:
        assert Secrets().redact(text) == text

    def test_a_long_line_takes_no_long_time(self) -> None:
        start = time.process_time()
        for line in ("api_key" * 10_000, "a_" * 32_000, "api_key=" + "'" * 60_000, "bearer " * 9_000, " " * 64_000):
            knowing(KEY).redact(line)
        assert time.process_time() - start < 2


RED, PLAIN = "\x1b[31m", "\x1b[0m"


class TestWhatATerminalDoesNotShow:
    """A highlighter colours a part of a value; what is shown is the value all the same."""

    @pytest.mark.parametrize(
        "between",
        [RED, PLAIN, "\x1b]8;;http://x\x07", "\x1b]8;;\x1b\\", "\x07", "\0", "\r", "\u200b", "\u202e", "\x9b"],
    )
    @pytest.mark.parametrize("at", [1, 7, len(KEY) - 1])
    def test_it_divides_no_value(self, between: str, at: int) -> None:
        assert knowing(KEY).redact(f"key {KEY[:at]}{between}{KEY[at:]}.") == f"key {HIDDEN}."

    def test_every_character_in_a_colour_of_its_own(self) -> None:
        text = "".join(f"{RED}{character}{PLAIN}" for character in json.dumps(KEY))
        assert knowing(KEY).redact(text) == f'"{HIDDEN}"'

    def test_a_text_without_a_secret_keeps_it(self) -> None:
        text = f"{RED}error{PLAIN}\tsee\r\n\x1b]0;title\x07 and \x1b alone"
        assert knowing(KEY).redact(text) == text
        assert LineRedactor(knowing(KEY))(text) == text

    def test_around_the_parts_of_a_broken_value(self) -> None:
        redact = LineRedactor(knowing(KEY))
        lines = [f"{RED}key {KEY[:9]}{PLAIN}", f"{RED}{KEY[9:]}{PLAIN} end"]
        assert [redact(line) for line in lines] == [f"key {HIDDEN}", f"{HIDDEN} end"]


def parts(key: str, length: int) -> list[str]:
    """Return every part of a key that has this length."""
    return [key[n : n + length] for n in range(len(key) - length + 1)]


class TestLines:
    @pytest.mark.parametrize(
        "form",
        [
            json.dumps(KEY)[1:-1],
            urllib.parse.quote(KEY, safe=""),
            base64.b64encode(KEY.encode()).decode().rstrip("="),
            base64.urlsafe_b64encode(KEY.encode()).decode().rstrip("="),
        ],
    )
    @pytest.mark.parametrize("at", [4, 11, -4])
    def test_a_value_in_another_form_that_is_broken(self, form: str, at: int) -> None:
        redact = LineRedactor(knowing(KEY))
        assert [redact(f"a {form[:at]}"), redact(f"{form[at:]} b")] == [f"a {HIDDEN}", f"{HIDDEN} b"]

    """A value that the ends of lines cut."""

    @settings(deadline=None)
    @given(KEYS.filter(lambda key: key not in HIDDEN), st.data())
    def test_of_a_value_in_parts_less_than_the_shortest_secret_is_seen(self, key: str, data: st.DataObject) -> None:
        cuts = sorted(data.draw(st.sets(st.integers(1, len(key) - 1), min_size=1, max_size=4)))
        parts = [key[a:b] for a, b in zip([0, *cuts], [*cuts, len(key)], strict=True)]
        lines = [f"error at {parts[0]}", *parts[1:-1], f"{parts[-1]} was refused"]
        redact = LineRedactor(knowing(key))
        seen = "".join(redact(line) for line in lines).replace(HIDDEN, "\0")
        assert not any(key[n : n + SHORTEST_PART] in seen for n in range(len(key) - SHORTEST_PART + 1))

    @pytest.mark.parametrize(("before", "after"), [("│ ", " │"), ("'", "'"), ("    ", ""), ('"', '"\\')])
    def test_frames_and_quotes_around_the_parts(self, before: str, after: str) -> None:
        redact = LineRedactor(knowing("sk-case-0123456789abcdef"))
        lines = [redact(f"{before}{part}{after}") for part in ("key: sk-case-0123", "456789abcdef and more")]
        assert lines == [f"{before}key: {HIDDEN}{after}", f"{before}{HIDDEN} and more{after}"]

    def test_wrapped_by_a_program(self) -> None:
        key = "abcdefghij" * 12
        redact = LineRedactor(knowing(key))
        seen = [redact(line) for line in textwrap.wrap(f"the key {key} is wrong", 40)]
        assert "".join(seen).replace(HIDDEN, "") == "the key  is wrong"

    @pytest.mark.parametrize("end", ["\n", "\n    ", " │\n│ ", '"\n"', "\\n  "])
    def test_broken_within_one_text(self, end: str) -> None:
        text = f"key: sk-case-01{end}23456789{end}abcdef and more"
        assert knowing("sk-case-0123456789abcdef").redact(text) == f"key: {HIDDEN} and more"

    STAMPS = (
        "[2026-11-30 16:47:44] ",
        "[2026-11-30 16:47:44 TP0] INFO: ",
        "(EngineCore pid=812) ",
        "2026-11-30T16:47:44Z ",
    )

    @pytest.mark.parametrize("between", [[], ["[2026-11-30 16:47:44] Decode batch"], ["a line"] * 7])
    @pytest.mark.parametrize("stamp", STAMPS)
    @pytest.mark.parametrize("cut", [1, 3, 4, 12, 20, 23])
    def test_a_value_that_a_timestamp_divides(self, stamp: str, between: list[str], cut: int) -> None:
        """Two records of a log with a part each, and records of other processes between them."""
        key = "sk-case-0123456789abcdef"
        redact = LineRedactor(knowing(key))
        lines = [f"{stamp}the key {key[:cut]}", *between, f"{stamp}{key[cut:]} was refused"]
        seen = "\n".join(redact(line) for line in lines)
        assert not any(part in seen for part in parts(key, SHORTEST_SECRET))
        assert seen.splitlines()[1:-1] == between

    @pytest.mark.parametrize("stamp", STAMPS)
    def test_a_value_in_three_records(self, stamp: str) -> None:
        redact = LineRedactor(knowing("sk-case-0123456789abcdef"))
        lines = [f"{stamp}key sk-case-", f"{stamp}01234567", "other", f"{stamp}89abcdef end", f"{stamp}89abcdef"]
        assert [redact(line) for line in lines] == [
            f"{stamp}key {HIDDEN}",
            f"{stamp}{HIDDEN}",
            "other",
            f"{stamp}{HIDDEN} end",
            f"{stamp}89abcdef",
        ]

    def test_a_rest_long_after_its_beginning_stays(self) -> None:
        redact = LineRedactor(knowing("sk-case-0123456789abcdef"))
        lines = ["key sk-case-0123", *["a"] * 8, "[stamp] 456789abcdef"]
        assert [redact(line) for line in lines] == [f"key {HIDDEN}", *lines[1:]]

    def test_other_lines_stay(self) -> None:
        redact = LineRedactor(knowing("sk-case-0123456789abcdef"))
        lines = ["that was his", "k", "", "sk", "a line of another kind", "0123456789abcdef", "sk-"]
        assert [redact(line) for line in lines] == lines


class TestWays:
    def test_a_file_is_read_and_protected(self, secrets: Secrets, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.write_text(" sesame-open\n")
        assert read_secret(path) == "sesame-open"
        assert redaction.redact("x sesame-open") == f"x {HIDDEN}"

    def test_variables_and_flags(self, secrets: Secrets) -> None:
        protect_named({"HF_TOKEN": "hf_12345678", "MY_API_KEY": "abcdefgh1", "PATH": "/usr/bin:/bin", "X_KEY": "true"})
        protect_arguments(["--admin-api-key", "first-value", "--log-level=debug", "--x-password=second-value", "--key"])
        assert secrets.values == {"hf_12345678", "abcdefgh1", "first-value", "second-value"}

    def test_a_document(self, secrets: Secrets) -> None:
        secrets.add("sesame-open")
        document = {"a sesame-open": [1, None, True, "sesame-open", {"b": ("x sesame-open",)}]}
        assert redact_all(document) == {f"a {HIDDEN}": [1, None, True, HIDDEN, {"b": [f"x {HIDDEN}"]}]}

    def test_a_page_of_metrics(self, secrets: Secrets) -> None:
        secrets.add("12345678")
        page = 'a{model="x\\"12345678",b="c"} 12345678.0\n'
        assert redact_labels(page) == f'a{{model="x\\"{HIDDEN}",b="c"}} 12345678.0\n'

    def test_a_traceback_in_the_log(self, secrets: Secrets) -> None:
        secrets.add("sesame-open")
        try:
            raise ValueError("refused sesame-open")
        except ValueError as error:
            record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed %s", ("sesame-open",), None)
            record.exc_info = (type(error), error, error.__traceback__)
        text = RedactingFormatter("%(message)s").format(record)
        assert "sesame" not in text
        assert text.startswith(f"failed {HIDDEN}\nTraceback")
        assert text.endswith(f"ValueError: refused {HIDDEN}")
