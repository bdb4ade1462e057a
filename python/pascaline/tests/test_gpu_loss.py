"""A GPU is lost by evidence: NVML in a killable child, and the kernel's log, each about this instance's card."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pascaline.gpu import loss
from pascaline.gpu.devices import GpuIdentity
from pascaline.gpu.fake_nvml import fake_nvml_environment, write_scenario
from pascaline.gpu.kernel_log import OFF_THE_BUS, XidEvent, driver_lines, xid_events
from pascaline.gpu.loss import Standing, judge
from pascaline.gpu.reader import Reader
from pascaline.gpu.reading import DeviceReading, DeviceStatus, DriverStatus, Reading
from pascaline.programs import Output

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

GPU = GpuIdentity(0, "GPU-aaaa", "0000:01:00", "Tesla P4")
OTHER = GpuIdentity(1, "GPU-bbbb", "0000:02:00", "Tesla P40")
HOST = """
[library]
nvmlSystemGetDriverVersion = 580.105.08
[gpu 0]
nvmlDeviceGetUUID = GPU-aaaa
nvmlDeviceGetName = Tesla P4
[gpu 1]
nvmlDeviceGetUUID = GPU-bbbb
nvmlDeviceGetName = Tesla P40
"""
XID = "2026-11-20T08:00:12+00:00 host kernel: NVRM: Xid (PCI:0000:{}): {}, pid='<unknown>', name=<unknown>, words"
ABSENT = Reading(DriverStatus.NO_LIBRARY, "nvmlInit said LIBRARY_NOT_FOUND")


def reading(folder: Path, changes: str = "", host: str = HOST, deadline: float = 5.0) -> Reading:
    """What a reader that starts now finds on the host, after the changes."""
    write_scenario(folder / "host.nvml", host + changes)
    with Reader(
        environment=fake_nvml_environment(folder / "host.nvml"), deadline=deadline, start_deadline=deadline
    ) as r:
        return r.read()


class TestNvml:
    @pytest.mark.parametrize(
        ("changes", "standing", "text"),
        [
            ("", Standing.WELL, "NVML reads GPU 0 (GPU-aaaa, 0000:01:00)"),
            (
                "[gpu 0]\nall = error GPU_IS_LOST\n",
                Standing.LOST,
                "NVML finds GPU 0 (GPU-aaaa, 0000:01:00) lost: nvmlDeviceGetHandleByIndex said GPU_IS_LOST",
            ),
            ("[gpu 1]\nall = error GPU_IS_LOST\n", Standing.WELL, "NVML reads GPU 0 (GPU-aaaa, 0000:01:00)"),
            (
                "[gpu 0]\nnvmlDeviceGetName = error RESET_REQUIRED\n",
                Standing.LOST,
                "NVML finds GPU 0 (GPU-aaaa, 0000:01:00) reset required: nvmlDeviceGetName said RESET_REQUIRED",
            ),
            ("[gpu 0]\nnvmlDeviceGetHandleByIndex = error UNKNOWN\n", Standing.UNKNOWN, None),
            (
                "[library]\nnvmlDeviceGetCount = error DRIVER_NOT_LOADED\n",
                Standing.LOST,
                "the driver's kernel module is no longer loaded",
            ),
            ("[library]\nnvmlDeviceGetCount = error LIB_RM_VERSION_MISMATCH\n", Standing.UNKNOWN, None),
            ("[library]\nnvmlInit = crash\n", Standing.UNKNOWN, None),
        ],
    )
    def test_what_it_says(self, tmp_path: Path, changes: str, standing: Standing, text: str | None) -> None:
        evidence = judge([GPU], reading(tmp_path, changes))
        assert evidence.standing is standing
        assert text is None or evidence.text == text

    def test_a_card_that_took_the_place_of_a_lost_one_is_another(self, tmp_path: Path) -> None:
        """After the loss NVML counts one GPU, and index 0 is the P40's."""
        left = "[gpu 0]\nnvmlDeviceGetUUID = GPU-bbbb\nnvmlDeviceGetName = Tesla P40\n"
        evidence = judge([GPU], reading(tmp_path, host=left))
        assert (evidence.standing, evidence.text) == (
            Standing.LOST,
            "NVML no longer lists GPU 0 (GPU-aaaa, 0000:01:00)",
        )
        assert judge([OTHER], reading(tmp_path, host=left)).standing is Standing.WELL

    def test_a_card_that_was_renumbered_is_the_same(self, tmp_path: Path) -> None:
        swapped = HOST.replace("GPU-aaaa", "x").replace("GPU-bbbb", "GPU-aaaa").replace("x", "GPU-bbbb")
        assert judge([GPU], reading(tmp_path, host=swapped)).standing is Standing.WELL
        lost = reading(tmp_path, "[gpu 0]\nall = error GPU_IS_LOST\n", host=swapped)
        assert judge([GPU], lost).standing is Standing.WELL
        assert judge([OTHER], lost).standing is Standing.LOST

    def test_no_gpu_is_counted(self, tmp_path: Path) -> None:
        empty = reading(tmp_path, host="[library]\nnvmlDeviceGetCount = 0\nnvmlSystemGetDriverVersion = 580.1\n")
        assert judge([GPU], empty).standing is Standing.LOST

    def test_a_call_about_the_card_that_hangs(self, tmp_path: Path) -> None:
        found = reading(tmp_path, "[gpu 0]\nnvmlDeviceGetName = hang\n", deadline=2.0)
        assert judge([GPU], found).standing is Standing.LOST
        assert judge([OTHER], found).standing is Standing.DOUBTFUL

    def test_a_library_that_hangs_is_a_doubt(self, tmp_path: Path) -> None:
        found = reading(tmp_path, "[library]\nnvmlInit = hang\n", deadline=2.0)
        assert judge([GPU], found).standing is Standing.DOUBTFUL

    def test_the_worst_of_several_cards_counts(self, tmp_path: Path) -> None:
        found = reading(tmp_path, "[gpu 1]\nall = error GPU_IS_LOST\n")
        assert judge([GPU, OTHER], found).standing is Standing.LOST

    def test_no_card_is_nothing_known(self) -> None:
        assert judge([], Reading(DriverStatus.OK)) == loss.NOTHING_KNOWN
        assert loss.examine([], since=0.0) == loss.NOTHING_KNOWN


class TestKernelLog:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            (XID.format("01:00", 79), ("0000:01:00", 79)),
            ("NVRM: Xid (0000:3B:00): 31, Ch 00000010", ("0000:3b:00", 31)),
            ("NVRM: Xid (PCI:000a:3b:00.0): 48, pid=1", ("000a:3b:00", 48)),
            ("NVRM: GPU 0000:01:00.0: GPU has fallen off the bus.", ("0000:01:00", OFF_THE_BUS)),
            ("NVRM: GPU at PCI:0000:01:00: GPU-aaaa", None),
            ("NVRM: loading NVIDIA UNIX x86_64 Kernel Module", None),
        ],
    )
    def test_events(self, line: str, expected: tuple[str, int] | None) -> None:
        assert [(event.address, event.number) for event in xid_events([line])] == ([expected] if expected else [])

    def test_a_card_that_is_named_in_the_line_before(self) -> None:
        lines = [
            "[ 1843.308145] NVRM: The NVIDIA GPU 0000:b3:00.0",
            "               NVRM: (PCI ID: 10de:26b5) installed in this system has",
            "               NVRM: fallen off the bus and is not responding to commands.",
        ]
        (event,) = xid_events(lines)
        assert (event.address, event.number) == ("0000:b3:00", OFF_THE_BUS)

    def test_an_event_keeps_the_kernels_words(self) -> None:
        (event,) = xid_events([XID.format("01:00", 79)])
        words = "NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', name=<unknown>, words"
        assert event == XidEvent("0000:01:00", 79, words)

    @pytest.mark.parametrize(
        ("address", "number", "standing"),
        [
            ("01:00", 79, Standing.LOST),
            ("02:00", 79, Standing.UNKNOWN),
            ("01:00", 62, Standing.DOUBTFUL),
            ("01:00", 119, Standing.DOUBTFUL),
            ("01:00", 31, Standing.UNKNOWN),
            ("01:00", 13, Standing.UNKNOWN),
            ("01:00", 48, Standing.UNKNOWN),
        ],
    )
    def test_beside_an_nvml_that_is_absent(self, address: str, number: int, standing: Standing) -> None:
        assert judge([GPU], ABSENT, [XID.format(address, number)]).standing is standing

    def test_a_card_without_a_known_address_has_no_events(self) -> None:
        assert judge([GpuIdentity(0, "", "")], ABSENT, ["NVRM: Xid (x): 79, words"]).standing is Standing.UNKNOWN

    def test_a_card_that_answers_now_is_well_whatever_happened_before(self) -> None:
        device = DeviceReading(0, GPU.uuid, DeviceStatus.OK)
        well = Reading(DriverStatus.OK, devices=(device,), counted=1)
        evidence = judge([GPU], well, [XID.format("01:00", 79), XID.format("02:00", 62)])
        assert evidence.standing is Standing.WELL
        assert evidence.text.startswith("NVML reads GPU 0 (GPU-aaaa, 0000:01:00); the kernel's log says: NVRM: Xid")
        assert "): 79," in evidence.text

    @pytest.mark.parametrize("number", [13, 31, 48])
    def test_an_event_that_needs_no_reset_is_evidence_too(self, number: int) -> None:
        evidence = judge([GPU], ABSENT, [XID.format("01:00", number)])
        assert evidence.standing is Standing.UNKNOWN
        assert f"the kernel's log says: NVRM: Xid (PCI:0000:01:00): {number}, " in evidence.text

    @pytest.mark.parametrize(
        ("journal", "dmesg", "expected"),
        [
            (Output(0, XID.format("01:00", 79)), None, 1),
            (Output(1, "-- No entries --"), Output(0, XID.format("01:00", 79)), 0),
            (Output(1, "", "Hint: You are currently not seeing messages from other users"), None, None),
            (None, Output(0, "2026-11-20T08:00:13,123456+00:00 NVRM: Xid (PCI:0000:01:00): 79, words"), 1),
            (None, Output(0, "2026-11-20T07:00:00,000000+00:00 NVRM: Xid (PCI:0000:01:00): 79, words"), 0),
            (None, Output(1, "", "dmesg: read kernel buffer failed: Operation not permitted"), None),
            (None, None, None),
            (Output(-1, "", "did not end within 5 s"), None, None),
        ],
    )
    def test_where_it_is_read(self, journal: Output | None, dmesg: Output | None, expected: int | None) -> None:
        since = 1763625600.0  # 2025-11-20T08:00:00Z
        answers = {"journalctl": journal, "dmesg": dmesg}

        def run(command: Sequence[str]) -> Output | None:
            return answers[command[0]]

        lines = driver_lines(since + 365 * 86400, run)
        assert (None if lines is None else len(lines)) == expected
