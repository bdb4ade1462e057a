"""A plan as text: the memory table with its bar, the formulas, sweeps and comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.planning.speed import host_speed
from pascaline.text_table import LEFT, RIGHT, Column, table_lines
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pascaline.engines.memory_model import Part
    from pascaline.planning.nearest import Change
    from pascaline.planning.plan import Plan
    from pascaline.planning.search import Choice
    from pascaline.planning.speed import Rate, Speed

BAR_WIDTH = 64
BAR_LETTERS = {
    "weights": "W",
    "kv_pool": "K",
    "tables": "t",
    "rounding": "r",
    "workspace": "d",
    "page_tables": "h",
    "activations": "a",
    "logits": "l",
    "draft": "m",
    "graphs": "g",
    "context": "c",
    "library": "b",
    "process": "p",
    "fragmentation": "f",
}
"""Letter of each part in the bar."""
_SIZE = Column(right=True, min_width=12)


def table(plan: Plan) -> str:
    """Return the memory table: each part, what is free, the verdict, and what to expect."""
    lines = [f"{plan.model} on {plan.card}: {_settings_words(plan)}", ""]
    lines += table_lines(list(_card_rows(plan)), [LEFT, _SIZE, LEFT])
    lines += ["", f"  [{bar(plan)}]", ""]
    if plan.fits:
        lines.append(f"fits: a KV cache of {plan.kv_tokens:,} tokens, {format_bytes(plan.kv_bytes_per_token)} each")
    lines += [f"cannot be served: {reason}" for reason in plan.refusals]
    lines += [f"does not fit: {reason}" for reason in plan.reasons]
    lines += [f"note: {note}" for note in plan.notes]
    lines += _host_lines(plan)
    return "\n".join([*lines, *_speed_lines(plan)])


def _card_rows(plan: Plan) -> Iterable[tuple[str, ...]]:
    yield from _part_rows(plan.parts)
    yield "    together", _size(plan.total_bytes)
    if plan.request.used_bytes:
        yield "  x used by others", _size(plan.request.used_bytes)
    yield f"    the {'card' if plan.request.device == 'cuda' else 'host'} has", _size(plan.card_bytes)
    yield "    headroom" if plan.headroom_bytes >= 0 else "    missing", _size(abs(plan.headroom_bytes))


def _part_rows(parts: Iterable[Part], *, letters: bool = True) -> Iterable[tuple[str, ...]]:
    """Yield name, size and origin of each part that holds something, with its letter in the bar if there is one."""
    for part in parts:
        if part.n_bytes:
            letter = BAR_LETTERS.get(part.key, "?") if letters else " "
            yield f"  {letter} {part.name}", _size(part.n_bytes), part.origin


def _host_lines(plan: Plan) -> list[str]:
    """The table of the host's memory, if it holds more than the input embedding."""
    if len(plan.host_parts) < 2:
        return []
    free = plan.request.host_memory_bytes
    rows = [*_part_rows(plan.host_parts, letters=False), ("    together", _size(plan.host_bytes))]
    return [
        "",
        f"in the host's memory{'' if free is None else f', of which {format_bytes(free)} are free'}:",
        *table_lines(rows, [LEFT, _SIZE, LEFT]),
        *_rate_lines(plan),
    ]


def _rate_lines(plan: Plan) -> list[str]:
    """The rates on which the speed of the host's part is based."""
    host = host_speed(plan.request)
    if host is None:
        return []
    text = f"    read at {host.memory_bytes_per_second / 1e9:,.0f} GB/s ({host.source})"
    text += f", copied to the card at {host.link_bytes_per_second / 1e9:,.1f} GB/s"
    if plan.request.host_rates.memory_bytes_per_second is None:
        text += "; pascaline plan --measure-host measures the first"
    return [text]


def _settings_words(plan: Plan) -> str:
    request = plan.request
    role = "" if plan.generates else f" {request.role}"
    words = (
        f"{request.engine}{role}, context {plan.context_length:,}, {request.max_running_requests} requests, "
        f"KV {request.kv_dtype}, chunk {request.chunked_prefill_tokens}"
    )
    if request.prefill_bits is None:
        return words
    return f"{words}, {request.prefill_bits}-bit prompts, {request.decode_bits}-bit decode"


def _speed_lines(plan: Plan) -> list[str]:
    speed = plan.speed
    if speed is None or not plan.fits:
        return []
    basis = (
        "from measured points"
        if speed.basis == "measured"
        else "estimated: this engine was not measured with such a model on such a card, or at too few points"
    )
    rows = _generation_rows(plan, speed) if plan.generates else [("  prompt", _rate(speed.prefill))]
    return ["", f"expected speed ({basis}):", *table_lines(rows, [Column(min_width=20), LEFT])]


def _generation_rows(plan: Plan, speed: Speed) -> list[tuple[str, str]]:
    decode = speed.decode
    each = f"{rate_digits(decode.tokens_per_second / decode.batch)} each"
    first = f"first token of {plan.context_length:,} after {speed.ttft_seconds:,.1f} s"
    return [
        ("  one request", _rate(speed.single)),
        *_speculation_rows(plan),
        (f"  {decode.batch} at {decode.context:,} tokens", f"{_rate(decode)}, {each}"),
        ("  prompt", f"{_rate(speed.prefill)}, {first}"),
    ]


def _speculation_rows(plan: Plan) -> list[tuple[str, str]]:
    """The range by acceptance: no draft is right, or all are."""
    speed, drafts = plan.speed, plan.request.speculation
    if speed is None or speed.repeating is None:
        return []
    low, high = speed.single.tokens_per_second, speed.repeating.tokens_per_second
    ends = f"no draft is right, or all {drafts.tokens} of each step are"
    return [(f"  with {drafts.method}", f"{low:,.0f} to {high:,.0f} tok/s: {ends}")]


def rate_digits(tokens_per_second: float) -> str:
    """Return the number for a reader, of two digits below 1."""
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 1 else f"{tokens_per_second:.2g}"


def _rate(rate: Rate) -> str:
    text = f"{rate_digits(rate.tokens_per_second)} tok/s ({rate_digits(rate.low)} to {rate_digits(rate.high)})"
    text += f", bound by {rate.bound}"
    return text.replace("bound by bandwidth", "bound by memory bandwidth").replace(
        "bound by host", "bound by the weights on the host"
    )


def bar(plan: Plan, width: int = BAR_WIDTH) -> str:
    """Return the memory as one line of letters; `.` is free memory, and a plan that exceeds the card ends in `!`."""
    whole = max(plan.card_bytes, plan.total_bytes + plan.request.used_bytes)
    if whole == 0:
        return "." * width
    pieces = [(BAR_LETTERS.get(part.key, "?"), part.n_bytes) for part in plan.parts]
    pieces.append(("x", plan.request.used_bytes))
    text, done = "", 0
    for letter, n_bytes in pieces:
        done += n_bytes
        text += letter * (round(width * done / whole) - len(text))
    text = text.ljust(width, ".")
    if plan.headroom_bytes < 0:
        edge = round(width * plan.card_bytes / whole)
        text = text[:edge] + "!" * (width - edge)
    return text


def explanation(plan: Plan) -> str:
    """Return every part with its formula in numbers, its source, and its certainty."""
    lines = []
    for part in plan.parts:
        lines += _explained(part)
    for part in plan.host_parts:
        lines += ["on the host: " + line if not line.startswith(" ") else line for line in _explained(part)]
    if plan.mem_fraction_static is not None:
        lines.append(
            f"mem_fraction_static {plan.mem_fraction_static:g}: share of what is free before the model is loaded"
        )
    if plan.speed is not None:
        rates = {"one request": plan.speed.single, "all requests": plan.speed.decode, "prompt": plan.speed.prefill}
        if plan.speed.repeating is not None:
            rates["one request, every draft right"] = plan.speed.repeating
        lines += [f"{name}: {rate.tokens_per_second:,.1f} tok/s\n    = {rate.formula}" for name, rate in rates.items()]
        lines.append("    source: pascaline/engines/*/engine.toml, docs/planning.md")
    return "\n".join(lines)


def _explained(part: Part) -> list[str]:
    lines = [f"{part.name}: {part.n_bytes:,} B ({_size(part.n_bytes).strip()}), {part.origin}", f"    = {part.formula}"]
    return [*lines, f"    source: {part.source}"] if part.source else lines


def refusal(plan: Plan, changes: Sequence[Change]) -> str:
    """Return the table of a plan that does not fit, and the nearest settings that do."""
    lines = [table(plan), ""]
    if changes:
        lines.append("nearest that fit:")
        lines += [f"  {number}. {change.sentence}" for number, change in enumerate(changes, 1)]
    else:
        on_cpu = plan.request.device == "cpu"
        larger = "more free memory of the host" if on_cpu or _is_short_of_host_memory(plan) else "a larger card"
        lines.append(f"nothing near fits: a smaller model or {larger} is needed")
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return "fits"
    return "the host lacks memory" if _is_short_of_host_memory(plan) else "does not fit"


def _is_short_of_host_memory(plan: Plan) -> bool:
    """Whether the card has room, but not the host for the weights that stay there."""
    return plan.headroom_bytes >= 0 and len(plan.host_parts) > 1


def sweep_table(plans: Sequence[Plan], over: str) -> str:
    """Return one line per plan."""
    titles = (over, "weights", "KV cache", "tokens", "total", "headroom", "tok/s", "prompt tok/s", "verdict")
    rows = [titles, *(_sweep_row(plan, over) for plan in plans)]
    return "\n".join(table_lines(rows, [RIGHT] * 8 + [LEFT]))


def _sweep_row(plan: Plan, over: str) -> tuple[str, ...]:
    value = {
        "context": f"{plan.context_length:,}",
        "requests": str(plan.request.max_running_requests),
        "quant": plan.model,
    }[over]
    speed = plan.speed if plan.fits else None
    return (
        value,
        _size(plan.weights_bytes),
        _size(plan.kv_bytes),
        f"{plan.kv_tokens:,}",
        _size(plan.total_bytes),
        _size(plan.headroom_bytes),
        f"{speed.decode.tokens_per_second:,.0f}" if speed else "-",
        f"{speed.prefill.tokens_per_second:,.0f}" if speed else "-",
        _verdict(plan),
    )


def choices_table(choices: Sequence[Choice]) -> str:
    """Return one line per choice, the best first."""
    titles = ("quant", "KV", "context", "requests", "chunk", "where", "tok/s", "latency", "loss", "total", "headroom")
    rows = [titles, *map(_choice_row, choices)]
    return "\n".join(table_lines(rows, [LEFT, LEFT, RIGHT, RIGHT, RIGHT, LEFT] + [RIGHT] * 5))


def _choice_row(choice: Choice) -> tuple[str, ...]:
    plan, request = choice.plan, choice.plan.request
    return (
        choice.file_type,
        request.kv_dtype,
        f"{request.context_length:,}",
        str(request.max_running_requests),
        str(request.chunked_prefill_tokens),
        plan.where,
        "-" if choice.throughput is None else f"{choice.throughput:,.0f}",
        "-" if choice.latency_seconds is None else f"{choice.latency_seconds:,.1f} s",
        f"{choice.loss:.3f}",
        _size(plan.total_bytes),
        _size(plan.headroom_bytes),
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"
