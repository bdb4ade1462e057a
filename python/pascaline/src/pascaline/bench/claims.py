"""Figures that others publish: the guide that this project grew out of, and measurements. Shown beside results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

GUIDE = "GPU Optimization Strategies (the guide), 7B model on a Tesla P4"


@dataclass(frozen=True, slots=True)
class Claim:
    """One figure that a source claims."""

    kind: str
    """The benchmark: batch, context or quant."""
    axis: float | str
    """Batch size, or type of the weights."""
    key: str
    """Key in metrics.METRICS."""
    value: float
    """Value in the figure's base unit."""
    source: str


GUIDE_CLAIMS = (
    *(Claim("batch", size, "output_throughput", value, GUIDE) for size, value in ((1, 3), (2, 5), (4, 8), (8, 10))),
    *(
        Claim("batch", size, "gpu_memory_bytes", value * 2**30, GUIDE)
        for size, value in ((1, 4), (2, 5), (4, 6), (8, 7))
    ),
    *(
        Claim("quant", kind, "output_throughput", value, GUIDE)
        for kind, value in (("Q8_0", 5), ("Q6_K", 7), ("Q4_K_M", 10))
    ),
)
"""docs/guide.md, rows 3, 5 and 13."""

EXPECTED_BATCH = 4
"""Concurrent requests of the guide's expected performance, row 13."""
EXPECTED_LOAD_SECONDS = 10.0
EXPECTED = {
    "output_throughput": 8.0,
    "gpu_memory_bytes": 7.0 * 2**30,
    # The guide does not say which latency its 200 ms are.
    "ttft_p50": 0.2,
    "itl_p50": 0.2,
    "e2e_p50": 0.2,
}
"""Row 13, in the figures' base units."""

WHALEVAULT = "MykytaKyt/WhaleVault docs/models.md, llama.cpp on a Tesla P4, driver 580.105.08, October 2026"


@dataclass(frozen=True, slots=True)
class Anchor:
    """One published measurement of a Pascal card, single stream."""

    card: str
    model: str
    weights_bytes: float
    """Size of the model's file."""
    output_throughput: float
    source: str


# File sizes: the published GGUF files of these names, to two digits.
ANCHORS = (
    Anchor("tesla-p4", "Qwen3.5-4B Q4_K_M", 2.7e9, 35.7, WHALEVAULT),
    Anchor("tesla-p4", "Qwen3.5-9B Q4_K_M", 5.6e9, 19.7, WHALEVAULT),
    Anchor("tesla-p40", "llama 7B Q4_K_S", 3.9e9, 53.7, "llama.cpp #4766"),
    Anchor("tesla-p40", "llama 7B Q4_0", 3.8e9, 56.3, "llama.cpp #4766"),
)


GUIDE_CARD = "Tesla P4"
GUIDE_PARAMETERS = (6e9, 8e9)
"""Least and most parameters of what is called a 7B model."""


def guide_applies(document: Mapping[str, Any]) -> bool:
    """Whether a result is of a model and a card that the guide speaks of; not if either is unknown."""
    gpus = (document.get("machine") or {}).get("gpus") or []
    parameters = ((document.get("instance") or {}).get("model") or {}).get("parameters")
    least, most = GUIDE_PARAMETERS
    fits = parameters is not None and least <= parameters <= most
    return fits and bool(gpus) and gpus[0].removeprefix("NVIDIA ") == GUIDE_CARD


def claims_beside(document: Mapping[str, Any], key: str) -> dict[float | str, float]:
    """Return the guide's claims for one figure of a result; none if the guide speaks of something else."""
    return claims_for(document["kind"], key) if guide_applies(document) else {}


def claims_for(kind: str, key: str) -> dict[float | str, float]:
    """Return the guide's claims for one figure of one benchmark: axis -> value."""
    return {claim.axis: claim.value for claim in GUIDE_CLAIMS if claim.kind == kind and claim.key == key}
