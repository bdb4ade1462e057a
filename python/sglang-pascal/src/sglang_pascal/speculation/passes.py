"""One pass of a model over a chain: several tokens of each request, each of which sees the tokens before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.speculative.ngram_info import NgramVerifyInput

if TYPE_CHECKING:
    import torch

    from sglang_pascal.speculation.graphs import RecordedWidths


def run_chain(
    worker: Any, graphs: RecordedWidths, batch: Any, tokens: torch.Tensor, positions: torch.Tensor
) -> tuple[Any, bool]:
    """Run a model over tokens `[n, width]` at these positions; return its output and whether the pass was recorded.

    worker: SGLang's worker of that model. batch: SGLang's; its lengths `[n]` do not count these tokens. Its fields that
    describe a pass are changed.
    """
    slots = batch.req_to_token_pool.req_to_token[batch.req_pool_indices[:, None], positions]
    batch.input_ids, batch.out_cache_loc = tokens.flatten(), slots.flatten().long()
    batch.forward_mode = ForwardMode.TARGET_VERIFY
    batch.spec_info = NgramVerifyInput(
        draft_token=batch.input_ids,
        positions=positions.flatten(),
        draft_token_num=tokens.shape[1],
        new_seq_lens=batch.seq_lens,
    )
    batch.spec_info.capture_hidden_mode = CaptureHiddenMode.NULL
    with graphs.of_width(tokens.shape[1]):
        result = worker.forward_batch_generation(batch, is_verify=True)
    return result.logits_output, result.can_run_cuda_graph
