"""Every refusal of the driver that is known, in its own words, leads to what the firmware or the driver needs."""

from __future__ import annotations

import pytest
from pascaline.doctor.checks.driver import CHECKS
from pascaline.doctor.driver_messages import driver_messages, refusals
from pascaline.doctor.host import Host, Logs
from pascaline.doctor.verdicts import Verdict

PROBE_FAILED = (
    "nvidia 0000:3b:00.0: probe with driver nvidia failed with error -1",
    "NVRM: The NVIDIA probe routine failed for 1 device(s).",
    "NVRM: None of the NVIDIA devices were initialized.",
)
MESSAGES = {
    "bar-without-address": (
        (
            "NVRM: This PCI I/O region assigned to your NVIDIA device is invalid:",
            "NVRM: BAR1 is 0M @ 0x0 (PCI:0000:3b:00.0)",
        ),
        "Above 4G Decoding",
    ),
    "bar-behind-bridge": (
        ("NVRM: This is a 64-bit BAR mapped above 4GB by the system BIOS or the Linux",),
        "update the firmware",
    ),
    "open-module": (
        (
            "NVRM: The NVIDIA GPU 0000:09:00.0 (PCI ID: 10de:1d01)",
            "NVRM: installed in this system is not supported by open",
            "NVRM: nvidia.ko because it does not include the required GPU",
        ),
        "closed kernel module",
    ),
    "needs-open-module": (
        ("NVRM: installed in this system requires use of the NVIDIA open kernel modules.",),
        "one of the two cards",
    ),
    "legacy-branch": (
        (
            "NVRM: The NVIDIA Tesla P4 GPU installed in this system is",
            "NVRM:  supported through the NVIDIA 580.xx Legacy drivers. Please",
            "NVRM:  The 595.84 NVIDIA driver will ignore this GPU.  Continuing probe...",
        ),
        "R580",
    ),
    "not-supported": (
        ("NVRM: installed in this system is not supported by the", "NVRM: NVIDIA 520.56.06 driver release."),
        "R580",
    ),
    "power-cable": (
        ("NVRM: GPU 0000:3b:00.0: GPU does not have the necessary power cables connected.",),
        "EPS 8-pin",
    ),
    "off-the-bus": (("NVRM: fallen off the bus and is not responding to commands.",), "power-cycle the host"),
    "other-driver": (
        (
            "NVRM: The NVIDIA probe routine was not called for 1 device(s).",
            "NVRM: Try unloading the conflicting kernel module (and/or",
        ),
        "keep the other driver from loading",
    ),
    "registers-claimed": (("NVRM: request_mem_region failed for 16M @ 0xf6000000.",), "video=efifb:off"),
    "no-interrupt": (("NVRM: Can't find an IRQ for your NVIDIA card!",), "Assign IRQ to VGA"),
    "device-not-enabled": (("NVRM: pci_enable_device failed, aborting",), "Above 4G Decoding"),
    "version-mismatch": (("NVRM: API mismatch: the client has the version 580.105.08, but",), "restart the host"),
    "other-kernel": (("nvidia: version magic '6.1.0 SMP' should be '6.6.0 SMP'",), "running kernel"),
    "unsigned-module": (("Lockdown: modprobe: unsigned module loading is restricted; see man",), "Secure Boot"),
    "vbios": (("NVRM: GPU 0000:3b:00.0: Failed to copy vbios to system memory.",), "power-cycle the host"),
    "init-failed": (
        (
            "NVRM: GPU 0000:3b:00.0: RmInitAdapter failed! (0x26:0x65:1239)",
            "NVRM: GPU 0000:3b:00.0: rm_init_adapter failed",
        ),
        "power-cycle the host",
    ),
    "no-card": (("NVRM: No NVIDIA GPU found.",), "look for the card on the bus"),
    "probe-failed": ((), "the lines before this one"),
}
(CHECK,) = (check for check in CHECKS if check.id == "driver-messages")


@pytest.mark.parametrize("name", MESSAGES)
def test_a_refusal_and_what_it_asks_for(name: str) -> None:
    """The cause is named before its consequences, with the line that says so."""
    said, remedy = MESSAGES[name]
    finding = CHECK.examine(Host(logs=Logs(kernel=("NVRM: loading NVIDIA UNIX", *said, *PROBE_FAILED))))
    message = next(each for each in driver_messages() if each.id == name)
    assert finding.verdict is Verdict.FAILURE
    assert finding.evidence.startswith(f"{message.means}: ")
    assert finding.remedy == message.remedy
    assert remedy in message.remedy.text
    assert not said or not any(line in finding.evidence for line in PROBE_FAILED)


def test_every_message_is_tried() -> None:
    assert [message.id for message in driver_messages()] == list(MESSAGES)


def test_two_causes_are_both_told() -> None:
    """Of two cards one is refused for its window and the other for its power."""
    lines = [*MESSAGES["power-cable"][0], *MESSAGES["bar-without-address"][0]]
    assert [found.message.id for found in refusals(lines)] == ["bar-without-address", "power-cable"]
    evidence = CHECK.examine(Host(logs=Logs(kernel=tuple(lines)))).evidence
    assert "(BAR1) no address" in evidence
    assert "power connector" in evidence


@pytest.mark.parametrize(
    "line",
    [
        "NVRM: loading NVIDIA UNIX x86_64 Kernel Module  580.105.08",
        "nvidia: module verification failed: signature and/or required key missing - tainting kernel",
        "NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.",
        "NVRM: GPU at PCI:0000:3b:00: GPU-00000000-0000-4000-8000-000000000004",
        "pci 0000:3b:00.0: BAR 1: assigned [mem 0x38000000000-0x380ffffffff 64bit pref]",
        "nouveau: module not loaded",
    ],
)
def test_what_is_no_refusal(line: str) -> None:
    assert refusals([line]) == []
