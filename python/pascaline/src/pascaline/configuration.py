"""Merges the sources of settings: card profile, TOML file, PASCALINE_* variables, flags; later ones win.

Problems in all sources are reported together, each as `key: what is wrong, must be what is allowed (origin)`.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pascaline.cards import card_names, detect_card, load_card, unknown_name
from pascaline.digests import SHA256_WORDS, parse_sha256s
from pascaline.engines import ENGINES
from pascaline.errors import ConfigurationError
from pascaline.gpu.devices import VISIBLE_DEVICES, driver_gpus, visible_gpus
from pascaline.redaction import protect_arguments, protect_named, read_api_key
from pascaline.settings import Settings, contradictions
from pascaline.toml_lines import line_of_key
from pascaline.units import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PREFIX = "PASCALINE_"
CONFIG_VARIABLE = "PASCALINE_CONFIG"
# PASCALINE_* variables that are not settings: the settings file, and those that ./dev, tests and simulated NVML read.
OTHER_VARIABLES = frozenset(
    {
        CONFIG_VARIABLE,
        "PASCALINE_BARE_USER",
        "PASCALINE_ENV",
        "PASCALINE_FAKE_NVML",
        "PASCALINE_NIXPKGS",
        "PASCALINE_NIX_STAND_INS",
        "PASCALINE_PYTHON",
        "PASCALINE_TEST_WORKERS",
        "PASCALINE_VIRTUAL_MACHINES",
    }
)
DEFAULT = "default"
PROFILE = "profile "


@dataclass(frozen=True, slots=True)
class Configuration:
    """The settings, and the origin of each value."""

    settings: Settings
    origins: Origins
    card: str | None
    """The card profile whose values were used; None for a GPU without a profile."""


@dataclass(frozen=True, slots=True)
class Value:
    """One raw value and where it comes from."""

    raw: Any
    source: str | FileKey

    @property
    def origin(self) -> str:
        """Its source in words."""
        return str(self.source)


@dataclass(frozen=True, slots=True)
class FileKey:
    """A key of a TOML file; its line is looked for when it is shown."""

    file: Path
    text: str
    path: tuple[str, ...]

    def __str__(self) -> str:
        line = line_of_key(self.text, self.path)
        return str(self.file) if line is None else f"{self.file}:{line}"


class Origins(Mapping[str, str]):
    """The origin of every setting by dotted key, made when it is asked for."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        """values: those that were given; the others have their default."""
        self._values = values
        self._keys = dict(setting_fields()).keys()

    def __getitem__(self, key: str) -> str:
        """Return an origin. Raises KeyError if there is no such setting."""
        if key not in self._keys:
            raise KeyError(key)
        return self._values[key].origin if key in self._values else DEFAULT

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def is_chosen(self, key: str) -> bool:
        """Whether somebody has set it: it has neither its default nor a card profile's value."""
        return key in self._values and not self[key].startswith(PROFILE)

    def with_origin(self, key: str, raw: Any, origin: str) -> Origins:
        """Return these with another value's origin."""
        return Origins({**self._values, key: Value(raw, origin)})

    @property
    def chosen(self) -> int:
        """The number of settings that do not have their default."""
        return len(self._keys & self._values.keys())


def setting_fields(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every leaf setting as (dotted key, field), in the order in which they are declared."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def flag_of(key: str) -> str:
    """Return the command-line flag of a setting: kv_cache.max_bytes -> --kv-cache-max-bytes."""
    return "--" + key.replace(".", "-").replace("_", "-")


def variable_of(key: str) -> str:
    """Return the environment variable of a setting: kv_cache.max_bytes -> PASCALINE_KV_CACHE_MAX_BYTES."""
    return PREFIX + key.replace(".", "_").upper()


def load(
    flags: Mapping[str, Any] | None = None,
    config_file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    *,
    check_host: bool = True,
) -> Configuration:
    """Merge all sources into one checked configuration.

    flags: dotted key -> value, for the flags that were given. config_file: None means the file that PASCALINE_CONFIG
    names, if any. environment: None means this process's. check_host: whether to check that the files that settings
    name are readable on this host. Raises ConfigurationError with every problem, one a line.
    """
    environment = os.environ if environment is None else environment
    if config_file is None and environment.get(CONFIG_VARIABLE):
        config_file = Path(environment[CONFIG_VARIABLE])
    problems: list[str] = []
    values: dict[str, Value] = {}
    if config_file is not None:
        values |= _read_file(config_file, problems)
    values |= _read_environment(environment, problems)
    values |= {key: Value(raw, f"flag {flag_of(key)}") for key, raw in (flags or {}).items()}
    card = _choose_card(values, environment, problems)
    merged = _profile_values(card) | values
    settings = _validate(merged, problems)
    if settings is not None:
        problems += _contradiction_sentences(settings, merged)
        if check_host:
            problems += _host_problems(settings, merged)
    if problems or settings is None:
        raise ConfigurationError("\n".join(problems))
    protect_named(settings.environment)
    protect_arguments(settings.extra_args)
    return Configuration(settings, Origins(merged), card)


def _read_file(path: Path, problems: list[str]) -> dict[str, Value]:
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigurationError(f"failed to read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"failed to read {path}: not TOML: {error}") from error
    keys = dict(setting_fields())
    values = {}
    for names, raw in _leaves(document, keys):
        key, source = ".".join(names), FileKey(path, text, names)
        if key not in keys:
            problems.append(f"{key}: unknown key{_suggestion(key, keys)} ({source})")
        elif not _is_of_toml_type(raw, keys[key]):
            problems.append(f"{key}: invalid value {raw!r}, must be {allowed_values(keys[key])} ({source})")
        else:
            values[key] = Value(raw, source)
    return values


def _is_of_toml_type(raw: Any, field: FieldInfo) -> bool:
    """Whether a TOML value has the field's own type: pydantic would also accept true as 1, and "4096" as a number."""
    annotations = {field.annotation, *get_args(field.annotation)}
    if isinstance(raw, bool) or bool in annotations:
        return isinstance(raw, bool) and bool in annotations
    return not (isinstance(raw, str) and annotations & {int, float} and not _has_units(field))


def _has_units(field: FieldInfo) -> bool:
    return any(getattr(part, "func", None) in {parse_bytes, parse_seconds} for part in _all_metadata(field))


def _leaves(
    table: dict[str, Any], keys: Mapping[str, object], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (names, value) of a TOML document, descending into tables that are groups of settings."""
    for name, value in table.items():
        names = (*above, name)
        key = ".".join(names)
        if isinstance(value, dict) and key not in keys and any(known.startswith(f"{key}.") for known in keys):
            yield from _leaves(value, keys, names)
        else:
            yield names, value


def _read_environment(environment: Mapping[str, str], problems: list[str]) -> dict[str, Value]:
    variables = {variable_of(key): (key, field) for key, field in setting_fields()}
    values = {}
    for name in sorted(environment):
        if not name.startswith(PREFIX) or name in OTHER_VARIABLES:
            continue
        if name not in variables:
            problems.append(f"{name}: unknown variable{_suggestion(name, variables)}")
            continue
        key, field = variables[name]
        values[key] = Value(from_text(environment[name], field), f"variable {name}")
    return values


def from_text(text: str, field: FieldInfo) -> Any:
    """Convert the text of a variable or flag into the value that TOML would hold for this field."""
    if _is_pairs(field):
        return from_pairs([part for part in text.split(",") if part])
    if _is_sequence(field):
        return [part for part in text.split(",") if part]
    if field.annotation is bool and text.lower() in {"true", "1", "yes", "on", "false", "0", "no", "off"}:
        return text.lower() in {"true", "1", "yes", "on"}
    return text


def from_pairs(texts: Sequence[str]) -> Any:
    """Return a mapping from texts NAME=VALUE; if one has another form, that text alone, for pydantic to refuse."""
    wrong = next((text for text in texts if "=" not in text), None)
    return dict(text.partition("=")[::2] for text in texts) if wrong is None else wrong


def _is_pairs(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict


def _is_sequence(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _choose_card(values: Mapping[str, Value], environment: Mapping[str, str], problems: list[str]) -> str | None:
    """Return the configured profile, otherwise `cpu` if the device is the CPU, otherwise that of this host's GPU."""
    if "card" in values:
        value = values["card"]
        if value.raw in card_names():
            return str(value.raw)
        problems.append(f"{unknown_name(value.raw)} ({value.origin})")
        return None
    if "device" in values and values["device"].raw == "cpu":
        return "cpu"
    return detect_card(_visible_index(values, environment))


def _visible_index(values: Mapping[str, Value], environment: Mapping[str, str]) -> int:
    """Return the index of the GPU that the engine sees first; 0 if that is unknown or no GPU is visible."""
    named = values["environment"].raw if "environment" in values else {}
    visible = {**environment, **(named if isinstance(named, dict) else {})}.get(VISIBLE_DEVICES)
    try:
        return next((gpu.index for gpu in visible_gpus(driver_gpus(), visible)), 0)
    except ConfigurationError:
        # If the engine needs a GPU, the placement reports this error.
        return 0


def _profile_values(card: str | None) -> dict[str, Value]:
    if card is None:
        return {}
    keys = dict(setting_fields())
    return {".".join(names): Value(raw, f"{PROFILE}{card}") for names, raw in _leaves(load_card(card).settings, keys)}


def _validate(values: Mapping[str, Value], problems: list[str]) -> Settings | None:
    document: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        table = document
        for group in groups:
            table = table.setdefault(group, {})
        table[name] = value.raw
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        # A value of a union has an error for each member, all with the same sentence.
        problems += dict.fromkeys(_sentence(details, values) for details in error.errors())
        return None


def _sentence(details: Any, values: Mapping[str, Value]) -> str:
    location = [str(part) for part in details["loc"]]
    key = next((k for k in (".".join(location[:n]) for n in (1, 2)) if k in values), ".".join(location))
    field = dict(setting_fields())[key]
    value = values[key]
    # A message of our own validators is more exact than one made from the type.
    cause = details.get("ctx", {}).get("error")
    reason = str(cause) if cause else f"invalid value {value.raw!r}, must be {allowed_values(field)}"
    return f"{key}: {reason} ({value.origin})"


def allowed_values(field: FieldInfo) -> str:
    """Describe the allowed values of a setting: its choices, or its type and range."""
    choices = _choices(field.annotation)
    if choices:
        numbers = [FieldInfo.from_annotation(a) for a in get_args(field.annotation) if get_origin(a) is Annotated]
        return ", or ".join(["one of: " + ", ".join(choices), *map(allowed_values, numbers)])
    return _type_words(field) + _range_words(field)


def _range_words(field: FieldInfo) -> str:
    if any(getattr(part, "min_length", None) == 1 for part in _all_metadata(field)):
        return " that is not empty"
    limits = {
        name: getattr(part, name)
        for part in _all_metadata(field)
        for name in ("ge", "gt", "le", "lt")
        if getattr(part, name, None) is not None
    }
    if "ge" in limits and "le" in limits:
        return f" between {limits['ge']} and {limits['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return "".join(f" {words[name]} {limit}" for name, limit in limits.items()).replace(" below", " and below")


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) if get_origin(part) is Literal for choice in _choices(part)]


def _type_words(field: FieldInfo) -> str:
    validators = {getattr(part, "func", None) for part in _all_metadata(field)}
    if parse_bytes in validators:
        return "a size such as 512 MiB"
    if parse_seconds in validators:
        return "a duration such as 60s or 5m"
    if parse_sha256s in validators:
        return SHA256_WORDS
    if _is_pairs(field):
        return "pairs NAME=VALUE"
    if _is_sequence(field):
        return "a list of texts"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    annotations = [field.annotation, *get_args(field.annotation)]
    return next((names[a] for a in annotations if a in names), "a value of another type")


def _all_metadata(field: FieldInfo) -> list[Any]:
    nested = [part for a in get_args(field.annotation) for part in getattr(a, "__metadata__", ())]
    return [*field.metadata, *nested]


def _contradiction_sentences(settings: Settings, values: Mapping[str, Value]) -> list[str]:
    found = [*contradictions(settings), *ENGINES[settings.engine].problems(settings)]
    return [f"{key}: {sentence} ({_origin_of(key, values)})" for key, sentence in found]


def _host_problems(settings: Settings, values: Mapping[str, Value]) -> list[str]:
    """Return the problems that depend on this host: files named by settings that cannot be read."""
    path = settings.api_key_file
    if path is None:
        return []
    try:
        read_api_key(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        sentence = f"failed to read {path}: {reason}; it must be a file that this user may read"
        return [f"api_key_file: {sentence} ({_origin_of('api_key_file', values)})"]
    except ValueError as error:
        return [f"api_key_file: {path} {error} ({_origin_of('api_key_file', values)})"]
    return []


def _origin_of(key: str, values: Mapping[str, Value]) -> str:
    for candidate in (key, key.split(".", maxsplit=1)[0]):
        if candidate in values:
            return values[candidate].origin
    return DEFAULT


def _suggestion(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else f", must be one of: {', '.join(known)}"
