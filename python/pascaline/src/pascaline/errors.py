"""The errors that users can cause or see, and the exit code of each.

PascalineError
├── ConfigurationError   ExitCode.CONFIGURATION
├── ModelError           ExitCode.MODEL
├── PortInUseError       ExitCode.PORT_IN_USE
├── EngineError          ExitCode.ENGINE_FAILED: it could not be loaded
├── GaveUpError          ExitCode.GAVE_UP: it crashed too often
├── DoesNotFitError      ExitCode.DOES_NOT_FIT: the plan exceeds the card
├── MissingError         ExitCode.MISSING: a required program, library or device is not on this machine
└── StorageError         ExitCode.STORAGE: a disk is full or not writable

A message starts in lower case, names the cause, the value and the remedy, and has no full stop at its end.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit codes of every command; a member's `meaning` is the sentence that `--help` prints."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        """Keep the sentence beside the number."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "done; a server that was asked to stop has drained"
    FAILED = 1, "an error that has no code of its own, or a check that found something wrong"
    CONFIGURATION = 2, "bad configuration or usage; nothing was started"
    MODEL = 3, "the model is missing, damaged, has another checksum or an unknown architecture"
    PORT_IN_USE = 4, "another process already uses a port, a socket or a folder that is needed"
    ENGINE_FAILED = 5, "the engine failed while it loaded"
    GAVE_UP = 6, "the engine crashed more often than max_restarts allows"
    DOES_NOT_FIT = 7, "the plan needs more memory than the card has; nothing was started"
    MISSING = 8, "a required program, library or device is not on this machine"
    STORAGE = 9, "a disk is full, or a folder is not writable"
    WARNED = 10, "doctor: nothing failed, but something deserves a warning"
    INTERRUPTED = 130, "stopped at once by a second signal"


class PascalineError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED


class ConfigurationError(PascalineError):
    """A setting is unknown, malformed, out of its range, or contradicts another."""

    exit_code = ExitCode.CONFIGURATION


class ModelError(PascalineError):
    """A model cannot be served: missing, truncated, wrong checksum, unknown architecture."""

    exit_code = ExitCode.MODEL


class NotFetchedError(ModelError):
    """A model's source does not answer, or not with the file: the same command may succeed later."""

    exit_code = ExitCode.FAILED


class PortInUseError(PascalineError):
    """Another process already listens on the address, or holds the folder, that this one needs for itself."""

    exit_code = ExitCode.PORT_IN_USE


class EngineError(PascalineError):
    """The engine ended, or reported that it cannot continue, before it was ready."""

    exit_code = ExitCode.ENGINE_FAILED


class GaveUpError(PascalineError):
    """The engine failed again after the last allowed restart."""

    exit_code = ExitCode.GAVE_UP


class DoesNotFitError(PascalineError):
    """The planned memory exceeds the card's."""

    exit_code = ExitCode.DOES_NOT_FIT


class MissingError(PascalineError):
    """A required program, library or device is not on this machine."""

    exit_code = ExitCode.MISSING


class StorageError(PascalineError):
    """A disk is full, or a folder is not writable."""

    exit_code = ExitCode.STORAGE
