"""The plugin serves on the devices that it is made for, and does nothing on others."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import sglang_pascal
from sglang_pascal import card_code
from sglang_pascal import device as module
from sglang_pascal.device import Decision, Device, decide, devices, is_cuda_initialized, visible_devices
from sglang_pascal.errors import PluginError

P4 = Device(0, "Tesla P4", (6, 1), 7_975_600_128)
P100 = Device(1, "Tesla P100-PCIE-16GB", (6, 0), 17_066_885_120)
TURING = Device(0, "Tesla T4", (7, 5))
VOLTA = Device(0, "Tesla V100", (7, 0))
MAXWELL = Device(0, "Tesla M40", (5, 2))
NAMED = {"SGLANG_PLATFORM": "pascal"}


class TestDecide:
    def test_without_a_device_it_serves_on_the_cpu(self):
        assert decide([], {}) == Decision("cpu", "no NVIDIA device is visible")

    @pytest.mark.parametrize("devices", [[P4], [P100], [P4, P100]])
    def test_pascal_cards_are_served(self, devices):
        assert decide(devices, {}).device == "cuda"

    def test_the_reason_names_the_cards(self):
        assert decide([P4, P100], {}).reason == (
            "Tesla P4 (compute capability 6.1), Tesla P100-PCIE-16GB (compute capability 6.0)"
        )

    @pytest.mark.parametrize("devices", [[TURING], [VOLTA], [MAXWELL], [P4, TURING]])
    def test_other_cards_are_left_to_sglang(self, devices):
        assert decide(devices, {}).device is None
        assert decide(devices, {"SGLANG_PLATFORM": "other"}).device is None

    def test_the_refusal_says_how_to_ask_for_it(self):
        assert decide([TURING], {}).reason == (
            "Tesla T4 (compute capability 7.5): SGLang's own kernels serve cards newer than Pascal; "
            "name it with SGLANG_PLATFORM=pascal, or show Pascal cards only with CUDA_VISIBLE_DEVICES"
        )

    def test_an_older_card_is_not_called_a_newer_one(self):
        seen = ", ".join(map(str, (P4, MAXWELL)))
        assert decide([P4, MAXWELL], {}).reason == (
            f"{seen}: nothing here serves a card older than Pascal, as {MAXWELL.name} is; "
            "show Pascal cards only with CUDA_VISIBLE_DEVICES"
        )

    @pytest.mark.parametrize("devices", [[TURING], [P4, TURING], [P4]])
    def test_named_it_serves_any_card(self, devices):
        assert decide(devices, NAMED).device == "cuda"

    def test_sglangs_own_cpu_engine_is_respected_unless_the_plugin_is_named(self):
        own = {"SGLANG_USE_CPU_ENGINE": "1"}
        assert decide([], own).device is None
        assert decide([], own | NAMED).device == "cpu"

    def test_torch_for_amd_is_left_alone(self):
        assert decide([], {}, torch_hip="6.2").device is None


class FakeDriver:
    """The few functions of libcuda that are called."""

    def __init__(self, devices, init=0):
        self.devices, self.init = devices, init
        self.is_initialized = False

    def cuInit(self, flags):  # noqa: N802  # the driver's own name
        self.is_initialized = True
        return self.init

    def cuDeviceGetCount(self, count):  # noqa: N802  # the driver's own name
        count._obj.value = len(self.devices)
        return 0 if self.is_initialized else 3

    def cuDeviceGet(self, handle, index):  # noqa: N802  # the driver's own name
        handle._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, value, attribute, handle):  # noqa: N802  # the driver's own name
        value._obj.value = self.devices[handle.value].compute_capability[{75: 0, 76: 1}[attribute]]
        return 0

    def cuDeviceGetName(self, buffer, length, handle):  # noqa: N802  # the driver's own name
        buffer.value = self.devices[handle.value].name.encode()
        return 0

    def cuDeviceTotalMem_v2(self, total, handle):  # noqa: N802  # the driver's own name
        total._obj.value = self.devices[handle.value].total_bytes
        return 0


class TestVisibleDevices:
    @pytest.fixture(autouse=True)
    def unrestricted(self, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def test_every_device_of_the_driver(self, monkeypatch):
        monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver([P4, P100]))
        assert visible_devices() == [P4, P100]

    @pytest.mark.parametrize("value", ["", "-1"])
    def test_hidden_devices_are_not_asked_for(self, monkeypatch, value):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        monkeypatch.setattr(ctypes, "CDLL", None)
        assert visible_devices() == []

    def test_without_a_driver(self, monkeypatch):
        monkeypatch.setattr(module, "DRIVER_LIBRARY", "libcuda-that-is-not-there.so.1")
        assert visible_devices() == []

    @pytest.mark.parametrize("code", [100, 34])
    def test_a_driver_without_a_device(self, monkeypatch, code):
        monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver([], init=code))
        assert visible_devices() == []

    def test_a_broken_driver_is_an_error_and_not_a_cpu_server(self, monkeypatch):
        monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver([], init=999))
        with pytest.raises(PluginError) as error:
            visible_devices()
        assert str(error.value) == (
            "failed to initialise the CUDA driver: error 999; "
            "check nvidia-smi, or set CUDA_VISIBLE_DEVICES= to serve on the CPU"
        )


class TestDevices:
    """The devices by way of another process: this one leaves the driver uninitialised."""

    @pytest.fixture
    def answer(self, monkeypatch, capfd):
        """Let this process have a driver, and the other one print what this returns."""
        driver = FakeDriver([P4, P100])
        monkeypatch.setattr(module, "_driver", lambda: driver)
        devices.cache_clear()
        yield lambda done: monkeypatch.setattr(subprocess, "run", lambda command, **options: done(command))
        devices.cache_clear()
        assert not driver.is_initialized

    def test_they_are_what_the_other_process_sees(self, answer, monkeypatch, capfd):
        with monkeypatch.context() as other:
            other.setattr(module, "_driver", lambda: FakeDriver([P4, P100]))
            assert module._print_devices() == 0
        printed = capfd.readouterr().out
        answer(lambda command: subprocess.CompletedProcess(command, 0, printed, ""))
        assert devices() == (P4, P100)
        assert not is_cuda_initialized()

    def test_its_error_is_passed_on(self, answer, monkeypatch, capfd):
        with monkeypatch.context() as other:
            other.setattr(module, "_driver", lambda: FakeDriver([], init=999))
            assert module._print_devices() == 1
        printed = capfd.readouterr().err
        answer(lambda command: subprocess.CompletedProcess(command, 1, "", printed))
        with pytest.raises(PluginError, match="failed to initialise the CUDA driver: error 999"):
            devices()

    def test_its_end_without_a_word_is_an_error(self, answer):
        answer(lambda command: subprocess.CompletedProcess(command, -11, "", ""))
        with pytest.raises(PluginError) as error:
            devices()
        assert str(error.value) == (
            "the CUDA driver cannot be asked: exit code -11; "
            "check nvidia-smi, or set CUDA_VISIBLE_DEVICES= to serve on the CPU"
        )

    def test_its_silence_is_an_error(self, answer):
        def hang(command):
            raise subprocess.TimeoutExpired(command, 120)

        answer(hang)
        with pytest.raises(PluginError) as error:
            devices()
        assert str(error.value) == (
            "the CUDA driver did not answer within 120 s; "
            "check nvidia-smi, or set CUDA_VISIBLE_DEVICES= to serve on the CPU"
        )

    def test_the_real_process_runs_and_finds_no_driver_here(self, answer, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert devices() == ()


def test_a_process_tells_whether_cuda_is_initialized(monkeypatch):
    driver = FakeDriver([P4])
    monkeypatch.setattr(module, "_driver", lambda: driver)
    assert not is_cuda_initialized()
    assert visible_devices() == [P4]
    assert is_cuda_initialized()
    monkeypatch.setattr(module, "_driver", lambda: None)
    assert not is_cuda_initialized()


def test_the_plugins_activation_leaves_the_driver_uninitialized(monkeypatch):
    """Else the server cannot fork its workers, and each of them takes as long as it for the same imports."""

    def initializes():
        raise AssertionError("visible_devices initialises the driver")

    monkeypatch.setattr(module, "devices", lambda: (P4,))
    monkeypatch.setattr(module, "visible_devices", initializes)
    monkeypatch.setattr(sglang_pascal, "_decision", lambda: Decision("cuda", ""))
    monkeypatch.setattr(card_code, "check_torch", lambda _version, _built_for, capabilities: asked.append(capabilities))
    for target in ("compat.check_sglang_version", "compat.apply_shims", "orphans.die_with_parent"):
        monkeypatch.setattr(f"sglang_pascal.{target}", lambda *_: None)
    monkeypatch.setattr("sglang_pascal.collector.collect_seldom", lambda: None)
    asked: list[set[tuple[int, int]]] = []
    assert sglang_pascal.activate() == "sglang_pascal.platform:PascalCudaPlatform"
    assert asked == [{(6, 1)}]
