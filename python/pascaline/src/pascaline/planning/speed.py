"""Estimate of speed: the time to move the bytes and to do the arithmetic, at measured shares of the peaks.

A step over n tokens takes bytes / (bandwidth x share) + n x multiply-accumulates / (peak x share). The shares are
fitted to measured points (engine.toml of an engine), one for each way in which kernels work: one, few, many tokens at
once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pascaline.cards import card_names, load_card
from pascaline.engines import ENGINES, engine_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pascaline.cards import Card, Fact
    from pascaline.engines.data import SpeedPoint
    from pascaline.engines.memory_model import Weights
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec

SMALL_BATCH = 8
"""Most columns of a decode kernel (llama.cpp, mmvq.cu, MMVQ_MAX_BATCH_SIZE); tiles begin beyond."""
DP4A_MACS = 4
"""int8 multiply-accumulates of one dp4a instruction; a card without it multiplies in fp32."""
LEAST_POINTS = 3
"""Minimum of measured points of a kind; figures based on fewer are called an estimate."""
ATTENTION_SHARE = 0.4
"""Share of the fp32 peak in prefill attention: estimated, as 0.6 to 0.7 is what a tiled kernel aims at."""

Kind = Literal["bandwidth", "small_batch", "large_batch"]


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens per second, all requests together."""

    tokens_per_second: float
    low: float
    high: float
    batch: int
    """Requests decoded at once, or tokens of a prefill chunk."""
    context: int
    """Tokens of each request that are in the cache."""
    bound: Literal["bandwidth", "compute", "host"]
    """What limits the speed: the part that takes the most time."""
    formula: str
    """The calculation with its numbers."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast the plan's settings are expected to be."""

    decode: Rate
    """All requests at once, each with half of its context behind it, or its share of a smaller KV cache."""
    single: Rate
    """One request at its first tokens."""
    repeating: Rate | None
    """One request at its first tokens, if every draft is right; None without speculation."""
    prefill: Rate
    ttft_seconds: float
    """Time to first token of a prompt that fills the context, on an idle engine."""
    basis: Literal["measured", "estimated"]
    """Whether the engine's shares of the peak come from measured points."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Shares of the peak that an engine reaches."""

    bandwidth: float
    small_batch: float
    large_batch: float
    errors: dict[str, float]
    """By kind: how far measurements lie from the estimate, root mean square of the relative deviation."""
    step_seconds_per_layer: float
    """Launches that add to the time on the card."""
    least_seconds_per_layer: float
    """Time of a layer's launches, which no step is faster than."""
    basis: Literal["measured", "estimated"]


def estimate_speed(spec: ModelSpec, card: Card, request: PlanRequest, weights: Weights, kv_tokens: int) -> Speed | None:
    """Return the expected speed; None for a device whose bandwidth and clock are unknown, or without weights.

    kv_tokens: tokens of the KV cache, which all requests share.
    """
    if not is_speed_known(card, request) or not weights.n_bytes:
        return None
    shares = calibration_for(card, request.engine, mixture=bool(spec.num_experts))
    model = _Model(spec, card, request, weights, shares)
    prefill = model.prefill()
    seconds = request.context_length / prefill.tokens_per_second
    return Speed(
        decode=model.decode(
            request.max_running_requests, min(request.context_length // 2, kv_tokens // request.max_running_requests)
        ),
        single=model.decode(1, 0),
        repeating=model.decode(request.speculation.width, 0, drafting=True) if request.speculation.tokens else None,
        prefill=prefill,
        ttft_seconds=seconds,
        basis=model.calibration.basis,
    )


def is_speed_known(card: Card, request: PlanRequest) -> bool:
    """Whether the card's data suffice for an estimate; false for a CPU and for a GPU without a profile."""
    return "bandwidth_bytes_per_second" in card.facts and request.device != "cpu"


class _Model:
    """The roofline of one model on one card."""

    def __init__(
        self, spec: ModelSpec, card: Card, request: PlanRequest, weights: Weights, shares: Calibration
    ) -> None:
        self.calibration = shares
        self._spec, self._request, self._weights = spec, request, weights
        self._engine = engine_named(request.engine).memory
        self._bandwidth = card.number("bandwidth_bytes_per_second") * shares.bandwidth
        self._peak = peak_macs(card)
        self._fp32 = card.number("cores") * card.number("boost_clock_hertz")
        self._kv = self._engine.kv_bytes_per_token(spec, request)
        self._overhead = shares.step_seconds_per_layer * spec.num_hidden_layers
        self._least = shares.least_seconds_per_layer * spec.num_hidden_layers
        self._host = host_speed(request) if weights.host_read_bytes(1) else None
        draft = request.speculation.draft
        self._draft_bytes = sum(tensor.n_bytes for tensor in draft.tensors) if draft is not None else 0

    def decode(self, batch: int, context: int, *, drafting: bool = False) -> Rate:
        """A step of one token for each of `batch` requests with `context` tokens each.

        drafting: the rows are one request's, and a draft model has read its weights once for each but the first.
        """
        drafted = (batch - 1) * self._draft_bytes if drafting else 0
        memory = (self._weights.read_bytes(batch) + drafted + batch * context * self._kv) / self._bandwidth
        kind = kind_of(batch)
        compute = self._compute(batch * self._weights.macs, kind, self._request.decode_bits)
        # The host launches kernels while the card computes: only what is left of that counts.
        launches = max(self._overhead, self._least - memory - compute)
        host = error = 0.0
        if self._host:
            host = self._host_seconds(batch, self._host.cpu_bytes_per_second)
            host += self._weights.host_switches * self._host.switch_seconds
            error = self._host.cpu_error
        return self._rate(batch, (memory, compute, launches, host), kind, batch, context, error)

    def prefill(self) -> Rate:
        """Chunks of a prompt that fills the context: the last one attends to all tokens before it."""
        chunk, total = self._request.chunked_prefill_tokens, self._request.context_length
        chunk = min(chunk, total)
        kind = kind_of(chunk)
        steps = math.ceil(total / chunk)
        memory = steps * self._weights.read_bytes(chunk) / self._bandwidth
        macs = total * (self._weights.macs - self._weights.output_macs)
        heads = self._spec.num_heads * (self._spec.head_dim + self._spec.v_head_dim) / self._request.tensor_parallel
        attention = self._spec.num_hidden_layers * heads * total**2 / 2 / (self._fp32 * ATTENTION_SHARE)
        compute = self._compute(macs, kind, self._request.prefill_bits)
        # Every batch copies the weights that it uses from the host and reads them on the device.
        memory += steps * self._weights.host_read_bytes(chunk) / self._bandwidth
        host = steps * self._host_seconds(chunk, self._host.link_bytes_per_second) if self._host else 0.0
        times = (memory, compute + attention, steps * self._overhead, host)
        return self._rate(total, times, kind, chunk, total, self._host.link_error if self._host else 0.0)

    def _host_seconds(self, batch: int, bytes_per_second: float) -> float:
        """Time for the host's part of a step: at this rate, and from the disk for what its memory cannot hold."""
        assert self._host is not None
        n_bytes, absent = self._weights.host_read_bytes(batch), absent_share(self._request, self._weights)
        return n_bytes * ((1 - absent) / bytes_per_second + absent / self._host.disk_bytes_per_second)

    def _compute(self, macs: float, kind: Kind, bits: int | None) -> float:
        columns = self._engine.activation_columns(bits)
        return 0.0 if kind == "bandwidth" else macs * columns / (self._peak * getattr(self.calibration, kind))

    def _rate(
        self,
        tokens: int,
        times: tuple[float, float, float, float],
        kind: Kind,
        batch: int,
        context: int,
        host_error: float,
    ) -> Rate:
        """times: seconds of memory traffic, of arithmetic, of launches, and for what the host's memory holds."""
        memory, compute, launches, host = times
        rate = tokens / sum(times)
        # The host's part of the time is known less well than the device's.
        error = (self.calibration.errors[kind] * (sum(times) - host) + host_error * host) / sum(times)
        bounds: dict[float, Literal["bandwidth", "compute", "host"]] = {
            compute: "compute", memory: "bandwidth", host: "host",
        }  # fmt: skip
        share = f" at {getattr(self.calibration, kind):.0%} of {self._peak / 1e12:.1f} T/s" if compute else ""
        formula = (
            f"{tokens:,} tokens / ({memory * 1e3:,.1f} ms for {memory * self._bandwidth / 1e9:,.2f} GB at "
            f"{self._bandwidth / 1e9:,.0f} GB/s + {compute * 1e3:,.1f} ms of arithmetic{share}"
            f" + {launches * 1e3:,.1f} ms of launches"
        )
        formula += f" + {host * 1e3:,.1f} ms for the host's part)" if host else ")"
        bound = bounds[max(memory, compute, host)]
        return Rate(rate, rate * (1 - error), rate * (1 + error), batch, context, bound, formula)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpeed:
    """The rates of what the host does while a GPU computes the rest, bytes per second."""

    memory_bytes_per_second: float
    """What the CPUs read from their memory."""
    source: str
    """Where that comes from."""
    cpu_bytes_per_second: float
    """What they compute with in a decode step."""
    link_bytes_per_second: float
    """Copies of a prompt's weights to the GPU."""
    disk_bytes_per_second: float
    """What a mapped file is read with, where the memory cannot hold it."""
    switch_seconds: float
    """What a layer of a decode step takes beside its bytes: values to the host, its threads' start, and back."""
    cpu_error: float
    link_error: float
    """Largest relative deviations to expect of the host's time in a decode step and in a prompt."""


def host_speed(request: PlanRequest) -> HostSpeed | None:
    """Return the request's rates, with the engine's assumptions for what it leaves open.

    None if the engine keeps no weights on the host.
    """
    known, given = engine_named(request.engine).data.efficiency, request.host_rates
    if "host_memory_bytes_per_second" not in known:
        return None
    is_known = given.memory_bytes_per_second is not None
    memory = given.memory_bytes_per_second or known["host_memory_bytes_per_second"].value
    pageable = known["mapped_link_bytes_per_second"].value
    link = given.link_bytes_per_second or known["link_bytes_per_second"].value
    return HostSpeed(
        memory_bytes_per_second=memory,
        source=given.source if is_known else "assumed",
        cpu_bytes_per_second=cpu_rate(memory, given.cores, known),
        link_bytes_per_second=min(link, pageable) if request.mapped or request.locked else link,
        disk_bytes_per_second=known["disk_bytes_per_second"].value,
        switch_seconds=known["host_switch_seconds"].value,
        cpu_error=known["host_error_known" if is_known else "host_error"].value,
        link_error=known["host_error" if given.link_bytes_per_second is None else "host_error_known"].value,
    )


def cpu_rate(memory_bytes_per_second: float, cores: int | None, known: Mapping[str, Fact]) -> float:
    """Return the bytes per second that the CPUs compute with: what they read, and at most what their cores multiply."""
    rate = memory_bytes_per_second * known["host_share"].value
    return rate if cores is None else min(rate, cores * known["host_core_bytes_per_second"].value)


def absent_share(request: PlanRequest, weights: Weights) -> float:
    """Return the share of the host's weights that its free memory cannot hold: steps read it from the file.

    0 unless they are mapped: a plan that does not fit is refused otherwise.
    """
    free = request.host_memory_bytes
    if not request.mapped or free is None or weights.host_bytes <= free:
        return 0.0
    return 1 - free / weights.host_bytes


def kind_of(batch: int) -> Kind:
    """The kind of kernels that multiply this many columns."""
    if batch == 1:
        return "bandwidth"
    return "small_batch" if batch <= SMALL_BATCH else "large_batch"


def peak_macs(card: Card) -> float:
    """Multiply-accumulates per second: dp4a if the card has it, else fp32."""
    per_lane = DP4A_MACS if card.has_dp4a else 1
    return card.number("cores") * card.number("boost_clock_hertz") * per_lane


@cache
def calibration(engine: str, *, mixture: bool = False) -> Calibration:
    """Return an engine's shares for dense models or mixtures of experts: from measured points, else as estimated.

    The two are fitted apart. Where a kind has fewer than LEAST_POINTS points the shares are an estimate, with an error
    at least as large as the one known for such models.
    """
    known = engine_named(engine).data.efficiency
    points = [point for point in _confirmed(engine) if point.mixture == mixture]
    overhead = known["step_seconds_per_layer"].value
    least = known["least_seconds_per_layer"].value if "least_seconds_per_layer" in known else 0.0
    if not points:
        return _estimated(known, overhead, least, known["mixture_error" if mixture else "error"].value)
    bandwidth = _geometric_mean(
        point.tokens_per_second * point.read_bytes / _bandwidth(point) for point in points if point.batch == 1
    )
    large = _compute_share(points, "large_batch", bandwidth)
    if mixture:
        # Without a point: the same factor below the dense models' share as for large batches.
        dense = calibration(engine)
        small = dense.small_batch * large / dense.large_batch
    else:
        small = _compute_share(points, "small_batch", bandwidth)
    shares = {"bandwidth": math.inf, "small_batch": small, "large_batch": large}
    floor = known["mixture_error"].value if mixture else 0.0
    errors = {kind: _error(_of_kind(points, kind), bandwidth, shares[kind], floor) for kind in shares}
    few = any(len(_of_kind(points, kind)) < LEAST_POINTS for kind in shares)
    return Calibration(bandwidth, small, large, errors, overhead, least, "estimated" if few else "measured")


def calibration_for(card: Card, engine: str, *, mixture: bool) -> Calibration:
    """Return the shares for a card.

    For a card without a profile, and from measurements on cards that differ in dp4a, they are estimates.
    """
    shares = calibration(engine, mixture=mixture)
    measured = {point.card for point in _confirmed(engine)}
    if card.name in card_names() and any(load_card(name).has_dp4a == card.has_dp4a for name in measured):
        return shares
    error = engine_named(engine).data.efficiency["error"].value
    return replace(shares, errors={kind: max(error, own) for kind, own in shares.errors.items()}, basis="estimated")


def speed_points() -> tuple[SpeedPoint, ...]:
    """Return the measured speeds of every engine."""
    return tuple(point for engine in ENGINES.values() for point in engine.data.points)


def _confirmed(engine: str) -> list[SpeedPoint]:
    return [point for point in engine_named(engine).data.points if point.confirmed]


def _estimated(known: Mapping[str, Fact], overhead: float, least: float, error: float) -> Calibration:
    errors = dict.fromkeys(("bandwidth", "small_batch", "large_batch"), error)
    bandwidth, small, large = (known[kind].value for kind in errors)
    return Calibration(bandwidth, small, large, errors, overhead, least, "estimated")


def _of_kind(points: Iterable[SpeedPoint], kind: str) -> list[SpeedPoint]:
    return [point for point in points if kind_of(point.batch) == kind]


def predicted(point: SpeedPoint, bandwidth: float, compute: float) -> float:
    """Return the tokens per second that these shares give for a measured point."""
    memory = point.read_bytes / (_bandwidth(point) * bandwidth)
    return point.batch / (memory + point.batch * point.macs / (peak_macs(load_card(point.card)) * compute))


def _compute_share(points: Sequence[SpeedPoint], kind: Kind, bandwidth: float) -> float:
    """The share of the arithmetic peak that was reached in the measured time minus the time for the bytes."""
    shares = []
    for point in points:
        if kind_of(point.batch) != kind:
            continue
        seconds = point.batch / point.tokens_per_second - point.read_bytes / (_bandwidth(point) * bandwidth)
        shares.append(point.batch * point.macs / seconds / peak_macs(load_card(point.card)))
    return _geometric_mean(shares)


def _error(points: Sequence[SpeedPoint], bandwidth: float, compute: float, floor: float) -> float:
    """Return the root mean square deviation, or the largest one if there are few points; at least `floor`."""
    deviations = [predicted(point, bandwidth, compute) / point.tokens_per_second - 1 for point in points]
    if len(points) < LEAST_POINTS:
        return max(floor, *map(abs, deviations), 0.0)
    return max(floor, math.sqrt(sum(deviation**2 for deviation in deviations) / len(deviations)))


def _bandwidth(point: SpeedPoint) -> float:
    return load_card(point.card).number("bandwidth_bytes_per_second")


def _geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))
