"""The units that the modules render, run by a real systemd with the fake engine: life, death, secrets, sandbox.

Only what the units call is put in place (conftest.py); their text is that of the modules.
"""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.container import Container, wait_until
from support.units import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]

MAIN = "pascaline-main.service"
API, AGENT = "http://127.0.0.1:30000", "http://127.0.0.1:30001"
CGROUP = f"/sys/fs/cgroup/pascaline.slice/{MAIN}"
KEY = "a-key-that-nobody-guesses"
WORST_EXPOSURE = 2.0
"""Of 10; systemd calls everything below 2.5 OK. Common servers without a sandbox have 9.6."""
REFUSALS = ("No such file or directory", "Permission denied")
WATCHDOG_SECONDS = 60
"""As the unit has it."""
THREE_STARTS_SECONDS = 180
"""Each imports the supervisor and the engine, which a busy machine takes half a minute for."""


@pytest.fixture
def main(machine: Container) -> Container:
    """The host with its main instance ready, however the last test left it."""
    start(machine)
    return machine


def start(machine: Container) -> None:
    machine.run("systemctl", "reset-failed", MAIN, check=False)
    machine.run("systemctl", "start", "--no-block", MAIN)
    wait_until(lambda: is_ready(machine), explain=lambda: machine.journal(MAIN)[-2000:])


def is_ready(machine: Container, agent: str = AGENT) -> bool:
    return machine.request(f"{agent}/readyz")[0] == 200


def health(machine: Container) -> dict[str, Any]:
    return dict(json.loads(machine.request(f"{AGENT}/health")[1]))


def main_pid(machine: Container) -> str:
    return machine.show(MAIN, "MainPID")


def changed(machine: Container, pid: str) -> Callable[[], bool]:
    """Whether another main process than this one has become ready."""
    return lambda: main_pid(machine) not in {pid, "0"} and is_ready(machine)


def kill(machine: Container, signal: str) -> None:
    machine.run("systemctl", "kill", "--kill-whom=main", f"--signal={signal}", MAIN)


def inside(machine: Container, pid: str, command: str) -> str:
    """Run a shell command with the mounts, the user and the limits of a process of a unit."""
    return machine.run(
        *("nsenter", "--target", pid, "--mount", "setpriv", "--reuid=pascaline", "--regid=pascaline"),
        *("--clear-groups", "--no-new-privs", "bash", "-c", command),
        check=False,
    )


def completion(words: int) -> tuple[str, ...]:
    body = json.dumps({"model": "main", "prompt": "one two three", "max_tokens": words})
    return (
        *("curl", "--silent", "--fail", "--header", f"Authorization: Bearer {KEY}"),
        *("--header", "Content-Type: application/json", "--data", body, f"{API}/v1/completions"),
    )


class TestFiles:
    """What can be said of the text alone, by systemd's own tools."""

    def test_systemd_finds_nothing_to_complain_about(self, machine: Container) -> None:
        """No unknown key, no path that is missing. What is not here by design is the driver's own units."""
        units = sorted(f"/etc/systemd/system/{file.name}" for file in (ROOT / "etc/systemd/system").glob("*.service"))
        output = machine.run("systemd-analyze", "verify", "--man=no", *units, check=False)
        assert [line for line in output.splitlines() if "pascaline" in line] == []

    def test_exposure_is_low(self, machine: Container, capsys: pytest.CaptureFixture[str]) -> None:
        """Every unit's score, printed, and none above the bound."""
        units = sorted(file.name for file in (ROOT / "etc/systemd/system").glob("*.service"))
        scores = {}
        for unit in units:
            page = machine.run("systemd-analyze", "security", "--offline=true", "--no-pager", unit, check=False)
            match = re.search(rf"Overall exposure level for {re.escape(unit)}: ([0-9.]+)", page)
            assert match, page
            scores[unit] = float(match[1])
        with capsys.disabled():
            print("\nsystemd-analyze security, 0 (closed) to 10 (open):")
            for unit, score in scores.items():
                print(f"  {score:4.1f}  {unit}")
        assert max(scores.values()) <= WORST_EXPOSURE


class TestStart:
    def test_unit_is_active_only_once_a_generation_succeeded(self, main: Container) -> None:
        """Type=notify: systemd's moment of activation is the supervisor's READY, not the start of the process."""
        assert main.show(MAIN, "ActiveState") == "active"
        assert main.show(MAIN, "StatusText") == "ready: a generation succeeded"
        # journald reads what the instance and what systemd write from two sockets.
        wait_until(lambda: f"Started {MAIN}" in main.journal(MAIN), explain=lambda: main.journal(MAIN)[-2000:])
        lines = main.journal(MAIN).splitlines()
        ready = next(n for n, line in enumerate(lines) if "starting → ready: a generation succeeded" in line)
        assert any(line.startswith(f"Started {MAIN}") for line in lines[ready:])

    def test_model_is_fetched_and_verified_first(self, main: Container) -> None:
        fetched = int(main.show("pascaline-model-smollm2.service", "ActiveEnterTimestampMonotonic"))
        assert 0 < fetched < int(main.show(MAIN, "ExecMainStartTimestampMonotonic"))
        listing = main.run("find", "/var/lib/pascaline/models/smollm2", "-type", "f", "-printf", "%f %u %m\n")
        assert sorted(listing.splitlines()) == [
            ".lock pascaline 600",
            "smollm2.gguf pascaline 600",
            "smollm2.gguf.verified pascaline 600",
        ]

    def test_link_reaches_the_fetch_as_it_was_declared(self, machine: Container) -> None:
        unit = "pascaline-model-linked.service"
        wait_until(lambda: machine.show(unit, "ActiveState") == "active", explain=lambda: machine.journal(unit))
        assert "models/linked/smoll%6D2.gguf: is in place, sha256" in machine.journal(unit)

    def test_instance_waits_for_a_model_that_comes_late(self, machine: Container) -> None:
        """A fetch that fails is tried again, and what waits for it neither fails nor needs a second start."""
        unit, late = "pascaline-model-late.service", "pascaline-late.service"
        wait_until(lambda: "auto-restart" in machine.show(unit, "SubState"), explain=lambda: machine.journal(unit))
        assert machine.show(late, "ActiveState") == "inactive"
        assert machine.show(late, "Job") != ""
        machine.run("cp", "/srv/smollm2.gguf", "/srv/late.gguf")
        wait_until(lambda: is_ready(machine, "http://127.0.0.1:30011"), 90, lambda: machine.journal(late))

    def test_wrong_checksum_is_not_tried_again(self, machine: Container) -> None:
        unit = "pascaline-model-wrong.service"
        machine.run("systemctl", "start", unit, check=False)
        assert machine.show(unit, "ActiveState") == "failed"
        assert machine.show(unit, "NRestarts") == "0"
        assert "must be e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855; the file was deleted" in (
            machine.journal(unit)
        )
        assert machine.run("find", "/var/lib/pascaline/models/wrong", "-name", "*.gguf*") == ""

    def test_bad_configuration_fails_once_with_its_reason(self, machine: Container) -> None:
        unit = "pascaline-refused.service"
        machine.run("systemctl", "start", unit, check=False)
        assert machine.show(unit, "ActiveState") == "failed"
        assert machine.show(unit, "ExecMainStatus") == "2"
        assert machine.show(unit, "NRestarts") == "0"
        assert "context_length: 1000000 is above the model's, must be at most 8192" in machine.journal(unit)


class TestTrouble:
    def test_engine_that_dies_is_restarted_by_the_supervisor(self, main: Container) -> None:
        """systemd does not notice."""
        pid, restarts = main_pid(main), main.show(MAIN, "NRestarts")
        engine = health(main)["engine_pid"]
        main.run("bash", "-c", f"kill -KILL {engine}")
        wait_until(lambda: is_ready(main) and health(main)["engine_pid"] not in {engine, None})
        assert (main_pid(main), main.show(MAIN, "NRestarts")) == (pid, restarts)

    def test_engine_dies_with_its_supervisor_and_both_come_back(self, main: Container) -> None:
        pid, engine = main_pid(main), health(main)["engine_pid"]
        kill(main, "KILL")
        wait_until(lambda: main.run("bash", "-c", f"test -e /proc/{engine} || echo gone", check=False) == "gone", 10)
        wait_until(changed(main, pid), explain=lambda: main.journal(MAIN)[-2000:])

    @pytest.mark.slow("waits for systemd's watchdog")
    def test_watchdog_replaces_a_supervisor_that_stands_still(self, main: Container) -> None:
        """Stopped, it sends no sign of life: systemd ends it and its engine and starts the unit anew."""
        pid = main_pid(main)
        kill(main, "STOP")
        wait_until(changed(main, pid), WATCHDOG_SECONDS + 40, lambda: main.journal(MAIN)[-2000:])
        assert "Failed with result 'watchdog'." in main.journal(MAIN)

    def test_engine_that_never_loads_is_given_up_with_its_reason(self, machine: Container) -> None:
        """Not looped for ever: systemd's limit of starts ends it. The drop-in makes its tries quick and few."""
        unit = "pascaline-gpu.service"
        assert machine.show(unit, "StartLimitBurst") == "15"
        assert machine.show(unit, "StartLimitIntervalUSec") == "12h"
        assert machine.show(unit, "RestartMaxDelayUSec") == "5min"
        folder = f"/run/systemd/system/{unit}.d"
        quick = (
            "[Unit]\nStartLimitBurst=3\n"
            "[Service]\nRestartSec=100ms\nRestartSteps=0\nEnvironment=FAKE_ENGINE_FAULTS=load_error=out-of-memory\n"
        )
        machine.run("systemctl", "stop", unit)
        machine.run(
            "bash", "-c", f"mkdir --parents {folder} && printf '{quick}' >{folder}/quick.conf".replace("\n", "\\n")
        )
        machine.run("systemctl", "daemon-reload")
        try:
            machine.run("systemctl", "start", "--no-block", unit)
            gave_up = "Start request repeated too quickly."
            wait_until(
                lambda: gave_up in machine.journal(unit), THREE_STARTS_SECONDS, lambda: machine.journal(unit)[-2000:]
            )
            assert machine.show(unit, "ActiveState") == "failed"
            assert machine.show(unit, "ExecMainStatus") == "5"
            assert "not enough memory on the device; lower mem_fraction_static" in machine.journal(unit)
        finally:
            machine.run("rm", "--recursive", folder)
            machine.run("systemctl", "daemon-reload")
            machine.run("systemctl", "reset-failed", unit)
            machine.run("systemctl", "start", unit)


class TestStop:
    def test_stop_lets_a_running_request_end(self, main: Container) -> None:
        main.request(f"{API}/fake/faults", {"decode_tokens_per_second": 5})
        request = main.popen(*completion(words=20))
        wait_until(lambda: "sglang:num_running_reqs" in running_line(main) and running_line(main).endswith(" 1.0"))
        begin = time.monotonic()
        main.run("systemctl", "stop", MAIN)
        answer, _ = request.communicate(timeout=30)
        assert json.loads(answer)["usage"]["completion_tokens"] == 20
        assert time.monotonic() - begin < 30
        assert main.show(MAIN, "Result") == "success"
        assert main.show(MAIN, "ActiveState") == "inactive"

    def test_nothing_is_left_behind(self, main: Container) -> None:
        main.run("systemctl", "stop", MAIN)
        assert main.run("bash", "-c", f"cat {CGROUP}/cgroup.procs 2>/dev/null; true") == ""
        assert (
            main.run("bash", "-c", "ls -d /run/pascaline-main /run/credentials/pascaline-main* 2>/dev/null; true") == ""
        )


def running_line(machine: Container) -> str:
    page = machine.request(f"{API}/metrics")[1]
    return next((line for line in page.splitlines() if line.startswith("sglang:num_running_reqs{")), "")


class TestSecrets:
    def test_api_wants_the_key(self, main: Container) -> None:
        assert main.request(f"{API}/v1/models")[0] == 401
        assert main.request(f"{API}/v1/models", key=KEY)[0] == 200

    def test_key_is_readable_by_the_unit_alone(self, main: Container) -> None:
        """Neither the file on the host nor systemd's copy can be read by another user; the unit's own user reads it."""
        copy = f"/run/credentials/{MAIN}/api-key"
        for file in ("/etc/pascaline/api-key", copy):
            refused = main.run("setpriv", "--reuid=nobody", "--clear-groups", "cat", file, check=False)
            assert refused == f"cat: {file}: Permission denied"
        assert main.run("setpriv", "--reuid=pascaline", "--clear-groups", "cat", copy) == KEY

    @pytest.mark.parametrize("unit", ["pascaline-exporter.service", "pascaline-router.service"])
    def test_key_is_hidden_from_other_units_of_the_same_user(self, main: Container, unit: str) -> None:
        """They share the user, and yet systemd shows each its own credentials alone."""
        read = f"cat /run/credentials/{MAIN}/api-key"
        assert inside(main, main_pid(main), read) == KEY
        wait_until(lambda: main.show(unit, "ActiveState") == "active", explain=lambda: main.journal(unit)[-2000:])
        refused = inside(main, main.show(unit, "MainPID"), read)
        assert refused in {f"{read.replace(' ', ': ')}: {reason}" for reason in REFUSALS}

    def test_key_is_in_no_argument_variable_or_log(self, main: Container) -> None:
        pids = main.run("cat", f"{CGROUP}/cgroup.procs").split()
        assert len(pids) >= 2
        for pid in pids:
            assert KEY not in main.run("cat", f"/proc/{pid}/cmdline", f"/proc/{pid}/environ")
        assert KEY not in main.journal(MAIN)

    def test_key_reaches_no_disk(self, main: Container) -> None:
        """The engine's own file with the key lies in memory, in a folder of the unit's user."""
        found = main.run(
            "bash", "-c", f"grep --recursive --files-with-matches --fixed-strings {KEY} /run/pascaline-main"
        ).split()
        assert len(found) == 1
        assert main.run("stat", "--format=%U %a", *found) == "pascaline 600"
        assert main.run("findmnt", "--noheadings", "--output=FSTYPE", "--target", found[0]) == "tmpfs"
        kept = "/var/lib /var/cache /var/tmp /tmp"
        assert main.run("bash", "-c", f"grep --recursive --files-with-matches {KEY} {kept}", check=False) == ""


class TestSandbox:
    """What the processes of the unit really may do."""

    def test_every_process_is_without_privileges(self, main: Container) -> None:
        for pid in main.run("cat", f"{CGROUP}/cgroup.procs").split():
            status = dict(re.findall(r"^(\w+):\s+(.*)$", main.run("cat", f"/proc/{pid}/status"), re.MULTILINE))
            assert status["NoNewPrivs"] == "1", pid
            assert status["Seccomp"] == "2", pid
            assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, pid
            assert main.run("stat", "--format=%U", f"/proc/{pid}") == "pascaline"

    def test_only_its_own_folders_can_be_written(self, main: Container) -> None:
        pid = main_pid(main)
        for folder in (
            "/var/lib/pascaline-main",
            "/var/cache/pascaline-main",
            "/run/pascaline-main",
            "/tmp",
            "/dev/shm",
        ):
            assert inside(main, pid, f"touch {folder}/probe && rm {folder}/probe") == "", folder
        for folder in ("/etc", "/usr", "/srv", "/var/lib/pascaline/models"):
            assert "Read-only file system" in inside(main, pid, f"touch {folder}/probe"), folder

    def test_homes_and_devices_are_hidden(self, main: Container) -> None:
        main.run("mkdir", "--parents", "/home/someone")
        main.run("touch", "/home/someone/file")
        pid = main_pid(main)
        assert "No such file" in inside(main, pid, "ls /home/someone/file") or "denied" in (
            inside(main, pid, "ls /home/someone/file")
        )
        devices = inside(main, pid, "ls /dev").split()
        assert set(devices) <= {
            *("char", "core", "fd", "full", "hugepages", "log", "mqueue", "null", "ptmx", "pts", "random", "shm"),
            *("stderr", "stdin", "stdout", "tty", "urandom", "zero"),
        }

    def test_device_rules_admit_the_driver_and_nothing_else(self, machine: Container) -> None:
        """The unit of an instance with a GPU: if the device is allowed and has no driver, opening says "no such device"."""
        nodes = {"nvidiactl": (195, 255), "nvidia-uvm": (510, 0), "mem": (1, 1), "kvm": (10, 232), "disk": (8, 0)}
        for name, (major, minor) in nodes.items():
            kind = "b" if name == "disk" else "c"
            machine.run("mknod", "--mode=666", f"/dev/{name}", kind, str(major), str(minor))
        try:
            unit = "pascaline-gpu.service"
            machine.run("systemctl", "restart", unit)
            attempt = (
                "import os, pathlib, errno\n"
                f"pathlib.Path('/sys/fs/cgroup/pascaline.slice/{unit}/cgroup.procs').write_text(str(os.getpid()))\n"
                f"for name in {[*nodes, 'null']}:\n"
                "    try: os.close(os.open(f'/dev/{name}', os.O_RDWR)); print(name, 'opened')\n"
                "    except OSError as error: print(name, errno.errorcode[error.errno])\n"
            )
            lines = machine.run("python3", "-c", attempt).splitlines()
        finally:
            machine.run("rm", *(f"/dev/{name}" for name in nodes))
        found = dict(line.split() for line in lines)
        assert {name: found[name] for name in ("mem", "kvm", "disk", "null")} == {
            "mem": "EPERM",
            "kvm": "EPERM",
            "disk": "EPERM",
            "null": "opened",
        }
        # With a driver these open.
        assert found["nvidiactl"] in {"ENXIO", "opened"}
        assert found["nvidia-uvm"] in {"ENXIO", "opened"}

    def test_router_passes_on_what_carries_the_key(self, main: Container) -> None:
        """The real sglang-router in its sandbox, before the main instance; its arguments do not show the key."""
        unit, url = "pascaline-router.service", "http://127.0.0.1:30080/v1/completions"
        body = {"model": "main", "prompt": "one two", "max_tokens": 3}
        wait_until(lambda: main.request(url, body, KEY)[0] == 200, explain=lambda: main.journal(unit)[-2000:])
        assert main.request(url, body)[0] == 401
        assert main.request(url, body, key="another")[0] == 401
        pid = main.show(unit, "MainPID")
        assert KEY not in main.run("cat", f"/proc/{pid}/cmdline", f"/proc/{pid}/environ")

    def test_exporter_reads_every_gpu_in_its_sandbox(self, machine: Container) -> None:
        """The fake NVML has two; the unit finds the library where NixOS puts the driver's."""
        wait_until(
            lambda: machine.request("http://127.0.0.1:9836/metrics")[1].count("nvidia_gpu_temperature_gpu{") == 2
        )


class TestBoot:
    def test_second_boot_keeps_model_cache_and_state(self, main: Container) -> None:
        """Nothing is copied, hashed or prepared again; models that are no longer declared are deleted."""
        prepared = "/var/cache/pascaline-main/prepared"
        main.run("touch", "/var/lib/pascaline-main/kept")
        before = main.run("find", prepared, "-name", "*.lock", "-o", "-type", "f", "-printf", "%p %T@\n")
        assert before
        main.run("mkdir", "--parents", "/var/lib/pascaline/models/forgotten")
        main.run("chown", "--recursive", "pascaline:pascaline", "/var/lib/pascaline/models/forgotten")
        main.shut_down()
        main.boot()
        wait_until(lambda: is_ready(main), explain=lambda: main.journal(MAIN)[-2000:])
        assert "smollm2.gguf: was there already" in main.journal("pascaline-model-smollm2.service")
        assert main.run("find", prepared, "-name", "*.lock", "-o", "-type", "f", "-printf", "%p %T@\n") == before
        main.run("test", "-e", "/var/lib/pascaline-main/kept")
        wait_until(lambda: "deleting model forgotten" in main.journal("pascaline-model-gc.service"))
        assert main.run("ls", "/var/lib/pascaline/models").split() == ["late", "linked", "smollm2", "wrong"]
