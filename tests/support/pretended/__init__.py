"""A switch for tests: every process of a command sees a Pascal card where another NVIDIA card is.

    python tests/support/pretended tesla-p4 [--report FILE.jsonl] -- COMMAND …

`pretended.c` changes what CUDA's runtime, the driver (asked by ctypes), NVML and the driver's folder in /proc say:
capability, name, multiprocessors, memory. All processes of the command share the card: together their allocations are
held to its memory, and NVML counts those and no other ones of the host. `site/` is loaded into each Python process: whatever Pascal has no code for is an error that names its caller: a launch by Triton, a compiled
function of torch.compile, a product in bfloat16, 8-bit floating point or TF32, a call of cuDNN. torch chooses its
attention by the changed capability, and its own check then refuses flash attention; the kernel that it would choose for
Pascal is empty in the machine code for newer cards, so its plain attention runs. Which machine code runs is not changed:
that of the real card, and our kernels from their PTX for 6.0 or 6.1.

Only a process below `environment`'s own obeys: anywhere else the variable is an error, in `site/` and in the plugin.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.cards import installed_models, load_card
from pascaline.gpu.devices import PROC_GPUS
from pascaline.gpu.fake_nvml import _compiler
from sglang_pascal.device import PRETENDED_CARD

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CARDS", "LEDGER", "REAL_NAME", "REPORT", "VARIABLE", "another_card", "build", "environment", "run"]

VARIABLE = PRETENDED_CARD
"""Name of the card, as in cards.toml."""
PARENT = "STAND_IN_CARD_PARENT"
"""Process id of the test: only its descendants pretend."""
REPORT = "STAND_IN_CARD_REPORT"
"""A file to which each refusal is added, one JSON object a line."""
REAL_NAME = "STAND_IN_CARD_REAL_NAME"
"""Name of the card that the host has."""
LEDGER = "STAND_IN_CARD_LEDGER"
"""A file in which the processes of one card enter what they hold; without it each has the card to itself."""
CARDS = {
    # L2 and shared memory: CUDA C++ Programming Guide 11.8, table 15; the whitepapers of GP100 and GP104.
    "tesla-p4": {"L2_BYTES": 2 * 2**20, "SHARED_BYTES": 98304},
    "tesla-p100-16gb": {"L2_BYTES": 4 * 2**20, "SHARED_BYTES": 65536},
}
CONTEXT_BYTES = 200 * 2**20
"""Of each process that computes on the card."""
_FOLDER = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread", "-ldl")


def build(folder: Path | None = None) -> Path:
    """Compile the library unless it is there; return its path. folder: None = that of temporary files."""
    source = _FOLDER / "pretended.c"
    checksum = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    library = (folder or Path(tempfile.gettempdir())) / f"pretended-{checksum}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*_compiler(), *_FLAGS, "-o", str(part), str(source)], check=True)
        part.replace(library)
    return library


def environment(
    card: str, base: Mapping[str, str] | None = None, *, library: Path | None = None, report: Path | None = None
) -> dict[str, str]:
    """Return `base` (None: this process' environment) changed so that this process' children see the card."""
    found, facts = dict(os.environ if base is None else base), load_card(card)
    major, minor = facts.compute_capability.split(".")
    numbers = {
        "MAJOR": major,
        "MINOR": minor,
        "BYTES": facts.memory_bytes,
        "CONTEXT_BYTES": CONTEXT_BYTES,
        "MULTIPROCESSORS": int(facts.number("multiprocessors")),
        "CORES": int(facts.number("cores")),
        "CLOCK_KHZ": int(facts.number("boost_clock_hertz")) // 1000,
    }
    found |= {f"STAND_IN_CARD_{name}": str(value) for name, value in (numbers | CARDS[card]).items()}
    found |= {VARIABLE: card, PARENT: str(os.getpid()), "STAND_IN_CARD_NAME": facts.nvml_names[0]}
    found[REAL_NAME] = ", ".join(sorted(set(installed_models()))) or "unknown card"
    found["STAND_IN_CARD_PROC_GPUS"] = str(PROC_GPUS)
    if report is not None:
        found[REPORT] = str(report.absolute())
    for name, first in (("LD_PRELOAD", library or build()), ("PYTHONPATH", _FOLDER / "site")):
        found[name] = ":".join(filter(None, [str(first), found.get(name, "")]))
    return found


def another_card(folder: Path) -> dict[str, str]:
    """Return variables for a process that gets such a card for itself; none where no card is pretended."""
    if VARIABLE not in os.environ:
        return {}
    ledger = folder / "pretended-card"
    ledger.touch()
    return {LEDGER: str(ledger)}


def run(card: str, command: list[str], report: Path | None = None) -> int:
    """Run a command under the switch; return its exit status."""
    with tempfile.NamedTemporaryFile(prefix="pretended-card-") as ledger:
        seen = environment(card, report=report) | {LEDGER: ledger.name}
        return subprocess.run(command, env=seen, check=False).returncode


def main(arguments: list[str]) -> int:
    """The command line above."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = arguments[:at], arguments[at + 1 :]
    report = Path(options[2]) if options[1:2] == ["--report"] and len(options) == 3 else None
    if not command or not options or options[0] not in CARDS or len(options) not in (1, 3):
        print(f"usage: pretended {'|'.join(CARDS)} [--report FILE.jsonl] -- COMMAND …", file=sys.stderr)
        return 2
    return run(options[0], command, report)
