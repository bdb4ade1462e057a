"""The line of a key, in every form in which TOML lets a key be written."""

from __future__ import annotations

import tomllib

import pytest
from pascaline.toml_lines import line_of_key

TEXT = '''# port = 0

port = 1 # c
text = """
port = 3
kv_cache = 5
"""
"a.b" = true
kv.x = 1
list = [
  1,
  2,
]
kv.y = 2
pairs = { A = "1", B = "2" }

# before
[empty]   # port = 1

[deep.first]
q = 1

  [deep.second]
  q = true

[[many]]
z = 1

[[many]]
z = 2

[ "kv_cache" . 'sub' ]
max_bytes = "1"
[other]
port = 1
[deep.third]
k = 1
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("port", 3),
        ("text", 4),
        ("kv", 9),
        ("kv/x", 9),
        ("list", 10),
        ("kv/y", 14),
        ("pairs", 15),
        ("pairs/B", 15),
        ("empty", 18),
        ("deep", 20),
        ("deep/first", 20),
        ("deep/first/q", 21),
        ("deep/second/q", 24),
        ("many", 26),
        ("kv_cache", 32),
        ("kv_cache/sub", 32),
        ("kv_cache/sub/max_bytes", 33),
        ("other/port", 35),
        ("deep/third/k", 37),
        ("a.b", 8),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_forms(path: str, line: int, end: str) -> None:
    text = TEXT.removesuffix("\n") if not end else TEXT.replace("\n", end)
    tomllib.loads(text)
    assert line_of_key(text, path.split("/")) == line


@pytest.mark.parametrize("path", ["absent", "absent/port", "port/x", "list/x", "many/z"])
def test_what_is_not_there_has_no_line(path: str) -> None:
    assert line_of_key(TEXT, path.split("/")) is None


def test_what_is_no_toml_has_no_line() -> None:
    assert line_of_key("port = \n", ["port"]) is None
