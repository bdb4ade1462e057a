"""A folder that others may remove at any time, and that is removed when its owner was killed."""

from __future__ import annotations

import stat
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest
from pascaline.serving.runtime_folder import PREFIX, RuntimeFolder, left_behind

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, of this test alone."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_it_is_private_stays_the_same_and_goes_with_its_owner(temporary: Path) -> None:
    with RuntimeFolder() as folder:
        path = folder.path()
        (path / "key").write_text("x")
        assert path.name.startswith(PREFIX)
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert folder.path() == path
    assert list(temporary.iterdir()) == []


def test_one_that_was_removed_is_made_anew(temporary: Path) -> None:
    with RuntimeFolder() as folder:
        folder.path().rmdir()
        assert folder.path().is_dir()
        folder.path().rmdir()
        temporary.rmdir()
        assert folder.path().is_dir()
        assert stat.S_IMODE(folder.path().stat().st_mode) == 0o700
    assert list(temporary.iterdir()) == []


def test_what_somebody_put_in_its_place_is_neither_used_nor_removed(temporary: Path, tmp_path: Path) -> None:
    with RuntimeFolder() as folder:
        path = folder.path()
        path.rmdir()
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
        assert folder.path() != path
    assert list(temporary.iterdir()) == [path]
    assert (tmp_path / "elsewhere").is_dir()


def test_without_a_folder_for_temporary_files_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with RuntimeFolder() as folder, pytest.raises(FileNotFoundError):
        folder.path()


def test_what_a_killed_owner_left_is_removed_and_what_others_use_is_not(temporary: Path) -> None:
    code = (
        "import os, signal, tempfile\n"
        f"tempfile.tempdir = {str(temporary)!r}\n"
        "from pascaline.serving.runtime_folder import RuntimeFolder\n"
        "path = RuntimeFolder().path()\n"
        "(path / 'key').write_text('x')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (temporary / "other").mkdir()
    (temporary / f"{PREFIX}file").write_text("x")
    (temporary / f"{PREFIX}link").symlink_to(temporary / "other")
    with RuntimeFolder() as used:
        mine = used.path()
        assert [path / "key" for path in left_behind()] == list(temporary.glob(f"{PREFIX}*/key"))
        with RuntimeFolder() as another:
            assert list(left_behind()) == []
            assert mine.is_dir()
            assert another.path() != mine
    assert sorted(path.name for path in temporary.iterdir()) == ["other", f"{PREFIX}file", f"{PREFIX}link"]
