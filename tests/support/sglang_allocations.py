"""Says what SGLang really allocates for a model: run in the engine's Python, prints one JSON object as its last line.

    python tests/support/sglang_allocations.py --model-path DIR --device cpu --max-total-tokens 4096 …

Takes the flags of `sglang.launch_server`, loads the model and makes its memory pools as the server's scheduler does, and
adds up the bytes of every tensor that it finds, shared storage once. On CUDA, or with --work first, it then computes a
whole prefill chunk and some decode steps. On CUDA it says what the driver counts as used more than before (other
processes must leave the GPU alone).

With --wait as the only argument it imports all it needs, prints `ready`, and takes the flags as one line of JSON from
standard input: whoever measures many models lets several processes import while nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch

READY = "ready"


def main() -> None:
    """Import, wait where that is asked for, allocate, count."""
    # Models are imported by name only when one is loaded, which takes as long as all else together.
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark import one_batch
    from sglang.srt.models import registry

    registry.ModelRegistry.get_supported_archs()
    flags = sys.argv[1:]
    if flags == ["--wait"]:
        print(READY, flush=True)
        flags = json.loads(sys.stdin.readline())
    does_work = flags[:1] == ["--work"]
    print(json.dumps(measure(one_batch, flags[does_work:], does_work=does_work)), flush=True)


def measure(one_batch: Any, flags: list[str], *, does_work: bool) -> dict[str, Any]:
    """Load the model that these flags name and report its memory; a failure meanwhile is reported, not raised."""
    from sglang.srt.server_args import PortArgs, ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    server_args = ServerArgs.from_cli_args(parser.parse_args(flags))
    is_cuda = server_args.device == "cuda"
    used_before = driver_used_bytes() if is_cuda else 0
    server_args.resolve_once()
    one_batch._set_envs_and_config(server_args)
    ranks = one_batch.SpawnRanks(world_rank=one_batch.spawn_world_rank(server_args, tp_rank=0, pp_rank=0), gpu_id=0)
    one_batch.publish(server_args, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    context_bytes = 0
    if is_cuda:
        # As in the server: after SGLang has set the driver's variables (CUDA_DEVICE_MAX_CONNECTIONS).
        torch.zeros(1, device="cuda")
        context_bytes = driver_used_bytes() - used_before
    # The tokenizer is not needed to know sizes, and models with random weights have none.
    one_batch.get_tokenizer = lambda *_, **__: None
    bench, _ = one_batch.load_model(server_args, PortArgs.init_new(server_args), 0, 0)
    found: dict[str, Any] = allocations(bench.torch_runner) | {"torch": torch.__version__}
    if is_cuda:
        found |= {"context_bytes": context_bytes, "idle_bytes": driver_used_bytes() - used_before}
    if is_cuda or does_work:
        try:
            work(one_batch, bench, server_args.chunked_prefill_size, found["context_length"])
        except Exception as error:
            # What was allocated up to here is a finding all the same.
            found["failure"] = f"{type(error).__name__}: {error}"[:500]
    if is_cuda:
        found |= device_totals()
        found["used_bytes"] = driver_used_bytes() - used_before
    return found


def work(one_batch: Any, bench: Any, chunk: int, context: int) -> None:
    """Compute one prefill chunk for all requests together, then some decode steps."""
    runner = bench.torch_runner
    requests, vocabulary = runner.req_to_token_pool.size, runner.model_config.vocab_size
    length = max(1, min(chunk // requests, context - 16))
    one_batch.BenchArgs.output_len = 8
    prompts = [[(request + token) % vocabulary for token in range(length)] for request in range(requests)]
    tokens, _, batch = bench.extend(one_batch.prepare_synthetic_inputs_for_latency_test(requests, length, prompts))
    for _ in range(8):
        tokens, _ = bench.decode(tokens, batch)


def driver_used_bytes() -> int:
    """What the driver counts as used on the GPU, asked from outside so that this process needs no context for it."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
    command = ["nvidia-smi", "-i", gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 2**20


def allocations(runner: Any) -> dict[str, Any]:
    """Bytes by what for, and the sizes of the pools in tokens and requests."""
    model, pool = runner.model, runner.token_to_kv_pool
    return {
        "parameters_bytes": storage_bytes(model.parameters()),
        "weights_bytes": storage_bytes([*model.parameters(), *model.buffers()]),
        "buffers": {name: buffer.nbytes for name, buffer in model.named_buffers()},
        "kv_bytes": storage_bytes(tensors_of(pool)),
        "kv_tokens": runner.max_total_num_tokens,
        "request_table_bytes": runner.req_to_token_pool.req_to_token.nbytes,
        "max_running_requests": runner.req_to_token_pool.size,
        "context_length": runner.model_config.context_len,
    }


def tensors_of(pool: Any) -> list[torch.Tensor]:
    """Every tensor of a KV pool and of the pools inside it."""
    found = []
    for value in vars(pool).values():
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, torch.Tensor)]
        elif type(value).__name__.endswith("KVPool"):
            found += tensors_of(value)
    # Small tables of addresses are no part of the cache.
    return [tensor for tensor in found if tensor.dim() > 1]


def storage_bytes(tensors: Any) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def device_totals() -> dict[str, int]:
    """What torch's allocator counts on the device."""
    torch.cuda.synchronize()
    return {
        "torch_allocated_bytes": torch.cuda.memory_allocated(),
        "torch_reserved_bytes": torch.cuda.memory_reserved(),
        "torch_peak_bytes": torch.cuda.max_memory_allocated(),
    }


if __name__ == "__main__":
    main()
    sys.stdout.flush()
