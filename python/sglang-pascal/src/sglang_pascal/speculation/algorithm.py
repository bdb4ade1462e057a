"""`--speculative-algorithm PASCAL_LOOKUP`: what SGLang knows of prompt lookup before a worker exists."""

from __future__ import annotations

import os
from typing import Any, Final

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from sglang_pascal.errors import PluginError
from sglang_pascal.kernels.formats import SPECULATIVE_WIDTHS
from sglang_pascal.names import LOOKUP

DEFAULT_WIDTH: Final = 8
"""Rows of one request in the widest step: a decided token and seven drafts."""
_BARRIER: Final = "SGLANG_ENABLE_WAR_BARRIER"
"""The scheduler's slots for the next step must wait for this step's reads. SGLang does so where `is_cuda` is True,
which the plugin replaces."""


class LookupAlgorithm(CustomSpecAlgo):  # type: ignore[misc]  # SGLang publishes no types
    """Three methods that the scheduler calls are missing in SGLang's own class."""

    def is_ngram(self) -> bool:
        """Return True: SGLang then carries accepted tokens from step to step, and records verification steps."""
        return True

    def has_draft_kv(self) -> bool:
        """Return False: drafts come from the host."""
        return False

    def need_topk(self) -> bool:
        """Return False: there is no draft model."""
        return False

    def carries_draft_hidden_states(self) -> bool:
        """Return False: there is no draft model."""
        return False

    def create_future_map(
        self, device: Any, pool: Any, needs_cpu_seq_lens: bool = True, needs_confidence_relay: bool = False
    ) -> Any:
        """Return SGLang's relay without lengths on the host: they would wait for the device in every step."""
        from sglang.srt.managers.overlap_utils import FutureMap

        del needs_cpu_seq_lens
        return FutureMap(device, self, pool, False, needs_confidence_relay)

    def handle_server_args(self, server_args: Any) -> None:
        """Fill in what was not given. SGLang turns the assignments into declared defaults."""
        width = server_args.speculative_num_draft_tokens or DEFAULT_WIDTH
        server_args.speculative_num_draft_tokens = width
        server_args.speculative_num_steps = width - 1
        server_args.speculative_eagle_topk = 1
        server_args.enable_mixed_chunk = False
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
"""Argument -> the only value with which prompt lookup works, and its flag."""


def check_arguments(server_args: Any) -> None:
    """Raise PluginError for arguments with which prompt lookup does not work."""
    for name, (only, flag) in _UNSUPPORTED.items():
        value = getattr(server_args, name, only)
        if value != only:
            raise PluginError(f"--speculative-algorithm {LOOKUP}: {flag} is {value!r}, must be {only!r}")
    width = server_args.speculative_num_draft_tokens
    if width is not None and not 2 <= width <= SPECULATIVE_WIDTHS[-1]:
        raise PluginError(f"--speculative-num-draft-tokens must be between 2 and {SPECULATIVE_WIDTHS[-1]}, got {width}")


def _worker_class(server_args: Any) -> type:
    from sglang_pascal.speculation.worker import LookupWorker

    del server_args
    return LookupWorker


def register() -> None:
    """Add the algorithm to SGLang's registry."""
    decorate = SpeculativeAlgorithm.register(
        LOOKUP, supports_overlap=True, validate_server_args=check_arguments, spec_class=LookupAlgorithm
    )
    decorate(_worker_class)
