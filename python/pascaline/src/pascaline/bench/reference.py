"""What a result is compared with: the card's roofline, the plan's estimate, and the guide's claims."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pascaline.bench.claims import ANCHORS, GUIDE_CLAIMS
from pascaline.bench.workload import parse_lengths
from pascaline.cards import card_for_device, card_names, load_card
from pascaline.engines import DEFAULT_ENGINE, ENGINES, engine_named
from pascaline.planning.plan import make_plan
from pascaline.planning.request import PlanRequest
from pascaline.planning.speed import peak_macs
from pascaline.planning.weights import weights_on_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.bench.experiment import Experiment, Point
    from pascaline.cards import Card
    from pascaline.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How the engine computes; only what decides bytes and operations."""

    engine: str
    dtype: str
    kv_dtype: str
    chunked_prefill_tokens: int


def reference(
    card: Card | None, spec: ModelSpec | None, plan: Mapping[str, Any] | None, engine: str, experiment: Experiment
) -> dict[str, Any]:
    """Return for each point the roofline and the plan's estimate; `note` says what is missing.

    card: None if the server's card is unknown. plan: the plan that the instance was started with, if any.
    """
    found: dict[str, Any] = {
        "card": card.name if card else None,
        "claims": [asdict(claim) for claim in GUIDE_CLAIMS if claim.kind == experiment.kind],
        "anchors": [asdict(anchor) for anchor in ANCHORS],
        "points": {},
    }
    if card is None or "bandwidth_bytes_per_second" not in card.facts:
        return found | {"note": "no roofline: the server runs on the CPU, or its card is unknown (name it with --card)"}
    if spec is None:
        return found | {"note": "no roofline: the model's file is not on this machine (name it with --model)"}
    setting = setting_of(plan, engine)
    points = {point.name: _expectation(card, spec, setting, point) for point in experiment.points}
    return found | {"points": points, "note": None}


def setting_of(plan: Mapping[str, Any] | None, engine: str) -> Setting:
    """Return how an instance computes, by its plan; without a plan, by the profiles of the cards."""
    known = plan or {}
    return Setting(
        engine=engine if engine in ENGINES else DEFAULT_ENGINE,
        dtype=known.get("dtype", "float16"),
        kv_dtype=known.get("kv_dtype", "fp16"),
        chunked_prefill_tokens=known.get("chunked_prefill_tokens", 512),
    )


def find_card(name: str | None, gpus: list[str], plan: Mapping[str, Any] | None = None) -> Card | None:
    """Return the card with a profile's name; without a name, the plan's card; without a plan, that of the host's GPUs.

    gpus: their names. None if the card has no profile, or if the host has unlike GPUs and nothing says which it is.
    """
    if name is not None:
        return load_card(name)
    if planned_for := (plan or {}).get("card"):
        return load_card(planned_for) if planned_for in card_names() else None
    return card_for_device(gpus[0].removeprefix("NVIDIA ")) if len(set(gpus)) == 1 else None


def _expectation(card: Card, spec: ModelSpec, setting: Setting, point: Point) -> dict[str, Any]:
    prompt = parse_lengths("prompt_tokens", point.prompt_tokens).typical
    output = parse_lengths("output_tokens", point.output_tokens).typical
    if point.concurrency is None:
        # Requests with arrival times are never served faster than they arrive.
        return {}
    return {
        "roofline": {"output_throughput": roofline(card, spec, setting, point.concurrency, prompt, output)},
        "plan": planned(card, spec, setting, point.concurrency, prompt, output),
    }


def roofline(card: Card, spec: ModelSpec, setting: Setting, batch: int, prompt: int, output: int) -> float:
    """Return the output tokens per second that no program can exceed on the card.

    Per round of `batch` requests: the prompts at the arithmetic peak, then `output` steps, each of which reads the
    weights once and every request's KV cache, and takes the larger of the times for bytes and for arithmetic.
    """
    request = _request(card, setting, batch, prompt + output)
    weights = weights_on_device(spec, request)
    bandwidth, peak = card.number("bandwidth_bytes_per_second"), peak_macs(card)
    token_bytes = engine_named(setting.engine).memory.kv_bytes_per_token(spec, request)
    cached = batch * (prompt + output / 2) * token_bytes
    step = max((weights.read_bytes(batch) + cached) / bandwidth, batch * weights.macs / peak)
    prefill = batch * prompt * (weights.macs - weights.output_macs) / peak
    return batch * output / (prefill + output * step)


def planned(card: Card, spec: ModelSpec, setting: Setting, batch: int, prompt: int, output: int) -> dict[str, float]:
    """Return the planner's estimate: memory if started for this point, and speed."""
    plan = make_plan(spec, card, _request(card, setting, batch, prompt + output))
    found = {"gpu_memory_bytes": float(plan.total_bytes)}
    # The planner's decode rate is at half of the context, which is the mean cached length here.
    decode = make_plan(spec, card, _request(card, setting, batch, 2 * prompt + output)).speed
    prefill = make_plan(spec, card, _request(card, setting, 1, prompt)).speed
    if decode is not None and prefill is not None:
        seconds = batch * prompt / prefill.prefill.tokens_per_second
        seconds += batch * output / decode.decode.tokens_per_second
        found["output_throughput"] = batch * output / seconds
        found["ttft_p50"] = prefill.ttft_seconds
    return found


def _request(card: Card, setting: Setting, batch: int, context: int) -> PlanRequest:
    return PlanRequest(
        card_bytes=card.memory_bytes,
        engine=setting.engine,
        dtype=setting.dtype,
        context_length=context,
        max_running_requests=batch,
        kv_dtype=setting.kv_dtype,
        chunked_prefill_tokens=setting.chunked_prefill_tokens,
    )
