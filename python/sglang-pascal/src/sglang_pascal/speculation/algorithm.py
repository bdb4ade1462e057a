"""`--speculative-algorithm PASCAL_LOOKUP` and `PASCAL_DRAFT`: what SGLang needs before a worker exists."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from sglang_pascal.errors import PluginError
from sglang_pascal.kernels.formats import SPECULATIVE_WIDTHS
from sglang_pascal.names import DRAFT, LOOKUP

DEFAULT_WIDTH: Final = 8
"""Rows of one request in the widest step: a decided token and seven drafts."""
_BARRIER: Final = "SGLANG_ENABLE_WAR_BARRIER"
"""Makes the scheduler write the next step's slots only after this step has read its own. SGLang does so by itself if
`is_cuda` is True; with the plugin it is not."""


class ChainAlgorithm(CustomSpecAlgo):  # type: ignore[misc]  # SGLang publishes no types
    """SGLang's class for registered algorithms, with the methods that the scheduler also calls."""

    def is_ngram(self) -> bool:
        """Return True: SGLang then carries accepted tokens from step to step, and records verification steps."""
        return True

    def has_draft_kv(self) -> bool:
        """Return False: a chain has no branches whose keys and values would need room."""
        return False

    def need_topk(self) -> bool:
        """Return False: there is no tree of drafts."""
        return False

    def supports_target_verify_for_draft(self) -> bool:
        """Return True: a draft model's passes are chains too."""
        return True

    def carries_draft_hidden_states(self) -> bool:
        """Return False: no draft depends on the target's hidden states."""
        return False

    def create_future_map(
        self, device: Any, pool: Any, needs_cpu_seq_lens: bool = True, needs_confidence_relay: bool = False
    ) -> Any:
        """Return SGLang's relay without lengths on the host: they would wait for the device in every step."""
        from sglang_pascal.speculation.relay import ChainRelay

        del needs_cpu_seq_lens
        return ChainRelay(device, self, pool, False, needs_confidence_relay)

    def handle_server_args(self, server_args: Any) -> None:
        """Set the arguments that were not given. SGLang turns the assignments into declared defaults."""
        width = server_args.speculative_num_draft_tokens or DEFAULT_WIDTH
        server_args.speculative_num_draft_tokens = width
        server_args.speculative_num_steps = width - 1
        server_args.speculative_eagle_topk = 1
        server_args.enable_mixed_chunk = False
        if server_args.speculative_draft_model_path and server_args.speculative_draft_model_quantization is None:
            server_args.speculative_draft_model_quantization = server_args.quantization
        os.environ.setdefault(_BARRIER, "1")


_UNSUPPORTED: Final = {
    "pp_size": (1, "--pp-size"),
    "tp_size": (1, "--tp-size"),
    "dp_size": (1, "--dp-size"),
    "disaggregation_mode": ("null", "--disaggregation-mode"),
    "enable_custom_logit_processor": (False, "--enable-custom-logit-processor"),
    "enable_return_hidden_states": (False, "--enable-return-hidden-states"),
    "enable_watermark": (False, "--enable-watermark"),
}
"""Argument -> the only value with which drafts work, and the argument's flag."""


def check_arguments(server_args: Any) -> None:
    """Raise PluginError for arguments with which drafts do not work."""
    algorithm = server_args.speculative_algorithm
    for name, (only, flag) in _UNSUPPORTED.items():
        value = getattr(server_args, name, only)
        if value != only:
            raise PluginError(f"--speculative-algorithm {algorithm}: {flag} is {value!r}, must be {only!r}")
    width = server_args.speculative_num_draft_tokens
    if width is not None and not 2 <= width <= SPECULATIVE_WIDTHS[-1]:
        raise PluginError(f"--speculative-num-draft-tokens must be between 2 and {SPECULATIVE_WIDTHS[-1]}, got {width}")


def check_draft_arguments(server_args: Any) -> None:
    """Raise PluginError for arguments with which a draft model does not work, or if its tokenizer differs."""
    from sglang_pascal.speculation.tokenizers import require_same_tokenizer

    check_arguments(server_args)
    draft = server_args.speculative_draft_model_path
    if draft is None:
        raise PluginError(
            f"--speculative-draft-model-path is missing, which --speculative-algorithm {DRAFT} needs: the folder that "
            "`sglang-pascal prepare` made of the draft model"
        )
    require_same_tokenizer(Path(server_args.model_path), Path(draft))


def _lookup_worker(server_args: Any) -> type:
    from sglang_pascal.speculation.worker import LookupWorker

    del server_args
    return LookupWorker


def _draft_worker(server_args: Any) -> type:
    from sglang_pascal.speculation.worker import DraftWorker

    del server_args
    return DraftWorker


def register() -> None:
    """Add the algorithms to SGLang's registry."""
    for name, check, worker in (
        (LOOKUP, check_arguments, _lookup_worker),
        (DRAFT, check_draft_arguments, _draft_worker),
    ):
        decorate = SpeculativeAlgorithm.register(
            name, supports_overlap=True, validate_server_args=check, spec_class=ChainAlgorithm
        )
        decorate(worker)
