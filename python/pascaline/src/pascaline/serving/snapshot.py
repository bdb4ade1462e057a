"""What the agent's page shows, as texts that are ready to be read: computed here, for the page and for its scripts.

A snapshot has `texts` (place in the page -> text), `tables` (name -> rows of texts), `parts` and `points` for the
pictures, and what the box for a question needs. Every text may hold anything, and is never markup.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pascaline.engines import Vitals
from pascaline.redaction import redact_all
from pascaline.serving.health import State
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.serving.instance_view import InstanceView
    from pascaline.serving.page_gpus import GpuState
    from pascaline.settings import Role

UNKNOWN = "-"
STAGES = {
    "resolve": "find the model and read its header",
    "plan": "compute the memory",
    "verify": "check the files' checksums",
    "load": "the engine reads the weights",
    "warm-up": "the first generation",
}
"""Stages of a start, in order, and what happens in each."""
RUNBOOK = "https://github.com/pascaline/pascaline/blob/main/docs/operations.md"
RUNBOOK_SECTIONS = {
    State.BLIND: "enginenotready",
    State.UNRESPONSIVE: "engineunresponsive",
    State.RESTARTING: "enginerestarting",
    State.GPU_LOST: "gpulost",
    State.FAILED: "instancerestartloop",
    State.DRAINING: "take-an-instance-out-without-losing-a-request",
    State.STARTING: "enginenotready",
}
"""States that are not ready -> section of docs/operations.md that says what to do."""


def snapshot(instance: InstanceView, gpus: Sequence[GpuState], now: float) -> dict[str, Any]:
    """Return everything that the page shows at a Unix time, without secrets."""
    health = instance.health
    shown: dict[str, Any] = {
        "state": health.state,
        "runbook": f"{RUNBOOK}#{RUNBOOK_SECTIONS[health.state]}" if health.state in RUNBOOK_SECTIONS else "",
        "texts": _texts(instance, now),
        "tables": {
            "stages": _stages(instance),
            "memory": _memory(instance),
            "gpus": [_gpu(gpu) for gpu in gpus],
            "changes": [[clock(change.since), change.state, change.reason] for change in reversed(instance.changes)],
        },
        "parts": _parts(instance.plan),
        "points": [[round(at), _rounded(rate), _rounded(ttft)] for at, rate, ttft in instance.history.points],
        "now": round(now),
        "api": _api(instance),
    }
    redacted: dict[str, Any] = redact_all(shown)
    return redacted


def _texts(instance: InstanceView, now: float) -> dict[str, str]:
    health = instance.health
    return {
        "name": _name(instance),
        "state": health.state,
        "reason": health.reason,
        "since": f"for {span(now - health.since)}, since {clock(health.since)}",
        "restarts": str(instance.restarts),
        "probe": _probe(instance, now),
        "versions": ", ".join(f"{name} {version}" for name, version in instance.versions.items()),
        **_load(instance),
        **_model(instance),
        **_limits(instance),
    }


def _name(instance: InstanceView) -> str:
    settings = instance.settings
    if instance.model is not None:
        return instance.model.served_name
    return settings.served_model_name or str(settings.model)


def _load(instance: InstanceView) -> dict[str, str]:
    """Return what the engine does now, and did in the last five seconds."""
    api = instance.api
    vitals, requests = (api.vitals, instance.requests) if api is not None else (Vitals(), None)
    point = instance.history.points[-1] if api is not None and instance.history.points else None
    rate = point.tokens_per_second if point else None
    ttfts = [each.ttft_seconds for each in instance.history.points if each.ttft_seconds is not None]
    kv_tokens = (instance.plan or {}).get("kv_tokens")
    return {
        "running": UNKNOWN if requests is None else str(requests.running),
        "queued": UNKNOWN if requests is None else str(requests.queued),
        "speed": UNKNOWN if rate is None else f"{rate:.1f}",
        "ttft": seconds(ttfts[-1]) if ttfts else UNKNOWN,
        "kv": UNKNOWN if vitals.kv_ratio is None else f"{100 * vitals.kv_ratio:.0f} %",
        "kv-of": f"of {kv_tokens:,} tokens" if kv_tokens else "",
    }


def _model(instance: InstanceView) -> dict[str, str]:
    model, settings = instance.model, instance.settings
    if model is None:
        return {"model": str(settings.model), "model-type": UNKNOWN}
    spec = model.spec
    kind = [spec.architecture, f"{count(spec.n_parameters)} parameters"]
    kind += [each for each in (spec.file_type, spec.quantization) if each]
    return {"model": str(model.path), "model-type": ", ".join(kind)}


def _limits(instance: InstanceView) -> dict[str, str]:
    plan, settings = instance.plan or {}, instance.settings
    pid = instance.engine_pid
    engine = settings.engine + (f", process {pid}" if pid is not None else ", not running")
    if not plan:
        return {"engine": engine, "device": UNKNOWN, "limits": UNKNOWN, "memory": "not planned yet"}
    return {
        "engine": engine,
        "device": f"{plan['card']}, {plan['dtype']}",
        "limits": f"{plan['context_length']:,} tokens of context, {plan['max_running_requests']} requests at once",
        "memory": f"{format_bytes(plan['total_bytes'])} planned of {format_bytes(plan['card_bytes'])}",
    }


def _probe(instance: InstanceView, now: float) -> str:
    probe = instance.last_probe
    if probe is None:
        return "none yet"
    result = "succeeded" if probe.ok else f"failed ({probe.reason})"
    return f"{result} after {seconds(probe.seconds)}, {span(now - probe.at)} ago"


def _stages(instance: InstanceView) -> list[list[str]]:
    """Return (stage, what happens, standing, duration or progress) of the last start."""
    running = instance.running_stage
    rows = []
    for name, text in STAGES.items():
        if running is not None and running[0] == name:
            rows.append([name, text, "runs", f"{running[2]} {running[1]:.0f} s".strip()])
        elif name in instance.stages:
            rows.append([name, text, "done", f"{instance.stages[name]:.1f} s"])
        else:
            rows.append([name, text, "waits", ""])
    return rows


def _memory(instance: InstanceView) -> list[list[str]]:
    """Return (part, planned, allocated by the engine) of the plan, and what is left."""
    plan = instance.plan
    if plan is None:
        return []
    allocated = plan.get("allocated") or {}
    known = {"weights": allocated.get("weights_bytes"), "kv_pool": allocated.get("kv_bytes")}
    rows = [
        [part["name"], format_bytes(part["bytes"]), size(known.get(part["key"]))]
        for part in plan["parts"]
        if part["bytes"]
    ]
    return [*rows, ["left free", format_bytes(max(0, plan["card_bytes"] - plan["total_bytes"])), UNKNOWN]]


def _parts(plan: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the bytes of the picture: planned parts, what the engine allocated of them, and the device's memory."""
    if plan is None:
        return None
    allocated = plan.get("allocated") or {}
    known = {"weights": allocated.get("weights_bytes"), "kv_pool": allocated.get("kv_bytes")}
    return {
        "card": plan["card_bytes"],
        "planned": [[part["key"], part["name"], part["bytes"]] for part in plan["parts"] if part["bytes"]],
        "allocated": [[key, n_bytes] for key, n_bytes in known.items() if n_bytes],
    }


def _gpu(gpu: GpuState) -> list[str]:
    """Return (GPU, temperature, power, clock, busy, memory, what slows it)."""
    name = f"{gpu.index} {gpu.name}"
    if gpu.trouble:
        return [name, *[UNKNOWN] * 5, gpu.trouble]
    clock_mhz = None if gpu.clock_hertz is None else gpu.clock_hertz / 1e6
    return [
        name,
        _unit(gpu.temperature_celsius, "°C"),
        f"{_unit(gpu.power_watts)} of {_unit(gpu.power_limit_watts)} W",
        _unit(clock_mhz, "MHz"),
        _unit(gpu.utilization_percent, "%"),
        f"{size(gpu.memory_used_bytes)} of {size(gpu.memory_total_bytes)}",
        ", ".join(gpu.slowed_by) or "nothing",
    ]


def _api(instance: InstanceView) -> dict[str, Any]:
    settings, model = instance.settings, instance.model
    return {
        "host": settings.host,
        "port": settings.port,
        "key": settings.api_key_file is not None,
        "model": _name(instance),
        "kind": UNKNOWN if model is None else _kind(settings.role, has_chat_template=model.has_chat_template),
        "most_tokens": (instance.plan or {}).get("context_length"),
    }


def _kind(role: Role, *, has_chat_template: bool) -> str:
    """Return what can be asked: chat, completion, embed or rerank."""
    if role != "generate":
        return role
    return "chat" if has_chat_template else "completion"


def clock(at: float) -> str:
    """Return a Unix time in this host's zone, as its log has it; with the day if it is not today."""
    moment, today = time.localtime(at), time.localtime()
    day = "" if moment[:3] == today[:3] else "%Y-%m-%d "
    return time.strftime(f"{day}%H:%M:%S %Z", moment)


def span(length: float) -> str:
    """Return a length of time in its two largest units; length: seconds."""
    total = max(0, int(length))
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    parts: list[str] = []
    for unit, sign in units:
        amount, total = divmod(total, unit)
        if amount or (parts and len(parts) < 2):
            parts.append(f"{amount} {sign}")
    return " ".join(parts[:2]) or "0 s"


def seconds(value: float) -> str:
    """Return a duration: milliseconds below a second, as `pascaline top` has it."""
    return f"{value * 1e3:.0f} ms" if value < 0.9995 else f"{value:.1f} s"


def size(n_bytes: float | None) -> str:
    """Return bytes as text."""
    return UNKNOWN if n_bytes is None else format_bytes(n_bytes)


def count(number: int) -> str:
    """Return a large count, such as 7.24 B."""
    for unit, factor in (("B", 10**9), ("M", 10**6)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return str(number)


def _unit(value: float | None, unit: str = "") -> str:
    return UNKNOWN if value is None else f"{value:.0f} {unit}".rstrip()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
