"""Says what SGLang really allocates for a model: run in the engine's Python, prints one JSON object as its last line.

    python tests/support/sglang_allocations.py --model-path DIR --device cpu --max-total-tokens 4096 …

Takes the flags of `sglang.launch_server`, loads the model and makes its memory pools as the server's scheduler does, and
adds up the bytes of every tensor that it finds, shared storage once. On CUDA it then computes a whole prefill chunk and
some decode steps, and says what the driver counts as used more than before (other processes must leave the GPU alone).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch


def main() -> None:
    """Load, allocate, count."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs, ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    server_args = ServerArgs.from_cli_args(parser.parse_args())
    server_args.resolve_once()
    one_batch._set_envs_and_config(server_args)
    ranks = one_batch.SpawnRanks(world_rank=one_batch.spawn_world_rank(server_args, tp_rank=0, pp_rank=0), gpu_id=0)
    one_batch.publish(server_args, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    is_cuda = server_args.device == "cuda"
    used_before = driver_used_bytes() if is_cuda else 0
    context_bytes = 0
    if is_cuda:
        torch.zeros(1, device="cuda")
        context_bytes = driver_used_bytes() - used_before
    # The tokenizer is not needed to know sizes, and models with random weights have none.
    one_batch.get_tokenizer = lambda *_, **__: None
    bench, _ = one_batch.load_model(server_args, PortArgs.init_new(server_args), 0, 0)
    runner = bench.torch_runner
    found: dict[str, Any] = allocations(runner)
    if is_cuda:
        found["context_bytes"] = context_bytes
        found["idle_bytes"] = driver_used_bytes() - used_before
        work(one_batch, bench, server_args.chunked_prefill_size, found["context_length"])
        found |= device_totals()
        found["used_bytes"] = driver_used_bytes() - used_before
    print(json.dumps(found), flush=True)


def work(one_batch: Any, bench: Any, chunk: int, context: int) -> None:
    """Compute one prefill chunk for all requests together, then some decode steps."""
    requests = bench.torch_runner.req_to_token_pool.size
    length = max(1, min(chunk // requests, context - 16))
    one_batch.BenchArgs.output_len = 8
    tokens, _, batch = bench.extend(one_batch.prepare_synthetic_inputs_for_latency_test(requests, length))
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
