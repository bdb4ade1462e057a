"""The engines that this package has: every folder beside this file that holds an engine.toml and a package.

A new engine is a new folder. Its package defines `ENGINE`, an `Engine`; nothing else names it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, cast

from pascaline.errors import ConfigurationError
from pascaline.settings import ENGINE_FOLDERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.engines.base import Engine


@cache
def engines() -> Mapping[str, Engine]:
    """Return every engine by its name in the setting `engine`, the default first."""
    return {
        name: cast("Engine", import_module(f"{__package__}.{folder}").ENGINE) for name, folder in ENGINE_FOLDERS.items()
    }


def engine_named(name: str) -> Engine:
    """Return the engine of this name. Raises ConfigurationError for an unknown name."""
    try:
        return engines()[name]
    except KeyError:
        raise ConfigurationError(f"engine: unknown engine {name!r}, must be one of: {', '.join(engines())}") from None
