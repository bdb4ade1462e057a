"""Why a run of the engine ended, from its exit, its last words and the evidence about its GPU. No I/O."""

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
    """How a run failed: decides what is done about it, and is a label of the restarts metric."""

    CRASH = "crash"
    UNRESPONSIVE = "unresponsive"
    GPU_LOST = "gpu-lost"
    """Restarts are no cure."""
    HOST = "host"
    """It could not even be started: no process, memory, descriptor or room on a disk is left."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run of the engine ended."""

    kind: FailureKind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What is seen of an engine that is not to go on."""

    exit_code: int | None
    """None: it runs, as it was not ready in time, or cannot be killed; negative: a signal."""
    last_line: str = ""
    """The last that it wrote."""
    diagnosis: Diagnosis | None = None
    silence: str | None = None
    """Why it was taken for unresponsive; None where it was not."""
    stuck: str | None = None
    """What is said of a process that does not end when it is killed."""
    not_ready: str | None = None
    """Why it was not taken for ready; None where it ended by itself."""


def judge(ending: Ending, evidence: Evidence = NOTHING_KNOWN) -> Failure:
    """Return the kind of the failure and its text, which names what was seen."""
    text = _text(ending)
    if ending.stuck is not None and ending.silence is not None:
        return Failure(FailureKind.GPU_LOST, text)
    if _gpu_is_lost(ending, evidence):
        return Failure(FailureKind.GPU_LOST, _with_evidence(text, ending, evidence))
    if ending.diagnosis is not None and ending.diagnosis.cause is Cause.CUDA_FAULT and evidence.text:
        text += f"; {evidence.text}"
    return Failure(FailureKind.UNRESPONSIVE if ending.silence is not None else FailureKind.CRASH, text)


def _gpu_is_lost(ending: Ending, evidence: Evidence) -> bool:
    """Hard evidence decides alone; CUDA's words and silence count together with a doubt, never alone."""
    cause = ending.diagnosis.cause if ending.diagnosis else None
    if evidence.standing is Standing.UNKNOWN:
        # NVML's own words, which the engine passed on, and nobody here can ask NVML.
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
