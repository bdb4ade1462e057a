"""Serves many models by SGLang with the plugin, one after the other, in one process.

    python sglang_side.py JOB.json RESULT.json

The tokenizer, the loader, the model, the KV pool and the attention backend are those that serve; only the scheduler and
HTTP are missing. SGLang is imported once, which takes a hundred times as long as a tiny model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import traceback
from array import array
from pathlib import Path
from typing import Any

FLAGS = [
    "--device",
    "cpu",
    "--load-format",
    "pascal_gguf",
    "--dtype",
    "float32",
    "--max-total-tokens",
    "1024",
]
FLAGS += [
    "--mem-fraction-static",
    "0.2",
    "--max-running-requests",
    "4",
    "--log-level",
    "warning",
]


MODELS_THAT_IMPORT = 2
"""SGLang has imported everything it serves with after this many models. It collects garbage for each model, which takes
most of a second if it looks at the modules' objects."""


def main(job: dict[str, Any]) -> dict[str, Any]:
    """job: `models` (name -> folder, flags), `texts`, `prompts`, `steps`; see `serve`."""
    os.environ |= {
        "SGLANG_PLATFORM": "pascal",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    from sglang.srt.plugins import load_plugins

    load_plugins()
    results = {}
    for number, (name, model) in enumerate(job["models"].items()):
        if number < MODELS_THAT_IMPORT:
            gc.freeze()
        try:
            results[name] = serve(model, job)
        except Exception:  # the other models are still to be compared
            results[name] = {"error": traceback.format_exc()}
    return results


def serve(model: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Return token ids of the texts and log-probabilities after the prompts, by the length of what precedes."""
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    tokenizer = get_tokenizer(model["folder"])
    ids = [tokenizer.encode(text) for text in job["texts"]]
    try:
        runner = _loaded(model["folder"], model.get("flags", []))
        return {
            "ids": ids,
            "logprobs": _logprobs(runner, job["ids"], job["lengths"], job["steps"]),
        }
    finally:
        _forget_groups()


def _loaded(folder: str, flags: list[str]) -> Any:
    from sglang.benchmark import one_batch
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    arguments = ServerArgs.from_cli_args(parser.parse_args(["--model-path", folder, *FLAGS, *flags]))
    arguments.resolve_once()
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    one_batch._init_process_global_configs()
    return one_batch.load_model(arguments, PortArgs.init_new(arguments), 0, 0)[0].torch_runner


def _forget_groups() -> None:
    """Undo what SGLang allows once per process."""
    from sglang.srt.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )

    destroy_model_parallel()
    destroy_distributed_environment()


def _logprobs(runner: Any, ids: list[int], lengths: list[int], steps: int) -> dict[int, list[float]]:
    """Prefill the first ids of each length together, and decode the next ones."""
    import torch
    from sglang.benchmark import one_batch

    found = {}
    _, logits, batch = one_batch.extend([_request(str(n), ids[:n]) for n in lengths], runner)
    for step in range(steps + 1):
        for length, row in zip(lengths, logits.float().log_softmax(-1), strict=True):
            found[length + step] = row.tolist()
        if step < steps:
            tokens = torch.tensor([ids[length + step] for length in lengths])
            _, logits = one_batch.decode(tokens, batch, runner)
    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    return found


def _request(name: str, ids: list[int]) -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(temperature=0, max_new_tokens=1)
    request = Req(
        rid=name,
        origin_input_text="",
        origin_input_ids=array("q", ids),
        sampling_params=sampling,
    )
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len = -1
    request.extend_end = len(ids)
    return request


if __name__ == "__main__":
    job_file, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps(main(json.loads(job_file.read_text()))))
