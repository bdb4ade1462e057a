"""The doctor's checks as a table: ids, remedies and documentation; and those that no recorded host can show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pascaline.cli.doctor import doctor_page, exit_code
from pascaline.doctor import examine, worst
from pascaline.doctor.checks import ALL_CHECKS
from pascaline.doctor.checks.cases import CASES
from pascaline.doctor.collect import Question, collect
from pascaline.doctor.host import Driver, Gpu, Host, Instance, Mount, Node, System
from pascaline.doctor.kernel_log import killed_for_memory, xids
from pascaline.doctor.machine import Machine
from pascaline.doctor.verdicts import Finding, Verdict
from pascaline.errors import ConfigurationError, ExitCode
from pascaline.gpu.reading import DeviceReading, DeviceStatus, DriverStatus, Reading

ROOT = Path(__file__).parents[2]


def examined(host: Host) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(host)}


def gpu(index: int, name: str) -> Gpu:
    return Gpu(DeviceReading(index, f"GPU-{index}", DeviceStatus.OK, values={"nvmlDeviceGetName": name}), None)


class TestTable:
    def test_ids_are_unique_and_readable(self) -> None:
        """An id is a name for ever."""
        ids = [check.id for check in ALL_CHECKS] + list(CASES)
        assert len(set(ids)) == len(ids) >= 35
        assert [name for name in ids if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)] == []

    def test_every_check_explains_itself_and_says_what_to_do(self) -> None:
        """A finding without a remedy as a command or an option is of no use."""
        poor = [c.id for c in ALL_CHECKS if not c.explanation or not (c.remedy.command or c.remedy.option)]
        assert poor == []

    def test_nixos_options_exist(self) -> None:
        """Every option of ours that a remedy names is declared by a module, and every setting is one."""
        from pascaline.configuration import setting_fields

        modules = "\n".join(path.read_text() for path in (ROOT / "modules").glob("*.nix"))
        settings = {part for key, _ in setting_fields() for part in (key, key.split(".")[0])}
        for check in ALL_CHECKS:
            path = check.remedy.option.partition(" = ")[0]
            if "pascaline" not in path:
                continue
            *_, parent, name = path.split(".")
            if ".settings." in path:
                assert path.split(".settings.")[1] in settings, path
            elif parent not in ("environment", "models"):
                assert re.search(rf"\b{re.escape(name)} = (mkOption|lib\.mkEnableOption)|\b{name} = lib", modules), path

    def test_commands_of_ours_exist(self) -> None:
        """A remedy names no command of pascaline that is not there, and no flag that it does not have."""
        for check in ALL_CHECKS:
            for command in re.findall(r"pascaline ([a-z]+)", check.remedy.command):
                if command != "<name>":
                    assert (ROOT / f"python/pascaline/src/pascaline/cli/{command}.py").exists(), check.remedy.command

    def test_causes_of_the_cases_are_checks(self) -> None:
        """A case names no check that does not exist."""
        ids = {check.id for check in ALL_CHECKS}
        assert [name for _, names in CASES.values() for name in names if name not in ids] == []

    def test_documentation_is_the_table(self) -> None:
        """docs/doctor.md is what `pascaline doctor --docs` prints."""
        assert (ROOT / "docs/doctor.md").read_text() == doctor_page()

    def test_an_empty_host_is_skipped_over(self) -> None:
        """With nothing known no check fails to run, and none pretends to know."""
        found = examined(Host())
        assert {name: f.evidence for name, f in found.items() if f.verdict is Verdict.FAILURE} == {
            "engine": "not installed: torch, sglang, sglang-pascal",
            "clock": "the clock says 1970-01-01 00:00 UTC, which is wrong",
            "case-model-loading": "engine: not installed: torch, sglang, sglang-pascal",
        }


class TestVerdicts:
    def test_exit_code_follows_the_worst(self) -> None:
        """One failure decides, whatever else was found."""
        codes = {verdict: exit_code(verdict) for verdict in Verdict}
        assert codes == {
            Verdict.OK: ExitCode.OK,
            Verdict.SKIPPED: ExitCode.OK,
            Verdict.INFO: ExitCode.OK,
            Verdict.WARNING: ExitCode.WARNED,
            Verdict.FAILURE: ExitCode.FAILED,
        }
        findings = [Finding("a", "", verdict, "") for verdict in (Verdict.OK, Verdict.FAILURE, Verdict.WARNING)]
        assert worst(findings) is Verdict.FAILURE
        assert worst([]) is Verdict.OK


class TestChecksWithoutARecordedHost:
    def test_old_glibc(self) -> None:
        """SGLang's wheels do not load on a glibc before 2.34."""
        found = {
            version: examined(Host(system=System(glibc=version)))["glibc"] for version in ("2.31", "2.34", "2.40", "")
        }
        assert {version: (f.verdict.value, f.evidence) for version, f in found.items()} == {
            "2.31": ("failure", "glibc 2.31, must be 2.34 or newer"),
            "2.34": ("ok", "glibc 2.34"),
            "2.40": ("ok", "glibc 2.40"),
            "": ("skipped", "the version is unknown"),
        }

    def test_different_cards_need_an_order(self) -> None:
        """Index 0 of CUDA and of nvidia-smi may be two different cards."""
        host = Host(gpus=(gpu(0, "Tesla P4"), gpu(1, "Tesla P40")))
        assert examined(host)["env-device-order"].evidence == "not set: serve sets PCI_BUS_ID"
        other = replace(host, instance=Instance(environment={"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}))
        assert examined(other)["env-device-order"].evidence == "CUDA_DEVICE_ORDER=FASTEST_FIRST, and cards differ"
        ordered = replace(host, instance=Instance(environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}))
        assert examined(ordered)["env-device-order"].verdict is Verdict.OK

    def test_full_cache_disk(self) -> None:
        """A cache that cannot take a prepared model stops the next start."""
        host = Host(system=System(cache=Mount("/var", "ext4", 5 * 2**20)))
        assert examined(host)["disk-space"].evidence == "5.00 MiB free on /var"
        assert examined(host)["disk-space"].verdict is Verdict.FAILURE

    def test_device_nodes_that_this_user_may_not_open(self) -> None:
        """A node that exists and cannot be opened is reported with its mode."""
        nodes = {"/dev/nvidiactl": Node(0o660, False), "/dev/nvidia0": Node(0o666, True)}
        values = {"nvmlDeviceGetMinorNumber": 0}
        host = Host(
            driver=Driver(version="580.105.08", nodes=nodes | {"/dev/nvidia-uvm": Node(0o600, False)}),
            gpus=(Gpu(DeviceReading(0, "GPU-0", DeviceStatus.OK, values=values), None),),
            nvml=Reading(DriverStatus.OK, counted=1),
        )
        assert examined(host)["device-nodes"].evidence == "this user may not open /dev/nvidiactl (0660)"
        assert examined(host)["uvm"].evidence == "this user may not open /dev/nvidia-uvm (0600)"


class TestKernelLog:
    def test_xids_are_counted_without_the_harmless(self) -> None:
        """Xid 45 follows every killed program and means nothing."""
        line = "kernel: NVRM: Xid (PCI:0000:3b:00): {}, pid=1, name=x"
        assert xids([line.format(79), line.format(31), line.format(31), line.format(45), "NVRM: ok"]) == {79: 1, 31: 2}

    def test_both_forms_of_the_oom_killer(self) -> None:
        """The kernel names the process in one of two ways."""
        lines = [
            "Memory cgroup out of memory: Killed process 10 (python3) total-vm:1kB",
            "oom-kill:constraint=CONSTRAINT_NONE,task=chrome,pid=11,uid=0",
        ]
        assert killed_for_memory(lines) == {10: "python3", 11: "chrome"}


class TestMachine:
    def test_program_that_does_not_end_is_left_behind(self) -> None:
        """A hung program costs its time limit and no more, and its group dies."""
        began = time.monotonic()
        output = Machine().run("sleeper", ["sh", "-c", "sleep 600 & sleep 600"], timeout=0.5)
        assert output is not None
        assert (output.code, output.errors) == (-1, "did not end within 0.5 s")
        assert time.monotonic() - began < 60

    def test_missing_program_file_and_server(self, tmp_path: Path) -> None:
        """What is not there is None, and the record says so."""
        machine = Machine(root=tmp_path)
        assert machine.run("none", ["/no/such/program"]) is None
        assert machine.read("/etc/nothing") is None
        assert machine.list("/sys/nothing") == []
        assert machine.fetch("http://127.0.0.1:9/health") is None
        assert [shown for _, shown in machine.transcript] == [
            "(no such program)",
            "(No such file or directory)",
            "(no answer)",
        ]

    def test_speed_of_a_real_file(self, tmp_path: Path) -> None:
        """A file of some megabytes is measured where its file system allows direct reads; a tiny one is not."""
        large, tiny = tmp_path / "large", tmp_path / "tiny"
        large.write_bytes(os.urandom(8 * 2**20))
        tiny.write_bytes(b"x")
        speed = Machine().read_speed(large)
        assert speed is None or speed > 1e5
        assert Machine().read_speed(tiny) is None


class TestQuestion:
    def test_unknown_instance(self) -> None:
        """A name without a unit is an error with what would be right."""
        with pytest.raises(ConfigurationError) as caught:
            collect(Machine(), Question(instance="no-such-instance"))
        assert str(caught.value) == (
            "--instance: no unit pascaline-no-such-instance.service on this host, "
            "must be an instance's name, its agent's URL or its TOML file"
        )


class TestCommand:
    def test_on_this_machine(self, tmp_path: Path) -> None:
        """The real command on the real host: JSON on standard output, a report file, the exit code of the worst."""
        report = tmp_path / "report.txt"
        command = [sys.executable, "-m", "pascaline", "doctor", "--device", "cpu", "--json", "--report", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        document = json.loads(done.stdout)
        codes = {"failure": 1, "warning": 10}
        assert done.returncode == codes.get(document["verdict"], 0), done.stderr
        assert [finding["check"] for finding in document["findings"]] == [c.id for c in ALL_CHECKS] + list(CASES)
        assert done.stderr == f"pascaline doctor: wrote {report}; read it before you publish it\n"
        assert "model-format: llama, Q4_1" in report.read_text()

    def test_report_that_cannot_be_written(self, tmp_path: Path) -> None:
        """A folder that is not there ends in one sentence and the code for storage."""
        command = [sys.executable, "-m", "pascaline", "doctor", "--device", "cpu", "--report", "/no/such/folder/x"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert (done.returncode, done.stderr) == (
            9,
            "pascaline doctor: failed to write '/no/such/folder/x': No such file or directory\n",
        )
