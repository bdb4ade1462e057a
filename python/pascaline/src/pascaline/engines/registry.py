"""The engines that this package has: every folder beside this file that holds an engine.toml and a package.

A new engine is a new folder. Its package defines `ENGINE`, an `Engine`; nothing else names it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pascaline.engines.data import FILE_NAME
from pascaline.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.engines.base import Engine


@cache
def engines() -> Mapping[str, Engine]:
    """Return every engine by its name in the setting `engine`."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob(f"*/{FILE_NAME}"))
    found = [cast("Engine", import_module(f"{__package__}.{folder}").ENGINE) for folder in folders]
    return {engine.name: engine for engine in found}


def engine_named(name: str) -> Engine:
    """Return the engine of this name. Raises ConfigurationError if there is none."""
    try:
        return engines()[name]
    except KeyError:
        raise ConfigurationError(f"engine: unknown engine {name!r}, must be one of: {', '.join(engines())}") from None
