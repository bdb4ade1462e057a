"""Memory of the device: of the GPU that CUDA would show, of the host within its control group."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from pascaline.errors import ConfigurationError, MissingError
from pascaline.gpu.fake_nvml import fake_nvml_environment, write_scenario
from pascaline.gpu.memory import DeviceMemory, gpu_memory, host_memory

CAPTURES = Path(__file__).parents[3] / "tests/gpu/captures"
MIB = 1 << 20


@pytest.fixture(scope="module")
def p4() -> Mapping[str, str]:
    return fake_nvml_environment(CAPTURES / "tesla-p4.nvml")


class TestGpu:
    def test_what_is_not_free_is_used(self, p4: Mapping[str, str]) -> None:
        """By processes and by the driver: 8053063680 in all, 2070937600 free."""
        assert gpu_memory(environment=p4) == DeviceMemory("Tesla P4", 8053063680, 8053063680 - 2070937600)

    @pytest.mark.parametrize("visible", ["0", "0,1", "GPU-00000000", "GPU-00000000-0000-4000-8000-000000000004"])
    def test_cuda_names_it_by_index_or_uuid(self, visible: str, p4: Mapping[str, str]) -> None:
        assert gpu_memory(visible, p4).name == "Tesla P4"

    @pytest.mark.parametrize("visible", ["1", "", "-1", "GPU-ffff"])
    def test_what_it_does_not_name(self, visible: str, p4: Mapping[str, str]) -> None:
        with pytest.raises(ConfigurationError) as caught:
            gpu_memory(visible, p4)
        assert str(caught.value) == (
            f"CUDA_VISIBLE_DEVICES={visible} names none of the GPUs here, must be an index below 1 or a UUID"
        )

    def test_no_gpu(self, tmp_path: Path) -> None:
        scenario = tmp_path / "empty.nvml"
        write_scenario(scenario, "[library]\nnvmlSystemGetDriverVersion = 580.1\n")
        with pytest.raises(MissingError) as caught:
            gpu_memory(environment=fake_nvml_environment(scenario))
        assert str(caught.value) == "NVML shows no GPU: NVML counts no GPU; name a card (--card) to plan without it"


class TestHost:
    def test_what_is_available(self, tmp_path: Path) -> None:
        meminfo = tmp_path / "meminfo"
        meminfo.write_text("MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:   600 kB\n")
        assert host_memory(meminfo, tmp_path / "none", tmp_path) == DeviceMemory("cpu", 600 * 1024)

    def test_a_control_group_allows_less(self, tmp_path: Path) -> None:
        """The tightest of all groups above the process counts."""
        meminfo, cgroup, root = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "fs"
        meminfo.write_text("MemAvailable:   60000 kB\n")
        cgroup.write_text("0::/a.slice/b.service\n")
        (root / "a.slice/b.service").mkdir(parents=True)
        (root / "a.slice/memory.max").write_text(f"{30 * MIB}\n")
        (root / "a.slice/memory.current").write_text(f"{10 * MIB}\n")
        (root / "a.slice/b.service/memory.max").write_text("max\n")
        (root / "a.slice/b.service/memory.current").write_text(f"{5 * MIB}\n")
        assert host_memory(meminfo, cgroup, root).total_bytes == 20 * MIB

    def test_this_host_has_some(self) -> None:
        assert host_memory().total_bytes > 0
