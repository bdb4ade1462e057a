"""What is served is what was verified: all parts of a split model, and no file that changed between two starts."""

from __future__ import annotations

import hashlib
import shutil
from typing import TYPE_CHECKING

import pytest
from pascaline.errors import ExitCode
from pascaline.models.folder_files import folder_files, folder_sha256
from support.hf_models import write_folder
from support.instance import FAKE_ENGINE
from support.models import split_gguf, tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.instance import Instance

    Serve = Callable[..., Instance]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """A private copy, to be changed at will."""
    return shutil.copy(model, tmp_path / "own.gguf")


def overwrite(path: Path) -> None:
    """Change weights, and neither size nor header."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 64)
        file.write(b"\x11" * 64)


class TestChangedInPlace:
    def test_a_checksum_holds_at_every_start_of_the_engine(self, serve: Serve, own: Path) -> None:
        before = sha256(own)
        instance = serve(model=own, model_sha256=before)
        instance.wait_for_state("ready")
        overwrite(own)
        instance.fault(crash_now=1)
        assert instance.wait() == ExitCode.MODEL
        assert instance.error == (
            f"{own} has sha256 {sha256(own)}, must be {before} (model_sha256); copy or download it again"
        )
        assert instance.states[-2:] == ["restarting", "failed"]

    def test_the_checksum_of_a_folder_holds_too(self, serve: Serve, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "folder", tiny("llama"))
        names = folder_files(folder)
        before = folder_sha256(names, [sha256(folder / name) for name in names])
        instance = serve(model=folder, model_sha256=before)
        instance.wait_for_state("ready")
        overwrite(folder / "model.safetensors")
        instance.fault(crash_now=1)
        assert instance.wait() == ExitCode.MODEL
        after = folder_sha256(names, [sha256(folder / name) for name in names])
        assert instance.error.startswith(
            f"{folder} has sha256 {after} over its 2 files, must be {before} (model_sha256)"
        )

    def test_a_change_while_the_engine_loads_is_noticed_before_it_serves(self, serve: Serve, own: Path) -> None:
        before = sha256(own)
        instance = serve(model=own, model_sha256=before, faults="start_seconds=3")
        instance.wait_for_state("starting")
        overwrite(own)
        assert instance.wait() == ExitCode.MODEL
        assert f"must be {before} (model_sha256)" in instance.error
        assert "ready" not in instance.states

    def test_without_a_checksum_the_new_file_is_read_and_reported(self, serve: Serve, own: Path) -> None:
        before = sha256(own)
        instance = serve(model=own)
        assert instance.wait_for_state("ready")["model"]["sha256"] == before
        overwrite(own)
        instance.fault(crash_now=1)
        instance.wait_for_state("restarting")
        assert instance.wait_for_state("ready")["model"]["sha256"] == sha256(own)
        assert f"sha256 {sha256(own)}, was {before}; it is read again" in instance.text

    def test_a_file_that_was_only_touched_is_served_again(self, serve: Serve, own: Path) -> None:
        instance = serve(model=own, model_sha256=sha256(own))
        instance.wait_for_state("ready")
        own.touch()
        instance.fault(crash_now=1)
        instance.wait_for_state("restarting")
        assert instance.wait_for_state("ready")["restarts"] == 1

    def test_a_file_that_is_gone(self, serve: Serve, own: Path) -> None:
        instance = serve(model=own, model_sha256=sha256(own))
        instance.wait_for_state("ready")
        own.unlink()
        instance.fault(crash_now=1)
        assert instance.wait() == ExitCode.MODEL
        assert instance.error == f"failed to read {own}: No such file or directory"


class TestSplitModels:
    def test_each_part_is_verified_and_any_may_be_named(self, serve: Serve, own: Path) -> None:
        parts = split_gguf(own, 2)
        digests = [sha256(part) for part in parts]
        instance = serve(model=parts[1], model_sha256=",".join(digests))
        report = instance.wait_for_state("ready")["model"]
        assert report == {"name": "own", "path": str(parts[0]), "architecture": "llama", "sha256": digests}
        overwrite(parts[1])
        instance.fault(crash_now=1)
        assert instance.wait() == ExitCode.MODEL
        assert f"{parts[1]} has sha256 {sha256(parts[1])}, must be {digests[1]}" in instance.error

    @pytest.mark.parametrize("engine", ["sglang", "llama.cpp"])
    def test_a_missing_part_is_refused_before_the_engine_starts(self, serve: Serve, own: Path, engine: str) -> None:
        parts = split_gguf(own, 2)
        parts[1].unlink()
        instance = serve(model=parts[0], engine=engine, engine_executable=FAKE_ENGINE)
        assert instance.wait() == ExitCode.MODEL
        assert instance.error == (
            f"part 2 of 2 of the split model cannot be read: failed to read {parts[1]}: there is no such file; put all "
            "parts into one folder, under the names that they were made with"
        )
        assert "starting" not in instance.states

    def test_one_checksum_does_not_cover_two_parts(self, serve: Serve, own: Path) -> None:
        parts = split_gguf(own, 2)
        instance = serve(model=parts[0], model_sha256=sha256(parts[0]))
        assert instance.wait() == ExitCode.CONFIGURATION
        assert instance.error == (
            "model_sha256: one checksum covers one part only, and the model has 2 parts; set a list of 2, one for each "
            "part in order, as sha256sum prints them"
        )
