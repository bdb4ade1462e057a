"""What llama-server keeps in the host's memory for prompts that come again: whole prompts, and checkpoints of states.

Both grow while requests come, to limits that its flags set: by default 8 GiB of prompts and 32 checkpoints of a slot.
Where weights take the host's memory too, the plan sets limits that the rest has room for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.engines.kv_layers import layer_groups
from pascaline.engines.llama_cpp.states import recurrent_bytes

if TYPE_CHECKING:
    from pascaline.engines.kv_layers import KvType
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec

MOST_PROMPT_BYTES = 8 * 2**30
"""Default of --cache-ram (common.h, cache_ram_mib)."""
FREE_PARTS = 4
"""Kept prompts may use the free memory divided by this. The page cache and other programs need the rest."""
MIB = 2**20
MOST_CHECKPOINTS, CHECKPOINT_TOKENS = 32, 8192
"""Defaults of --ctx-checkpoints and --checkpoint-min-step (common.h)."""
AT_THE_ENDS = 2
"""Checkpoints of a context besides those in between: at the start and at the end of a prompt."""


def prompt_cache_bytes(free_bytes: int | None, needed_bytes: int) -> int:
    """Return the limit of kept prompts, whole MiB. free_bytes: of the host, None = unknown; needed_bytes: all else."""
    if free_bytes is None:
        return MOST_PROMPT_BYTES
    return min(MOST_PROMPT_BYTES, max(0, free_bytes - needed_bytes) // FREE_PARTS // MIB * MIB)


def checkpoints(context_length: int) -> int:
    """Return how many checkpoints of a slot a context has room for at llama-server's distance between them."""
    return min(MOST_CHECKPOINTS, context_length // CHECKPOINT_TOKENS + AT_THE_ENDS)


def checkpoint_bytes(spec: ModelSpec, request: PlanRequest, kind: KvType) -> int:
    """Return the bytes of all checkpoints of all requests: recurrent states, and the windows of sliding layers.

    0 for a model with neither, which needs none.
    """
    window = min(request.context_length, (spec.sliding_window or 0) + request.chunked_prefill_tokens)
    sliding = sum(window * group.token_bytes(kind) for group in layer_groups(spec) if group.sliding)
    one = recurrent_bytes(spec) + round(sliding if spec.sliding_window else 0)
    return one * checkpoints(request.context_length) * request.max_running_requests
