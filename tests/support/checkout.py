"""A copy of this checkout, as a person who clones it gets it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def clone(folder: Path) -> Path:
    """Clone the repository into a folder, with the changes that are not committed yet; return the folder."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True)
    for name in _git("ls-files", "-z", "--modified", "--others", "--exclude-standard"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in _git("ls-files", "-z", "--deleted"):
        (folder / name).unlink(missing_ok=True)
    return folder


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return list(filter(None, done.stdout.split("\0")))
