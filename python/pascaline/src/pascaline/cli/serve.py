"""`pascaline serve`: plan, launch and supervise an engine that serves one model."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pascaline.cli.options import add_settings_arguments, load_from_arguments
from pascaline.errors import ExitCode

if TYPE_CHECKING:
    import argparse

_CODES = "\n".join(f"  {code.value:>3}  {code.meaning}" for code in ExitCode)
DESCRIPTION = f"""Serve one model: find and verify it, start the engine, say when a generation has succeeded, watch
it by its progress, and start it again when it crashes or falls silent.

The model's API (OpenAI's) listens on --port, the agent (health, metrics) on --agent-port. SIGTERM, Ctrl-C or a
closed terminal lets running requests end within --drain-timeout; a second one stops at once. Under systemd it speaks
Type=notify and WatchdogSec.

  pascaline serve                                   the built-in model
  pascaline serve --model emily.Q4_K_M.gguf --card tesla-p4
  pascaline serve --config emily.toml

exit codes:
{_CODES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all settings."""
    add_settings_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until asked to stop."""
    configuration = load_from_arguments(arguments)
    # Imported late: a mistake in the configuration is reported before a web framework is loaded.
    from pascaline.serving.console import Console, silence_libraries
    from pascaline.serving.notify import Notifier
    from pascaline.serving.supervisor import Supervisor
    from pascaline.serving.threads import share_one_heap

    share_one_heap()
    silence_libraries()

    async def main() -> int:
        return await Supervisor(configuration, Console(), Notifier.from_environment()).run()

    return asyncio.run(main())
