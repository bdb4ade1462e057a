"""`pascaline serve`: plan, launch and supervise an engine that serves one model."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING

from pascaline.cli.options import add_settings_arguments, load_from_arguments
from pascaline.errors import ExitCode

if TYPE_CHECKING:
    import argparse

STANDARD_ERROR = 2
_CODES = "\n".join(f"  {code.value:>3}  {code.meaning}" for code in ExitCode)
DESCRIPTION = f"""Serve one model: find and verify it, start the engine, report when a first generation succeeds, watch
the engine's progress, and restart it when it crashes or stops answering.

The OpenAI-compatible API listens on --port, the agent (health, metrics) on --agent-port. After SIGTERM, Ctrl-C or the
end of the terminal, running requests may finish within --drain-timeout; a second signal stops at once. systemd units
can use Type=notify and WatchdogSec.

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
    # Imported late, so that an error in the configuration is reported before a web framework is loaded.
    from pascaline.serving.console import Console, open_outlet, silence_libraries
    from pascaline.serving.notify import Notifier
    from pascaline.serving.supervisor import Supervisor
    from pascaline.serving.threads import share_one_heap

    share_one_heap()
    _open_standard_streams()
    outlet = open_outlet(STANDARD_ERROR)
    console = Console(outlet)
    silence_libraries(console)

    async def main() -> int:
        supervisor = Supervisor(configuration, console, Notifier.from_environment())
        console.on_repeated = partial(supervisor.metrics.count_dropped, "repeated")
        outlet.on_lost = partial(supervisor.metrics.count_dropped, "unread")
        return await supervisor.run()

    try:
        return asyncio.run(main())
    finally:
        outlet.close()


def _open_standard_streams() -> None:
    """Open standard streams that are closed as /dev/null; otherwise the next opened file would receive the log."""
    for descriptor in range(STANDARD_ERROR + 1):
        try:
            os.fstat(descriptor)
        except OSError:
            # open returns the lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)
