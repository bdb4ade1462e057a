"""Reads databases of nvprof (CUDA 11.8), the last profiler made for Pascal, as timelines; writes Chrome traces.

The tables are those that its libcuinj64.so.11.8.87 creates. Times are nanoseconds, globalMemoryBandwidth is kB/s.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

from pascaline.profile.timeline import Kernel, Timeline
from pascaline.profile.trace import TraceError

if TYPE_CHECKING:
    from pathlib import Path

NANO = 1e-9
KILO = 1000
MAGIC = b"SQLite format 3\x00"

_KERNELS = """
    select s.value, k.start, k.end, k.streamId, null from CUPTI_ACTIVITY_KIND_{} k join StringTable s on s._id_ = k.name
"""
_COPIES = "select 'memcpy', start, end, streamId, bytes from CUPTI_ACTIVITY_KIND_MEMCPY"
_FILLS = "select 'memset', start, end, streamId, bytes from CUPTI_ACTIVITY_KIND_MEMSET"
# Concurrent kernels, which nvprof records by default, have their own table.
_QUERIES = (_KERNELS.format("CONCURRENT_KERNEL"), _KERNELS.format("KERNEL"), _COPIES, _FILLS)
_DEVICE = """
    select s.value, d.globalMemoryBandwidth from CUPTI_ACTIVITY_KIND_DEVICE d join StringTable s on s._id_ = d.name
"""


def is_nvprof(path: Path) -> bool:
    """Whether a file is an SQLite database."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_nvprof(path: Path, steps: int = 0) -> Timeline:
    """Read a database. Raises TraceError if it is not one of nvprof's, or if it holds no kernel."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            rows = [row for query in _QUERIES for row in _rows(database, query)]
            device = next(iter(_rows(database, _DEVICE)), ("GPU", None))
    except sqlite3.Error as error:
        raise TraceError(f"{path} is not a database of nvprof: {error}") from error
    if not rows:
        raise TraceError(f"{path} holds no kernel: nothing ran on the GPU while it was recorded")
    first = min(row[1] for row in rows)
    kernels = tuple(
        Kernel(str(name), (start - first) * NANO, (end - start) * NANO, moved, stream)
        for name, start, end, stream, moved in sorted(rows, key=lambda row: row[1])
    )
    bandwidth = float(device[1]) * KILO if device[1] else None
    return Timeline(str(device[0]), kernels, steps, bandwidth)


def _rows(database: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
    """Rows of a query; none if the table is missing, because nvprof makes no table for what never happened."""
    try:
        return database.execute(query).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise


def write_chrome_trace(timeline: Timeline, path: Path) -> None:
    """Write a timeline for viewers of Chrome's format (ui.perfetto.dev, chrome://tracing)."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": timeline.device}},
        *(
            {
                "ph": "X",
                "cat": "kernel",
                "name": kernel.name,
                "pid": 0,
                "tid": kernel.stream,
                "ts": kernel.start / 1e-6,
                "dur": kernel.seconds / 1e-6,
                "args": {"stream": kernel.stream} | ({"bytes": kernel.bytes} if kernel.bytes is not None else {}),
            }
            for kernel in timeline.kernels
        ),
    ]
    document = {"traceEvents": events, "deviceProperties": [{"id": 0, "name": timeline.device}]}
    path.write_text(json.dumps(document), encoding="utf-8")
