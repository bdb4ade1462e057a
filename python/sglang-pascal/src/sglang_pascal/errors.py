"""The errors that a user can cause, and the exit code of `sglang-pascal` for each.

The numbers are those of pascaline's own commands, so that a supervisor can pass them on. A message starts in lower
case, names the cause, the value and the remedy, and has no full stop at its end.
"""

from __future__ import annotations

from typing import ClassVar


class PluginError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code: ClassVar[int] = 1


class CheckpointError(PluginError):
    """A model file is missing, damaged, has the wrong checksum or cannot be converted."""

    exit_code = 3


class UnsupportedVersionError(PluginError):
    """This plugin was not made for the installed version of SGLang."""

    exit_code = 8


class StorageError(PluginError):
    """A disk is full, or a folder is not writable."""

    exit_code = 9


class DeviceMemoryError(PluginError):
    """The weights do not fit into the memory of the device."""

    exit_code = 7
