"""The packages and the flake's outputs evaluate against a trimmed nixpkgs: what Nix would build is all there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from support.nix import STAND_INS

pytestmark = pytest.mark.nix

INPUTS = ("nixpkgs", "nixpkgs-cuda", "colmena")
KERNEL_VARIABLES = ("CUDA_NVRTC", "CUDA_PTXAS")


@pytest.fixture(scope="module")
def flake(nix_command: Any, source: Path, input_overrides: list[str]) -> Any:
    """A function that evaluates an output of our flake over the stand-ins."""

    def evaluate(output: str, apply: str = "x: x") -> Any:
        options = ("--impure", "--json", "--no-write-lock-file", *input_overrides)
        result = nix_command("eval", *options, f"path:{source}#{output}", "--apply", apply)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return evaluate


def test_flake_check_passes(nix_command: Any, source: Path, input_overrides: list[str]) -> None:
    """Nix' own view of every output: packages, apps, modules, hosts, checks, templates. None needs KVM."""
    options = ("--no-build", "--impure", "--no-write-lock-file", *input_overrides)
    result = nix_command("flake", "check", *options, f"path:{source}")
    assert result.returncode == 0, result.stderr
    assert "checking derivation checks.x86_64-linux.host-watch" in result.stderr
    assert "runNixOSTest" not in result.stderr
    assert "pascaline-serve" not in result.stderr


def test_outputs_are_listed_without_evaluating_a_system(
    nix_command: Any, source: Path, input_overrides: list[str]
) -> None:
    """`nix flake show` needs only names; evaluating each system would take minutes."""
    options = ("--json", "--impure", "--no-write-lock-file", *input_overrides)
    result = nix_command("flake", "show", *options, f"path:{source}")
    assert result.returncode == 0, result.stderr
    checks = json.loads(result.stdout)["checks"]["x86_64-linux"]
    assert {"host-gpu-1", "case-p4", "failures", "units"} <= set(checks)
    assert "a system is evaluated" not in result.stderr


def test_packages_need_two_instances_of_nixpkgs(nix_command: Any, source: Path, input_overrides: list[str]) -> None:
    """The host's own, and the one with CUDA 11.8: each is hundreds of megabytes to evaluate."""
    options = ("--impure", "--json", "--no-write-lock-file", *input_overrides)
    paths = "builtins.mapAttrs (_: package: package.drvPath)"
    result = nix_command("eval", *options, f"path:{source}#packages.x86_64-linux", "--apply", paths)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("trace: an instance of nixpkgs\n") == 1
    assert result.stderr.count("trace: an instance of nixpkgs-cuda\n") == 1


@pytest.mark.parametrize("system", ["aarch64-linux", "aarch64-darwin", "x86_64-darwin"])
def test_administrators_elsewhere_have_formatter_and_shell(flake: Any, system: str) -> None:
    """Whoever maintains the hosts may use an ARM board or a Mac, which have no CUDA."""
    assert flake(f"formatter.{system}.name")
    assert flake(f"devShells.{system}.default.name") == "shell"


def test_virtual_machines_are_an_output_of_their_own(flake: Any) -> None:
    tests = flake("legacyPackages.x86_64-linux.vm-tests", "builtins.mapAttrs (_: test: test.drvPath)")
    assert sorted(tests) == ["fleet", "serve"]


def test_lock_is_whole(nix_command: Any, source: Path) -> None:
    """Nix takes the lock as it is: complete, of this flake's inputs, in need of no update and no network."""
    result = nix_command("flake", "metadata", "--json", "--no-update-lock-file", f"path:{source}")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["locks"] == json.loads((source / "flake.lock").read_text())


@pytest.mark.parametrize(
    "package",
    [
        "default",
        "docs",
        "llama-cpp-pascal",
        "pascaline",
        "pascaline-engine",
        "pascaline-router",
        "sglang-pascal-kernels",
    ],
)
def test_package_evaluates_to_a_derivation(flake: Any, package: str) -> None:
    assert flake(f"packages.x86_64-linux.{package}.drvPath").startswith("/nix/store/")


def test_llama_cpp_is_made_for_pascal_alone(flake: Any) -> None:
    """With the last CUDA that can; of two settings of the architectures CMake takes the later one."""
    package = flake("packages.x86_64-linux.llama-cpp-pascal", "p: { inherit (p) cudaSupport cudaVersion cmakeFlags; }")
    assert package["cudaSupport"] is True
    assert package["cudaVersion"] == "12.9"
    assert package["cmakeFlags"][-1] == "-DCMAKE_CUDA_ARCHITECTURES=60;61"


def test_other_torch_is_another_environment(flake: Any) -> None:
    """The CUDA 11.8 build of torch is one override, and changes only the engine environment."""
    locked = flake("packages.x86_64-linux.pascaline-engine.drvPath")
    other = flake("packages.x86_64-linux.pascaline-engine", 'p: (p.override { torchFlavour = "cu118"; }).drvPath')
    assert other.startswith("/nix/store/")
    assert other != locked


def test_other_torch_is_accepted_by_torchvision(flake: Any, tmp_path: Path) -> None:
    """Its wheel is for CUDA 12 and refuses a torch of CUDA 11 when it is imported, unless its check is taken out."""
    torchvision = Path(sysconfig.get_path("purelib")) / "torchvision"
    if not torchvision.is_dir():
        pytest.skip("torchvision is not installed here")
    check, changed = "if t_major != tv_major:", "if False:"
    install = flake("packages.x86_64-linux.pascaline-engine", 'p: (p.override { torchFlavour = "cu118"; }).postInstall')
    assert f'torchvision/extension.py \\\n  --replace-fail "{check}" "{changed}"' in install
    assert "torchvision" not in flake("packages.x86_64-linux.pascaline-engine.postInstall")

    (tmp_path / "torchvision").mkdir()
    for file in torchvision.iterdir():
        (tmp_path / "torchvision" / file.name).symlink_to(file)
    (tmp_path / "torchvision.libs").symlink_to(torchvision.with_name("torchvision.libs"))
    extension = tmp_path / "torchvision" / "extension.py"
    text = extension.read_text()
    extension.unlink()
    assert text.count(check) == 1
    extension.write_text(text.replace(check, changed))
    script = "import torch.version; torch.version.cuda = '11.8'; import torchvision.transforms as t; print(t.Compose)"
    for path, accepted in ((torchvision.parent, False), (tmp_path, True)):
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(path)}
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (result.returncode == 0) is accepted, result.stderr


def test_kernels_are_built_by_the_plugin_itself(flake: Any, repository: Path, tmp_path: Path) -> None:
    """The derivation calls the plugin's own build with CUDA 11.8 by path; the build needs nothing but a bare Python."""
    command = flake("packages.x86_64-linux.sglang-pascal-kernels.buildCommand")
    assert "python -m sglang_pascal.kernels.build --output $out" in command
    variables = {name: flake(f"packages.x86_64-linux.sglang-pascal-kernels.{name}") for name in KERNEL_VARIABLES}
    assert all(path.startswith("/nix/store/") for path in variables.values())
    environment = variables | {"PYTHONPATH": str(repository / "python/sglang-pascal/src"), "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-S", "-m", "sglang_pascal.kernels.build", "--output", tmp_path / "kernels"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # The stand-ins for CUDA 11.8 hold no files, and the build says so by the variable's name.
    assert result.returncode == 8
    assert "NVRTC 11.8 is not on this machine" in result.stderr
    assert "name the file by CUDA_NVRTC" in result.stderr


C_LIBRARY = {
    *("ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libm.so.6", "libmvec.so.1", "libpthread.so.0", "librt.so.1"),
    *("libutil.so.1",),
}
BUILD_INPUTS = {"libgcc_s.so.1", "libstdc++.so.6", "libz.so.1"}
"""Of stdenv's compiler and zlib, which python/default.nix names."""


def test_wheels_need_no_library_that_nix_lacks(flake: Any, run_nix: Any) -> None:
    """autoPatchelf fails the build on a library that is neither in the environment nor named as to be left out."""
    packages = Path(sysconfig.get_path("purelib"))
    if not (packages / "torch").is_dir():
        pytest.skip("torch is not installed here")
    files = [file for file in packages.rglob("*.so*") if file.is_file()]
    listing = run_nix("readelf", "--dynamic", *files).stdout
    needed = set(re.findall(r"\(NEEDED\) +Shared library: \[(.+)\]", listing))
    assert "libcudnn.so.9" in needed
    ignored = set(flake("packages.x86_64-linux.pascaline-engine.autoPatchelfIgnoreMissingDeps"))
    missing = needed - {file.name for file in files} - C_LIBRARY - BUILD_INPUTS - ignored
    assert missing == set()


def test_libraries_find_their_parts_beside_them(flake: Any) -> None:
    """NVRTC and cuDNN open further files of their own folder by name, which autoPatchelf finds in no header."""
    assert "$ORIGIN" in flake("packages.x86_64-linux.pascaline-engine.appendRunpaths")


def test_commands_find_the_driver_where_nixos_keeps_it(flake: Any) -> None:
    command = flake("packages.x86_64-linux.pascaline.buildCommand")
    assert "--suffix LD_LIBRARY_PATH : /run/opengl-driver/lib" in command


def test_app_runs_the_control_plane(flake: Any) -> None:
    assert flake("apps.x86_64-linux.default.program").endswith("/bin/pascaline")


def test_modules_are_exposed(flake: Any) -> None:
    names = {
        "cloudlab",
        "cuda",
        "default",
        "driver",
        "exporter",
        "inference",
        "models",
        "monitoring",
        "network",
        "router",
    }
    assert set(flake("nixosModules", "builtins.attrNames")) == names


def test_modules_bring_the_packages_once(flake: Any, repository: Path) -> None:
    """Whoever imports several of them gets one overlay, not as many: each is a whole nixpkgs to evaluate."""
    count = f"""
      modules:
      let
        lib = import {STAND_INS}/nixpkgs-lib/lib;
        standIn = import {repository}/tests/nix/stand-in.nix {{ inherit lib; }};
        evaluated = lib.evalModules {{
          modules = [ standIn.module standIn.nixosModule modules.driver modules.inference modules.router ];
          specialArgs = {{ inherit (standIn) pkgs; }};
        }};
      in
      builtins.length evaluated.config.nixpkgs.overlays
    """
    assert flake("nixosModules", count) == 1


def test_every_host_evaluates_to_a_system(flake: Any) -> None:
    paths = flake("nixosConfigurations", "builtins.mapAttrs (_: host: host.config.system.build.toplevel.drvPath)")
    assert sorted(paths) == ["gpu-1", "gpu-2", "watch"]
    assert all(path.startswith("/nix/store/") for path in paths.values())


def test_hive_deploys_every_host(flake: Any) -> None:
    """Colmena's own evaluator accepts the hive and finds a system for each host."""
    hive = "h: { deployment = h.deploymentConfig; systems = builtins.mapAttrs (_: t: t.drvPath) h.toplevel; }"
    found = flake("colmenaHive", hive)
    assert found["deployment"]["gpu-1"]["targetHost"] == "10.10.1.1"
    assert found["deployment"]["gpu-1"]["tags"] == ["gpu"]
    assert found["deployment"]["watch"]["tags"] == ["monitoring", "router"]
    assert all(path.startswith("/nix/store/") for path in found["systems"].values())


def test_hive_warns_of_nothing(nix_command: Any, source: Path, input_overrides: list[str]) -> None:
    """The locked Colmena reads the platform by a name that nixpkgs 26.05 warns of; ours is put in its place."""
    options = ("--impure", "--json", "--no-write-lock-file", *input_overrides)
    result = nix_command("eval", *options, f"path:{source}#colmenaHive.toplevel.gpu-1.drvPath")
    assert result.returncode == 0, result.stderr
    assert "a deprecated name of nixpkgs" not in result.stderr


def test_checks_evaluate(flake: Any) -> None:
    """Each check is a derivation; building them needs the real nixpkgs."""
    checks = flake("checks.x86_64-linux", "builtins.mapAttrs (_: check: check.drvPath)")
    assert {
        "format",
        "statix",
        "deadnix",
        "options",
        "failures",
        "settings",
        "units",
        "host-gpu-1",
    } <= set(checks)


SYSTEMS = "builtins.mapAttrs (_: host: host.config.system.build.toplevel.drvPath)"
TEMPLATES = {
    "single": (
        ["configuration.nix", "flake.nix", "hardware-configuration.nix"],
        {"nixosConfigurations": (SYSTEMS, ["box"])},
    ),
    "fleet": (
        ["common.nix", "flake.nix", "fleet.nix"],
        {
            "nixosConfigurations": (SYSTEMS, ["gpu-1", "watch"]),
            "colmenaHive": ("hive: builtins.mapAttrs (_: system: system.drvPath) hive.toplevel", ["gpu-1", "watch"]),
        },
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_template_becomes_systems(
    template: str, nix_command: Any, source: Path, input_overrides: list[str], tmp_path: Path
) -> None:
    """What `nix flake init -t` leaves in an empty folder evaluates to systems without a further word."""
    files, outputs = TEMPLATES[template]
    result = nix_command("flake", "init", "-t", f"path:{source}#{template}", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == files
    inputs = [f"pascaline/{part}" if part in INPUTS else part for part in input_overrides]
    options = ("--impure", "--json", "--no-write-lock-file", "--override-input", "pascaline", f"path:{source}", *inputs)
    for output, (apply, systems) in outputs.items():
        result = nix_command("eval", *options, f"path:{tmp_path}#{output}", "--apply", apply)
        assert result.returncode == 0, result.stderr
        assert sorted(json.loads(result.stdout)) == systems


def test_development_shell_evaluates(flake: Any) -> None:
    assert flake("devShells.x86_64-linux.default.drvPath").startswith("/nix/store/")
