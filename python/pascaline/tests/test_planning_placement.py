"""One decision about devices, dtype, memory and NUMA node, for all commands and hosts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.cards import load_card
from pascaline.errors import ConfigurationError, MissingError
from pascaline.gpu.devices import GpuIdentity, visible_gpus
from pascaline.gpu.host_bandwidth import HostBandwidth, NodeBandwidth
from pascaline.gpu.memory import DeviceMemory, GpuRates, node_bytes, node_cpus, numa_node, socket_nodes
from pascaline.planning.placement import HostFacts, Placement, cpu_flags, place, place_on_card
from pascaline.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

P4 = GpuIdentity(0, "GPU-aaaa", "0000:01:00", "Tesla P4")
P40 = GpuIdentity(1, "GPU-bbbb", "0000:82:00", "Tesla P40")
MIXED = (P4, P40)


def host(gpus: tuple[GpuIdentity, ...] = MIXED, nvml: str | None = None, **environment: str) -> HostFacts:
    """A host with these GPUs. nvml: why it does not answer."""

    def memory(visible: str | None) -> DeviceMemory:
        if nvml is not None or not gpus:
            raise MissingError(nvml or "NVML counts no GPU")
        seen = tuple(visible_gpus(gpus, visible))
        return DeviceMemory(seen[0].name, load_card(seen[0].name.lower().replace(" ", "-")).memory_bytes, 0, seen)

    return HostFacts(
        environment=environment,
        installed=lambda: [gpu.name for gpu in gpus],
        gpu_memory=memory,
        host_memory=lambda: DeviceMemory("cpu", 2**34),
        cpu_flags=lambda: frozenset({"avx2"}),
        driver_gpus=lambda: gpus,
        numa_node=lambda address: 1 if address == P40.address else 0,
    )


def placed(facts: HostFacts, **settings: Any) -> Placement:
    return place(Settings(**settings), settings.get("card"), facts)


class TestDevices:
    @pytest.mark.parametrize(
        ("visible", "expected", "node"), [("0", P4, 0), ("1", P40, 1), ("GPU-bb", P40, 1), ("1,0", P40, 1)]
    )
    def test_planned_and_handed_on_are_one_card(self, visible: str, expected: GpuIdentity, node: int) -> None:
        """From the process's variables or from the settings': card, memory, NUMA node and the engine's UUID agree."""
        for found in (
            placed(host(CUDA_VISIBLE_DEVICES=visible), device="cuda"),
            placed(host(CUDA_VISIBLE_DEVICES="0"), device="cuda", environment={"CUDA_VISIBLE_DEVICES": visible}),
        ):
            assert found.card.name == expected.name.lower().replace(" ", "-")
            assert found.memory.total_bytes == found.card.memory_bytes
            assert found.gpus == (expected,)
            assert found.numa_node == node
            assert found.variables == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": expected.uuid}

    def test_without_the_variable_the_first_on_the_bus(self) -> None:
        """llama.cpp would spread over all that it sees: it sees what was planned for."""
        found = placed(host(), engine="llama.cpp")
        assert (found.gpus, found.notes) == ((P4,), ())
        assert found.variables["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa"

    def test_more_named_than_used_is_said(self) -> None:
        (note,) = placed(host(CUDA_VISIBLE_DEVICES="0,1"), device="cuda").notes
        assert note == "CUDA_VISIBLE_DEVICES=0,1 shows 2 GPUs, used: GPU 0 (GPU-aaaa, 0000:01:00)"
        assert placed(host(CUDA_VISIBLE_DEVICES="0,1"), device="cuda", tensor_parallel=2).gpus == MIXED

    def test_fewer_than_needed_are_refused(self) -> None:
        with pytest.raises(
            ConfigurationError, match=r"^tensor_parallel x pipeline_parallel needs 2 GPUs, 1 visible: GPU 0"
        ):
            placed(host(CUDA_VISIBLE_DEVICES="0"), device="cuda", tensor_parallel=2)

    @pytest.mark.parametrize("visible", [None, "0", "1,GPU-aaaa"])
    def test_another_order_beside_an_index_is_refused(self, visible: str | None) -> None:
        variables = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"} | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
        with pytest.raises(ConfigurationError) as caught:
            placed(host(), device="cuda", environment=variables)
        assert str(caught.value) == (
            "CUDA_DEVICE_ORDER=FASTEST_FIRST numbers the GPUs otherwise than the plan does, must be PCI_BUS_ID or left "
            "out; or name the GPU by its UUID in CUDA_VISIBLE_DEVICES (nvidia-smi -L)"
        )

    def test_another_order_beside_uuids_is_no_matter(self) -> None:
        facts = host(CUDA_DEVICE_ORDER="FASTEST_FIRST", CUDA_VISIBLE_DEVICES="GPU-bbbb")
        assert placed(facts, device="cuda").gpus == (P40,)

    def test_a_mig_device_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="names a MIG device"):
            placed(host(CUDA_VISIBLE_DEVICES="MIG-1"), device="cuda")

    @pytest.mark.parametrize("visible", ["", "-1", " "])
    def test_gpus_that_are_hidden(self, visible: str) -> None:
        facts = host(CUDA_VISIBLE_DEVICES=visible)
        assert placed(facts).device == "cpu"
        with pytest.raises(ConfigurationError) as caught:
            placed(facts, device="cuda")
        assert str(caught.value) == (
            f"device: cuda is wanted, but CUDA_VISIBLE_DEVICES={visible} hides every GPU; name one, or set device to cpu"
        )

    def test_no_gpu(self) -> None:
        assert placed(host(gpus=())).device == "cpu"
        with pytest.raises(ConfigurationError) as caught:
            placed(host(gpus=()), device="cuda")
        assert str(caught.value) == (
            "device: cuda is wanted, but the NVIDIA driver shows no GPU; check nvidia-smi, or set device to cpu"
        )

    def test_the_cpu_sees_no_gpu_and_obeys_no_order(self) -> None:
        found = placed(host(CUDA_DEVICE_ORDER="FASTEST_FIRST"), device="cpu")
        assert (found.card.name, found.memory.total_bytes, found.gpus) == ("cpu", 2**34, ())
        assert found.variables == {"CUDA_VISIBLE_DEVICES": ""}

    def test_where_nvml_fails_the_profile_and_the_drivers_folder_stand_in(self) -> None:
        found = placed(host(nvml="NVML hangs", CUDA_VISIBLE_DEVICES="1"), device="cuda", card="tesla-p40")
        assert (found.card.name, found.gpus) == ("tesla-p40", (P40,))
        assert found.notes == ("planned as if nothing else used the card: NVML hangs",)


class TestNumberType:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"device": "cuda"}, "float16"),
            ({"device": "cuda", "dtype": "float32"}, "float32"),
            ({"device": "cpu"}, "float32"),
            ({"device": "cpu", "dtype": "bfloat16"}, "bfloat16"),
        ],
    )
    def test_by_device(self, settings: dict[str, Any], expected: str) -> None:
        assert placed(host(CUDA_VISIBLE_DEVICES="0"), **settings).dtype == expected

    @pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
    def test_a_cpu_that_multiplies_bfloat16(self, flag: str) -> None:
        flags = cpu_flags(f"processor\t: 0\nflags\t\t: fpu {flag} sse2\nprocessor\t: 1\nflags\t\t: fpu\n")
        assert flags == {"fpu", flag, "sse2"}
        facts = HostFacts(
            environment={},
            installed=list,
            gpu_memory=lambda _: DeviceMemory("", 0),
            host_memory=lambda: DeviceMemory("cpu", 1),
            cpu_flags=lambda: flags,
        )
        assert placed(facts).dtype == "bfloat16"

    def test_unreadable_flags_are_none(self) -> None:
        assert cpu_flags("") == frozenset()

    def test_bfloat16_on_pascal_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="bfloat16 is emulated on tesla-p4"):
            placed(host(CUDA_VISIBLE_DEVICES="0"), device="cuda", card="tesla-p4", dtype="bfloat16")


def test_a_card_that_is_elsewhere() -> None:
    found = place_on_card(Settings(), load_card("tesla-p40"))
    assert (found.device, found.dtype, found.memory.used_bytes, found.gpus) == ("cuda", "float16", 0, ())


def test_the_numa_node_of_an_address(tmp_path: Path) -> None:
    for address, text in (("0000:3b:00", "1\n"), ("0000:5e:00", "-1\n")):
        (tmp_path / f"{address}.0").mkdir()
        (tmp_path / f"{address}.0" / "numa_node").write_text(text)
    assert numa_node("0000:3b:00", tmp_path) == 1
    assert numa_node("0000:5e:00", tmp_path) is None
    assert numa_node("0000:00:00", tmp_path) is None


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        (
            GpuRates(320e9, 2560, 1.6e9, "7.5"),
            "no profile knows Tesla T4: its speed is estimated from the clocks, bus width and cores that NVML reports",
        ),
        (None, "no profile knows Tesla T4: its speed is unknown, and its memory is all that is planned with"),
    ],
)
def test_a_gpu_without_a_profile_is_planned_by_what_nvml_says_of_it(rates: GpuRates | None, words: str) -> None:
    memory = DeviceMemory("Tesla T4", 16 << 30, 0, (replace(P4, name="Tesla T4"),), rates)
    found = place(Settings(device="cuda"), None, replace(host((P4,)), gpu_memory=lambda _: memory))
    assert (found.card.name, found.notes) == ("Tesla T4", (words,))
    assert ("cores" in found.card.facts) == (rates is not None)


class TestCpus:
    """An engine runs beside its GPU; where the node is unknown, or its CPUs are too few, it runs anywhere."""

    NODES = {0: frozenset(range(4)), 1: frozenset(range(4, 8))}  # noqa: RUF012

    def facts(self, cpus: range = range(8), **environment: str) -> HostFacts:
        nodes = self.NODES
        return replace(
            host(**environment), node_cpus=lambda node: nodes.get(node, frozenset()), cpus=lambda: frozenset(cpus)
        )

    @pytest.mark.parametrize(("visible", "node"), [("0", 0), ("1", 1)])
    def test_those_of_the_gpus_node(self, visible: str, node: int) -> None:
        found = placed(self.facts(CUDA_VISIBLE_DEVICES=visible), device="cuda")
        assert found.cpus == self.NODES[node]
        assert found.to_json()["cpus"] == sorted(self.NODES[node])

    def test_only_those_that_this_process_may_use(self) -> None:
        assert placed(self.facts(range(2, 6)), device="cuda").cpus == {2, 3}

    def test_gpus_on_both_nodes_have_all(self) -> None:
        assert placed(self.facts(CUDA_VISIBLE_DEVICES="0,1"), device="cuda", tensor_parallel=2).cpus == frozenset()

    @pytest.mark.parametrize("cpus", [range(4), range(4, 8)], ids=["all of them are there", "none of them is"])
    def test_nothing_to_choose(self, cpus: range) -> None:
        assert placed(self.facts(cpus), device="cuda").cpus == frozenset()

    def test_more_threads_than_the_node_has_cpus(self) -> None:
        assert placed(self.facts(), device="cuda", threads=4).cpus == self.NODES[0]
        assert placed(self.facts(), device="cuda", threads=5).cpus == frozenset()

    def test_a_node_that_is_unknown(self) -> None:
        assert placed(replace(self.facts(), numa_node=lambda _: None), device="cuda").cpus == frozenset()
        assert placed(replace(self.facts(), node_cpus=lambda _: frozenset()), device="cuda").cpus == frozenset()

    def test_on_the_cpu(self) -> None:
        assert placed(self.facts(), device="cpu").cpus == frozenset()


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-2,8\n", {0, 1, 2, 8}), ("5\n", {5}), ("\n", set()), ("words", set()), (None, set())]
)
def test_the_cpus_of_a_node(tmp_path: Path, text: str | None, cpus: set[int]) -> None:
    (tmp_path / "node1").mkdir()
    if text is not None:
        (tmp_path / "node1/cpulist").write_text(text)
    assert node_cpus(1, tmp_path) == cpus


@dataclass(frozen=True)
class Tree:
    """A part of sysfs: the NUMA nodes of a host of two sockets, and the node of its card."""

    root: Path

    def write(self, nodes: dict[int, str], packages: dict[str, int], card_node: int, empty: int | None = None) -> Tree:
        """nodes: number -> CPUs. packages: CPUs -> socket. card_node: of P40. empty: a node without memory."""
        for number, cpus in nodes.items():
            folder = self.root / f"node/node{number}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(f"{cpus}\n")
            size = 0 if number == empty else 96 * 2**20
            (folder / "meminfo").write_text(f"Node {number} MemTotal:       {size} kB\n")
        for cpus, package in packages.items():
            first, last = map(int, cpus.split("-"))
            for cpu in range(first, last + 1):
                folder = self.root / f"cpu/cpu{cpu}/topology"
                folder.mkdir(parents=True)
                (folder / "physical_package_id").write_text(f"{package}\n")
        card = self.root / f"pci/{P40.address}.0"
        card.mkdir(parents=True)
        (card / "numa_node").write_text(f"{card_node}\n")
        return self

    def facts(self) -> HostFacts:
        """The host with its card, as the functions for the real tree read it."""
        nodes, cpus = self.root / "node", self.root / "cpu"
        numbers = sorted(int(path.name.removeprefix("node")) for path in nodes.glob("node*"))
        measured = [NodeBandwidth(number, 1e10 * (number + 1), 4, 2**30, 0, 1.0) for number in numbers]
        return replace(
            host(CUDA_VISIBLE_DEVICES="1"),
            numa_node=partial(numa_node, devices=self.root / "pci"),
            node_cpus=partial(node_cpus, nodes=nodes),
            socket_nodes=partial(socket_nodes, nodes=nodes, cpus=cpus),
            cpus=lambda: frozenset(range(8)),
            bandwidth=lambda: HostBandwidth("2026-11-30T12:00:00Z", "Xeon", tuple(measured)),
        )


class TestSockets:
    """The engine, its unit and the estimate use the socket of the card."""

    TWO = ({0: "0-3", 1: "4-7"}, {"0-3": 0, "4-7": 1})
    DIVIDED = ({0: "0-1", 1: "2-3", 2: "4-5", 3: "6-7"}, {"0-3": 0, "4-7": 1})

    def test_the_card_is_at_the_second(self, tmp_path: Path) -> None:
        found = placed(Tree(tmp_path).write(*self.TWO, card_node=1).facts(), device="cuda")
        assert (found.numa_node, found.numa_nodes, found.cpus) == (1, (1,), frozenset(range(4, 8)))
        assert found.host_rates.memory_bytes_per_second == 2e10
        assert found.host_rates.source == "measured 2026-11-30, NUMA node 1, 4 threads"

    def test_the_kernel_knows_no_node_of_the_card(self, tmp_path: Path) -> None:
        """It writes -1 then. The engine is bound to nothing, and the slower node counts."""
        found = placed(Tree(tmp_path).write(*self.TWO, card_node=-1).facts(), device="cuda")
        assert (found.numa_node, found.numa_nodes, found.cpus) == (None, (), frozenset())
        assert found.host_rates.memory_bytes_per_second == 1e10

    def test_the_firmware_divides_sockets(self, tmp_path: Path) -> None:
        """Sub-NUMA clusters: half of the socket's channels belong to the node beside the card's."""
        found = placed(Tree(tmp_path).write(*self.DIVIDED, card_node=2).facts(), device="cuda")
        assert (found.numa_node, found.numa_nodes, found.cpus) == (2, (2, 3), frozenset(range(4, 8)))
        assert found.host_rates.memory_bytes_per_second == 3e10 + 4e10
        assert found.host_rates.source == "measured 2026-11-30, NUMA node 2 and 3, 8 threads"

    def test_one_divided_socket_is_all(self, tmp_path: Path) -> None:
        facts = Tree(tmp_path).write({0: "0-3", 1: "4-7"}, {"0-7": 0}, card_node=0).facts()
        assert placed(facts, device="cuda").cpus == frozenset()

    def test_a_node_without_cpus_binds_nothing(self, tmp_path: Path) -> None:
        facts = Tree(tmp_path).write({0: "0-3", 1: "4-7", 2: ""}, {"0-3": 0, "4-7": 1}, card_node=2).facts()
        assert placed(facts, device="cuda").cpus == frozenset()

    def test_a_node_without_memory_has_its_cpus(self, tmp_path: Path) -> None:
        """The unit is not bound to it (unit_limits), as it has no room."""
        tree = Tree(tmp_path).write(*self.TWO, card_node=1, empty=1)
        assert placed(tree.facts(), device="cuda").cpus == frozenset(range(4, 8))
        assert node_bytes(1, tmp_path / "node") == 0

    def test_without_the_sockets_of_cpus_a_node_is_alone(self, tmp_path: Path) -> None:
        Tree(tmp_path).write(self.DIVIDED[0], {}, card_node=2)
        assert socket_nodes(2, tmp_path / "node", tmp_path / "cpu") == (2,)
