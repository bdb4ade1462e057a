"""The systemd unit for hosts without NixOS: what it says, that it says what NixOS' unit says, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pascaline.cli import main
from pascaline.errors import ConfigurationError, ExitCode
from pascaline.gpu.devices import GpuIdentity
from pascaline.gpu.memory import DeviceMemory
from pascaline.planning import Plan, make_plan
from pascaline.planning.placement import HostFacts, Placement, place_on_card
from pascaline.planning.unit_limits import MARGIN_BYTES, UnitLimits, unit_limits
from pascaline.service import Unit
from pascaline.settings import Settings
from support.catalog_files import shape_named, write_catalog_file
from support.mixtures import QWEN_3_30B_A3B, mixture_spec
from support.planning import P4, request

ROOT = Path(__file__).parents[3]
RENDERED = ROOT / "tests/systemd/root/etc/systemd/system"
OURS_ALONE = {"DynamicUser"}
NIXOS_ALONE = {
    "User",  # an account of its own, which the modules declare
    "MemoryMax",  # an option of the instance
    "Slice",
    "LD_LIBRARY_PATH",  # where NixOS keeps the driver
}
"""Keys and variables that only one of the two has, on purpose."""


def unit(**changes: object) -> Unit:
    values = {
        "instance": "emily",
        "executable": Path("/opt/pascaline/bin/pascaline"),
        "config": Path("/etc/pascaline/emily.toml"),
        "model": Path("/data/models/emily.gguf"),
        "gpus": "0",
    }
    return Unit(**(values | changes))  # type: ignore[arg-type]


def settings(text: str) -> dict[str, set[str]]:
    """Key -> values of [Service]; a variable of Environment= is a key of its own."""
    found: dict[str, set[str]] = {}
    section = re.split(r"^\[(\w+)\]$", text, flags=re.MULTILINE)
    service = section[section.index("Service") + 1]
    for line in service.splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            if key == "Environment":
                key, _, value = value.strip('"').partition("=")
            parts = value.split() if key == "RestrictAddressFamilies" else [value]
            found.setdefault(key, set()).update(parts)
    return found


@pytest.mark.parametrize(("name", "gpus"), [("main", ""), ("gpu", "0")])
def test_it_says_what_the_unit_of_nixos_says(name: str, gpus: str) -> None:
    """Every line of the sandbox, the limits and the restarts; paths and names apart."""
    ours = settings(unit(instance=name, gpus=gpus, api_key_file=Path("/etc/pascaline/api-key")).text())
    nixos = settings((RENDERED / f"pascaline-{name}.service").read_text())
    differing = {key for key in ours.keys() | nixos.keys() if ours.get(key) != nixos.get(key)}
    assert differing - {"ExecStart", "LoadCredential"} == (OURS_ALONE | NIXOS_ALONE) & (ours.keys() | nixos.keys())


def test_the_command_names_the_settings_the_name_and_the_key() -> None:
    text = unit(api_key_file=Path("/etc/pascaline/api-key")).text()
    assert (
        "ExecStart=/opt/pascaline/bin/pascaline serve --config /etc/pascaline/emily.toml --served-model-name emily "
        "--api-key-file /run/credentials/pascaline-emily.service/api-key\n"
    ) in text
    assert "LoadCredential=api-key:/etc/pascaline/api-key\n" in text


def test_what_means_something_to_systemd_is_escaped() -> None:
    text = unit(config=Path("/etc/pascaline/50% of $HOME.toml")).text()
    assert 'serve --config "/etc/pascaline/50%% of $$HOME.toml"' in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"executable": Path("/home/ada/venv/bin/pascaline")},
            "the program /home/ada/venv/bin/pascaline is under /home, which the unit does not see; "
            "install into /opt/pascaline, keep settings in /etc/pascaline and models in /var/lib or /data",
        ),
        (
            {"model": Path("/root/emily.gguf")},
            "model /root/emily.gguf is under /root, which the unit does not see; "
            "install into /opt/pascaline, keep settings in /etc/pascaline and models in /var/lib or /data",
        ),
        ({"config": Path("emily.toml")}, "the settings file must be named by an absolute path, got emily.toml"),
        (
            {"instance": "a/b"},
            "instance name 'a/b' must start with a letter or a digit, and hold only those and _ . -",
        ),
    ],
)
def test_what_the_unit_could_not_see_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        unit(**changes).text()
    assert str(caught.value) == message


def test_show_prints_the_unit_of_a_settings_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "emily.toml"
    config.write_text('device = "cpu"\ndrain_timeout = "5m"\n')
    code = main(["service", "show", "emily", "--config", str(config)])
    # pytest's folder is under /tmp, and a checkout may be under /home: a unit sees neither.
    assert code == 2
    assert re.search(r" is under /\w+, which the unit does not see; ", capsys.readouterr().err)


def test_show_takes_what_the_settings_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("pascaline.service.HIDDEN", ())
    config = tmp_path / "emily.toml"
    config.write_text('device = "cpu"\ndrain_timeout = "5m"\nserved_model_name = "e"\n')
    assert main(["service", "show", "emily", "--config", str(config)]) == 0
    text = capsys.readouterr().out
    assert "TimeoutStopSec=330\n" in text
    assert "CUDA_VISIBLE_DEVICES=\n" in text
    assert f"ExecStart={Path(sys.executable).with_name('pascaline')} serve --config {config}\n" in text


def test_install_and_remove_write_and_delete_the_unit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """systemctl is a program that records its arguments."""
    folder, log = tmp_path / "units", tmp_path / "log"
    folder.mkdir()
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{systemctl.parent}:/usr/bin:/bin")
    monkeypatch.setattr("pascaline.service.UNIT_FOLDER", folder)
    monkeypatch.setattr("pascaline.service.HIDDEN", ())
    monkeypatch.setattr("pascaline.cli.service.BOOTED", tmp_path)
    config = tmp_path / "emily.toml"
    config.write_text('device = "cpu"\n')
    assert main(["service", "install", "emily", "--config", str(config)]) == 0
    assert (folder / "pascaline-emily.service").is_file()
    assert "systemctl enable --now pascaline-emily" in capsys.readouterr().out
    assert main(["service", "remove", "emily"]) == 0
    assert not (folder / "pascaline-emily.service").exists()
    assert log.read_text() == "daemon-reload\ndisable --now pascaline-emily\ndaemon-reload\n"
    assert main(["service", "remove", "emily"]) == 2


@pytest.mark.parametrize(
    ("has_program", "problem"),
    [
        (False, "systemctl is not on PATH: this host has no systemd"),
        (True, "is not there: systemd does not run this host"),
    ],
)
def test_without_systemd_nothing_is_written(
    has_program: bool, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs, folder = tmp_path / "bin", tmp_path / "units"
    programs.mkdir()
    folder.mkdir()
    if has_program:
        (programs / "systemctl").write_text("#!/bin/sh\n")
        (programs / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr("pascaline.service.UNIT_FOLDER", folder)
    monkeypatch.setattr("pascaline.service.HIDDEN", ())
    monkeypatch.setattr("pascaline.cli.service.BOOTED", tmp_path / "none")
    (tmp_path / "emily.toml").write_text('device = "cpu"\n')
    assert main(["service", "install", "emily", "--config", str(tmp_path / "emily.toml")]) == 8
    assert capsys.readouterr().err.endswith(f"{problem}; `pascaline service show` prints the unit anyway\n")
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here (Debian: apt install systemd)"
)
def test_systemd_takes_every_line(tmp_path: Path) -> None:
    path = tmp_path / "pascaline-emily.service"
    path.write_text(unit(executable=Path("/bin/true")).text())
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False)
    # Keys of systemd 254; Debian 12 has 252, which says so and goes on with a constant pause between restarts.
    newer = re.compile("Unknown key '(RestartSteps|RestartMaxDelaySec)' in section")
    wrong = [line for line in done.stderr.splitlines() if "Unknown" in line and not newer.search(line)]
    assert wrong == []


class TestLimits:
    """Where experts stay in the host's memory, the unit follows the plan."""

    def plan(self, **changes: object) -> Plan:
        values = {"engine": "llama.cpp", "max_running_requests": 1, "expert_layers_on_host": None} | changes
        return make_plan(mixture_spec(QWEN_3_30B_A3B), P4, request(P4, **values))

    def placement(self) -> Placement:
        return replace(place_on_card(Settings(), P4), numa_node=1, numa_nodes=(1,), cpus=frozenset(range(10, 20)))

    def test_memory_and_node(self) -> None:
        plan = self.plan()
        limits = unit_limits(plan, self.placement(), 96 * 2**30)
        assert limits.numa_nodes == (1,)
        assert limits.memory_max_bytes is not None
        (prompts,) = (part.n_bytes for part in plan.host_parts if part.key == "host_prompts")
        share = 1.5 * (plan.host_bytes - prompts) + prompts
        assert limits.memory_max_bytes - MARGIN_BYTES == pytest.approx(share, abs=1)
        service = settings(unit(limits=limits).text())
        assert service["MemoryMax"] == {str(limits.memory_max_bytes)}
        assert (service["NUMAPolicy"], service["NUMAMask"], service["CPUAffinity"]) == ({"bind"}, {"1"}, {"numa"})

    @pytest.mark.parametrize("node_bytes", [None, 8 * 2**30])
    def test_a_node_without_room_is_not_bound_to(self, node_bytes: int | None) -> None:
        assert unit_limits(self.plan(), self.placement(), node_bytes).numa_nodes == ()

    def test_a_socket_of_several_nodes(self) -> None:
        placement = replace(self.placement(), numa_nodes=(2, 3))
        text = unit(limits=unit_limits(self.plan(), placement, 96 * 2**30)).text()
        assert settings(text)["NUMAMask"] == {"2,3"}

    def test_an_unbound_placement_stays_so(self) -> None:
        placement = replace(self.placement(), cpus=frozenset())
        assert unit_limits(self.plan(), placement, 96 * 2**30).numa_nodes == ()

    def test_a_mapped_file_is_not_limited(self) -> None:
        assert unit_limits(self.plan(mapped=True), self.placement(), 96 * 2**30).memory_max_bytes is None

    def test_nothing_if_all_is_on_the_card_or_nothing_fits(self) -> None:
        for plan in (self.plan(card_bytes=24 * 2**30), self.plan(card_bytes=2**30)):
            assert unit_limits(plan, self.placement(), 96 * 2**30) == UnitLimits()
        assert "NUMAPolicy" not in unit().text()

    def test_without_a_plan_the_reader_is_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "emily.toml"
        file.write_text('engine = "llama.cpp"\nmodel = "/absent.gguf"\ncard = "tesla-p4"\n')
        main(["service", "show", "emily", "--config", str(file)])
        assert "no limits of memory and NUMA node, as there is no plan: " in capsys.readouterr().err

    def test_as_options_of_nixos(self) -> None:
        limits = unit_limits(self.plan(), replace(self.placement(), numa_nodes=(2, 3)), 96 * 2**30)
        assert limits.nixos_options() == {"memoryMax": str(limits.memory_max_bytes), "numaNode": [2, 3]}
        assert UnitLimits().nixos_options() == {"memoryMax": None, "numaNode": None}

    def test_limits_are_printed_for_nixos(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """An instance that keeps nothing on the host has none; without a plan there is no file to use."""
        file = tmp_path / "emily.toml"
        file.write_text('device = "cpu"\n')
        assert main(["service", "limits", "emily", "--config", str(file)]) == 0
        assert json.loads(capsys.readouterr().out) == {"memoryMax": None, "numaNode": None}
        file.write_text('engine = "llama.cpp"\nmodel = "/absent.gguf"\ncard = "tesla-p4"\n')
        assert main(["service", "limits", "emily", "--config", str(file)]) in {ExitCode.CONFIGURATION, ExitCode.MODEL}
        assert capsys.readouterr().out == ""
        assert main(["service", "limits", "emily"]) == ExitCode.CONFIGURATION

    def test_a_mixture_on_a_card_has_both(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From a settings file to the module's options, on a host of two sockets with a P4 on the second one."""
        gpu = GpuIdentity(0, "GPU-4", "0000:3b:00.0", "Tesla P4")
        facts = HostFacts(
            environment={},
            installed=lambda: [gpu.name],
            gpu_memory=lambda _: DeviceMemory(gpu.name, P4.memory_bytes, 0, (gpu,)),
            host_memory=lambda: DeviceMemory("cpu", 180 * 2**30),
            cpu_flags=frozenset,
            driver_gpus=lambda: [gpu],
            numa_node=lambda _: 1,
            node_cpus=lambda node: frozenset(range(10 * node, 10 * node + 10)),
            cpus=lambda: frozenset(range(20)),
        )
        monkeypatch.setattr("pascaline.serving.task.this_host", lambda _: facts)
        monkeypatch.setattr("pascaline.gpu.memory.node_bytes", lambda _: 96 * 2**30)
        model = write_catalog_file(tmp_path / "m.gguf", shape_named("Qwen3-30B-A3B", 48))
        file = tmp_path / "emily.toml"
        file.write_text(f'engine = "llama.cpp"\nmodel = "{model}"\ncard = "tesla-p4"\nmax_running_requests = 1\n')
        assert main(["service", "limits", "emily", "--config", str(file)]) == 0
        limits = json.loads(capsys.readouterr().out)
        assert limits["numaNode"] == [1]
        assert 16 * 2**30 < int(limits["memoryMax"]) < 64 * 2**30
        monkeypatch.setattr("pascaline.serving.task.this_host", lambda _: replace(facts, host_memory=_two_gib))
        assert main(["service", "limits", "emily", "--config", str(file)]) == ExitCode.DOES_NOT_FIT
        assert "the plan does not fit: " in capsys.readouterr().err


def _two_gib() -> DeviceMemory:
    return DeviceMemory("cpu", 2 * 2**30)
