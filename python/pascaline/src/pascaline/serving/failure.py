"""Decides why a run of the engine ended, from its exit, its last output and the evidence about its GPU. No I/O."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from pascaline.engines import Cause
from pascaline.gpu.loss import NOTHING_KNOWN, Evidence, Standing

if TYPE_CHECKING:
    from pascaline.engines import Diagnosis


class FailureKind(StrEnum):
    """How a run failed. It decides what happens next, and is a label of the restarts metric."""

    CRASH = "crash"
    UNRESPONSIVE = "unresponsive"
    GPU_LOST = "gpu-lost"
    """A restart does not help."""
    HOST = "host"
    """It could not be started: the host has no process, memory, file descriptor or disk space left."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run of the engine ended."""

    kind: FailureKind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What was observed about an engine that ended or has to end."""

    exit_code: int | None
    """None: it still runs, because it was not ready in time or cannot be killed; negative: the signal that ended it."""
    last_line: str = ""
    """The line of its output that best explains the end."""
    diagnosis: Diagnosis | None = None
    silence: str | None = None
    """Why it counts as unresponsive; None if it does not."""
    stuck: str | None = None
    """The message about a process that SIGKILL does not end; None if it ended."""
    not_ready: str | None = None
    """Why it never became ready; None if it ended by itself."""


def judge(ending: Ending, evidence: Evidence = NOTHING_KNOWN) -> Failure:
    """Return the kind of the failure, and a text that names the observations."""
    text = _text(ending)
    if ending.stuck is not None and ending.silence is not None:
        return Failure(FailureKind.GPU_LOST, text)
    if _gpu_is_lost(ending, evidence):
        return Failure(FailureKind.GPU_LOST, _with_evidence(text, ending, evidence))
    if ending.diagnosis is not None and ending.diagnosis.cause is Cause.CUDA_FAULT and evidence.text:
        text += f"; {evidence.text}"
    return Failure(FailureKind.UNRESPONSIVE if ending.silence is not None else FailureKind.CRASH, text)


def _gpu_is_lost(ending: Ending, evidence: Evidence) -> bool:
    """Hard evidence decides alone; CUDA errors and silence count only together with doubtful evidence."""
    cause = ending.diagnosis.cause if ending.diagnosis else None
    if evidence.standing is Standing.UNKNOWN:
        # This process cannot ask NVML, but the engine printed NVML's own message.
        return cause is Cause.GPU_LOST
    if evidence.standing is Standing.DOUBTFUL:
        return ending.silence is not None or cause in {Cause.GPU_LOST, Cause.CUDA_FAULT}
    return evidence.standing is Standing.LOST


def _with_evidence(text: str, ending: Ending, evidence: Evidence) -> str:
    said = ending.diagnosis is not None and ending.diagnosis.cause is Cause.GPU_LOST
    return f"{text}; {'' if said else 'the GPU is lost: '}{evidence.text}" if evidence.text else text


def _text(ending: Ending) -> str:
    if ending.silence is not None:
        end = ending.stuck or "was killed"
        return f"the engine was unresponsive ({ending.silence}){'; ' if ending.stuck else ' and '}{end}"
    if ending.not_ready is not None:
        return ending.not_ready
    code = ending.exit_code or 0
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"the engine ended with {ended}: {ending.diagnosis.text if ending.diagnosis else ending.last_line}"
