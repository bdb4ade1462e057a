"""The virtual machines' own scripts, run with containers of the same hosts: what they ask for is there, machine or not."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.container import Container, image, wait_until
from support.virtual_machine import PATIENCE, as_machine, machine_image

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.slow("waits minutes for an alert of a fleet"),
    pytest.mark.systemd,
    pytest.mark.nix,
    pytest.mark.timeout(900),
]

SCRIPTS = Path(__file__).resolve().parents[1] / "nix" / "vm"
UNIT_SECONDS = 180


@dataclass
class Machine:
    """A container behind the methods that NixOS' test driver gives a script for a machine; the first one used boots it."""

    container: Container
    patience: int = 1
    """How much longer than the script says everything may take."""

    def execute(self, command: str) -> tuple[bool, str]:
        """Run it as the driver does, where a failure inside a pipe is one too; return whether it succeeded, and its output."""
        self.start()
        output = self.container.run("bash", "-c", f'(set -euo pipefail; {command}\n); echo "exit code $?"')
        text, _, code = output.rpartition("exit code ")
        return code == "0", text

    def succeed(self, command: str) -> str:
        succeeded, output = self.execute(command)
        assert succeeded, f"{command}: {output}"
        return output

    def fail(self, command: str) -> str:
        succeeded, output = self.execute(command)
        assert not succeeded, f"{command} succeeded: {output}"
        return output

    def wait_until_succeeds(self, command: str, timeout: float) -> None:
        limit = timeout * self.patience
        wait_until(lambda: self.execute(command)[0], limit, lambda: f"{command}: {self.execute(command)[1]}")

    def wait_for_unit(self, unit: str) -> None:
        self.start()
        show = self.container.show
        wait_until(
            lambda: show(unit, "ActiveState") == "active",
            UNIT_SECONDS * self.patience,
            lambda: self.container.journal(unit)[-2000:],
        )

    def shutdown(self) -> None:
        self.container.shut_down()

    def start(self) -> None:
        if not self.container.is_booted:
            self.container.boot()


@contextlib.contextmanager
def subtest(name: str) -> Iterator[None]:
    """As the driver's: a failure inside names it."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"in subtest: {name}")
        raise


@pytest.mark.parametrize("check", ["serve", "fleet"])
def test_script_passes(check: str, virtual_machines: dict[str, Container]) -> None:
    image()
    run_script(check, {name: Machine(container) for name, container in virtual_machines.items()})


@pytest.mark.skipif(
    not os.environ.get("PASCALINE_VIRTUAL_MACHINES"),
    reason="PASCALINE_VIRTUAL_MACHINES does not ask for virtual machines, which take many minutes without KVM",
)
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("check", ["serve"])
def test_script_passes_in_a_virtual_machine(check: str, virtual_machines: dict[str, Container]) -> None:
    """With a kernel of its own, two boots and a disk between them; the host's units as the modules render them."""
    machine_image()
    [(name, container)] = virtual_machines.items()
    machine = as_machine(container)
    try:
        run_script(check, {name: Machine(machine, PATIENCE)})
    finally:
        machine.kill()


def run_script(check: str, machines: dict[str, Machine]) -> None:
    """Run a check's script with these machines in place of those of NixOS' test driver."""
    script = SCRIPTS / f"{check}.py"

    def start_all() -> None:
        for machine in machines.values():
            machine.start()

    code = compile(script.read_text(), script, "exec")
    exec(code, {**machines, "start_all": start_all, "subtest": subtest})
