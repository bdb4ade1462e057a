"""What the options do: to the units, to the driver's settings, to variables, file systems and ports of the host."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.nix

SSH = 22
"""Which NixOS opens with the SSH daemon of CloudLab's profile."""


@pytest.fixture
def host(evaluated: Any) -> Any:
    """A function from a case of cases.nix to what its host is made of."""
    return lambda case: evaluated("units")[case]


class TestDriver:
    def test_module_of_cuda_follows_the_driver(self, host: Any) -> None:
        """As NixOS has it: asked for by name at boot, it would fail systemd-modules-load where a card is dead."""
        assert "nvidia_uvm" not in host("p4")["kernelModules"]
        assert "softdep nvidia post: nvidia-uvm" in host("p4")["extraModprobeConfig"]

    def test_owner_of_a_desktop_keeps_the_settings_program(self, host: Any) -> None:
        """A server does not need it, and the owner's setting is kept."""
        assert host("desktop")["nvidia"]["nvidiaSettings"] is True
        assert host("p4")["nvidia"]["nvidiaSettings"] is False

    def test_limits_are_set_one_call_each(self, host: Any) -> None:
        unit = host("limits")["services"]["pascaline-gpu-limits"]
        assert unit["after"] == ["nvidia-persistenced.service"]
        commands = [command.split("/bin/")[1] for command in unit["serviceConfig"]["ExecStart"]]
        assert commands == ["nvidia-smi --power-limit=60", "nvidia-smi --applications-clocks=3003,1531"]

    def test_limits_are_set_in_a_sandbox(self, host: Any) -> None:
        """The driver lets those set them who have CAP_SYS_ADMIN in the host's user namespace."""
        service = host("limits")["services"]["pascaline-gpu-limits"]["serviceConfig"]
        assert service["CapabilityBoundingSet"] == ["CAP_SYS_ADMIN"]
        assert "User" not in service
        assert (service["PrivateUsers"], service["PrivateDevices"], service["ProcSubset"]) == (False, False, "all")
        assert (service["DevicePolicy"], service["PrivateNetwork"]) == ("closed", True)
        assert service["RestrictAddressFamilies"] == ["AF_UNIX"]

    def test_card_keeps_its_own_limits_where_none_are_set(self, host: Any) -> None:
        assert "pascaline-gpu-limits" not in host("p4")["services"]


def test_every_unit_has_the_sandbox(evaluated: Any) -> None:
    units = {
        (case, name): unit["serviceConfig"]
        for case, host in evaluated("units").items()
        for name, unit in host["services"].items()
        if name.startswith("pascaline-")
    }
    assert len(units) > 10
    for where, service in units.items():
        assert service["NoNewPrivileges"] is True, where
        assert service["ProtectSystem"] in {"strict", "full"}, where
        assert "@system-service" in service["SystemCallFilter"], where


WORST_EXPOSURE = 2.0
"""Of 10, by `systemd-analyze security`; systemd calls everything below 2.5 OK. A service without a sandbox has 9.6."""


def test_the_exposure_of_every_unit_is_low(evaluated: Any, tmp_path: Path) -> None:
    """With a GPU, limits and exporter too; units that differ only in what they run are rated once."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on PATH")
    texts = {
        (name.partition("@")[0], _unit_text(unit["serviceConfig"]))
        for host in evaluated("units").values()
        for name, unit in host["services"].items()
        if name.startswith("pascaline-")
    }
    files = {tmp_path / f"{name}-{number}.service": text for number, (name, text) in enumerate(sorted(texts))}
    for file, text in files.items():
        file.write_text(text)
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", *map(str, files)]
    pages = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    scores = {unit: float(score) for unit, score in re.findall(r"exposure level for (\S+): ([0-9.]+)", pages)}
    assert len(scores) == len(files)
    assert any("gpu-limits" in unit for unit in scores)
    assert {unit: score for unit, score in scores.items() if score > WORST_EXPOSURE} == {}


def _unit_text(service: dict[str, Any]) -> str:
    """Return a unit with these settings; the sandbox does not depend on what it runs."""
    lines = ["[Service]", "ExecStart=/bin/true"]
    for name, value in service.items():
        if not name.startswith("Exec"):
            lines += [f"{name}={each}" for each in (value if isinstance(value, list) else [value])]
    return "\n".join(lines) + "\n"


class TestCuda:
    def test_compiled_kernels_outlive_a_boot(self, host: Any) -> None:
        """And every user's programs may keep theirs."""
        assert host("cuda")["variables"]["CUDA_CACHE_PATH"] == "/var/cache/pascaline-cuda"
        assert host("cuda")["tmpfiles"]["10-pascaline-cuda"]["/var/cache/pascaline-cuda"]["d"]["mode"] == "1777"

    def test_launches_block_for_debugging_alone(self, host: Any) -> None:
        ours = {name for name in host("cuda")["variables"] if name.startswith("CUDA_")}
        assert ours == {"CUDA_PATH", "CUDA_CACHE_PATH"}
        assert host("cudaDebug")["variables"]["CUDA_LAUNCH_BLOCKING"] == "1"


class TestInstance:
    def test_starts_after_driver_network_and_model(self, host: Any) -> None:
        unit = host("p4")["services"]["pascaline-emily"]
        assert unit["after"] == [
            "network-online.target",
            "nvidia-persistenced.service",
            "pascaline-gpu-limits.service",
            "pascaline-model-emily.service",
        ]
        assert unit["requires"] == ["pascaline-model-emily.service"]

    def test_opens_devices_of_nvidia_alone(self, host: Any) -> None:
        service = host("p4")["services"]["pascaline-emily"]["serviceConfig"]
        assert service["DevicePolicy"] == "closed"
        assert service["DeviceAllow"] == [
            "char-nvidia rw",
            "char-nvidia-frontend rw",
            "/dev/nvidiactl rw",
            "/dev/nvidia-uvm rw",
            "/dev/nvidia-uvm-tools rw",
        ]

    def test_on_the_cpu_opens_no_device(self, host: Any) -> None:
        service = host("cpu")["services"]["pascaline-tiny"]["serviceConfig"]
        assert service["PrivateDevices"] is True
        assert "DeviceAllow" not in service

    def test_memory_is_limited_where_asked_for(self, host: Any) -> None:
        limited = host("cpu")["services"]["pascaline-tiny"]["serviceConfig"]
        assert (limited["MemoryMax"], limited["Slice"]) == ("8G", "pascaline.slice")
        assert "MemoryMax" not in host("p4")["services"]["pascaline-emily"]["serviceConfig"]

    def test_each_instance_has_a_socket_where_asked_for(self, host: Any, evaluated: Any) -> None:
        """A node, or all of a socket that the firmware divides into several."""
        units = host("sockets")["services"]
        for name, node in (("card", "0"), ("host", "2,3")):
            service = units[f"pascaline-{name}"]["serviceConfig"]
            assert (service["NUMAPolicy"], service["NUMAMask"], service["CPUAffinity"]) == ("bind", node, "numa")
            assert service["LimitMEMLOCK"] == "infinity"
        assert "NUMAPolicy" not in host("p4")["services"]["pascaline-emily"]["serviceConfig"]
        placements = [settings.get("placement") for settings in evaluated("settings")["sockets"].values()]
        assert placements == [{"experts": "auto"}, None]

    def test_limits_follow_from_the_file_of_a_plan(self, host: Any) -> None:
        """What `pascaline service limits` wrote; an option that is set comes first."""
        units = host("plannedLimits")["services"]
        for name, nodes in (("card", "0,1"), ("host", "1")):
            service = units[f"pascaline-{name}"]["serviceConfig"]
            assert (service["MemoryMax"], service["NUMAMask"]) == ("33285996544", nodes)

    def test_key_comes_as_a_credential(self, host: Any, evaluated: Any) -> None:
        """The settings, which everyone may read in the Nix store, name systemd's copy."""
        service = host("p4")["services"]["pascaline-emily"]["serviceConfig"]
        assert service["LoadCredential"] == ["api-key:/run/secrets/key"]
        [settings] = evaluated("settings")["p4"].values()
        assert settings["api_key_file"] == "/run/credentials/pascaline-emily.service/api-key"

    def test_engine_decides_the_program(self, evaluated: Any) -> None:
        programs = {
            case: settings["engine_executable"].split("-", 1)[1]
            for case in ("p4", "llamaCpp")
            for settings in evaluated("settings")[case].values()
        }
        assert programs == {"p4": "pascaline-engine/bin/python", "llamaCpp": "llama-cpp/bin/llama-server"}


def test_firewall_is_opened_by_option_alone(evaluated: Any) -> None:
    opened = {case: set(host["firewall"]["allowedTCPPorts"]) - {SSH} for case, host in evaluated("units").items()}
    assert {case: sorted(ports) for case, ports in opened.items() if ports} == {
        "exporter": [9836],
        "monitoring": [3000, 9090],
        "p4": [30000],
        "router": [30080],
    }


class TestBesideWhatTheHostHas:
    """A Prometheus, a Grafana and an Alertmanager of the host's own keep their settings."""

    def test_prometheus(self, host: Any) -> None:
        """Its retention and interval win, and its jobs stand beside ours."""
        own = host("ownPrometheus")
        assert own["prometheus"] == {"retentionTime": "1y", "scrape_interval": "1m"}
        assert {job["job_name"] for job in own["scrapeConfigs"]} == {"node", "pascaline-exporter"}
        assert host("monitoring")["prometheus"] == {"retentionTime": "30d", "scrape_interval": "15s"}

    def test_grafana(self, host: Any) -> None:
        """Its port, secret and default data source stay; with two defaults Grafana would refuse to start."""
        own = host("ownGrafana")["grafana"]
        assert own["server"]["http_port"] == 3001
        assert own["security"]["secret_key"] == "$__file{/run/secrets/grafana}"
        assert {source["name"]: source["isDefault"] for source in own["dataSources"]} == {
            "Prometheus": True,
            "pascaline": False,
        }

    def test_alertmanager(self, host: Any) -> None:
        """Its receivers stay, as attributes or as text, and its flags stand beside ours."""
        own = host("ownAlertmanager")["alertmanager"]
        assert own["configuration"] == {"route": {"receiver": "mine"}, "receivers": [{"name": "mine"}]}
        assert set(own["extraFlags"]) == {"--cluster.listen-address=", "--data.retention=120h"}
        text = host("alertmanagerAsText")["alertmanager"]
        assert text["configText"].startswith("route: {receiver: mine}")
        assert text["configuration"] is None

    def test_cluster_of_alertmanagers(self, host: Any) -> None:
        assert host("alertmanagerCluster")["alertmanager"]["extraFlags"] == []


class TestNetwork:
    """An address on the interface that is named, by name, MAC address or driver."""

    def test_by_name(self, host: Any) -> None:
        assert host("addressByName")["interfaces"]["enp94s0f0"]["addresses"] == ["10.10.1.1/24"]
        assert "10-pascaline" not in host("addressByName")["links"]

    @pytest.mark.parametrize(
        ("case", "match", "address"),
        [
            ("addressByMac", {"PermanentMACAddress": "3c:fd:fe:00:00:01"}, "10.10.1.1/16"),
            ("addressByDriver", {"Driver": "ixgbe"}, "10.10.1.1/24"),
        ],
    )
    def test_by_what_udev_knows(self, host: Any, case: str, match: dict[str, str], address: str) -> None:
        """Udev gives the interface a name, which NixOS gives the address."""
        assert host(case)["interfaces"]["fleet0"]["addresses"] == [address]
        assert host(case)["links"]["10-pascaline"] == {"matchConfig": match, "linkConfig": {"Name": "fleet0"}}


def test_models_are_deleted_by_option_alone(evaluated: Any) -> None:
    deleting = [case for case, host in evaluated("units").items() if "pascaline-model-gc" in host["services"]]
    assert deleting == ["garbage"]


class TestCloudLab:
    def test_data_and_store_lie_on_their_own_partitions(self, host: Any) -> None:
        """Without /nix there is no system; a data disk that is missing must not keep the node from booting."""
        systems = host("cloudlab")["fileSystems"]
        assert systems["/"]["device"] == "/dev/sda1"
        assert systems["/nix"]["neededForBoot"] is True
        assert systems["/data"]["options"] == ["noatime", "nofail"]

    def test_control_network_alone_asks_for_an_address(self, host: Any) -> None:
        assert host("cloudlab")["interfaces"] == {"eno1": {"useDHCP": True, "addresses": []}}
        assert host("cloudlab")["useDHCP"] is False

    @pytest.mark.parametrize(
        ("case", "root", "grub", "systemd_boot"),
        [
            (
                "generated",
                {"device": "/dev/disk/by-uuid/0b1f7c5e-5bfa-4d7b-9a2c-0e1b7f3f5a10", "fsType": "ext4"},
                True,
                False,
            ),
            (
                "generatedSystemdBoot",
                {"device": "/dev/disk/by-uuid/0b1f7c5e-5bfa-4d7b-9a2c-0e1b7f3f5a10", "fsType": "ext4"},
                False,
                True,
            ),
            ("lvmRoot", {"device": "/dev/vg/root", "fsType": "ext4"}, True, False),
            ("zfsRoot", {"device": "rpool/root", "fsType": "zfs"}, True, False),
        ],
    )
    def test_what_the_host_itself_names_wins(
        self, host: Any, case: str, root: dict[str, str], grub: bool, systemd_boot: bool
    ) -> None:
        """nixos-generate-config wrote where its root is and how it boots; ours are defaults."""
        generated = host(case)
        assert {key: generated["fileSystems"]["/"][key] for key in root} == root
        assert (generated["grub"]["enable"], generated["systemdBoot"]) == (grub, systemd_boot)

    def test_console_is_serial(self, host: Any) -> None:
        assert "console=ttyS0,115200n8" in host("cloudlab")["kernelParams"]
        assert "terminal_output serial console" in host("cloudlab")["grub"]["extraConfig"]
