"""`pascaline service`: run an instance as a systemd unit on a host without NixOS; its limits by the plan with NixOS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.configuration import load
from pascaline.errors import ConfigurationError, DoesNotFitError, ExitCode, MissingError, PascalineError, StorageError
from pascaline.gpu.devices import VISIBLE_DEVICES
from pascaline.planning.unit_limits import NO_LIMITS, unit_limits
from pascaline.service import Unit
from pascaline.settings import BUILTIN_MODEL

if TYPE_CHECKING:
    import argparse

    from pascaline.configuration import Configuration
    from pascaline.planning.unit_limits import UnitLimits

BOOTED = Path("/run/systemd/system")
"""There if systemd is the init system (sd_booted(3))."""
DESCRIPTION = """Run an instance as a systemd unit on a host without NixOS.

  pascaline service show emily --config /etc/pascaline/emily.toml      print the unit file
  pascaline service install emily --config /etc/pascaline/emily.toml   check the settings, write it, reload systemd
  pascaline service remove emily                                       stop and disable it, delete the unit file
  pascaline service limits emily --config FILE > emily-limits.json     on NixOS: the file for the option `limits`

The unit is pascaline-NAME.service, with the sandbox of the NixOS module. It runs as its own user (DynamicUser), so the
program, the settings and the model must be readable by everyone, and outside /home and /root. The file of api_key_file
may be readable by root alone: systemd passes its content to the unit. Where llama.cpp keeps weights in the host's
memory, MemoryMax follows from the plan, and the unit is bound to the NUMA node of its GPU if that has room; install it
again after a change of the settings.

On NixOS the module makes the unit. `limits` prints what follows from the plan as JSON with its options memoryMax and
numaNode; null where the instance needs no limit. Run it on the host whose GPU and memory are planned.

exit codes: 0 done, 2 settings or paths that the unit cannot use, 8 no systemd here, 9 the unit cannot be written;
limits: 3 if the model cannot be read, 7 if the plan does not fit"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action, the instance and the parts of the unit."""
    parser.add_argument("action", choices=ACTIONS, metavar="{" + ",".join(ACTIONS) + "}", help="what to do")
    parser.add_argument("instance", metavar="NAME", help="name of the instance, and its name in the API")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with the settings (all but remove)")
    parser.add_argument(
        "--gpus", metavar="GPUS", help="GPUs by the numbers of `nvidia-smi -L`, or by UUID; '' for the CPU (default: 0)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the action."""
    return ACTIONS[arguments.action](arguments)


def _show(arguments: argparse.Namespace) -> int:
    print(_unit(arguments).text(), end="")
    return ExitCode.OK


def _print_limits(arguments: argparse.Namespace) -> int:
    _, configuration = _settings(arguments)
    gpus = _gpus(arguments.gpus, configuration.settings.device)
    print(json.dumps(_planned_limits(configuration, gpus).nixos_options()))
    return ExitCode.OK


def _install(arguments: argparse.Namespace) -> int:
    unit = _unit(arguments)
    text = unit.text()
    _need_systemd()
    try:
        unit.path.write_text(text)
    except OSError as error:
        raise StorageError(f"failed to write {unit.path}: {error.strerror}; run it as root (sudo)") from error
    _systemctl("daemon-reload")
    print(f"wrote {unit.path}\nstart it now and at every boot:\n  systemctl enable --now {unit.name}")
    return ExitCode.OK


def _remove(arguments: argparse.Namespace) -> int:
    unit = Unit(arguments.instance, executable=Path("/"), config=Path("/"), model=None, gpus="")
    if not unit.path.is_file():
        raise ConfigurationError(f"there is no {unit.path}, so no unit of an instance {arguments.instance!r} to remove")
    _need_systemd()
    _systemctl("disable", "--now", unit.name)
    try:
        unit.path.unlink()
    except OSError as error:
        raise StorageError(f"failed to delete {unit.path}: {error.strerror}; run it as root (sudo)") from error
    _systemctl("daemon-reload")
    print(f"removed {unit.path}; the cache /var/cache/{unit.name} and the state /var/lib/{unit.name} are kept")
    return ExitCode.OK


def _settings(arguments: argparse.Namespace) -> tuple[Path, Configuration]:
    """Return the settings file, by an absolute path, and what it says."""
    if arguments.config is None:
        raise ConfigurationError(
            "--config: no settings are named; write them to a file such as /etc/pascaline/NAME.toml"
        )
    config = Path(os.path.abspath(arguments.config))  # noqa: PTH100 # a symbolic link stays one
    return config, load(config_file=config, environment={})


def _unit(arguments: argparse.Namespace) -> Unit:
    config, configuration = _settings(arguments)
    settings = configuration.settings
    gpus = _gpus(arguments.gpus, settings.device)
    return Unit(
        arguments.instance,
        executable=_program(),
        config=config,
        model=None if settings.model == BUILTIN_MODEL else Path(settings.model),
        gpus=gpus,
        served_model_name=settings.served_model_name,
        api_key_file=settings.api_key_file,
        drain_seconds=settings.drain_timeout,
        limits=_limits(configuration, gpus),
    )


def _limits(configuration: Configuration, gpus: str) -> UnitLimits:
    """Return the unit's limits. Without a plan there are none, and a message says why."""
    try:
        return _planned_limits(configuration, gpus)
    except PascalineError as error:
        print(f"pascaline service: no limits of memory and NUMA node, as there is no plan: {error}", file=sys.stderr)
        return NO_LIMITS


def _planned_limits(configuration: Configuration, gpus: str) -> UnitLimits:
    """Plan the instance as its unit would run it; raise PascalineError if there is no plan, or none that fits.

    Only an engine that keeps weights on the host needs this.
    """
    from pascaline.engines import engine_named
    from pascaline.gpu.memory import node_bytes
    from pascaline.models import resolve
    from pascaline.models.reader import read_model
    from pascaline.planning import make_plan
    from pascaline.planning.placement import place
    from pascaline.planning.request import request_from_placement
    from pascaline.serving.task import this_host

    settings = configuration.settings
    if not gpus or not engine_named(settings.engine).keeps_weights_on_host:
        return NO_LIMITS
    host = this_host(settings)
    host = replace(host, environment={**host.environment, VISIBLE_DEVICES: gpus})
    placement = place(settings, configuration.card, host)
    spec = read_model(resolve.locate(settings)[0])
    plan = make_plan(spec, placement.card, request_from_placement(settings, spec, placement))
    if not plan.fits:
        raise DoesNotFitError(f"the plan does not fit: {plan.reasons[0]}; `pascaline plan --config` shows what would")
    sizes = [node_bytes(node) for node in placement.numa_nodes]
    known = [size for size in sizes if size is not None]
    return unit_limits(plan, placement, sum(known) if len(known) == len(sizes) else None)


def _gpus(chosen: str | None, device: str) -> str:
    if chosen is not None:
        return chosen
    return "" if device == "cpu" else "0"


def _program() -> Path:
    """Return the installed `pascaline`, beside this interpreter or on PATH."""
    beside = Path(sys.executable).with_name("pascaline")
    found = beside if beside.is_file() else shutil.which("pascaline")
    if found is None:
        raise MissingError("the program pascaline is neither beside this Python nor on PATH; install the package")
    return Path(found)


def _need_systemd() -> None:
    """Raise MissingError before anything is written."""
    for problem in (
        "systemctl is not on PATH: this host has no systemd" if shutil.which("systemctl") is None else None,
        f"{BOOTED} is not there: systemd does not run this host" if not BOOTED.is_dir() else None,
    ):
        if problem:
            raise MissingError(f"{problem}; `pascaline service show` prints the unit anyway")


def _systemctl(*arguments: str) -> None:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PascalineError(f"systemctl {' '.join(arguments)} failed: {done.stderr.strip() or done.returncode}")


ACTIONS = {"show": _show, "install": _install, "remove": _remove, "limits": _print_limits}
