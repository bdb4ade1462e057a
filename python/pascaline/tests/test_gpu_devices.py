"""Which GPUs a CUDA process sees, in CUDA's own reading of CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pascaline.errors import ConfigurationError
from pascaline.gpu.devices import GpuIdentity, bus_address, device_variables, driver_gpus, visible_gpus

if TYPE_CHECKING:
    from pathlib import Path

FIRST = GpuIdentity(0, "GPU-aaaa-1", "0000:01:00")
SECOND = GpuIdentity(1, "GPU-aabb-2", "0000:02:00")
HOST = (FIRST, SECOND)


class TestVisible:
    @pytest.mark.parametrize(
        ("visible", "expected"),
        [
            (None, [FIRST, SECOND]),
            ("0", [FIRST]),
            ("1", [SECOND]),
            (" 1 , 0 ", [SECOND, FIRST]),
            ("GPU-aabb-2", [SECOND]),
            ("GPU-aab", [SECOND]),
            ("gpu-AABB", [SECOND]),
            ("GPU-aaaa,1", [FIRST, SECOND]),
            ("0,-1,1", [FIRST]),
            ("0,7,1", [FIRST]),
            ("0,nonsense", [FIRST]),
        ],
    )
    def test_what_cuda_sees(self, visible: str | None, expected: list[GpuIdentity]) -> None:
        assert visible_gpus(HOST, visible) == expected

    @pytest.mark.parametrize("visible", ["", "-1", "2", "GPU-ffff", "aaaa", "1x", ","])
    def test_what_names_nothing(self, visible: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            visible_gpus(HOST, visible)
        assert str(caught.value) == (
            f"CUDA_VISIBLE_DEVICES={visible} names none of the GPUs here, must be an index below 2 or a UUID"
        )

    @pytest.mark.parametrize("visible", ["MIG-GPU-aaaa/1/0", "MIG-7f0d", "0,MIG-7f0d", "mig-1"])
    def test_mig_devices_are_refused_in_words(self, visible: str) -> None:
        with pytest.raises(ConfigurationError, match="names a MIG device, must be indices or UUIDs of whole GPUs"):
            visible_gpus(HOST, visible)

    @pytest.mark.parametrize(
        ("visible", "words"),
        [
            ("0,0", "names GPU 0 (GPU-aaaa-1, 0000:01:00) twice, must name each GPU once"),
            ("1,GPU-aabb", "names GPU 1 (GPU-aabb-2, 0000:02:00) twice, must name each GPU once"),
            (
                "GPU-aa",
                "fits GPU 0 (GPU-aaaa-1, 0000:01:00) and GPU 1 (GPU-aabb-2, 0000:02:00), must be the beginning of one "
                "UUID",
            ),
        ],
    )
    def test_what_cuda_itself_refuses(self, visible: str, words: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            visible_gpus(HOST, visible)
        assert str(caught.value) == f"CUDA_VISIBLE_DEVICES={visible} {words}"


class TestVariables:
    def test_a_gpu_is_named_by_its_uuid(self) -> None:
        expected = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-aabb-2,GPU-aaaa-1"}
        assert device_variables("cuda", [SECOND, FIRST]) == expected

    def test_without_a_uuid_the_order_alone_is_said(self) -> None:
        assert device_variables("cuda", [GpuIdentity(0, "", "0000:01:00")]) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        assert device_variables("cuda") == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def test_the_cpu_sees_none(self) -> None:
        assert device_variables("cpu") == {"CUDA_VISIBLE_DEVICES": ""}


class TestAddresses:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("00000000:3B:00.0", "0000:3b:00"),
            ("0000:3b:00.0", "0000:3b:00"),
            ("PCI:0000:3b:00", "0000:3b:00"),
            ("3b:00.0", "0000:3b:00"),
            ("00010000:01:00.0", "10000:01:00"),
            ("nothing", ""),
            ("", ""),
        ],
    )
    def test_every_form_is_one(self, text: str, expected: str) -> None:
        assert bus_address(text) == expected

    def test_the_drivers_folder(self, tmp_path: Path) -> None:
        for address, uuid in (("0000:3b:00.0", "GPU-00000000-0000-4000-8000-000000000004"), ("0000:18:00.0", "")):
            (tmp_path / address).mkdir()
            said = f"Model: \t\t Tesla P4\nGPU UUID: \t {uuid}\nBus Location: \t {address}\n"
            (tmp_path / address / "information").write_text(said)
        assert driver_gpus(tmp_path) == (
            GpuIdentity(0, "", "0000:18:00", "Tesla P4"),
            GpuIdentity(1, "GPU-00000000-0000-4000-8000-000000000004", "0000:3b:00", "Tesla P4"),
        )
        assert driver_gpus(tmp_path / "none") == ()
