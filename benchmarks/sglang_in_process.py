"""SGLang's model runner in this process: logits of whole prompts and of single decode steps, without a server.

The model, the weights, the KV pools, the attention backend and the recorded graphs are those that serve; only the
scheduler and HTTP are missing. Only one per process: SGLang keeps its configuration in globals.
"""

from __future__ import annotations

import argparse
import os
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class InProcessEngine:
    """A loaded model from a prepared folder."""

    def __init__(self, folder: Path, *flags: str, quantized: bool = True) -> None:
        """flags: as on SGLang's command line. quantized: False = dequantise the weights, also on a GPU."""
        start = time.monotonic()
        os.environ |= {"SGLANG_PLATFORM": "pascal", "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.benchmark import one_batch
        from sglang.srt.runtime_context import SpawnRanks, publish
        from sglang.srt.server_args import PortArgs, ServerArgs

        parser = argparse.ArgumentParser()
        ServerArgs.add_cli_args(parser)
        base = ["--model-path", str(folder), "--load-format", "pascal_gguf", "--log-level", "warning"]
        arguments = ServerArgs.from_cli_args(parser.parse_args([*base, *flags]))
        if not quantized:
            _dequantize_by_default()
        arguments.resolve_once()
        publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
        one_batch._init_process_global_configs()
        self.import_seconds = time.monotonic() - start
        """Seconds until the model began to load."""
        self._bench = one_batch
        self.weights_seconds = 0.0
        """Seconds to build the model and read its weights to the device; part of the time for the rest."""
        self.weights_host_bytes = 0
        """Most host memory during this, with the file's pages, minus what the process held before."""
        self._measure_loading()
        self.runner: Any = one_batch.load_model(arguments, PortArgs.init_new(arguments), 0, 0)[0].torch_runner

    def _measure_loading(self) -> None:
        import torch
        from sglang_pascal.checkpoint.loader import PascalGgufLoader

        load = PascalGgufLoader.load_model

        def timed(loader: Any, **arguments: Any) -> Any:
            start, held = time.monotonic(), _restart_peak_of_host_bytes()
            model = load(loader, **arguments)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.weights_seconds = time.monotonic() - start
            self.weights_host_bytes = _host_bytes("VmHWM") - held
            return model

        PascalGgufLoader.load_model = timed

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Any]:
        """Return logits `[n, vocabulary]` after each prompt, and the batch to decode with."""
        _, logits, batch = self._bench.extend(self._requests(prompts), self.runner)
        return logits.float().clone(), batch

    def decode(self, tokens: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return logits `[n, vocabulary]` after one more token `[n]` of each."""
        _, logits = self._bench.decode(tokens, batch, self.runner)
        return logits.float().clone()  # a recorded step writes the next ones to the same memory

    def step(self, tokens: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return the token `[n]` after one more token `[n]` of each, chosen as SGLang does, without waiting for it."""
        chosen: torch.Tensor = self._bench.decode(tokens, batch, self.runner)[0]
        return chosen

    def all_logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return logits `[len(ids), vocabulary]` after each token of one prompt, from one prefill."""
        import torch

        model, hidden = self.runner.model, []
        hook = model.model.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
        try:
            self.prefill([ids])
        finally:
            hook.remove()
            self.clear()
        (states,) = hidden
        with torch.no_grad():
            head = getattr(model, "lm_head", model.model.embed_tokens)  # Gemma 2 has no other name for it
            logits = model.logits_processor._compute_lm_head(states, head)
        result: torch.Tensor = logits[:, : model.config.vocab_size].float()
        cap = getattr(model.config, "final_logit_softcapping", None)
        return result if cap is None else cap * torch.tanh(result / cap)

    def greedy(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
        """Return the tokens at temperature 0 after each prompt, all decoded as one batch."""
        logits, batch = self.prefill(prompts)
        columns = [logits.argmax(-1)]
        for _ in range(n_tokens - 1):
            columns.append(self.decode(columns[-1], batch).argmax(-1))
        self.clear()
        return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def clear(self) -> None:
        """Forget all requests."""
        self.runner.req_to_token_pool.clear()
        self.runner.token_to_kv_pool_allocator.clear()

    def _requests(self, prompts: Sequence[Sequence[int]]) -> list[Any]:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        requests = []
        for number, ids in enumerate(prompts):
            request = Req(
                rid=str(number),
                origin_input_text="",
                origin_input_ids=array("q", ids),
                sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
            )
            request.full_untruncated_fill_ids = request.origin_input_ids
            request.logprob_start_len = -1
            request.extend_end = len(ids)
            requests.append(request)
        return requests


def _restart_peak_of_host_bytes() -> int:
    """Reset the process's peak (proc_pid_clear_refs(5)); return what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _host_bytes("VmRSS")


def _host_bytes(key: str) -> int:
    """Return a size of this process, which the kernel reports in units of 1024 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _dequantize_by_default() -> None:
    """Undo the plugin's choice on a GPU for weights of a GGUF file."""
    from sglang_pascal.platform import PascalCudaPlatform

    choose = PascalCudaPlatform.apply_server_args_defaults

    def without_quantization(self: Any, server_args: Any) -> None:
        choose(self, server_args)
        server_args.quantization = None

    PascalCudaPlatform.apply_server_args_defaults = without_quantization
