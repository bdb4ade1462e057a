"""Says what SGLang really allocates for a model: run in the engine's Python, prints one JSON object as its last line.

    python tests/support/sglang_allocations.py --model-path DIR --device cpu --max-total-tokens 4096 …

Takes the flags of `sglang.launch_server`, loads the model and makes its memory pools as the server's scheduler does, and
adds up the bytes of every tensor that it finds, shared storage once. On CUDA it also says what the driver counts.
"""

from __future__ import annotations

import argparse
import json
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
    found: dict[str, Any] = {}
    if is_cuda:
        found["free_before_bytes"], found["card_bytes"] = torch.cuda.mem_get_info()
    # The tokenizer is not needed to know sizes, and models with random weights have none.
    one_batch.get_tokenizer = lambda *_, **__: None
    wrapped, _ = one_batch.load_model(server_args, PortArgs.init_new(server_args), 0, 0)
    runner = getattr(wrapped, "torch_runner", wrapped)
    found |= allocations(runner)
    if is_cuda:
        found |= device_totals()
    print(json.dumps(found), flush=True)


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
    """What the driver and torch's allocator count on the device."""
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    return {
        "free_after_bytes": free,
        "torch_allocated_bytes": torch.cuda.memory_allocated(),
        "torch_reserved_bytes": torch.cuda.memory_reserved(),
        "torch_peak_bytes": torch.cuda.max_memory_allocated(),
    }


if __name__ == "__main__":
    main()
    sys.stdout.flush()
