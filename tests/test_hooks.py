"""The git hooks of ./dev hooks, run by a real git in a repository of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not on PATH (Debian: apt install git)")


@pytest.fixture
def commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that commits a file with a subject in a repository with the hooks; returns what git said, or None."""
    monkeypatch.setenv("PASCALINE_ENV", str(Path(sys.executable).parents[1]))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    repository = tmp_path / "repository"
    (repository / "python").mkdir(parents=True)
    shutil.copy(ROOT / "python/pyproject.toml", repository / "python")

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        identity = [
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@example.org",
            "-c",
            f"core.hooksPath={ROOT / 'python/hooks'}",
        ]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=repository, capture_output=True, text=True, check=False
        )

    def call(content: str, subject: str) -> str | None:
        (repository / "a.py").write_text(content)
        git("add", "a.py")
        done = git("commit", "-m", subject)
        return None if done.returncode == 0 else done.stdout + done.stderr

    git("init")
    return call


SOUND = '"""A module."""\n\nA = 1\n'


def test_a_sound_file_with_a_short_subject_is_committed(commit) -> None:
    assert commit(SOUND, "x" * 72) is None


def test_a_long_subject_is_refused(commit) -> None:
    said = commit(SOUND, "x" * 73)
    assert "commit-msg: the subject has 73 characters, must have at most 72; put the reasons into the body" in said


def test_a_file_that_is_not_formatted_is_refused(commit) -> None:
    assert "A = 1" in commit('"""A module."""\nA   =  1\n', "Add a module")


def test_what_the_linter_finds_is_refused(commit) -> None:
    assert "F401" in commit('"""A module."""\n\nimport os\n', "Add a module")
