"""The script that builds the Nix environments, run here with the same wheels for this machine's own Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pascaline.plugin import PLUGIN

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "python" / "install-environment"


def uv() -> str:
    """Return uv, from PATH or from where ./dev put it."""
    found = shutil.which("uv", path=f"{REPOSITORY / '.dev/uv/bin'}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("uv is neither on PATH nor in .dev/uv")
    return found


def download(wheels: Path, *requirements: str) -> None:
    """Fetch locked wheels, hashes checked, without resolving anything."""
    wheels.mkdir()
    lock = (REPOSITORY / "python" / "requirements.lock").read_text()
    wanted = wheels.with_suffix(".txt")
    entries = re.split(r"\n(?=\S)", lock.strip())
    chosen = [entry for entry in entries if not requirements or entry.split("==")[0] in requirements]
    wanted.write_text("\n".join(chosen) + "\n")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
            "--only-binary=:all:", "-d", wheels, "-r", wanted,
        ],
        check=True,
        timeout=1200,
    )  # fmt: skip


def build_own(wheels: Path, *packages: str) -> None:
    """Build packages of ours as wheels, with the build backend of this environment."""
    for package in packages:
        command = [
            uv(),
            "build",
            "--quiet",
            "--wheel",
            "--no-build-isolation",
            "--python",
            sys.executable,
            "--out-dir",
            wheels,
        ]
        subprocess.run([*command, REPOSITORY / "python" / package], check=True, timeout=300)


def install(out: Path, wheels: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{Path(uv()).parent}:/usr/bin:/bin", "HOME": str(out.parent)}
    return subprocess.run(
        [SCRIPT, out, sys.executable, wheels], env=environment, capture_output=True, text=True, timeout=900
    )


def python_says(environment: Path, statement: str) -> str:
    result = subprocess.run(
        [environment / "bin/python", "-c", statement],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_usage_is_shown_when_called_wrongly() -> None:
    result = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(
        "Installs wheels into a new environment, offline: install-environment OUT PYTHON WHEELS\n"
    )


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    result = subprocess.run([SCRIPT, tmp_path, sys.executable, tmp_path], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"install-environment: {tmp_path} exists, must be a new folder\n"


def members(environment: str) -> list[str]:
    """Return the packages that a Nix environment is made of."""
    document = json.loads((REPOSITORY / "python" / "wheels.json").read_text())
    return list(document["environments"][environment])


def test_control_plane_needs_its_own_wheels_alone(tmp_path: Path) -> None:
    """From the few wheels of its environment, without torch, every command loads."""
    wheels, out = tmp_path / "wheels", tmp_path / "environment"
    download(wheels, *members("pascaline"))
    build_own(wheels, "gguf-acceptance", "pascaline")
    result = install(out, wheels)
    assert result.returncode == 0, result.stderr
    commands = json.loads(python_says(out, "import json, pascaline.cli as c; print(json.dumps(list(c.COMMANDS)))"))
    assert {"serve", "config", "exporter"} <= set(commands)
    for command in commands:
        shown = subprocess.run([out / "bin/pascaline", command, "--help"], capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stderr
    settings = tmp_path / "pascaline.toml"
    settings.write_text('model = "/data/emily.gguf"\ncard = "tesla-p4"\n')
    command = [out / "bin/pascaline", "config", "check", "--no-host", "--config", settings]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_environment_does_not_name_its_wheels(tmp_path: Path) -> None:
    """What names a path of Nix' store keeps it: the wheels would be copied to every host, twice the environment's size."""
    wheels, out = tmp_path / "wheels", tmp_path / "environment"
    download(wheels, "idna")
    build_own(wheels, "gguf-acceptance", "pascaline")
    assert install(out, wheels).returncode == 0
    naming = [file for file in out.rglob("*") if file.is_file() and str(wheels).encode() in file.read_bytes()]
    assert naming == []
    for record in out.glob("lib/python*/site-packages/*.dist-info/RECORD"):
        listed = [record.parents[1] / line.split(",")[0] for line in record.read_text().splitlines()]
        assert [file for file in listed if not file.exists()] == []


def test_router_needs_its_own_wheels_alone(tmp_path: Path) -> None:
    wheels, out = tmp_path / "wheels", tmp_path / "environment"
    download(wheels, *members("router"))
    result = install(out, wheels)
    assert result.returncode == 0, result.stderr
    assert python_says(out, "from sglang_router.router import Router; print(Router.__name__)") == "Router"


@pytest.mark.engine
@pytest.mark.slow("downloads and installs every wheel anew")
@pytest.mark.timeout(1800)
def test_environment_from_wheels_alone_imports_the_engine(tmp_path: Path) -> None:
    """From nothing but wheels, offline: the control plane, torch, SGLang and the plugin, with bytecode compiled."""
    wheels, out = tmp_path / "wheels", tmp_path / "environment"
    try:
        download(wheels)
        build_own(wheels, "gguf-acceptance", "pascaline", "sglang-pascal")
        result = install(out, wheels)
        assert result.returncode == 0, result.stderr
        assert python_says(out, "import torch; print(torch.__version__)").startswith("2.7.1")
        assert python_says(out, "import sglang.version; print(sglang.version.__version__)") == PLUGIN.sglang[-1]
        entry = (
            "from importlib.metadata import entry_points as e; print(e(group='sglang.srt.platforms')['pascal'].value)"
        )
        assert python_says(out, entry) == "sglang_pascal:activate"
        assert python_says(out, "import sglang_pascal; print(sglang_pascal.__name__)") == "sglang_pascal"
        version = subprocess.run(
            [out / "bin/pascaline", "--version"], capture_output=True, text=True, check=True
        ).stdout
        assert version.startswith("pascaline ")
        assert any(out.glob("lib/python*/site-packages/torch/__pycache__/*.pyc"))
    finally:
        # Ten gigabytes that need not be kept.
        shutil.rmtree(wheels, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
