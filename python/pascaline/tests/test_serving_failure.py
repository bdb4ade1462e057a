"""Why a run ended: CUDA's messages count only with evidence, and hard evidence counts alone."""

from __future__ import annotations

import pytest
from pascaline.engines import Cause, Diagnosis
from pascaline.gpu.loss import Evidence, Standing
from pascaline.serving.failure import Ending, Failure, FailureKind, judge

CUDA = Diagnosis(Cause.CUDA_FAULT, "CUDA says: unknown error (cudaErrorUnknown, 999)")
NVML_WORDS = Diagnosis(Cause.GPU_LOST, "the GPU is lost")
MEMORY = Diagnosis(Cause.DEVICE_MEMORY, "not enough memory")
NO_MEMORY = FailureKind.OUT_OF_MEMORY
CRASH, LOST, SILENT = FailureKind.CRASH, FailureKind.GPU_LOST, FailureKind.UNRESPONSIVE


@pytest.mark.parametrize(
    ("diagnosis", "silence", "kinds"),
    [
        # Of the standings well, unknown, doubtful, lost.
        (None, None, (CRASH, CRASH, CRASH, LOST)),
        (MEMORY, None, (NO_MEMORY, NO_MEMORY, NO_MEMORY, LOST)),
        (MEMORY, "no token for 45 s", (SILENT, SILENT, LOST, LOST)),
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


class TestMemory:
    PLAN = "the plan: 6.40 GiB of 7.43 GiB"
    SAID = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB."

    @pytest.mark.parametrize(
        "stage", ["while it loaded the model", "at the first test generation", "after it had served for 3600 s"]
    )
    def test_the_engines_words_come_with_when_and_how_much(self, stage: str) -> None:
        ending = Ending(exit_code=-9, diagnosis=MEMORY, last_line=self.SAID, stage=stage, planned=self.PLAN)
        assert judge(ending).text == (
            f"the engine ended with signal SIGKILL: not enough memory ({stage}); it said: {self.SAID}; {self.PLAN}"
        )

    def test_the_kernel_killed_it(self) -> None:
        ending = Ending(exit_code=-9, last_line="GET /", oom_kills=1, stage="while it loaded the model")
        assert judge(ending) == Failure(
            NO_MEMORY,
            "the kernel killed the engine for lack of memory (the host has none left) (while it loaded the model)",
        )
        limited = judge(Ending(exit_code=-9, oom_kills=2, memory_limit="8.00 GiB"))
        assert limited.text == "the kernel killed the engine for lack of memory (its control group allows 8.00 GiB)"

    def test_a_leak_is_named(self) -> None:
        leak = "its memory grew from 2.00 GiB when it was ready to 7.00 GiB (1.00 GiB an hour)"
        assert judge(Ending(exit_code=-9, oom_kills=1, leak=leak)).text.endswith(f"; {leak}")

    @pytest.mark.parametrize(("code", "kills"), [(-9, 0), (1, 1), (-11, 1), (None, 1)])
    def test_another_end_is_not_the_kernels(self, code: int | None, kills: int) -> None:
        """Another process of the group was killed, or somebody else sent the signal."""
        assert judge(Ending(exit_code=code, oom_kills=kills, last_line="x", not_ready=None)).kind is CRASH


@pytest.mark.parametrize(
    ("code", "ended"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "signal SIGKILL"), (-35, "signal 35"), (-99, "signal 99")],
)
def test_how_it_ended_is_said_for_any_code(code: int, ended: str) -> None:
    assert judge(Ending(exit_code=code, last_line="bye")).text == f"the engine ended with {ended}: bye"
