"""The flags of every command that takes settings: one per setting, generated from its field."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

from pascaline.configuration import (
    Configuration,
    allowed_values,
    flag_of,
    from_pairs,
    from_text,
    load,
    setting_fields,
)
from pascaline.errors import ConfigurationError
from pascaline.redaction import read_secret

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config and one flag per setting. Their values are checked together with those of all other sources."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with settings (default: what $PASCALINE_CONFIG names)"
    )
    group = parser.add_argument_group(
        "settings",
        "Each is also a key of the TOML file (kv_cache.max_bytes) and a variable (PASCALINE_KV_CACHE_MAX_BYTES). "
        "Rising precedence: card profile, file, variable, flag.",
    )
    for key, field in setting_fields():
        _add_flag(group, key, field)


def load_from_arguments(arguments: argparse.Namespace, *, check_host: bool = True) -> Configuration:
    """Merge the flags that were given with all other sources."""
    return load(given_flags(arguments), arguments.config, check_host=check_host)


def given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given as flags: dotted key -> value."""
    fields = dict(setting_fields())
    return {
        key: _flag_value(value, field)
        for key, field in fields.items()
        if (value := getattr(arguments, key, None)) is not None
    }


def _add_flag(group: argparse._ArgumentGroup, key: str, field: FieldInfo) -> None:
    # argparse formats help with %.
    text = f"{field.description}{_default_words(field)}".replace("%", "%%")
    options: dict[str, Any] = {"dest": key, "default": None, "help": text}
    if field.annotation is bool:
        group.add_argument(flag_of(key), action=argparse.BooleanOptionalAction, **options)
    elif get_origin(field.annotation) in {dict, tuple}:
        metavar = "NAME=VALUE" if get_origin(field.annotation) is dict else "ARG"
        options["help"] += "; may be given several times"
        group.add_argument(flag_of(key), action="append", metavar=metavar, **options)
    else:
        group.add_argument(flag_of(key), metavar=_metavar(key, field), **options)


def _metavar(key: str, field: FieldInfo) -> str:
    allowed = allowed_values(field)
    if allowed.startswith("one of: "):
        return "{" + allowed.removeprefix("one of: ").replace(", ", ",") + "}"
    return key.rsplit(".", 1)[-1].rsplit("_", 1)[-1].upper()


def _default_words(field: FieldInfo) -> str:
    if field.default in (None, (), {}) or field.annotation is bool:
        return ""
    return f" (default: {field.default})"


def _flag_value(value: Any, field: FieldInfo) -> Any:
    if get_origin(field.annotation) is dict:
        return from_pairs(value)
    return from_text(value, field) if isinstance(value, str) else value


def add_token_argument(parser: argparse.ArgumentParser) -> None:
    """Add --token-file, for servers that require a token."""
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with the token that the server requires")


def token_headers(path: Path | None) -> dict[str, str]:
    """Return the HTTP headers with the token of a file; empty if path is None."""
    if path is None:
        return {}
    try:
        token = read_secret(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigurationError(f"--token-file: failed to read {path}: {reason}") from error
    if not token or len(token.split()) != 1:
        raise ConfigurationError(f"--token-file: {path} must hold one token and nothing else")
    return {"Authorization": f"Bearer {token}"}
