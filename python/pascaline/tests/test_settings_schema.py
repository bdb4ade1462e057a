"""`pascaline config schema` accepts every file that `config check` accepts: editors must not mark what is sound."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomlkit
from pascaline.cli import main
from pascaline.configuration import load, setting_fields
from pascaline.errors import ConfigurationError

ROOT = Path(__file__).parents[3]
VALUES: list[Any] = [
    *(0, 1, 4, 4096, 4096.0, 0.5, 1e30, -1, True, False),
    *("", "auto", "4", "4096", "0.5", "1_000", "+5", "1 GiB", "64mib", " 2 GB ", "5m", "90S", "1.5 h", "1 parsec"),
    *(
        "fp16",
        "pinned",
        "int8",
        "lpm",
        "embed",
        "shrink",
        "sglang",
        "llama.cpp",
        "cpu",
        "float16",
        "tesla-p4",
        "127.0.0.1",
        "/a/file",
        "x" * 64,
        "a" * 64,
        "A" * 64,
    ),
    *([], ["a"], ["a" * 64, "b" * 64], [1], {}, {"A": "b"}, {"A": 1}),
]


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(["config", "schema"]) == 0
    schema = json.loads(output.getvalue())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def document(key: str, value: Any) -> dict[str, Any]:
    group, _, name = key.rpartition(".")
    beside = {"engine": "llama.cpp", "speculative": {"method": "draft"}} if name == "draft_model" else {}
    return beside | ({group: beside.get(group, {}) | {name: value}} if group else {key: value})


@pytest.mark.parametrize("key", [key for key, _ in setting_fields()])
def test_a_value_that_is_checked_as_sound_is_in_the_schema(
    key: str, tmp_path: Path, validator: jsonschema.Draft202012Validator
) -> None:
    file, sound = tmp_path / "a.toml", 0
    for value in VALUES:
        file.write_text(tomlkit.dumps(document(key, value)))
        try:
            load(config_file=file, environment={}, check_host=False)
        except ConfigurationError:
            continue
        sound += 1
        found = [error.message for error in validator.iter_errors(tomllib.loads(file.read_text()))]
        assert found == [], f"{key} = {value!r}"
    assert sound, f"no value of the list suits {key}: add one"


def test_the_example_of_the_readme_is_in_the_schema(validator: jsonschema.Draft202012Validator) -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    validator.validate(tomllib.loads(example.replace('"…"', f'"{"0" * 64}"')))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('port = "30000"', "port: invalid value '30000', must be a whole number between 1 and 65535 ({}:1)"),
        ('mem_fraction_static = "0.9"', "mem_fraction_static: invalid value '0.9', must be a number above 0.0 and below 1.0 ({}:1)"),
        ("radix_cache = 1", "radix_cache: invalid value 1, must be true or false ({}:1)"),
        ('debug = "yes"', "debug: invalid value 'yes', must be true or false ({}:1)"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    """As flags and variables they are texts; in a file they have types."""
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load(config_file=file, environment={}, check_host=False)
    assert str(caught.value) == message.format(file)
