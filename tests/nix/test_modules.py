"""The NixOS modules: what evaluates, what is refused and with which words, what the fleet derives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import options, units

pytestmark = pytest.mark.nix

LEAST_FAILING_CASES = 40
INTERFACE = (
    'the interface that gets it, for example { name = "enp94s0f0"; } (or mac, or driver; '
    '"ip -brief link" on the host lists them)'
)
SSH = 22
"""CloudLab's profile has the SSH daemon, for which NixOS opens the firewall."""
SERVING_UNITS = ["pascaline-emily", "pascaline-exporter", "pascaline-model-emily", "pascaline-store"]


def test_working_configurations_break_no_assertion(evaluated: Any) -> None:
    answers = {name: case["failed"] + case["warnings"] for name, case in evaluated("units").items()}
    assert {name: said for name, said in answers.items() if said} == {}


def test_templates_break_no_assertion(evaluated: Any) -> None:
    """As they are left in an empty folder: with a placeholder's disks, checksum and MAC addresses."""
    hosts = evaluated("templates")
    assert {name: host["failed"] + host["warnings"] for name, host in hosts.items()} == {
        "box": [],
        "gpu-1": [],
        "watch": [],
    }
    assert hosts["box"]["systemdBoot"] is True


def test_every_module_stands_alone(evaluated: Any) -> None:
    """Who imports one of `nixosModules` need not know which others it reads."""
    exposed = ["cloudlab", "cuda", "driver", "exporter", "inference", "models", "network", "router"]
    assert evaluated("alone") == {name: [] for name in [*(f"{name}.nix" for name in exposed), "monitoring"]}


def test_failing_configurations_say_why(evaluated: Any) -> None:
    """Each mistake is answered by exactly its message, which carries the remedy."""
    cases = evaluated("failures")
    assert len(cases) >= LEAST_FAILING_CASES
    missing = {name: case["failed"] for name, case in cases.items() if case["message"] not in case["failed"]}
    assert missing == {}
    # Two mistakes at once are two messages: the pair on one GPU is such a case; and NixOS too misses Alertmanager's settings.
    assert [name for name, case in cases.items() if len(case["failed"]) > 1] == ["twoOnOneGpu", "unheardAlerts"]


@pytest.mark.parametrize(
    "case", ["badDigest", "badCapability", "wholeDisk", "keyInStore", "unknownOption", "halfAddress", "noNode"]
)
def test_option_types_refuse(evaluated: Any, case: str) -> None:
    with pytest.raises(RuntimeError, match=r"is not of type|does not exist"):
        evaluated(f"typeErrors.{case}")


def test_a_file_of_limits_with_other_names_is_refused(evaluated: Any) -> None:
    with pytest.raises(RuntimeError, match="is not what `pascaline service limits` writes"):
        evaluated("typeErrors.otherLimits")


def test_every_option_is_documented(evaluated: Any) -> None:
    """Type, default, example and description: nobody should have to read a module to use it."""
    options = [option for option in evaluated("options") if not option["internal"]]
    assert options
    incomplete = [option["name"] for option in options if not (option["description"] and "example" in option)]
    assert [name for name in incomplete if not name.endswith("._module.args")] == []
    # A submodule's leaf without a default must be given; these are the only ones.
    required = [option["name"] for option in options if "default" not in option]
    assert all(name.endswith((".instance", ".address", ".memory", ".graphics")) for name in required), required


def test_rendered_settings_are_accepted_by_the_program(evaluated: Any, tmp_path: Path) -> None:
    """What the modules render for every host and case is sound to the code that reads it at start."""
    documents = [text for rendered in evaluated("settings").values() for text in rendered.values()]
    assert len(documents) > 5
    for settings in documents:
        file = tmp_path / "pascaline.toml"
        file.write_text(units.toml(settings))
        command = [sys.executable, "-m", "pascaline", "config", "check", "--no-host", "--config", file]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{settings}: {result.stderr}"


class TestSettingsBuild:
    """The derivation of an instance's settings file: its script, run as Nix runs it."""

    def build(self, script: str, settings: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
        """Build with these settings in place of those that Nix rendered."""
        rendered = folder / "rendered.toml"
        rendered.write_text(units.toml(settings))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-euc", re.sub(r"/nix/store/\S+\.toml", str(rendered), script)],
            env=os.environ | {"PATH": path, "out": str(folder / "out")},
            capture_output=True,
            text=True,
            check=False,
        )

    def test_sound_settings_become_the_file(self, evaluated: Any, tmp_path: Path) -> None:
        settings = {"model": "builtin:smollm2-135m", "context_length": 4096}
        result = self.build(evaluated("settingsCheck"), settings, tmp_path)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "out").read_text() == units.toml(settings)

    def test_program_refuses_what_the_modules_cannot_know(self, evaluated: Any, tmp_path: Path) -> None:
        """A misspelt key and a value out of range are both named, with their lines, and end the build."""
        settings = {"model": "builtin:smollm2-135m", "contxt_length": 4096, "max_running_requests": 0}
        result = self.build(evaluated("settingsCheck"), settings, tmp_path)
        assert result.returncode == 2
        assert "contxt_length" in result.stderr
        assert "max_running_requests" in result.stderr
        assert f"{tmp_path / 'rendered.toml'}:2" in result.stderr
        assert not (tmp_path / "out").exists()


def test_rendered_tree_is_that_of_the_modules(evaluated: Any) -> None:
    """The systemd tests run the text that is kept in the repository; to renew it: cd tests && python -m support.units."""
    assert units.read(units.ROOT) == units.tree(evaluated("container"))


def test_reference_page_is_that_of_the_modules(evaluated: Any) -> None:
    """To renew it: cd tests && python -m support.options."""
    assert options.PAGE.read_text() == options.page(evaluated("options"))


def test_a_split_model_has_a_checksum_for_each_part(evaluated: Any) -> None:
    """The unit that brings it and the instance that serves it are told the same."""
    unit = evaluated("units")["split"]["services"]["pascaline-model-emily"]["serviceConfig"]
    *_, url, given, target, _ = unit["ExecStart"].split(" ")
    digests, file = given.removeprefix("--sha256=").split(","), target.removeprefix("--target=")
    assert url == "https://models.example.org/emily-00001-of-00002.gguf"
    assert file == "/var/lib/pascaline/models/emily/emily-00001-of-00002.gguf"
    [settings] = evaluated("settings")["split"].values()
    assert (settings["model"], settings["model_sha256"]) == (file, digests)
    assert [digest.lower() for digest in digests] == [digests[0]] * 2


def test_link_reaches_the_unit_whole(evaluated: Any) -> None:
    """systemd would read %20 as a specifier of its own; and a query is no part of the file's name."""
    unit = evaluated("units")["download"]["services"]["pascaline-model-emily"]["serviceConfig"]
    *_, url, _, target, _ = unit["ExecStart"].split()
    assert url == '"https://models.example.org/my%%20emily.gguf?download=true"'
    assert target == "--target=/var/lib/pascaline/models/emily/my%%20emily.gguf"


def test_toolkit_has_the_outputs_of_its_components(evaluated: Any) -> None:
    """nixpkgs separates headers and libraries from programs; nvcc needs one of the static libraries."""
    names = {path.split("-", 1)[1] for path in evaluated("units")["cuda"]["toolkit"]}
    assert {"cuda_nvcc", "cuda_cudart-dev", "cuda_cudart-lib", "cuda_cudart-static", "libcublas-lib"} <= names
    assert "libcublas-static" not in names


def test_no_unit_needs_a_compiler(evaluated: Any) -> None:
    """The plugin gives Triton a driver that it never asks to compile, and switches torch.compile off on a GPU."""
    units = evaluated("units")
    for host, service in (("p4", "pascaline-emily"), ("cpu", "pascaline-tiny")):
        assert not {"CC", "TRITON_LIBCUDA_PATH"} & set(units[host]["services"][service]["environment"])


def test_cloudlab_changes_nothing_where_it_is_off(evaluated: Any) -> None:
    units = evaluated("units")
    assert units["cloudlab"]["enableAllHardware"] is True
    assert units["p4"]["enableAllHardware"] is False


def test_unfree_packages_of_a_host_are_allowed_and_no_others(evaluated: Any) -> None:
    """The driver of NixOS 26.05 comes in four parts, one of them its kernel module; the rest is what llama.cpp is built with."""
    unfree = evaluated("unfree")
    cuda = ["cccl", "cuda_cccl", "cuda_cudart", "cuda_nvcc", "libcublas"]
    driver = ["nvidia-kernel-modules", "nvidia-persistenced", "nvidia-settings", "nvidia-x11"]
    assert unfree["packages"] == [*cuda, *driver]
    assert unfree["licences"] == {"CUDA EULA": True, "cuDNN EULA": True, "unfree": False}


def test_host_builds_what_it_serves_with_and_nothing_else(evaluated: Any) -> None:
    """Of SGLang, llama.cpp, the router and the CUDA 11.8 toolkit, what no option asks for is not even looked at."""
    units = evaluated("lazy")
    assert {name: [unit for unit in found if unit != "pascaline-store"] for name, found in units.items()} == {
        "sglang": ["pascaline-emily", "pascaline-model-emily"],
        "llamaCpp": ["pascaline-second"],
        "exporter": ["pascaline-exporter"],
        "router": ["pascaline-router"],
        "monitoring": ["grafana"],
    }


class TestFleet:
    """One inventory, from which everything else follows."""

    def test_hosts_of_the_inventory_break_no_assertion(self, evaluated: Any) -> None:
        assert {name: host["failed"] for name, host in evaluated("hosts").items()} == {
            "gpu-1": [],
            "gpu-2": [],
            "watch": [],
        }

    def test_targets_and_workers_follow_from_the_inventory(self, evaluated: Any) -> None:
        targets = evaluated("targets")
        assert targets["workers"] == ["http://10.10.1.1:30000", "http://10.10.1.2:30000"]
        assert [target["address"] for target in targets["agents"]] == ["10.10.1.1:30001", "10.10.1.2:30001"]
        assert targets["exporters"] == [
            {"instance": "gpu-1", "address": "10.10.1.1:9836"},
            {"instance": "gpu-2", "address": "10.10.1.2:9836"},
        ]

    def test_adding_a_host_is_one_line(self, evaluated: Any) -> None:
        """The new host serves, is scraped and gets requests, and lets in the host that does both, without further settings."""
        grown = evaluated("grown")
        assert grown["host"]["failed"] == []
        assert sorted(grown["host"]["services"]) == SERVING_UNITS
        assert "ip saddr { 10.10.1.10 }" in grown["host"]["firewall"]["extraInputRules"]
        assert "http://10.10.1.3:30000" in grown["targets"]["workers"]
        scraped = {
            target
            for job in grown["watch"]["scrapeConfigs"]
            for each in job["static_configs"]
            for target in each["targets"]
        }
        assert {"10.10.1.3:30000", "10.10.1.3:30001", "10.10.1.3:9836"} <= scraped
        router = grown["watch"]["services"]["pascaline-router"]["serviceConfig"]["ExecStart"]
        assert router.endswith("http://10.10.1.1:30000 http://10.10.1.2:30000 http://10.10.1.3:30000")

    def test_profile_brings_its_gpu(self, evaluated: Any) -> None:
        """A c240g5 has a P100 by default."""
        host = evaluated("small")
        assert host["failed"] == []
        assert host["computeCapability"] == "6.0"
        assert sorted(host["services"]) == ["pascaline-emily", "pascaline-exporter"]

    def test_grafana_has_a_secret_of_its_own(self, evaluated: Any, tmp_path: Path) -> None:
        """Made at the first start and kept; NixOS 26.05 refuses to evaluate without one."""
        host = evaluated("hosts")["watch"]
        assert host["grafana"]["security"]["secret_key"] == "$__file{/var/lib/grafana/secret-key}"
        script = host["services"]["grafana"]["preStart"].replace("/var/lib/grafana", str(tmp_path))
        secrets = set()
        for _ in range(2):
            subprocess.run(["bash", "-euc", script], check=True)
            secrets.add((tmp_path / "secret-key").read_text())
        assert len(secrets) == 1
        assert len(secrets.pop()) == 44
        assert (tmp_path / "secret-key").stat().st_mode & 0o777 == 0o600

    def test_monitoring_host_scrapes_every_serving_host(self, evaluated: Any) -> None:
        jobs = {job["job_name"]: job["static_configs"] for job in evaluated("hosts")["watch"]["scrapeConfigs"]}
        assert sorted(jobs) == ["pascaline-agent", "pascaline-engine", "pascaline-exporter"]
        assert jobs["pascaline-agent"][0] == {
            "targets": ["10.10.1.1:30001"],
            "labels": {"host": "gpu-1", "name": "emily"},
        }

    def test_alertmanager_joins_no_cluster(self, evaluated: Any) -> None:
        """It would look for a private address to advertise, and exit on a host without one, as CloudLab nodes may be."""
        alertmanager = evaluated("hosts")["watch"]["alertmanager"]
        assert alertmanager["extraFlags"] == ["--cluster.listen-address="]
        assert alertmanager["configuration"]["receivers"][0]["webhook_configs"] == [
            {"url": "http://127.0.0.1:9099/alerts"}
        ]

    def test_firewall_admits_monitoring_and_router_and_nobody_else(self, evaluated: Any) -> None:
        hosts = evaluated("hosts")
        assert hosts["gpu-1"]["firewall"] == {
            "allowedTCPPorts": [SSH],
            "extraInputRules": "ip saddr { 10.10.1.10 } tcp dport { 30000, 30001, 9836 } accept\n"
            "ip saddr { 10.10.1.10 } tcp dport { 30000 } accept\n",
        }

    def test_router_is_reached_by_its_clients(self, evaluated: Any) -> None:
        """Only by those of the inventory; Grafana, which the inventory does not mention, only by its own host."""
        watch = evaluated("hosts")["watch"]
        assert watch["firewall"] == {
            "allowedTCPPorts": [SSH],
            "extraInputRules": "ip saddr { 10.10.1.0/24 } tcp dport { 30080 } accept\n",
        }
        assert "--host 0.0.0.0 --port 30080" in watch["services"]["pascaline-router"]["serviceConfig"]["ExecStart"]
        assert watch["grafana"]["server"]["http_addr"] == "127.0.0.1"

    def test_router_and_grafana_are_opened_as_the_inventory_says(self, evaluated: Any) -> None:
        """To everyone by a port that is open to all, to networks by a rule each, since they may overlap."""
        host = evaluated("open")
        assert host["failed"] == []
        assert host["firewall"] == {
            "allowedTCPPorts": [30080],
            "extraInputRules": "ip saddr { 10.0.0.1 } tcp dport { 30000, 30001 } accept\n"
            "ip saddr { 10.0.0.1 } tcp dport { 30000 } accept\n"
            "ip saddr { 10.1.0.0/16 } tcp dport { 3000 } accept\n"
            "ip saddr { 10.1.2.0/24 } tcp dport { 3000 } accept\n",
        }
        assert "--host 0.0.0.0" in host["services"]["pascaline-router"]["serviceConfig"]["ExecStart"]
        assert host["grafana"]["server"]["http_addr"] == "0.0.0.0"
        assert host["grafana"]["security"]["admin_password"] == "$__file{/etc/pascaline/grafana-password}"

    def test_address_of_the_inventory_is_on_an_interface(self, evaluated: Any) -> None:
        """CloudLab's experiment network has no DHCP."""
        host = evaluated("hosts")["gpu-1"]
        assert host["interfaces"]["fleet0"]["addresses"] == ["10.10.1.1/24"]
        assert host["links"]["10-pascaline"] == {
            "matchConfig": {"PermanentMACAddress": "3c:fd:fe:00:00:01"},
            "linkConfig": {"Name": "fleet0"},
        }
        assert evaluated("small")["interfaces"] == {}

    def test_router_knows_every_worker(self, evaluated: Any) -> None:
        service = evaluated("hosts")["watch"]["services"]["pascaline-router"]["serviceConfig"]
        assert "--worker-urls http://10.10.1.1:30000 http://10.10.1.2:30000" in service["ExecStart"]
        assert service["LoadCredential"] == ["api-key:/etc/pascaline/api-key"]

    def test_serving_host_has_driver_model_and_instance(self, evaluated: Any) -> None:
        host = evaluated("hosts")["gpu-1"]
        assert host["nvidia"] == {
            "branch": "legacy_580",
            "open": False,
            "nvidiaPersistenced": True,
            "nvidiaSettings": False,
        }
        assert sorted(host["services"]) == SERVING_UNITS
        assert host["grub"]["device"] == "/dev/sda1"
        assert host["grub"]["forceInstall"] is True
        assert "console=ttyS0,115200n8" in host["kernelParams"]

    @pytest.mark.parametrize(
        ("case", "message"),
        [
            ("unknownInstance", "fleet: host a names instance 'emilie', must be one of: "),
            ("unknownRole", "fleet: host a names role 'watcher', must be one of: monitoring, router"),
            (
                "unknownKey",
                "fleet: host a has an unknown key 'gpus', "
                "must be one of: address, gpu, instances, modules, network, profile, roles",
            ),
            ("unknownProfile", "fleet: host a has profile 'c220g6', must be one of: c220g5, c240g5"),
            (
                "ownPort",
                "fleet: instance emily sets settings.port, must leave ports to the fleet, "
                "whose scrape targets, workers and firewall rules follow them",
            ),
            ("noAddress", "fleet: host a has address '', must be an IPv4 address, for example 10.10.1.1"),
            (
                "nameForAddress",
                "fleet: host a has address 'gpu-1.example.org', must be an IPv4 address, for example 10.10.1.1",
            ),
            (
                "halfGpu",
                "fleet: gpu of host a has the keys card, must have card and capability, "
                'for example { card = "tesla-p4"; capability = "6.1"; }',
            ),
            (
                "misspeltKey",
                "fleet: unknown key 'instnaces', must be one of: alertWebhook, apiKeyFile, clients, grafanaClients, "
                "grafanaPasswordFile, instances, models, hosts",
            ),
            ("unknownModel", "fleet: instance emily names model 'emilie', must be one of: emily"),
            ("sameAddress", "fleet: address 10.0.0.1 of host a is used twice"),
            (
                "noNetwork",
                'fleet: host a has no network, must say where its address 10.0.0.1 comes from: "dhcp" where the network '
                f"hands it out, else {INTERFACE}",
            ),
            ("otherNetwork", f"fleet: host a has network 'static', must be \"dhcp\", or {INTERFACE}"),
            (
                "misspeltNetwork",
                "fleet: network of host a has an unknown key 'nmae', must be one of: driver, mac, name, prefixLength",
            ),
            (
                "routerForNobody",
                "fleet: host a has role router and no clients are declared, must say who may use it: "
                'clients = [ "10.0.0.0/8" ], or "everyone" (with apiKeyFile), or [ ] for that host alone',
            ),
            (
                "badClient",
                "fleet: clients has '10.0.0', must be IPv4 addresses or networks, "
                'for example [ "10.0.0.0/8" ], or "everyone"',
            ),
            ("clientsWithoutKey", "fleet: clients are everyone, must have an API key; set apiKeyFile"),
            (
                "grafanaWithoutPassword",
                "fleet: grafanaClients are declared, must have a password of your own; "
                "set grafanaPasswordFile, a file on the monitoring host that grafana can read",
            ),
        ],
    )
    def test_mistakes_in_an_inventory_are_named(self, evaluated: Any, case: str, message: str) -> None:
        assert evaluated("problems")[case][0] == message
