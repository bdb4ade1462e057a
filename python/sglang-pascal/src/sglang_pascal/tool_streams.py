"""Makes a stream of tool calls independent of where its pieces are cut.

SGLang's parsers expect pieces of about one token. A busy server sends several tokens in one piece. Most
parsers then lose the text before a call, or the call's arguments: they take one step for each piece and expect the mark
that opens a call at the end of a piece. This module therefore divides each piece at the parser's marks and holds an
incomplete mark until the next piece. It then runs the parser again until the parser returns nothing more.
"""

# ruff: noqa: RUF001 - tokens of models
from __future__ import annotations

import functools
import inspect
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Parsed = tuple[str, list[Any]]
    """Text of the answer, and pieces of tool calls."""
    Parse = Callable[[Any, str], Parsed]

MAX_STEPS: Final = 10_000
"""Most steps after one piece: more than any parser takes."""
MIN_MARK: Final = 3
"""Characters of the shortest text that counts as a mark."""
# SGLang's classes that have marks inside regular expressions only.
_FURTHER_MARKS: Final[dict[str, tuple[str, ...]]] = {
    "DeepSeekV3Detector": ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    "DeepSeekV31Detector": ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
}


class _Opening(NamedTuple):
    """How a call begins in the answers that a parser reads."""

    mark: str
    bare: bool = False
    """Whether an answer that begins with a JSON object is a call too."""


# Parsers that change an answer without a call: one leaves out every "]", the other everything from a "{" on.
_OPENINGS: Final = {
    "MistralDetector": _Opening("[TOOL_CALLS"),
    "Llama32Detector": _Opening("<|python_tag|>", bare=True),
}
_OPENED: Final = "_pascal_opened"
"""Attribute of a parser: whether its opening was seen."""
_BEGUN: Final = "_pascal_begun"
"""Attribute of a parser: whether the answer has begun."""
_HELD: Final = "_pascal_held"
"""Attribute of a parser: the incomplete mark at the end of the last piece."""
_CALLS: Final = "_pascal_calls"
"""Attribute of a parser: whether it has found a call."""


def parse_piece(original: Parse, parser: Any, piece: str) -> Parsed:
    """Wrap `FunctionCallParser.parse_stream_chunk`."""
    marks = marks_of(parser.detector)
    text = getattr(parser, _HELD, "") + piece
    complete = len(text) - _incomplete(marks, text)
    setattr(parser, _HELD, text[complete:])
    answer, rest = _plain_beginning(parser, text[:complete])
    parts = [] if answer and not rest else _divided(marks, rest)
    found = _joined([(answer, []), *(_steps(original, parser, part) for part in parts)])
    if found[1]:
        setattr(parser, _CALLS, True)
    return found


def _plain_beginning(parser: Any, text: str) -> tuple[str, str]:
    """Divide a text into what is certainly no call, which some parsers would change, and the rest."""
    opening = _OPENINGS.get(type(parser.detector).__name__)
    if opening is None or not parser.tools or getattr(parser, _OPENED, False):
        return "", text
    # Before the answer's first character that is no white space, a bare JSON object is a call too.
    at = text.find(opening.mark)
    if opening.bare and not getattr(parser, _BEGUN, False) and text.lstrip().startswith("{"):
        at = text.index("{")
    setattr(parser, _OPENED, at >= 0)
    setattr(parser, _BEGUN, getattr(parser, _BEGUN, False) or (not text.isspace() and bool(text)))
    return (text, "") if at < 0 else (text[:at], text[at:])


def parse_end(original: Callable[[Any], Parsed], parser: Any) -> Parsed:
    """Wrap `FunctionCallParser.parse_stream_end`.

    A beginning of a mark that was never completed is text, unless the answer ends inside a call.
    """
    held, calls = getattr(parser, _HELD, ""), getattr(parser, _CALLS, False)
    setattr(parser, _HELD, "")
    if held and calls:
        return _joined([_steps(inspect.unwrap(type(parser).parse_stream_chunk), parser, held), original(parser)])
    return _joined([original(parser), (held, [])])


def marks_of(detector: Any) -> tuple[str, ...]:
    """Return the marks of a parser, the longest first: its texts that look like tags or tokens."""
    classes = [vars(kind) for kind in type(detector).__mro__]
    own = [vars(detector), *({key: values[key] for key in values if not key.startswith("__")} for values in classes)]
    texts = [value.strip() for values in own for value in values.values() if isinstance(value, str)]
    found = {text for text in texts if len(text) >= MIN_MARK and text[0] in "<[]" and not set(text) & set("\\?*(")}
    further = [mark for kind in type(detector).__mro__ for mark in _FURTHER_MARKS.get(kind.__name__, ())]
    return tuple(sorted({*found, *further}, key=lambda mark: (-len(mark), mark)))


@functools.cache
def _pattern(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(map(re.escape, marks)) + ")")


def _divided(marks: tuple[str, ...], text: str) -> list[str]:
    """Divide a text so that each mark is a part of its own; a text without a mark stays whole, an empty one too."""
    if not marks:
        return [text]
    return [part for part in _pattern(marks).split(text) if part] or [""]


def _incomplete(marks: tuple[str, ...], text: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a mark."""
    longest = min(len(text), max(map(len, marks), default=1) - 1)
    ends = (count for count in range(longest, 0, -1) if any(mark.startswith(text[-count:]) for mark in marks))
    return next((count for count in ends if text[-count:] not in marks), 0)


def _steps(parse: Parse, parser: Any, text: str) -> Parsed:
    """Give a text to a parser, and ask for further steps as long as the last one found something."""

    def found() -> Iterator[Parsed]:
        yield (last := parse(parser, text))
        for _ in range(MAX_STEPS):
            if not any(last):
                return
            yield (last := parse(parser, ""))

    return _joined(found())


def _joined(parts: Any) -> Parsed:
    text, calls = "", []
    for some_text, some_calls in parts:
        text += some_text or ""
        calls += some_calls
    return text, calls
