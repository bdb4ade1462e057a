"""The reference page of the NixOS options, from the modules themselves.

    cd tests && python -m support.options     writes docs/nixos-options.md anew

`nix build .#docs` renders the same options by nixpkgs' own generator, if nixpkgs is available.
"""

from __future__ import annotations

import re
from typing import Any

from support.nix import REPOSITORY, evaluate

PAGE = REPOSITORY / "docs" / "nixos-options.md"
HEAD = """# NixOS options

Generated from `modules/` by `tests/support/options.py`; `docs/nixos.md` says how they are used together.
"""


def page(options: list[dict[str, Any]]) -> str:
    """Return the page: a heading for each module, its options in alphabetic order."""
    shown = sorted((option for option in options if _is_shown(option)), key=lambda option: option["name"])
    parts, section = [HEAD], ""
    for option in shown:
        module = ".".join(option["name"].split(".")[:3])
        if module != section and any(other["name"].startswith(f"{module}.") for other in shown):
            parts.append(f"\n## {module}\n")
            section = module
        parts.append(_entry(option))
    return "".join(parts)


def _is_shown(option: dict[str, Any]) -> bool:
    return not option["internal"] and not option["name"].endswith("._module.args")


def _entry(option: dict[str, Any]) -> str:
    description = re.sub(r"\{option\}(`[^`]+`)", r"\1", option["description"]).strip()
    lines = [f"\n### `{option['name']}`\n\n{description}\n\n", f"- type: {option['type']}"]
    if option["readOnly"]:
        lines.append(", read only")
    lines.append("\n")
    lines += [_value(key, option[key]) for key in ("default", "example") if key in option]
    return "".join(lines)


def _value(key: str, text: str) -> str:
    if "\n" not in text:
        return f"- {key}: `{text}`\n"
    return f"- {key}:\n\n  ```nix\n" + "".join(f"  {line}\n" for line in text.rstrip().splitlines()) + "  ```\n"


if __name__ == "__main__":
    PAGE.write_text(page(evaluate("options")))
