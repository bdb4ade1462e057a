"""The plan of the instance's model on this host's card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.cards import load_card
from pascaline.doctor.evidence.instance import UNIT_PREFIX
from pascaline.errors import PascalineError
from pascaline.planning.plan import make_plan
from pascaline.planning.request import request_from_settings

if TYPE_CHECKING:
    from pascaline.doctor.host import Gpu, Host
    from pascaline.planning.plan import Plan


def make_host_plan(host: Host) -> tuple[Plan | None, str, str]:
    """Plan the model on this host's card beside what others hold of it: (plan, why there is none, refusal).

    A refusal is the planner's word that these settings cannot serve this model; without one, something is not known.
    """
    settings, spec, configuration = host.settings, host.model.spec, host.instance.configuration
    if settings is None or spec is None or configuration is None:
        return None, "", ""
    gpu = next(iter(host.gpus), None)
    name = configuration.card or (gpu.card.name if gpu and gpu.card else None)
    if name is None:
        return None, "the card has no profile; see card-profile", ""
    card = load_card(name)
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and name != "cpu")
    dtype = settings.dtype if settings.dtype != "auto" else "float16" if on_gpu else "float32"
    total, used = _memory_of(gpu, card.memory_bytes) if on_gpu else (host.system.memory.get("MemAvailable", 0), 0)
    try:
        request = request_from_settings(
            settings, spec, device="cuda" if on_gpu else "cpu", dtype=dtype, card_bytes=total, used_bytes=used
        )
        return make_plan(spec, card, request), "", ""
    except PascalineError as error:
        return None, "", str(error)


def _memory_of(gpu: Gpu | None, profile_bytes: int) -> tuple[int, int]:
    """Return (total, used by programs that are not ours), bytes; the profile's where the driver does not tell."""
    if gpu is None or gpu.memory is None:
        return profile_bytes, 0
    total, _, used = gpu.memory
    ours = sum(process.bytes or 0 for process in gpu.processes if process.unit.startswith(UNIT_PREFIX))
    return total, max(0, used - ours)
