"""A folder of one instance is locked while that instance lives; a second one is refused, and told by whom."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from pascaline.errors import PortInUseError
from pascaline.serving.own_folders import RUNTIME, STATE, OwnFolders
from support.ports import this_process

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("variable", [RUNTIME, STATE])
def test_a_second_instance_is_refused_while_the_first_lives(variable: str, tmp_path: Path) -> None:
    given = {variable: f"{tmp_path}:/another"}
    with OwnFolders(given) as first:
        assert first.hold(variable) == tmp_path
        with OwnFolders(given) as second, pytest.raises(PortInUseError) as refused:
            second.hold(variable)
    assert str(refused.value) == (
        f"{variable}: {tmp_path} is in use by {this_process()}; stop that process, or give each instance a folder of its own"
    )
    with OwnFolders(given) as third:
        assert third.hold(variable) == tmp_path


def test_an_instance_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    given = {RUNTIME: str(tmp_path)}
    code = (
        "import sys; from pascaline.serving.own_folders import OwnFolders\n"
        f"with OwnFolders({given!r}) as folders: folders.hold({RUNTIME!r}); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with OwnFolders(given) as folders, pytest.raises(PortInUseError, match=rf" \(pid {other.pid}\); "):
            folders.hold(RUNTIME)
        other.kill()
        other.wait()
    with OwnFolders(given) as folders:
        assert folders.hold(RUNTIME) == tmp_path


def test_one_folder_for_both(tmp_path: Path) -> None:
    with OwnFolders({RUNTIME: str(tmp_path), STATE: str(tmp_path)}) as folders:
        assert folders.hold(RUNTIME) == folders.hold(STATE) == tmp_path


def test_without_a_service_manager(tmp_path: Path) -> None:
    with OwnFolders({STATE: ""}) as folders:
        assert folders.hold(RUNTIME) is None
        assert folders.hold(STATE) is None
    with OwnFolders({STATE: str(tmp_path / "gone")}) as folders, pytest.raises(FileNotFoundError):
        folders.hold(STATE)
