"""`pascaline exporter` as a process, scraped over HTTP, on a simulated NVML that fails in every way."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil
import pytest
from pascaline.errors import ExitCode
from pascaline.gpu.exporter import ChangeLog, Exporter, Quiet, Readings
from pascaline.gpu.fake_nvml import DEMO_SCENARIO, write_scenario
from pascaline.gpu.reading import DeviceReading, DeviceStatus, DriverStatus, Reading, XidCount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 60.0
ONE_GPU = """
[gpu 0]
nvmlDeviceGetName = Tesla P4
nvmlDeviceGetUUID = GPU-a
nvmlDeviceGetTemperature 0 = 50
"""
SUCCESS = "nvidia_gpu_scrape_success 1\n"
FAILURE = "nvidia_gpu_scrape_success 0\n"


class RunningExporter:
    """The process, what it logs, and its scenario file."""

    def __init__(self, scenario: Path, *flags: str, preexec_fn: Callable[[], None] | None = None) -> None:
        self.scenario = scenario
        self.write("")
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pascaline", "exporter", "--port=0", f"--demo={scenario}", *flags],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec_fn,
        )
        assert self.process.stderr is not None
        self.url = self.process.stderr.readline().split()[-1].removesuffix("/metrics")
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()), daemon=True)
        self._reader.start()

    def write(self, fault: str) -> None:
        write_scenario(self.scenario, ONE_GPU + fault)

    def get(self, path: str = "/metrics", **headers: str) -> str:
        request = urllib.request.Request(self.url + path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return str(answer.read().decode())

    def scrape_until(self, wanted: Callable[[str], bool], **headers: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while not wanted(page := self.get(**headers)):
            assert time.monotonic() < deadline, f"last page:\n{page}\nlog: {self.log}"
            time.sleep(0.02)
        return page

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[RunningExporter]:
    running = RunningExporter(tmp_path / "scenario.nvml", "--interval=0.05", "--max-age=2", "--deadline=1")
    yield running
    running.stop()


def temperature(degrees: int) -> Callable[[str], bool]:
    return lambda page: f'nvidia_gpu_temperature_gpu{{gpu="0",uuid="GPU-a"}} {degrees}\n' in page


def test_a_scrape_shows_the_values_of_now(exporter: RunningExporter) -> None:
    exporter.scrape_until(temperature(50))
    exporter.write("nvmlDeviceGetTemperature 0 = 61")
    exporter.scrape_until(temperature(61))


def test_a_hang_turns_into_a_failure_without_data_and_back(exporter: RunningExporter) -> None:
    exporter.scrape_until(temperature(50))
    exporter.write("nvmlDeviceGetTemperature 0 = hang")
    page = exporter.scrape_until(lambda page: FAILURE in page)
    assert 'nvidia_gpu_driver_status{status="hung"} 1\n' in page
    assert 'nvidia_gpu_lost{gpu="0",uuid="GPU-a"} 1\n' in page
    assert "nvidia_gpu_temperature_gpu" not in page
    exporter.write("")
    page = exporter.scrape_until(temperature(50))
    assert SUCCESS in page
    assert 'nvidia_gpu_lost{gpu="0",uuid="GPU-a"} 0\n' in page


def test_a_scrape_waits_for_the_driver_no_longer_than_its_own_timeout(tmp_path: Path) -> None:
    """The deadline of a reading is an hour here: only the scrape's own timeout can end the wait."""
    exporter = RunningExporter(tmp_path / "scenario.nvml", "--interval=0.05", "--max-age=0.2", "--deadline=3600")
    try:
        exporter.scrape_until(temperature(50))
        exporter.write("nvmlDeviceGetTemperature 0 = hang")
        page = exporter.scrape_until(lambda page: FAILURE in page, X_Prometheus_Scrape_Timeout_Seconds="1")
    finally:
        exporter.stop()
    assert 'nvidia_gpu_driver_status{status="stale"} 1\n' in page
    assert "nvidia_gpu_temperature_gpu" not in page


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_senseless_timeout_is_the_default_one(exporter: RunningExporter, timeout: str) -> None:
    assert "nvidia_gpu_scrape_success" in exporter.get(X_Prometheus_Scrape_Timeout_Seconds=timeout)


def test_many_scrapes_at_once_cost_no_further_readings(tmp_path: Path) -> None:
    """The scenario counts for us: with an hour between readings all pages are the first one."""
    exporter = RunningExporter(tmp_path / "scenario.nvml", "--interval=3600", "--max-age=7200")
    try:
        exporter.scrape_until(temperature(50))
        exporter.write("nvmlDeviceGetTemperature 0 = 61")
        with ThreadPoolExecutor(16) as pool:
            pages = set(pool.map(lambda _: exporter.get(), range(64)))
    finally:
        exporter.stop()
    assert len(pages) == 1
    assert temperature(50)(pages.pop())


def test_each_change_is_logged_once(exporter: RunningExporter) -> None:
    exporter.scrape_until(temperature(50))
    exporter.write("all = error GPU_IS_LOST")
    exporter.scrape_until(lambda page: 'nvidia_gpu_lost{gpu="0",uuid="GPU-a"} 1' in page)
    exporter.write("xid = 79")
    exporter.scrape_until(lambda page: 'nvidia_gpu_xid_errors_total{gpu="0",uuid="GPU-a",xid="79"} 1\n' in page)
    exporter.stop()
    lines = [line.removeprefix("pascaline exporter: ").rstrip() for line in exporter.log]
    # The fault may come in the middle of a reading, so any call may be the first to report it.
    assert [re.sub(r"nvml\w+( \d+)*", "CALL", line) for line in lines] == [
        "NVML: ok",
        "GPU 0 (GPU-a): ok",
        "GPU 0 (GPU-a): lost: CALL said GPU_IS_LOST",
        "GPU 0 (GPU-a): ok",
        "GPU 0 (GPU-a): Xid 79, 1 so far",
    ]


@pytest.mark.parametrize(
    ("lines", "series", "message"),
    [
        (
            "nvmlDeviceGetMigMode = 1 1",
            'nvidia_gpu_mig_enabled{gpu="0",uuid="GPU-a"} 1',
            "MIG is on: NVML reports no utilization of the whole card",
        ),
        (
            "nvmlDeviceGetVirtualizationMode = 2",
            'virtualization="vgpu"} 1',
            "this is a vGPU: NVML reports only part of what the card does",
        ),
    ],
    ids=["MIG", "vGPU"],
)
def test_a_divided_card_is_marked_and_said(exporter: RunningExporter, lines: str, series: str, message: str) -> None:
    exporter.scrape_until(temperature(50))
    exporter.write(lines)
    page = exporter.scrape_until(lambda page: series in page)
    exporter.stop()
    assert "utilization" not in page
    assert exporter.log[-1] == f"pascaline exporter: GPU 0 (GPU-a): ok: {message}\n"


def test_a_long_interval_needs_no_other_flag(tmp_path: Path) -> None:
    exporter = RunningExporter(tmp_path / "scenario.nvml", "--interval=30")
    try:
        exporter.scrape_until(temperature(50))
    finally:
        exporter.stop()


def test_the_other_pages(exporter: RunningExporter) -> None:
    assert exporter.get("/livez") == "ok\n"
    assert '<a href="/metrics">' in exporter.get("/")
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        exporter.get("/nothing")
    assert caught.value.read() == b"not found; see /metrics\n"
    caught.value.close()


def test_livez_answers_while_the_driver_hangs(exporter: RunningExporter) -> None:
    exporter.write("[library]\nall = hang")
    assert exporter.get("/livez") == "ok\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_success_and_leaves_no_child(tmp_path: Path, number: signal.Signals) -> None:
    exporter = RunningExporter(tmp_path / "scenario.nvml", "--interval=0.05")
    exporter.scrape_until(temperature(50))
    (child,) = psutil.Process(exporter.process.pid).children()
    exporter.process.send_signal(number)
    assert exporter.process.wait(PATIENCE) == ExitCode.OK
    exporter.stop()
    assert not child.is_running()


def test_a_signal_ends_it_while_the_driver_hangs_without_a_word(tmp_path: Path) -> None:
    exporter = RunningExporter(tmp_path / "scenario.nvml", "--interval=0.05", "--deadline=3600")
    exporter.scrape_until(temperature(50))
    exporter.write("nvmlDeviceGetTemperature 0 = hang")
    exporter.scrape_until(lambda page: FAILURE in page, X_Prometheus_Scrape_Timeout_Seconds="0.2")
    assert exporter.stop() == ExitCode.OK
    assert len(exporter.log) == 2, exporter.log


class _BrokenReader:
    def read(self) -> Reading:
        raise RuntimeError("the reader is broken")

    def close(self) -> None:
        pass


def test_an_exporter_that_can_read_no_longer_ends_instead_of_being_stale_for_ever() -> None:
    switch_interval = sys.getswitchinterval()
    exporter = Exporter(cast("Any", _BrokenReader()), port=0, log=lambda _: None)
    try:
        with pytest.raises(RuntimeError, match="the reader is broken"):
            exporter.run()
    finally:
        sys.setswitchinterval(switch_interval)


def test_a_reader_of_the_log_that_goes_away_stops_nothing(tmp_path: Path) -> None:
    write_scenario(tmp_path / "scenario.nvml", ONE_GPU)
    command = [sys.executable, "-m", "pascaline", "exporter", "--port=0", f"--demo={tmp_path / 'scenario.nvml'}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = process.stderr.readline().split()[-1]
        process.stderr.close()
        write_scenario(tmp_path / "scenario.nvml", ONE_GPU + "all = error GPU_IS_LOST")
        try:
            deadline = time.monotonic() + PATIENCE
            while 'status="lost"} 1' not in urllib.request.urlopen(url, timeout=PATIENCE).read().decode():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.terminate()
            assert process.wait(PATIENCE) == ExitCode.OK
        finally:
            process.kill()


def run_exporter(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pascaline", "exporter", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)


def test_a_port_in_use_has_its_exit_code_and_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_exporter("--demo", f"--port={port}")
    assert done.returncode == ExitCode.PORT_IN_USE
    assert done.stderr == (
        f"pascaline exporter: port {port} of 127.0.0.1 is in use; stop the program that listens there, "
        "or choose another with --port\n"
    )


def test_an_ipv6_address_can_be_listened_on(tmp_path: Path) -> None:
    if not has_ipv6_loopback():
        pytest.skip("this machine has no ::1")
    exporter = RunningExporter(tmp_path / "scenario.nvml", "--host=::1")
    try:
        assert exporter.url.startswith("http://[::1]:")
        exporter.scrape_until(temperature(50))
    finally:
        exporter.stop()


def has_ipv6_loopback() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--demo", "--host=192.0.2.1"],
            "failed to listen on 192.0.2.1:9836: Cannot assign requested address; see --host and --port",
        ),
        (["--json"], "--json needs --once: a server answers Prometheus text only"),
        (
            ["--interval=5", "--max-age=5"],
            "--max-age must be more than --interval (5), got 5: else there are times without any reading to show",
        ),
        (
            ["--demo=missing.nvml"],
            "--demo: no scenario file 'missing.nvml'; without a name two Tesla P4 are simulated",
        ),
    ],
)
def test_bad_usage_is_told_before_anything_starts(flags: list[str], message: str) -> None:
    done = run_exporter(*flags)
    assert (done.returncode, done.stderr) == (ExitCode.CONFIGURATION, f"pascaline exporter: {message}\n")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--port=65536", "argument --port: port must be between 0 and 65535, got '65536'"),
        ("--port=-1", "argument --port: port must be between 0 and 65535, got '-1'"),
        ("--interval=0", "argument --interval: must be a number of seconds above 0, got '0'"),
        ("--max-age=inf", "argument --max-age: must be a number of seconds above 0, got 'inf'"),
        ("--deadline=soon", "argument --deadline: must be a number of seconds above 0, got 'soon'"),
    ],
)
def test_numbers_out_of_range_are_refused(flag: str, message: str) -> None:
    done = run_exporter(flag)
    assert done.returncode == ExitCode.CONFIGURATION
    assert done.stderr == f"pascaline exporter: error: {message}\npascaline exporter --help lists all options\n"


def test_once_prints_one_page_or_json() -> None:
    page = run_exporter("--demo", "--once")
    assert page.returncode == ExitCode.OK
    assert page.stdout.count("nvidia_gpu_temperature_gpu{") == 2
    described = json.loads(run_exporter("--demo", "--once", "--json").stdout)
    assert [gpu["info"]["name"] for gpu in described["gpus"]] == ["Tesla P4", "Tesla P4"]
    assert described["status"] == "ok"


def test_once_without_a_driver_fails_and_still_prints_health(tmp_path: Path) -> None:
    write_scenario(tmp_path / "s.nvml", "[library]\nall = error DRIVER_NOT_LOADED\n")
    done = run_exporter("--once", f"--demo={tmp_path / 's.nvml'}")
    assert done.returncode == ExitCode.FAILED
    assert FAILURE in done.stdout
    assert done.stderr == (
        "pascaline exporter: no_driver: nvmlInit said DRIVER_NOT_LOADED: "
        "the kernel module nvidia is not loaded; see modprobe nvidia and dmesg\n"
    )


def test_a_recording_replays_as_the_card_that_was_recorded(tmp_path: Path) -> None:
    original = write_still_scenario(tmp_path / "original.nvml")
    done = run_exporter(f"--record={tmp_path / 'copy.nvml'}", f"--demo={original}")
    assert done.returncode == ExitCode.OK
    first, second = (
        json.loads(run_exporter("--once", "--json", f"--demo={tmp_path / name}.nvml").stdout)
        for name in ("original", "copy")
    )
    assert first["gpus"] == second["gpus"]
    assert first["driver"] == second["driver"]


def write_still_scenario(path: Path) -> Path:
    """The demo without what moves, and with a process and a retired page."""
    still = [line for line in DEMO_SCENARIO.read_text().splitlines() if "wave(" not in line]
    still += ["nvmlDeviceGetComputeRunningProcesses = 1:1048576 2:-", "nvmlDeviceGetRetiredPages 1 = 4096"]
    write_scenario(path, "\n".join(still) + "\n")
    return path


def test_a_recording_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    done = run_exporter("--demo", f"--record={tmp_path / 'missing' / 'x.nvml'}")
    assert done.returncode == ExitCode.STORAGE
    assert "No such file or directory" in done.stderr


def ok(**values: int) -> Reading:
    device = DeviceReading(0, "GPU-a", DeviceStatus.OK, values={k.replace("__", " "): v for k, v in values.items()})
    return Reading(DriverStatus.OK, devices=(device,), counted=1)


def test_a_reading_that_is_too_old_is_never_shown() -> None:
    readings = Readings(max_age=0.0)
    readings.publish(ok(nvmlDeviceGetTemperature__0=50))
    page = readings.page(timeout=0.0).decode()
    assert FAILURE in page
    assert "temperature" not in page


def test_a_scrape_before_the_first_reading_waits_for_it() -> None:
    readings = Readings(max_age=PATIENCE)
    with ThreadPoolExecutor(1) as pool:
        page = pool.submit(readings.page, PATIENCE)
        readings.publish(ok(nvmlDeviceGetTemperature__0=50))
        assert b"nvidia_gpu_temperature_gpu" in page.result(PATIENCE)


def test_without_any_reading_the_page_says_starting() -> None:
    assert b'nvidia_gpu_driver_status{status="starting"} 1' in Readings(max_age=1.0).page(timeout=0.0)


def test_a_state_is_said_again_only_after_another() -> None:
    lines: list[str] = []
    log = ChangeLog(lines.append)
    hung = Reading(DriverStatus.HUNG, "a call hangs")
    for reading in (ok(), ok(), hung, hung, ok()):
        log.note(reading)
    log.note(Reading(DriverStatus.OK, xids=(XidCount(0, "GPU-a", 31, 2, 1.0),)))
    assert lines == [
        "NVML: ok",
        "GPU 0 (GPU-a): ok",
        "NVML: hung: a call hangs",
        "NVML: ok",
        "GPU 0 (GPU-a): Xid 31, 2 so far",
    ]


def test_half_open_connections_do_not_keep_scrapes_out(tmp_path: Path) -> None:
    exporter = RunningExporter(tmp_path / "scenario.nvml", "--interval=0.05", preexec_fn=_few_descriptors)
    held: list[socket.socket] = []
    try:
        address = urllib.parse.urlsplit(exporter.url)
        for _ in range(400):
            held.append(socket.create_connection((address.hostname or "", address.port or 0), 10))
            with contextlib.suppress(OSError):
                held[-1].sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
        for _ in range(5):
            assert "nvidia_gpu_" in exporter.get()
    finally:
        for connection in held:
            connection.close()
        exporter.stop()


def _few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


class TestQuiet:
    def test_one_too_many_displaces_the_longest_quiet(self) -> None:
        pairs = [socket.socketpair() for _ in range(4)]
        quiet = Quiet(2)
        for ours, _ in pairs[:2]:
            quiet.heard(ours)
        quiet.heard(pairs[0][0])
        quiet.heard(pairs[2][0])
        assert [_is_cut(theirs) for _, theirs in pairs[:3]] == [False, True, False]
        quiet.gone(pairs[2][0])
        quiet.heard(pairs[3][0])
        assert [_is_cut(theirs) for _, theirs in pairs] == [False, True, False, False]
        assert len(quiet) == 2
        _close(pairs)

    def test_what_is_quiet_for_too_long_ends_and_what_waits_for_an_answer_does_not(self) -> None:
        pairs = [socket.socketpair() for _ in range(3)]
        quiet = Quiet(8, seconds=0.1)
        quiet.heard(pairs[0][0])
        quiet.heard(pairs[1][0], patience=60)
        time.sleep(0.2)
        quiet.heard(pairs[2][0])
        quiet.cut_overdue()
        assert [_is_cut(theirs) for _, theirs in pairs] == [True, False, False]
        quiet.cut_oldest()
        assert [_is_cut(theirs) for _, theirs in pairs] == [True, True, False]
        _close(pairs)


def _is_cut(theirs: socket.socket) -> bool:
    theirs.setblocking(False)
    try:
        return theirs.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False


def _close(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    for pair in pairs:
        for each in pair:
            each.close()
