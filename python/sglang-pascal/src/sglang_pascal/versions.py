"""The versions of other packages that this plugin was made for. Importing it is cheap."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Final

from sglang_pascal.errors import UnsupportedVersionError

_DISTRIBUTION: Final = "sglang-pascal"


def pinned(package: str) -> str:
    """Return the version that this plugin's own metadata requires of a package.

    Its home is `dependencies` in pyproject.toml, which must name it anyway.
    """
    try:
        requirements = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as exc:
        raise UnsupportedVersionError(
            f"{_DISTRIBUTION} is not installed, only its files are found; install it with pip or uv"
        ) from exc
    for requirement in requirements:
        if match := re.fullmatch(rf"{re.escape(package)}==([\w.+!]+)", requirement):
            return match[1]
    raise UnsupportedVersionError(f"the metadata of {_DISTRIBUTION} pins no {package}; install it again")


SUPPORTED_SGLANG: Final = (pinned("sglang"),)
"""SGLang versions that the shims were checked against, newest last."""
BITSANDBYTES: Final = "0.49.2"
"""The version that NF4 was tested with. It is not locked, because only folders that NF4 quantises need it."""
OLDEST_BITSANDBYTES: Final = "0.46.1"
"""SGLang's `require_bitsandbytes` refuses an older one."""
