"""Keeps each request's newest token on the device for the next step, while SGLang overlaps steps.

After each step with speculation, SGLang relays all accepted tokens of each request, and their number. Here a step
without drafts relays one token of each request, as SGLang does without speculation. A step with drafts also relays the
others, which are read only if the host asks for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.overlap_utils import FutureMap

if TYPE_CHECKING:
    import torch


class ChainRelay(FutureMap):  # type: ignore[misc]  # SGLang publishes no types
    """SGLang's relay, by rows of its table of requests."""

    def stash(self, indices: torch.Tensor, payload: Any) -> None:
        """Store a step's tokens `[n, width]`; after a step with drafts, also each request's number of accepted ones."""
        tokens = payload.accept_tokens
        if tokens.shape[1] > 1:
            super().stash(indices, payload)
            tokens = tokens.gather(1, payload.accept_lens[:, None].long() - 1)
        self.output_tokens_buf[indices] = tokens[:, 0].to(self.output_tokens_buf.dtype)

    def runs(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens `[n, width]` and their numbers `[n]` of the last step with drafts of each request."""
        return self.accept_tokens_buf[indices], self.accept_lens_buf[indices]

    def _resolve_spec_extras(self, batch: Any) -> None:
        carried = batch.spec_info
        if carried is None or carried.future_indices is None or not len(carried.future_indices):
            return
        carried.newest = self.output_tokens_buf[carried.future_indices]
        carried.relay = self
