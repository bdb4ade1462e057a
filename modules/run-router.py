"""Starts SGLang's router with the API key that systemd passed: as an argument every user of the host could read it."""

import os
import sys
from pathlib import Path

from sglang_router.launch_router import launch_router, parse_router_args

arguments = sys.argv[1:]
if folder := os.environ.get("CREDENTIALS_DIRECTORY"):
    arguments += ["--api-key", (Path(folder) / "api-key").read_text().strip()]
launch_router(parse_router_args(arguments))
