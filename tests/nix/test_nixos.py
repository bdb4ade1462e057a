"""With NixOS' own modules, where $PASCALINE_NIXPKGS names a nixpkgs: what only they can show. The other cases run with them too."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import units
from support.nix import NIXPKGS, REPOSITORY, STAND_INS, evaluate, tool

pytestmark = [
    pytest.mark.nix,
    pytest.mark.skipif(
        NIXPKGS is None, reason="PASCALINE_NIXPKGS names no nixpkgs: NixOS' own modules are not available"
    ),
]

WITHOUT_MODULE = {
    "services.grafana.provision.dashboards.settings.providers",
    "services.grafana.provision.datasources.settings.datasources",
    "virtualisation.memorySize",
}
"""Parts of another option's submodule (two), and of virtual machines."""
CPU_SECONDS = 5
HEAP_BYTES = 10**9
SNIPPETS = REPOSITORY / "docs" / "first-switch.md"
MODULES = {
    "agenix": ["agenix/modules/age.nix"],
    "sops-nix": ["sops-nix/modules/sops/default.nix"],
    "disko": ["disko/module.nix"],
}
"""The modules beside ours in each snippet, by paths in the folder of the stand-ins."""


def say(capsys: pytest.CaptureFixture[str], line: str) -> None:
    """Print a finding of the run, whether or not its test passes."""
    with capsys.disabled():
        print(f"\n{line}", end="")


def test_options_are_those_of_nixos(evaluated: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option that a stand-in declares is one of NixOS, of a module of the tree that is printed."""
    modules = evaluated("nixosModules")
    for file, options in sorted(modules.items()):
        say(capsys, f"real: {file}: {', '.join(sorted(options))}")
    assert set(modules.pop("missing", [])) <= WITHOUT_MODULE
    assert all(file.startswith("nixos/modules/") for file in modules), modules.keys()


@pytest.mark.parametrize("host", ["gpu-1", "gpu-2", "watch"])
def test_hosts_become_systems(evaluated: Any, host: str) -> None:
    assert evaluated(f"hosts.{host}.toplevel").startswith("/nix/store/")


def test_units_are_those_that_a_real_systemd_ran(evaluated: Any) -> None:
    """NixOS writes what is kept in tests/systemd/root, line for line, but for the paths of its store."""
    folder = units.ROOT / "etc" / "systemd" / "system"
    kept = {file.name: file.read_text() for file in folder.glob("*.service")}
    written = evaluated("nixosUnits")
    assert sorted(kept) == sorted(written)
    for name, text in kept.items():
        lines = [line for line in text.partition("[Service]")[2].splitlines() if line and "/nix/store/" not in line]
        missing = set(lines) - set(written[name].splitlines())
        assert missing == set(), name


def test_host_is_evaluated_in_seconds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In processor time, which other programs of the machine do not lengthen."""
    statistics = tmp_path / "statistics.json"
    library = ("--argstr", "libPath", f"{NIXPKGS}/lib", "--argstr", "nixpkgs", str(NIXPKGS))
    subprocess.run(
        [tool("nix-instantiate"), "--eval", "--strict", "tests/nix/evaluate.nix", *library, "-A", "oneHost"],
        cwd=REPOSITORY,
        env=os.environ | {"NIX_SHOW_STATS": "1", "NIX_SHOW_STATS_PATH": str(statistics)},
        capture_output=True,
        check=True,
    )
    measured = json.loads(statistics.read_text())
    seconds, size = measured["cpuTime"], measured["gc"]["heapSize"]
    say(capsys, f"one host: {seconds:.1f} s of processor time, heap {size / 1e6:.0f} MB")
    assert seconds < CPU_SECONDS
    assert size < HEAP_BYTES


class TestFirstSwitchPage:
    """The snippets of docs/first-switch.md, each beside the module that it needs."""

    def snippet(self, name: str) -> str:
        """Return the code block that follows the page's mark of this name."""
        found = re.search(rf"<!-- evaluated: {name} -->\n```nix\n(.*?)^```$", SNIPPETS.read_text(), re.S | re.M)
        assert found, name
        return found.group(1)

    def evaluate(self, name: str, folder: Path) -> Any:
        """Return the host of a snippet, in a folder that has the encrypted files which it names."""
        modules = [STAND_INS / path for path in MODULES[name]]
        for module in modules:
            if not module.is_file():
                pytest.skip(f"{name} is not available (looked for {module})")
        (folder / "secrets").mkdir()
        (folder / "secrets" / "api-key.age").write_text("age-encryption.org/v1\n")
        (folder / "secrets" / "box.yaml").write_text("api-key: ENC[]\nsops: {version: 3.9.0}\n")
        (folder / "snippet.nix").write_text(self.snippet(name))
        (folder / "case.nix").write_text(
            "{ imports = [ ./snippet.nix ]; services.openssh.enable = true;\n"
            '  services.pascaline.instances.emily = { gpus = [ ]; settings.model = "builtin:smollm2-135m"; }; }\n'
        )
        files = " ".join(str(module) for module in modules)
        arguments = f"{{ file = {folder / 'case.nix'}; modules = map toString [ {files} ]; }}"
        return evaluate("besideOf", "--arg", "besides", arguments)

    @pytest.mark.parametrize("name", ["agenix", "sops-nix"])
    def test_secret_becomes_the_key(self, name: str, tmp_path: Path) -> None:
        """systemd reads the decrypted file, and the API is open to those who know it."""
        host = self.evaluate(name, tmp_path)
        assert host["failed"] == []
        assert host["toplevel"].startswith("/nix/store/")
        [credential] = host["services"]["pascaline-emily"]["serviceConfig"]["LoadCredential"]
        assert re.fullmatch(r"api-key:/run/(agenix|secrets)/api-key", credential)
        assert 30000 in host["firewall"]["allowedTCPPorts"]

    def test_disks_become_file_systems(self, tmp_path: Path) -> None:
        host = self.evaluate("disko", tmp_path)
        assert host["failed"] == []
        assert host["toplevel"].startswith("/nix/store/")
        assert {mount: system["fsType"] for mount, system in host["fileSystems"].items()} == {
            "/": "ext4",
            "/boot": "vfat",
            "/data": "ext4",
        }
