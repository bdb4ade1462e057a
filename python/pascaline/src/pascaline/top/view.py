"""The screen: lines of fixed columns that fit the terminal, which needs at least 80 x 24."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from pascaline.text_table import Column as Layout
from pascaline.text_table import table_lines
from pascaline.top.history import sparkline

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pascaline.top.history import History
    from pascaline.top.readings import GpuReading, HostReading, InstanceReading

UNKNOWN = "-"
_MIN_WIDTH = 80
_WIDE = 100
_WIDEST = 108
_FOR_SPECULATION = 123
"""Least width at which columns are drawn for which 80 characters have no room."""
_MIN_SPARK = 8
_MAX_SPARK = 60
_STATE_STYLES = {
    "ready": "green",
    "busy": "green",
    "starting": "yellow",
    "planned": "yellow",
    "draining": "yellow",
    "restarting": "yellow",
}
_HOT_CELSIUS = 85  # HighGPUTemp


class Column(NamedTuple):
    """A column's heading and width; the column of width 0 takes the rest of the line."""

    heading: str
    width: int
    right: bool = False
    least_width: int = 0
    """A narrower terminal leaves it out."""


_GPU_COLUMNS = (
    Column("HOST", 12),
    Column("GPU", 3),
    Column("NAME", 11),
    Column("UTIL", 4, right=True),
    Column("", 0),
    Column("MEMORY", 14, right=True),
    Column("TEMP", 5, right=True),
    Column("POWER", 8, right=True),
    Column("SLOWED BY", 19, least_width=_WIDE),
)
_INSTANCE_COLUMNS = (
    Column("HOST", 12),
    Column("INSTANCE", 10),
    Column("STATE", 12),
    Column("RUN/WAIT", 8, right=True),
    Column("TOK/S", 6, right=True),
    Column("TTFT", 6, right=True, least_width=_WIDE),
    Column("ITL", 6, right=True, least_width=_WIDE),
    Column("DRAFTS", 6, right=True, least_width=_WIDEST),
    Column("ACCEPT", 6, right=True, least_width=_FOR_SPECULATION),
    Column("WON", 7, right=True, least_width=_FOR_SPECULATION),
    Column("", 0),
    Column("KV", 4, right=True),
    Column("PLAN/USED", 13, right=True),
)


def render(readings: Sequence[HostReading], history: History, clock: str, width: int, height: int | None) -> list[Text]:
    """Return the lines of the screen; with a height, only as many as fit, and the number of hidden ones.

    clock: the end of the first line, such as the time, and how to end a screen that stays.
    """
    width = max(width, _MIN_WIDTH)
    lines = [_title(readings, clock, width), *_body(readings, history, width)]
    if height is None or len(lines) <= height:
        return lines
    hidden = len(lines) - height + 1
    return [*lines[: height - 1], Text(f"… {hidden} more lines: enlarge the window, or name fewer hosts", style="dim")]


def _title(readings: Sequence[HostReading], clock: str, width: int) -> Text:
    gpus = sum(len(reading.gpus) for reading in readings)
    instances = sum(len(reading.instances) for reading in readings)
    tokens = sum(i.tokens_per_second or 0.0 for reading in readings for i in reading.instances)
    counts = (
        f"{_count(len(readings), 'host')}, {_count(gpus, 'GPU')}, {_count(instances, 'instance')}, {tokens:.1f} tok/s"
    )
    left = f"pascaline top  {counts}"
    return Text(set_cell_size(left, width - cell_len(clock)) + clock, style="bold")


def _body(readings: Sequence[HostReading], history: History, width: int) -> Iterator[Text]:
    for reading in readings:
        if reading.error:
            yield Text(set_cell_size(f"{reading.host}: unreachable, {reading.error}", width).rstrip(), style="bold red")
    gpus = [(reading.host, gpu) for reading in readings for gpu in reading.gpus]
    if gpus:
        yield from _table(_GPU_COLUMNS, [_gpu_row(host, gpu, history) for host, gpu in gpus], width)
    instances = [(reading.host, instance) for reading in readings for instance in reading.instances]
    if instances:
        yield from _table(_INSTANCE_COLUMNS, [_instance_row(host, i, history) for host, i in instances], width)
    if not gpus and not instances and not all(reading.error for reading in readings):
        yield Text("no GPU and no instance found", style="yellow")


class _Row(NamedTuple):
    cells: tuple[str, ...]
    """Cells in the order of the columns; the sparkline's cell is empty."""
    values: list[float | None]
    top: float | None
    style: str


def _table(columns: tuple[Column, ...], rows: list[_Row], width: int) -> Iterator[Text]:
    shown = tuple(column for column in columns if width >= column.least_width)
    fixed = sum(column.width for column in shown) + len(shown) - 1
    spark = min(max(width - fixed, _MIN_SPARK), _MAX_SPARK)
    cells = [[column.heading for column in shown]]
    for row in rows:
        drawn = sparkline(row.values, spark, row.top)
        pairs = zip(columns, row.cells, strict=True)
        cells.append([cell if column.width else drawn for column, cell in pairs if column in shown])
    lines = table_lines(cells, [Layout(column.right, column.width or spark) for column in shown], gap=1)
    yield Text()
    for line, style in zip(lines, ["reverse", *(row.style for row in rows)], strict=True):
        yield Text(set_cell_size(line, fixed + spark), style=style)


def _gpu_row(host: str, gpu: GpuReading, history: History) -> _Row:
    memory = f"{_gibibytes(gpu.memory_used_bytes)}/{_gibibytes(gpu.memory_total_bytes)} GiB"
    power = f"{_number(gpu.power_watts)}/{_number(gpu.power_limit_watts)}W"
    utilization, temperature = _number(gpu.utilization_percent, "%"), _number(gpu.temperature_celsius, "°C")
    slowed_by = ",".join(gpu.throttle_reasons)
    cells = (host, gpu.gpu, gpu.name.removeprefix("NVIDIA "), utilization, "", memory, temperature, power, slowed_by)
    if gpu.lost:
        cells = (host, gpu.gpu, "LOST", *cells[3:])
    hot = gpu.temperature_celsius is not None and gpu.temperature_celsius > _HOT_CELSIUS
    style = "bold red" if gpu.lost else "red" if hot else ""
    return _Row(cells, history.of(host, "utilization", gpu.uuid), 100.0, style)


def _instance_row(host: str, instance: InstanceReading, history: History) -> _Row:
    requests = f"{_number(instance.running_requests)}/{_number(instance.queued_requests)}"
    kv_cache = None if instance.kv_cache_ratio is None else 100 * instance.kv_cache_ratio
    memory = f"{_gibibytes(instance.planned_bytes)}/{_gibibytes(instance.actual_bytes)} GiB"
    speed = UNKNOWN if instance.tokens_per_second is None else f"{instance.tokens_per_second:.1f}"
    latencies = (_seconds(instance.ttft_seconds), _seconds(instance.itl_seconds))
    accepted = None if instance.accepted_ratio is None else 100 * instance.accepted_ratio
    length = UNKNOWN if instance.accept_length is None else f"{instance.accept_length:.2f}"
    drafts = (_number(accepted, "%"), length, _number(instance.won_seconds, "s"))
    shares = ("", _number(kv_cache, "%"))
    cells = (host, instance.name, instance.state, requests, speed, *latencies, *drafts, *shares, memory)
    style = _STATE_STYLES.get(instance.state, "bold red")
    return _Row(cells, history.of(host, "tokens", str(instance.agent_port)), None, style)


def _gibibytes(n_bytes: float | None) -> str:
    """Return GiB, the unit of the plan and of the instance's page."""
    return UNKNOWN if n_bytes is None else f"{n_bytes / 2**30:.1f}"


def _seconds(value: float | None) -> str:
    """Four or five characters: milliseconds below a second."""
    if value is None:
        return UNKNOWN
    return f"{value * 1e3:.0f}ms" if value < 0.9995 else f"{value:.1f}s"


def _number(value: float | None, unit: str = "") -> str:
    return UNKNOWN if value is None else f"{value:.0f}{unit}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
