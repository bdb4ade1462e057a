"""Decides why a run of the engine ended, from its exit, its last output and the evidence about its GPU. No I/O."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from pascaline.engines import Cause
from pascaline.gpu.loss import NOTHING_KNOWN, Evidence, Standing
from pascaline.programs import ending as how_it_ended

if TYPE_CHECKING:
    from pascaline.engines import Diagnosis


class FailureKind(StrEnum):
    """How a run failed. It decides what happens next, and is a label of the restarts metric."""

    CRASH = "crash"
    UNRESPONSIVE = "unresponsive"
    GPU_LOST = "gpu-lost"
    """A restart does not help."""
    OUT_OF_MEMORY = "out-of-memory"
    """The device or the host had too little memory, according to the engine or to the kernel."""
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
    stage: str = ""
    """What it was doing, for an end for lack of memory: "while it loaded the model"."""
    oom_kills: int = 0
    """Processes of this control group that the kernel killed for lack of memory during the run."""
    memory_limit: str = ""
    """The memory that the control group allows, in words; empty if it has no limit."""
    planned: str = ""
    """What the plan says that the engine needs, in words."""
    leak: str | None = None
    """How its memory grew while it served; None if it did not."""


def judge(ending: Ending, evidence: Evidence = NOTHING_KNOWN) -> Failure:
    """Return the kind of the failure, and a text that names the observations."""
    text = _text(ending)
    if ending.stuck is not None and ending.silence is not None:
        return Failure(FailureKind.GPU_LOST, text)
    if _gpu_is_lost(ending, evidence):
        return Failure(FailureKind.GPU_LOST, _with_evidence(text, ending, evidence))
    if ending.silence is None and lacks_memory(ending):
        return Failure(FailureKind.OUT_OF_MEMORY, _with_memory(text, ending))
    if ending.diagnosis is not None and ending.diagnosis.cause is Cause.CUDA_FAULT and evidence.text:
        text += f"; {evidence.text}"
    return Failure(FailureKind.UNRESPONSIVE if ending.silence is not None else FailureKind.CRASH, text)


_MEMORY = frozenset({Cause.DEVICE_MEMORY, Cause.HOST_MEMORY})


def lacks_memory(ending: Ending) -> bool:
    """Whether it ended for lack of memory, by its own words or because the kernel killed it."""
    said = ending.diagnosis is not None and ending.diagnosis.cause in _MEMORY
    return said or _was_oom_killed(ending)


def _was_oom_killed(ending: Ending) -> bool:
    """Whether the kernel killed it or one of its processes; SGLang then kills itself with the same signal."""
    return ending.oom_kills > 0 and ending.exit_code == -signal.SIGKILL


def _with_memory(text: str, ending: Ending) -> str:
    """Add when it happened, and the numbers."""
    parts = [f"{text} ({ending.stage})" if ending.stage else text]
    if ending.diagnosis is not None and ending.last_line:
        parts.append(f"it said: {ending.last_line}")
    return "; ".join([*parts, *filter(None, (ending.leak, ending.planned))])


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
    if _was_oom_killed(ending) and ending.diagnosis is None:
        where = f"its control group allows {ending.memory_limit}" if ending.memory_limit else "the host has none left"
        return f"the kernel killed the engine for lack of memory ({where})"
    ended = how_it_ended(ending.exit_code or 0)
    return f"the engine ended with {ended}: {ending.diagnosis.text if ending.diagnosis else ending.last_line}"
