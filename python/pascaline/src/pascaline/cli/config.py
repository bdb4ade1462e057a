"""`pascaline config`: show, check or describe the settings, and where each value comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline.cli.options import add_settings_arguments, load_from_arguments
from pascaline.configuration import allowed_values, flag_of, setting_fields, variable_of
from pascaline.errors import ExitCode
from pascaline.settings import Settings
from pascaline.text_table import LEFT, table_lines

if TYPE_CHECKING:
    import argparse

    from pascaline.configuration import Configuration

DESCRIPTION = """Show, check or describe the settings.

  pascaline config show            every setting, its value and where it comes from
  pascaline config check [FILE]    exit code 0 if all sources together are valid, otherwise 2 and every problem
  pascaline config schema          JSON schema of the TOML file
  pascaline config docs            the settings as a Markdown table

Takes the same flags as serve, so you can check a command line before you run it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action, and the flags of all settings."""
    parser.add_argument("action", choices=ACTIONS, metavar="{" + ",".join(ACTIONS) + "}", help="what to do")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="TOML file, as --config")
    parser.add_argument("--json", action="store_true", help="show: as JSON")
    parser.add_argument(
        "--no-host",
        action="store_true",
        help="check: skip what depends on the serving host (whether files are readable)",
    )
    add_settings_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the action."""
    if arguments.file is not None:
        arguments.config = arguments.file
    return ACTIONS[arguments.action](arguments)


def _show(arguments: argparse.Namespace) -> int:
    configuration = load_from_arguments(arguments)
    rows = list(_rows(configuration))
    if arguments.json:
        print(json.dumps({key: {"value": value, "origin": origin} for key, value, origin in rows}, indent=2))
        return ExitCode.OK
    print("\n".join(table_lines([(key, _text(value), origin) for key, value, origin in rows], [LEFT] * 3)))
    return ExitCode.OK


def _rows(configuration: Configuration) -> list[tuple[str, Any, str]]:
    document = configuration.settings.model_dump(mode="json")
    return [(key, _lookup(document, key), configuration.origins[key]) for key, _ in setting_fields()]


def _lookup(document: Any, key: str) -> Any:
    for part in key.split("."):
        document = document[part]
    return document


def _text(value: Any) -> str:
    return "-" if value is None else json.dumps(value) if isinstance(value, (bool, list, dict)) else str(value)


def _check(arguments: argparse.Namespace) -> int:
    configuration = load_from_arguments(arguments, check_host=not arguments.no_host)
    print(f"valid: {configuration.origins.chosen} settings chosen, card profile {configuration.card or 'none'}")
    return ExitCode.OK


def _schema(_arguments: argparse.Namespace) -> int:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Settings.model_json_schema()}
    print(json.dumps(schema, indent=2))
    return ExitCode.OK


def _docs(_arguments: argparse.Namespace) -> int:
    print(configuration_page(), end="")
    return ExitCode.OK


def configuration_page() -> str:
    """Return docs/configuration.md."""
    rows = [
        f"| `{key}` | {field.description} | {allowed_values(field)} | {_default_cell(field.default)} |"
        for key, field in setting_fields()
    ]
    return "\n".join(
        [*_PAGE_HEAD.format(flag=flag_of(_EXAMPLE), variable=variable_of(_EXAMPLE)).splitlines(), *rows, ""]
    )


def _default_cell(default: Any) -> str:
    return "" if default in (None, (), {}) else f"`{json.dumps(default)}`".replace('"', "")


_EXAMPLE = "kv_cache.max_bytes"
_PAGE_HEAD = """# Configuration

Every setting has one name, `kv_cache.max_bytes` for example, and can be given in four places. A later one wins:

1. the card profile (`card`; by default that of the host's GPU, or `cpu` if there is none);
2. a TOML file (`--config FILE` or `$PASCALINE_CONFIG`): `max_bytes = "512 MiB"` in the table `[kv_cache]`;
3. a variable: `{variable}` (lists and pairs separated by commas);
4. a flag: `{flag}`.

`pascaline config show` prints each value with its origin, `pascaline config check` all problems at once.
Unknown keys, values out of range and values that contradict each other are errors with exit code 2.

| setting | meaning | must be | default |
|---|---|---|---|"""

ACTIONS = {"show": _show, "check": _check, "schema": _schema, "docs": _docs}
