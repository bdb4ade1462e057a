"""From evaluated modules to the files that a systemd without NixOS reads, as a tree that is laid over a root.

    cd tests && python -m support.units     writes tests/systemd/root anew from tests/systemd/host.nix

The tree is kept in the repository, so that the units also run where Nix' libraries are not; a test compares it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from support.nix import evaluate

ROOT = Path(__file__).resolve().parents[1] / "systemd" / "root"


def tree(rendered: dict[str, Any]) -> dict[str, str]:
    """Return path -> text; a text that begins with "-> " is a symbolic link."""
    files: dict[str, str] = dict(rendered["files"])
    for unit, text in rendered["units"].items():
        files[f"/etc/systemd/system/{unit}"] = text
        for target in rendered["wantedBy"][unit]:
            files[f"/etc/systemd/system/{target}.wants/{unit}"] = f"-> ../{unit}"
    for path, settings in rendered["settings"].items():
        files[path] = toml(settings)
    for name, rules in rendered["tmpfiles"].items():
        files[f"/etc/tmpfiles.d/{name}.conf"] = "".join(tmpfiles_lines(rules))
    return files


def toml(settings: dict[str, Any]) -> str:
    """Write a TOML document of scalars, lists of scalars and tables."""
    scalars = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in settings.items() if isinstance(value, dict)}
    # JSON writes strings, numbers, booleans and lists as TOML does.
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in scalars.items())
    return text + "".join(f"\n[{key}]\n{toml(value)}" for key, value in tables.items())


def tmpfiles_lines(rules: dict[str, Any]) -> list[str]:
    """Write `systemd.tmpfiles.settings` of one file as tmpfiles.d lines."""
    return [
        f"{kind} {path} {rule.get('mode', '-')} {rule.get('user', '-')} {rule.get('group', '-')}\n"
        for path, kinds in rules.items()
        for kind, rule in kinds.items()
    ]


def read(root: Path) -> dict[str, str]:
    """Read a tree back."""
    return {
        f"/{file.relative_to(root)}": f"-> {file.readlink()}" if file.is_symlink() else file.read_text()
        for file in root.rglob("*")
        if file.is_symlink() or file.is_file()
    }


def write(root: Path, files: dict[str, str]) -> None:
    """Replace a tree."""
    shutil.rmtree(root, ignore_errors=True)
    for path, text in files.items():
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            file.symlink_to(text.removeprefix("-> "))
        else:
            file.write_text(text)
            file.chmod(0o755 if text.startswith("#!") else 0o644)


if __name__ == "__main__":
    write(ROOT, tree(evaluate("container")))
