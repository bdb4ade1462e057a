"""The platform classes that SGLang uses: the same plugin on a CPU and on a CUDA device.

Both run a fused operation as plain torch unless a kernel is registered for it, allocate memory with torch code instead
of Triton, and support no MLA and no Mamba: dense text models only.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.cuda import CudaDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sglang_pascal.device import devices
from sglang_pascal.kernels.formats import RECORDED_BATCH_SIZES
from sglang_pascal.names import ATTENTION_BACKENDS, LOAD_FORMAT, QUANTIZATION


class _PascalPlatform(SRTPlatform):  # type: ignore[misc]  # SGLang publishes no types
    """The parts that both devices share."""

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Set defaults of arguments that the user did not give."""
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        # A constrained model may repeat white space without end; the flag has no off switch, so nobody is overruled.
        server_args.constrained_json_disable_any_whitespace = True

    def get_default_attention_backend(self) -> str:
        """Return `pascal`, this plugin's backend."""
        return ATTENTION_BACKENDS[0]

    def init_backend(self) -> None:
        """SGLang calls this once in each process that runs a model, after it has imported its layers."""
        from sglang_pascal.compat import apply_shims
        from sglang_pascal.fused_layers import register_norm

        apply_shims(self.device_type, "worker")
        register_norm(self.get_dispatch_key_name())

    def post_load_model(self, model: torch.nn.Module) -> None:
        """SGLang calls this once per model, after its weights are loaded."""
        from sglang_pascal.fused_layers import fuse

        fuse(model)

    def get_dispatch_key_name(self) -> str:
        """Return the key under which fused operations are registered; others run as plain torch."""
        return "native"

    def get_quantization_config(self, name: str) -> type | None:
        """Return this plugin's class for GGUF and bitsandbytes, SGLang's for any other method."""
        if name == "bitsandbytes":
            from sglang_pascal.quantization.nf4 import PascalNf4Config

            return PascalNf4Config
        if name != QUANTIZATION:
            return None
        from sglang_pascal.quantization.config import PascalGgufConfig

        return PascalGgufConfig

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """Return this plugin's pool for dense attention: it supports int8."""
        if kind != "mha":
            return None
        from sglang_pascal.attention.kv_pool import PascalKVPool

        return PascalKVPool

    def get_compile_backend(self, mode: str | None = None) -> str:
        """Return a backend other than inductor, which would generate Triton."""
        del mode
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        """Return the device's name for SGLang's profiler; without it `/start_profile` kills the scheduler."""
        return "CPU" if self.device_type == "cpu" else "CUDA"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        """Return the same for torch's profiler."""
        activities = torch.profiler.ProfilerActivity
        return activities.CPU if self.device_type == "cpu" else activities.CUDA


class PascalCpuPlatform(CpuDeviceMixin, _PascalPlatform):  # type: ignore[misc]
    """Serving without a GPU."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities(supports_triton=False)

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Choose this plugin's attention backend. SGLang sets `intel_amx`, which needs sgl-kernel, before it asks."""
        super().apply_server_args_defaults(server_args)
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = self.get_default_attention_backend()

    def post_load_model(self, model: torch.nn.Module) -> None:
        """SGLang calls this once per model, after its weights are loaded."""
        from sglang_pascal.packed_products import pack_products

        super().post_load_model(model)
        pack_products(model)

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """Return False: there is no device to pin memory for."""
        del device
        return False


class PascalCudaPlatform(CudaDeviceMixin, _PascalPlatform):  # type: ignore[misc]
    """Serving on a CUDA device without sgl-kernel, flashinfer or Triton."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities(supports_triton=False, graph_capture=True)

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Default to no prefill graph, few decode graphs, float16 (the kernels' type), and GGUF weights as stored."""
        super().apply_server_args_defaults(server_args)
        if server_args.dtype == "auto":
            server_args.dtype = "float16"
        if server_args.load_format == LOAD_FORMAT and server_args.quantization is None:
            server_args.quantization = QUANTIZATION
        server_args.cuda_graph_config = graph_config(
            server_args.cuda_graph_config, server_args._cuda_graph_config_locked
        )

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Return a device's bytes without initialising CUDA, so that a server can still fork its workers."""
        return devices()[device_id].total_bytes

    def post_load_model(self, model: torch.nn.Module) -> None:
        """Once per model, when its weights are there."""
        from sglang_pascal.half_products import use_half_products

        super().post_load_model(model)
        use_half_products(model)

    def get_graph_runner_cls(self) -> type:
        """Return SGLang's own runner of recorded decode steps, of width 1 with speculation."""
        from sglang_pascal.speculation.graphs import ChainGraphRunner

        return ChainGraphRunner

    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        """Return the rank's GPU (the interface's default is the CPU)."""
        return torch.device("cuda", local_rank)


def graph_config(config: Any, locked: set[tuple[str, str]]) -> Any:
    """Return SGLang's graph configuration with our defaults for what the user did not set. locked: what was set."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    if (Phase.PREFILL, "backend") not in locked:
        config = with_phase(config, Phase.PREFILL, backend=Backend.DISABLED)
    if not {(Phase.DECODE, "bs"), (Phase.DECODE, "max_bs")} & locked:
        sizes = list(RECORDED_BATCH_SIZES)
        config = with_phase(config, Phase.DECODE, bs=sizes, max_bs=sizes[-1])
    return config
