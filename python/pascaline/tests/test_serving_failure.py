"""Why a run ended: CUDA's words count with evidence, never alone, and hard evidence counts whatever was said."""

from __future__ import annotations

import pytest
from pascaline.engines import Cause, Diagnosis
from pascaline.gpu.loss import Evidence, Standing
from pascaline.serving.failure import Ending, Failure, FailureKind, judge

CUDA = Diagnosis(Cause.CUDA_FAULT, "CUDA says: unknown error (cudaErrorUnknown, 999)")
NVML_WORDS = Diagnosis(Cause.GPU_LOST, "the GPU is lost")
MEMORY = Diagnosis(Cause.DEVICE_MEMORY, "not enough memory")
CRASH, LOST, SILENT = FailureKind.CRASH, FailureKind.GPU_LOST, FailureKind.UNRESPONSIVE


@pytest.mark.parametrize(
    ("diagnosis", "silence", "kinds"),
    [
        # Of the standings well, unknown, doubtful, lost.
        (None, None, (CRASH, CRASH, CRASH, LOST)),
        (MEMORY, None, (CRASH, CRASH, CRASH, LOST)),
        (CUDA, None, (CRASH, CRASH, LOST, LOST)),
        (NVML_WORDS, None, (CRASH, LOST, LOST, LOST)),
        (None, "no token for 45 s", (SILENT, SILENT, LOST, LOST)),
        (CUDA, "no token for 45 s", (SILENT, SILENT, LOST, LOST)),
    ],
)
def test_every_pair_of_words_and_evidence(
    diagnosis: Diagnosis | None, silence: str | None, kinds: tuple[FailureKind, ...]
) -> None:
    ending = Ending(exit_code=-9, diagnosis=diagnosis, silence=silence)
    assert tuple(judge(ending, Evidence(standing, "seen")).kind for standing in Standing) == kinds


def test_a_lost_gpu_is_said_with_its_evidence() -> None:
    failure = judge(Ending(exit_code=-9, diagnosis=CUDA), Evidence(Standing.LOST, "NVML no longer lists GPU 0"))
    assert failure == Failure(
        LOST,
        "the engine ended with signal SIGKILL: CUDA says: unknown error (cudaErrorUnknown, 999); the GPU is lost: NVML "
        "no longer lists GPU 0",
    )
    failure = judge(Ending(exit_code=1, diagnosis=NVML_WORDS), Evidence(Standing.LOST, "NVML no longer lists GPU 0"))
    assert failure.text == "the engine ended with exit code 1: the GPU is lost; NVML no longer lists GPU 0"


def test_a_gpu_that_is_well_is_said_beside_cudas_words() -> None:
    failure = judge(Ending(exit_code=1, diagnosis=CUDA), Evidence(Standing.WELL, "NVML reads GPU 0"))
    assert failure.text == (
        "the engine ended with exit code 1: CUDA says: unknown error (cudaErrorUnknown, 999); NVML reads GPU 0"
    )


def test_without_words_the_last_line_is_shown() -> None:
    assert judge(Ending(exit_code=3, last_line="so long")).text == "the engine ended with exit code 3: so long"


def test_a_process_that_cannot_be_killed_waits_in_the_driver() -> None:
    ending = Ending(exit_code=None, silence="no token for 45 s", stuck="its process 7 does not end", not_ready="x")
    assert judge(ending) == Failure(LOST, "the engine was unresponsive (no token for 45 s); its process 7 does not end")


def test_an_engine_that_is_late() -> None:
    assert judge(Ending(exit_code=None, not_ready="it was not ready")) == Failure(CRASH, "it was not ready")
