"""The doctor on hosts that answer nonsense: whatever is missing or unreadable, every check still ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from pascaline.doctor import examine
from pascaline.doctor.checks import ALL_CHECKS
from pascaline.doctor.checks.cases import CASES
from pascaline.doctor.collect import Question, collect
from pascaline.errors import ConfigurationError
from support.hosts import HEALTHY, recorded_host

FILES = sorted(str(path.relative_to(HEALTHY)) for path in HEALTHY.rglob("*") if path.is_file())
GARBAGE = "\x00\xff\ud7ff 0x 99999999999999999999 {]: = [ : : \n\n-1 -1 -1 -1\n0A 0A 0A 0A\n"
OWN = {"read_speed", "host.nvml"}
"""What the recording itself is made of."""


def checks_of(folder: Path, changes: dict) -> tuple[list[str], list[str]]:
    """Ids of the findings, and what failed instead of being judged or collected."""
    machine = recorded_host(folder, changes)
    found = examine(collect(machine, Question()))
    failed = [f.evidence for f in found if "this check failed" in f.evidence]
    failed += [text for title, text in machine.transcript if title.startswith("failed to collect")]
    return [finding.check for finding in found], failed


@pytest.mark.parametrize("file", [file for file in FILES if file not in OWN])
def test_nonsense(file: str, tmp_path: Path) -> None:
    """One file at a time is nonsense."""
    ids, failed = checks_of(tmp_path / "host", {"files": {file: GARBAGE}})
    assert failed == []
    assert ids == [check.id for check in ALL_CHECKS] + list(CASES)


def test_nothing_at_all(tmp_path: Path) -> None:
    """A host of which nothing can be read, but for its GPU."""
    ids, failed = checks_of(tmp_path / "host", {"removed": [file for file in FILES if file not in OWN]})
    assert failed == []
    assert len(ids) == len(ALL_CHECKS) + len(CASES)


@pytest.mark.parametrize("value", ["-1", "999999999", "text", "1 2 3 4 5 6 7", "error UNKNOWN"])
def test_driver_that_answers_nonsense(value: str, tmp_path: Path) -> None:
    """Every call of NVML about the GPU answers the same nonsense."""
    scenario = (HEALTHY / "host.nvml").read_text()
    calls = [line.partition(" = ")[0] for line in scenario.splitlines() if line.startswith("nvmlDevice")]
    lines = "\n".join(f"{call} = {value}" for call in calls if "UUID" not in call)
    _, failed = checks_of(tmp_path / "host", {"nvml": lines})
    assert failed == []


def test_check_that_fails_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of ours in one check hides no other."""
    machine = recorded_host(tmp_path / "host")
    host = collect(machine, Question())
    monkeypatch.setattr("pascaline.doctor.checks.gpu._is_ours", lambda *_: 1 / 0)
    found = {finding.check: finding for finding in examine(host)}
    assert found["gpu-processes"].evidence == "this check failed: ZeroDivisionError: division by zero"
    assert found["gpu-processes"].remedy is not None
    assert found["gpu-processes"].remedy.command == "pascaline doctor --report bug.txt"
    assert found["throttling"].verdict == "ok"


def test_instance_without_a_unit(tmp_path: Path) -> None:
    """A name that systemd does not know is the user's mistake, and said as such."""
    machine = recorded_host(tmp_path / "host", {"edits": {"commands/systemctl-show": {"=loaded": "=not-found"}}})
    with pytest.raises(ConfigurationError, match=r"--instance: no unit pascaline-emily\.service on this host"):
        collect(machine, Question(instance="emily"))
