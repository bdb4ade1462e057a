"""Readings by a real process from a real, simulated NVML: every fault gives its state and goes with its cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pascaline.gpu.fake_nvml import build_fake_nvml, fake_nvml_environment, write_scenario
from pascaline.gpu.reader import MAX_ABANDONED, Reader
from pascaline.gpu.reading import DeviceStatus, DriverStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pascaline.gpu.reading import Reading

PATIENCE = 60.0
"""Seconds within which a state must have come, also on a machine under load."""
TWO_GPUS = """
nvmlSystemGetDriverVersion = 535.247.01
[gpu *]
nvmlDeviceGetName = Tesla P4
nvmlDeviceGetPowerUsage = 42000
nvmlDeviceGetMemoryInfo = 8000 5000 3000
nvmlDeviceGetMemoryInfo_v2 = 8000 200 5000 2800
[gpu 0]
nvmlDeviceGetUUID = GPU-a
[gpu 1]
nvmlDeviceGetUUID = GPU-b
"""
POWER = "nvmlDeviceGetPowerUsage"


class Driver:
    """A scenario file and the reader over it."""

    def __init__(self, scenario: Path, kill: Callable[[subprocess.Popen[bytes]], None]) -> None:
        self._scenario = scenario
        self.write("")
        self.environment = fake_nvml_environment(scenario)
        self.reader = Reader(
            deadline=3.0, start_deadline=PATIENCE, recheck=0.05, environment=self.environment, kill=kill
        )

    def write(self, fault: str, base: str = TWO_GPUS) -> None:
        write_scenario(self._scenario, base + fault)

    def read_until(self, wanted: Callable[[Reading], bool]) -> Reading:
        deadline = time.monotonic() + PATIENCE
        while not wanted(reading := self.reader.read()):
            assert time.monotonic() < deadline, f"last reading: {reading}"
            time.sleep(0.01)
        return reading


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    made = Driver(tmp_path / "scenario.nvml", subprocess.Popen.kill)
    yield made
    made.reader.close()


def is_ok(reading: Reading) -> bool:
    return reading.status is DriverStatus.OK and all(d.status is DeviceStatus.OK for d in reading.devices)


def statuses(reading: Reading) -> dict[str, DeviceStatus]:
    return {device.uuid: device.status for device in reading.devices}


def test_a_reading_holds_what_each_gpu_supports_and_nothing_else(driver: Driver) -> None:
    reading = driver.reader.read()
    assert is_ok(reading)
    assert [device.uuid for device in reading.devices] == ["GPU-a", "GPU-b"]
    assert reading.devices[1].values[POWER] == 42000
    assert "nvmlDeviceGetFanSpeed" not in reading.devices[1].values
    assert reading.devices[1].errors["nvmlDeviceGetFanSpeed"] == 3
    assert reading.library["nvmlSystemGetDriverVersion"] == "535.247.01"
    assert reading.last_success_timestamp == reading.timestamp


def test_the_process_that_reads_never_loads_nvml(tmp_path: Path) -> None:
    """In a process of its own: other tests load the library into this one."""
    write_scenario(tmp_path / "scenario.nvml", TWO_GPUS)
    program = "from pascaline.gpu.reader import Reader; r = Reader(); print(r.read().counted); print(open('/proc/self/maps').read())"
    command = [sys.executable, "-c", program]
    environment = fake_nvml_environment(tmp_path / "scenario.nvml")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=PATIENCE)
    counted, _, maps = done.stdout.partition("\n")
    assert counted == "2"
    assert "libnvidia-ml" not in maps


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (
            "[library]\nall = error DRIVER_NOT_LOADED",
            DriverStatus.NO_DRIVER,
            "nvmlDeviceGetCount said DRIVER_NOT_LOADED: "
            "the kernel module nvidia is not loaded; see modprobe nvidia and dmesg",
        ),
        (
            "[library]\nall = error LIB_RM_VERSION_MISMATCH",
            DriverStatus.VERSION_MISMATCH,
            "nvmlDeviceGetCount said LIB_RM_VERSION_MISMATCH: "
            "the driver's library and kernel module differ in version; restart the host",
        ),
        (
            "[library]\nall = error NO_PERMISSION",
            DriverStatus.NO_PERMISSION,
            "nvmlDeviceGetCount said NO_PERMISSION: "
            "this user may not open /dev/nvidiactl; check its mode and the unit's DeviceAllow",
        ),
        ("[library]\nall = error UNKNOWN", DriverStatus.ERROR, "nvmlDeviceGetCount said UNKNOWN"),
        (
            "[gpu 1]\nnvmlDeviceGetPowerUsage = crash",
            DriverStatus.CRASHED,
            "the process that calls NVML ended with signal SIGABRT in 1 nvmlDeviceGetPowerUsage",
        ),
        (
            "[gpu 1]\nnvmlDeviceGetPowerUsage = hang",
            DriverStatus.HUNG,
            "nvmlDeviceGetPowerUsage of GPU 1 has not returned for 3 s",
        ),
        (
            "[library]\nnvmlDeviceGetCount = hang",
            DriverStatus.HUNG,
            "nvmlDeviceGetCount has not returned for 3 s",
        ),
    ],
    ids=["no driver", "upgrade", "no permission", "other code", "crash", "hang in a GPU", "hang in the library"],
)
def test_a_failing_driver_is_named_gives_no_data_and_recovers(
    driver: Driver, fault: str, status: DriverStatus, message: str
) -> None:
    good = driver.reader.read()
    driver.write(fault)
    failed = driver.reader.read()
    assert (failed.status, failed.message) == (status, message)
    assert [device.values for device in failed.devices if device.values] == []
    assert failed.last_success_timestamp == good.timestamp
    driver.write("")
    recovered = driver.read_until(is_ok)
    assert recovered.reader_starts >= 2
    assert recovered.devices[0].values == good.devices[0].values


def test_a_hang_marks_the_gpu_as_lost_and_the_others_as_unknown(driver: Driver) -> None:
    driver.reader.read()
    driver.write("[gpu 1]\nnvmlDeviceGetPowerUsage = hang")
    assert statuses(driver.reader.read()) == {"GPU-b": DeviceStatus.HUNG}


def test_a_gpu_that_hangs_from_the_start_is_told_without_its_uuid(tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.nvml"
    write_scenario(scenario, TWO_GPUS + "[gpu 1]\nall = hang")
    with Reader(start_deadline=5.0, environment=fake_nvml_environment(scenario)) as reader:
        reading = reader.read()
    assert reading.status is DriverStatus.HUNG
    assert [(device.index, device.uuid, device.status) for device in reading.devices] == [(1, "", DeviceStatus.HUNG)]


def test_a_start_is_given_no_less_time_than_a_reading(tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.nvml"
    write_scenario(scenario, "nvmlInit = slow 0.5 0" + TWO_GPUS)
    with Reader(deadline=PATIENCE, start_deadline=0.1, environment=fake_nvml_environment(scenario)) as reader:
        assert is_ok(reader.read())


def test_a_hanging_child_is_gone_after_its_deadline(driver: Driver, tmp_path: Path) -> None:
    driver.reader.read()
    driver.write("[gpu 0]\nall = hang")
    reading = driver.reader.read()
    assert (reading.status, reading.readers_abandoned) == (DriverStatus.HUNG, 0)


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("all = error GPU_IS_LOST", DeviceStatus.LOST, "nvmlDeviceGetHandleByIndex said GPU_IS_LOST"),
        ("nvmlDeviceGetPowerUsage = error GPU_IS_LOST", DeviceStatus.LOST, "nvmlDeviceGetPowerUsage said GPU_IS_LOST"),
        (
            "nvmlDeviceGetName = error RESET_REQUIRED",
            DeviceStatus.RESET_REQUIRED,
            "nvmlDeviceGetName said RESET_REQUIRED",
        ),
        ("all = error NO_PERMISSION", DeviceStatus.NO_PERMISSION, "nvmlDeviceGetHandleByIndex said NO_PERMISSION"),
        ("all = error UNKNOWN", DeviceStatus.ERROR, "nvmlDeviceGetHandleByIndex said UNKNOWN"),
    ],
    ids=["lost", "lost in the middle", "reset required", "no permission", "other code"],
)
def test_one_failing_gpu_leaves_the_others_readable_and_recovers(
    driver: Driver, fault: str, status: DeviceStatus, message: str
) -> None:
    driver.reader.read()
    driver.write("[gpu 1]\n" + fault)
    reading = driver.reader.read()
    first, second = reading.devices
    assert (reading.status, first.status, first.values[POWER]) == (DriverStatus.OK, DeviceStatus.OK, 42000)
    assert (second.index, second.uuid, second.status, second.message, second.values) == (
        1,
        "GPU-b",
        status,
        message,
        {},
    )
    driver.write("")
    driver.read_until(is_ok)


def test_a_gpu_that_is_no_longer_counted_is_lost_until_it_comes_back(driver: Driver) -> None:
    driver.reader.read()
    driver.write("[library]\nnvmlDeviceGetCount = 1")
    reading = driver.reader.read()
    assert reading.counted == 1
    assert statuses(reading) == {"GPU-a": DeviceStatus.OK, "GPU-b": DeviceStatus.LOST}
    driver.write("")
    assert statuses(driver.read_until(is_ok)) == {"GPU-a": DeviceStatus.OK, "GPU-b": DeviceStatus.OK}


def test_a_lost_gpu_stays_lost_while_the_driver_fails_as_a_whole(driver: Driver) -> None:
    driver.reader.read()
    driver.write("[gpu 1]\nall = error GPU_IS_LOST")
    driver.reader.read()
    driver.write("[library]\nall = error DRIVER_NOT_LOADED")
    failed = driver.read_until(lambda reading: reading.status is DriverStatus.NO_DRIVER)
    assert statuses(failed) == {"GPU-b": DeviceStatus.LOST}


def test_a_child_that_someone_killed_between_two_readings_is_replaced(driver: Driver) -> None:
    """Regression: what was written to the dead process failed again when its pipe was closed."""
    driver.reader.read()
    assert driver.reader._child is not None
    driver.reader._child.process.kill()
    driver.reader._child.process.wait()
    reading = driver.reader.read()
    assert reading.status is DriverStatus.CRASHED
    assert reading.message.startswith("the process that calls NVML ended with signal SIGKILL")
    assert driver.read_until(is_ok).reader_starts == 2


def test_zero_devices_is_an_answer_and_not_a_failure(driver: Driver) -> None:
    driver.write("", base="nvmlDeviceGetCount = 0")
    reading = driver.reader.read()
    assert (reading.status, reading.succeeded, reading.devices) == (DriverStatus.NO_DEVICES, True, ())


def test_a_host_without_gpus_is_looked_at_by_a_new_process_again_and_again(driver: Driver) -> None:
    """A real NVML counts GPUs when it is initialised and never again; the fake one would tell the old process too."""
    driver.write("", base="nvmlDeviceGetCount = 0")
    driver.read_until(lambda reading: reading.reader_starts >= 3)
    driver.write("")
    starts = driver.read_until(is_ok).reader_starts
    assert driver.reader.read().reader_starts == starts


def test_a_process_that_cannot_be_started_is_a_failure_that_is_tried_again() -> None:
    environment = {"TOO_LONG_FOR_THE_KERNEL": "x" * 2**20}
    with Reader(environment=environment) as reader:
        reading = reader.read()
        assert (reading.status, reading.reader_starts) == (DriverStatus.ERROR, 0)
        assert reading.message == "failed to start the process that calls NVML: Argument list too long"
        environment.clear()
        environment.update(os.environ)
        deadline = time.monotonic() + PATIENCE
        while not (reading := reader.read()).reader_starts:
            assert time.monotonic() < deadline, reading.message
            time.sleep(0.05)


def test_a_host_without_the_library_says_so(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    with Reader(environment=environment, start_deadline=PATIENCE) as reader:
        reading = reader.read()
    if reading.status is DriverStatus.OK:
        pytest.skip("this machine has the NVIDIA driver's library")
    assert reading.status in (DriverStatus.NO_LIBRARY, DriverStatus.NO_DRIVER)
    assert reading.devices == ()


def test_a_call_that_an_old_driver_lacks_is_a_missing_field(driver: Driver, tmp_path: Path) -> None:
    folder = build_fake_nvml(
        tmp_path, without=["nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetCurrentClocksThrottleReasons"]
    )
    environment = fake_nvml_environment(tmp_path / "scenario.nvml", folder)
    with Reader(environment=environment, start_deadline=PATIENCE) as reader:
        reading = reader.read()
    assert is_ok(reading)
    assert reading.devices[0].errors["nvmlDeviceGetMemoryInfo_v2"] == 13
    assert reading.devices[0].values["nvmlDeviceGetMemoryInfo"] == [8000, 5000, 3000]


def test_xid_events_are_counted_with_their_time(driver: Driver) -> None:
    driver.reader.read()
    before = time.time()
    driver.write("[gpu 1]\nxid = 79\n[gpu 0]\nxid = 31")
    reading = driver.read_until(lambda reading: len(reading.xids) == 2)
    assert [(x.index, x.uuid, x.xid, x.count) for x in reading.xids] == [(0, "GPU-a", 31, 1), (1, "GPU-b", 79, 1)]
    assert all(before - 1 <= x.last_timestamp <= time.time() + 1 for x in reading.xids)
    driver.write("[gpu 1]\nxid = 79")
    again = driver.read_until(lambda reading: any(x.count == 2 for x in reading.xids))
    assert [(x.uuid, x.xid, x.count) for x in again.xids] == [("GPU-a", 31, 1), ("GPU-b", 79, 2)]


def test_an_xid_that_comes_just_before_a_hang_is_kept(driver: Driver) -> None:
    driver.reader.read()
    driver.write("[gpu 1]\nxid = 79\nnvmlDeviceGetPowerUsage = hang")
    reading = driver.reader.read()
    assert reading.status is DriverStatus.HUNG
    assert [(x.uuid, x.xid) for x in reading.xids] == [("GPU-b", 79)]


def test_events_still_come_after_the_wait_for_them_failed(driver: Driver) -> None:
    driver.write("[library]\nnvmlEventSetWait = error GPU_IS_LOST")
    driver.reader.read()
    time.sleep(0.1)  # the wait has failed by now
    driver.write("[gpu 1]\nxid = 31")
    reading = driver.read_until(lambda reading: bool(reading.xids))
    assert [(x.index, x.uuid, x.xid) for x in reading.xids] == [(1, "GPU-b", 31)]
    assert reading.reader_starts == 1


def test_an_event_is_told_by_its_handle_or_else_by_asking_for_it(driver: Driver) -> None:
    program = (
        "import pynvml\nfrom pascaline.gpu.nvml_process import _address, _identify\n"
        "pynvml.nvmlInit()\nhandle = pynvml.nvmlDeviceGetHandleByIndex(1)\n"
        "print(_identify(handle, {_address(handle): (7, 'known')}), _identify(handle, {}), _identify(None, {}))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=driver.environment, capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert done.stdout == "(7, 'known') (1, 'GPU-b') (-1, '')\n"


def test_a_driver_without_events_still_gives_readings(driver: Driver) -> None:
    driver.write(
        "[library]\nnvmlEventSetWait = error NOT_SUPPORTED\n[gpu *]\nnvmlDeviceRegisterEvents = error NOT_SUPPORTED"
    )
    driver.reader.read()
    assert is_ok(driver.reader.read())


def test_failures_are_retried_with_growing_pauses(tmp_path: Path) -> None:
    """A host whose driver is gone for hours must not start a process a second."""
    scenario = tmp_path / "scenario.nvml"
    write_scenario(scenario, "[library]\nall = error DRIVER_NOT_LOADED")
    with Reader(environment=fake_nvml_environment(scenario), start_deadline=PATIENCE, recheck=3600.0) as reader:
        readings = [reader.read() for _ in range(50)]
    assert {reading.status for reading in readings} == {DriverStatus.NO_DRIVER}
    assert readings[-1].reader_starts < 5


@pytest.mark.slow("waits four times for the deadline of a reading")
def test_children_that_cannot_be_killed_are_bounded_and_told(tmp_path: Path) -> None:
    """A stopped process, in place of one that waits in the kernel: neither ends by itself."""
    children: list[subprocess.Popen[bytes]] = []

    def stop(child: subprocess.Popen[bytes]) -> None:
        children.append(child)
        child.send_signal(signal.SIGSTOP)

    driver = Driver(tmp_path / "scenario.nvml", stop)
    try:
        for _ in range(MAX_ABANDONED):
            driver.write("")
            driver.read_until(is_ok)
            driver.write("[gpu 0]\nall = hang")
            driver.read_until(lambda reading: reading.status is DriverStatus.HUNG)
        reading = driver.read_until(lambda reading: "cannot be killed" in reading.message)
        assert reading.message == "3 processes hang in the driver and cannot be killed; restart the host"
        assert (reading.readers_abandoned, reading.reader_starts) == (MAX_ABANDONED, MAX_ABANDONED)
        driver.write("")
        for child in children:
            child.kill()
        # A killed process may take its time to end.
        driver.read_until(lambda reading: is_ok(reading) and reading.readers_abandoned == 0)
    finally:
        driver.reader.close()
        for child in children:
            child.kill()
            child.wait()


def test_the_child_ends_with_its_parent_even_while_a_call_hangs(driver: Driver, tmp_path: Path) -> None:
    driver.write("[library]\nnvmlInit = hang")
    program = (
        "import os, sys, time\nfrom pascaline.gpu.reader import Reader\n"
        "reader = Reader(deadline=0.5, start_deadline=0.5, kill=lambda child: print(child.pid, flush=True))\n"
        "reader.read()\ntime.sleep(3600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], env=driver.environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while _is_running(child):
        assert time.monotonic() < deadline, f"process {child} outlived its parent"
        time.sleep(0.01)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
