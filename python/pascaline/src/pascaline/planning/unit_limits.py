"""NUMA node and memory limit of an instance's systemd unit, if weights stay in the host's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pascaline.planning.placement import Placement
    from pascaline.planning.plan import Plan

MARGIN_BYTES, MARGIN_SHARE = 4 * 2**30, 0.5
"""What the unit may take beyond the plan's part of the host: the supervisor, the driver's own buffers, and a plan of
the next start that finds less of the card free. The latter does not change the limit of kept prompts."""
KEPT_PROMPTS = "host_prompts"


@dataclass(frozen=True, slots=True)
class UnitLimits:
    """None: the unit is not limited in this."""

    numa_nodes: tuple[int, ...] = ()
    """Nodes to whose CPUs and memory it is bound: those of one socket; empty if it is not bound."""
    memory_max_bytes: int | None = None

    def nixos_options(self) -> dict[str, str | list[int] | None]:
        """Return them as options of services.pascaline.instances.<name>, whose `limits` reads them from a file."""
        most = self.memory_max_bytes
        return {"memoryMax": None if most is None else str(most), "numaNode": list(self.numa_nodes) or None}


NO_LIMITS = UnitLimits()


def unit_limits(plan: Plan, placement: Placement, node_bytes: int | None) -> UnitLimits:
    """Return the limits that follow from a plan; none if nothing but the input embedding is on the host.

    node_bytes: memory of the placement's NUMA nodes together, None if unknown. Without room for everything the unit is
    not bound: its kernel would kill it while other nodes have memory. A mapped file is page cache, which a limit would
    push out.
    """
    if not plan.fits or len(plan.host_parts) < 2:
        return NO_LIMITS
    prompts = sum(part.n_bytes for part in plan.host_parts if part.key == KEPT_PROMPTS)
    most = round((plan.host_bytes - prompts) * (1 + MARGIN_SHARE)) + prompts + MARGIN_BYTES
    bound = bool(placement.cpus) and node_bytes is not None and most <= node_bytes
    return UnitLimits(placement.numa_nodes if bound else (), None if plan.request.mapped else most)
