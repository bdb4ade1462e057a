"""`pascaline plan --measure-host`: what each NUMA node reads from its memory."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from pascaline.errors import ExitCode
from pascaline.gpu.host_bandwidth import FILE, HostBandwidth, NodeBandwidth, measure, save, usable_nodes
from pascaline.gpu.memory import host_memory
from pascaline.models.cache import cache_folder, writing
from pascaline.text_table import LEFT, RIGHT, table_lines

if TYPE_CHECKING:
    from pascaline.settings import Settings

FILE_BYTES = 64 * 1024
"""Room for the kept result."""


def measure_host(settings: Settings, *, as_json: bool) -> ExitCode:
    """Measure, print, and keep the result unless other work disturbed it."""
    nodes = usable_nodes(os.sched_getaffinity(0))
    print(
        f"pascaline plan: measuring the memory of NUMA node {', '.join(map(str, nodes))}, some seconds each",
        file=sys.stderr,
    )
    measured = measure(nodes, host_memory().total_bytes)
    folder, kept = cache_folder(settings), None
    if not any(node.is_disturbed for node in measured.nodes):
        with writing(folder, FILE_BYTES):
            kept = save(measured, folder)
    if as_json:
        print(json.dumps(measured.to_json() | {"file": None if kept is None else str(kept)}, indent=2))
    else:
        print(_table(measured))
        print(f"kept in {kept}" if kept else f"not kept in {folder / FILE}: measure again while the host is idle")
    return ExitCode.OK if kept else ExitCode.FAILED


def _table(measured: HostBandwidth) -> str:
    rows = [("NUMA node", "GB/s", "threads"), *map(_cells, measured.nodes)]
    return "\n".join([f"{measured.cpu}, {measured.measured_at}", *table_lines(rows, [RIGHT, RIGHT, RIGHT, LEFT])])


def _cells(node: NodeBandwidth) -> tuple[str, ...]:
    return str(node.node), f"{node.bytes_per_second / 1e9:,.1f}", str(node.threads), "  ".join(node.notes)
