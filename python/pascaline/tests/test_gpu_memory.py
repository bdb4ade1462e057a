"""Memory of the device: of the GPU that CUDA would show, of the host within its control group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from pascaline.errors import ConfigurationError, MissingError
from pascaline.gpu.fake_nvml import build_fake_nvml, fake_nvml_environment, write_scenario
from pascaline.gpu.memory import DeviceMemory, gpu_memory, host_memory, memory_bandwidth

CAPTURES = Path(__file__).parents[3] / "tests/gpu/captures"
MIB = 1 << 20


WIDTH = "nvmlDeviceGetMemoryBusWidth"
CLOCK = "nvmlDeviceGetMaxClockInfo 2"


def with_lines(folder: Path, capture: str, lines: str, *, without: Iterable[str] = ()) -> Mapping[str, str]:
    """A captured card that answers more than it was asked then; its one GPU is the capture's last heading."""
    scenario = folder / "s.nvml"
    write_scenario(scenario, (CAPTURES / f"{capture}.nvml").read_text() + lines + "\n")
    return fake_nvml_environment(scenario, build_fake_nvml(without=without))


@pytest.fixture(scope="module")
def p4() -> Mapping[str, str]:
    return fake_nvml_environment(CAPTURES / "tesla-p4.nvml")


class TestGpu:
    def test_what_is_not_free_is_used(self, p4: Mapping[str, str]) -> None:
        """By processes and by the driver: 8053063680 in all, 2070937600 free."""
        memory = gpu_memory(environment=p4)
        assert (memory.name, memory.total_bytes, memory.used_bytes) == ("Tesla P4", 8053063680, 8053063680 - 2070937600)

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


class TestBandwidth:
    @pytest.mark.parametrize(
        ("capture", "name", "width", "bandwidth"),
        [
            ("tesla-p4", "Tesla P4", 256, 192.192e9),
            ("tesla-p40", "Tesla P40", 384, 347.04e9),
            ("tesla-p100-pcie-16gb", "Tesla P100-PCIE-16GB", 4096, 732.16e9),
            ("nvidia-h100-80gb-hbm3", "NVIDIA H100 80GB HBM3", 5120, 3352.32e9),
            ("nvidia-h200", "NVIDIA H200", 6016, 4814.304e9),
        ],
    )
    def test_twice_the_clock_times_the_width(
        self, capture: str, name: str, width: int, bandwidth: float, tmp_path: Path
    ) -> None:
        """What the data sheets say: 192, 346, 732, 3350 and 4800 GB/s."""
        assert memory_bandwidth(name, with_lines(tmp_path, capture, f"{WIDTH} = {width}")) == bandwidth

    @pytest.mark.parametrize("lines", ["", f"{WIDTH} = error UNKNOWN", f"{WIDTH} = 0", f"{WIDTH} = 256\n{CLOCK} = 0"])
    def test_what_nvml_does_not_tell(self, lines: str, tmp_path: Path) -> None:
        """A call without an answer, and one that answers 0."""
        assert memory_bandwidth("Tesla P4", with_lines(tmp_path, "tesla-p4", lines)) is None

    def test_a_driver_without_the_call(self, tmp_path: Path) -> None:
        environment = with_lines(tmp_path, "tesla-p4", f"{WIDTH} = 256", without=[WIDTH])
        assert memory_bandwidth("Tesla P4", environment) is None

    def test_another_card(self, tmp_path: Path) -> None:
        assert memory_bandwidth("Tesla P40", with_lines(tmp_path, "tesla-p4", f"{WIDTH} = 256")) is None

    def test_the_card_of_that_name_among_others(self, tmp_path: Path) -> None:
        scenario = tmp_path / "s.nvml"
        cards = (("Tesla P4", 256, 3003), ("Tesla P40", 384, 3615))
        text = "".join(
            f"[gpu {i}]\nnvmlDeviceGetUUID = GPU-{i}\nnvmlDeviceGetName = {name}\n{WIDTH} = {width}\n{CLOCK} = {clock}\n"
            for i, (name, width, clock) in enumerate(cards)
        )
        write_scenario(scenario, text)
        assert memory_bandwidth("Tesla P40", fake_nvml_environment(scenario)) == 347.04e9


class TestRates:
    LINES = f"{WIDTH} = 256\nnvmlDeviceGetNumGpuCores = 2560\n"

    def test_what_bounds_the_speed_of_a_p4(self, tmp_path: Path) -> None:
        memory = gpu_memory(environment=with_lines(tmp_path, "tesla-p4", self.LINES))
        assert memory.rates is not None
        assert memory.rates.bandwidth_bytes_per_second == 192.192e9
        assert (memory.rates.cores, memory.rates.compute_capability) == (2560, "6.1")
        assert 1e9 < memory.rates.clock_hertz < 2e9

    @pytest.mark.parametrize("missing", ["nvmlDeviceGetNumGpuCores", WIDTH])
    @pytest.mark.parametrize("answer", ["0", "error NOT_SUPPORTED"])
    def test_one_answer_that_is_missing_leaves_the_speed_unknown(
        self, missing: str, answer: str, tmp_path: Path
    ) -> None:
        memory = gpu_memory(environment=with_lines(tmp_path, "tesla-p4", f"{self.LINES}{missing} = {answer}\n"))
        assert memory.rates is None
        assert memory.total_bytes > 0


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

    def test_a_container_is_its_own_root(self, tmp_path: Path) -> None:
        meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
        meminfo.write_text("MemAvailable:   60000 kB\n")
        cgroup.write_text("0::/\n")
        (tmp_path / "memory.max").write_text(f"{30 * MIB}\n")
        (tmp_path / "memory.current").write_text(f"{10 * MIB}\n")
        assert host_memory(meminfo, cgroup, tmp_path).total_bytes == 20 * MIB

    def test_page_cache_is_room_and_the_soft_limit_is_one(self, tmp_path: Path) -> None:
        """A model that was read before fills its group up to the limit with pages that the kernel drops."""
        meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
        meminfo.write_text("MemAvailable:   60000 kB\n")
        cgroup.write_text("0::/\n")
        (tmp_path / "memory.max").write_text(f"{30 * MIB}\n")
        (tmp_path / "memory.current").write_text(f"{29 * MIB}\n")
        stat = f"anon {4 * MIB}\nfile {25 * MIB}\nshmem {MIB}\ninactive_file {20 * MIB}\nactive_file {4 * MIB}\n"
        (tmp_path / "memory.stat").write_text(stat)
        assert host_memory(meminfo, cgroup, tmp_path).total_bytes == 25 * MIB
        (tmp_path / "memory.high").write_text(f"{15 * MIB}\n")
        assert host_memory(meminfo, cgroup, tmp_path).total_bytes == 10 * MIB
        (tmp_path / "memory.max").write_text("0\n")
        assert host_memory(meminfo, cgroup, tmp_path).total_bytes == 0

    def test_this_host_has_some(self) -> None:
        assert host_memory().total_bytes > 0
