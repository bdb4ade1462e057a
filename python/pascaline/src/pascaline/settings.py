"""The one typed configuration of an instance: command-line flags, TOML keys, variables and NixOS options all come from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

EngineName = Literal["sglang", "llama.cpp"]
Port = Annotated[int, Field(ge=1, le=65535)]


class KvCacheSettings(BaseModel):
    """Size and type of the KV pool, all requests together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    dtype: Literal["auto", "fp16", "bf16", "fp8_e5m2", "int8"] = "auto"


class Settings(BaseModel):
    """All settings of one instance."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "builtin:smollm2-135m"
    """A GGUF file, a Hugging Face folder, or builtin:smollm2-135m."""
    model_sha256: str | None = None
    served_model_name: str | None = None
    card: str | None = None
    """Profile name; None = found from the GPU at hand, `cpu` where there is none."""
    engine: EngineName = "sglang"
    engine_executable: Path | None = None
    """Python interpreter that can import sglang, or the llama-server program; None = this interpreter / PATH."""
    host: str = "127.0.0.1"
    port: Port = 30000
    agent_host: str = "127.0.0.1"
    agent_port: Port = 30001
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    context_length: Annotated[int, Field(ge=16, le=2**24)] | None = None
    max_running_requests: Annotated[int, Field(ge=1, le=4096)] = 4
    max_queued_requests: Annotated[int, Field(ge=1, le=65536)] | None = None
    mem_fraction_static: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    schedule_policy: Literal["fcfs", "lpm", "random", "dfs-weight"] = "fcfs"
    chunked_prefill_tokens: Annotated[int, Field(ge=16, le=65536)] = 512
    kv_cache: KvCacheSettings = KvCacheSettings()
    radix_cache: bool = True
    attention_backend: str | None = None
    quantization: str | None = None
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    pipeline_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    api_key_file: Path | None = None
    extra_args: list[str] = []
    environment: dict[str, str] = {}
    debug: bool = False
    cache_dir: Path | None = None
    start_timeout: Annotated[float, Field(gt=0)] = 1800.0
    drain_timeout: Annotated[float, Field(ge=0)] = 60.0
    stall_timeout: Annotated[float, Field(gt=0)] = 45.0
    probe_interval: Annotated[float, Field(gt=0)] = 15.0
    max_restarts: Annotated[int, Field(ge=0)] = 5
    allow_overcommit: bool = False
