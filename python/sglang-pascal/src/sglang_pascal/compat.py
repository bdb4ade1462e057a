"""Everything that this plugin changes in SGLang and torch, as one table.

A shim is applied at one of three points. `activate` runs before SGLang's modules are imported and serves what they
read at import. `register` runs after the import and replaces functions and classes. `worker` runs only in processes
that run a model. SGLang only logs a hook that fails, so each shim can report whether it is in place; tests and
`sglang-pascal info` check this.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.metadata
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from sglang_pascal import deferred, environment
from sglang_pascal.checkpoint.completeness import load_completely
from sglang_pascal.errors import UnsupportedVersionError
from sglang_pascal.names import ATTENTION_BACKENDS, LOAD_FORMAT, LOOKUP
from sglang_pascal.orphans import SPAWNED, fork_workers
from sglang_pascal.versions import SUPPORTED_SGLANG

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Shim:
    """One change: what, why, and how to know that it is no longer needed. Made for SUPPORTED_SGLANG."""

    name: str
    what: str
    why: str
    devices: tuple[str, ...]
    """Platforms that need it: cpu, cuda."""
    stage: Literal["activate", "register", "worker"]
    is_needed: Callable[[], bool]
    """False = the installed SGLang or torch works without it: remove the shim."""
    apply: Callable[[], None]
    is_applied: Callable[[], bool]
    """Whether the change is in place in this process."""


def check_sglang_version(found: str | None = None) -> str:
    """Return the installed SGLang's version; an error if the shims were not made for it."""
    if found is None:
        try:
            found = importlib.metadata.version("sglang")
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
    if found in SUPPORTED_SGLANG:
        return found
    supported = ", ".join(SUPPORTED_SGLANG)
    raise UnsupportedVersionError(
        f"SGLang is {found}; sglang-pascal supports {supported}: pip install 'sglang=={SUPPORTED_SGLANG[-1]}'"
    )


def shims_for(device: str, stage: str | None = None) -> list[Shim]:
    """Return the table's rows for a device, in order; for one stage, or for all."""
    return [shim for shim in SHIMS if device in shim.devices and stage in (None, shim.stage)]


def apply_shims(device: str, stage: str) -> None:
    """Apply the needed shims that are not yet in place."""
    for shim in shims_for(device, stage):
        if shim.is_needed() and not shim.is_applied():
            shim.apply()


# --- variables that are read at import ------------------------------------------------------------------------------

_ROPE_FP32: Final = "SGLANG_ROPE_CACHE_FP32"
_NO_DLPACK_BUILD: Final = "TVM_FFI_DISABLE_TORCH_C_DLPACK"
_NVML_CHECK: Final = "PYTORCH_NVML_BASED_CUDA_CHECK"
_MODELS: Final = "SGLANG_EXTERNAL_MODEL_PACKAGE"
_LOGPROB_CHUNK: Final = "SGLANG_LOGPROB_CHUNK_SIZE"
_WRITE_BARRIER: Final = "SGLANG_ENABLE_WAR_BARRIER"
_FILL_INPUTS: Final = "SGLANG_OPT_CUDA_GRAPH_FILL_FAST_PATH"
_LOGPROB_ROWS: Final = "8"
"""Rows of logits at once when a request asks for log-probabilities of its prompt. SGLang's 2048 are a whole prefill
chunk: 512 rows of 152,064 float32, four times over in plain torch, are 1.2 GB that no plan has. Eight, two int8 each,
are what one pass of the decode product takes."""


def _builds_dlpack_exchange() -> bool:
    """Whether tvm_ffi would compile it; newer releases of torch contain it."""
    import torch

    return not hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def _set_unless_chosen(name: str, value: str) -> None:
    os.environ.setdefault(name, value)


# --- torch without guard_or_false -----------------------------------------------------------------------------------

_GUARDS: Final = ("guard_or_false", "guard_or_true")


def _symbolic_shapes() -> Any:
    return importlib.import_module("torch.fx.experimental.symbolic_shapes")


def _lacks_guards() -> bool:
    module = _symbolic_shapes()
    return any(getattr(module, name, bool) is bool for name in _GUARDS)


def _add_guards() -> None:
    """Add guards. Without symbolic shapes (there is no torch.compile here), a guard is the truth of a number."""
    module = _symbolic_shapes()
    for name in _GUARDS:
        if not hasattr(module, name):
            setattr(module, name, bool)


def _has_guards() -> bool:
    return all(hasattr(_symbolic_shapes(), name) for name in _GUARDS)


# --- Triton without a GPU -------------------------------------------------------------------------------------------


class HostTritonDriver:
    """A Triton driver with which modules with Triton kernels can be imported; none is ever launched."""

    def is_active(self) -> bool:
        """Always report itself as active."""
        return True

    def get_current_target(self) -> Any:
        """Return a target for which no kernel is compiled."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 32)

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_active_torch_device(self) -> Any:
        """Return the device that holds tensors."""
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., float]:
        """Return a benchmarker that times nothing."""
        return lambda *_args, **_kwargs: 0.0


def _triton_driver() -> Any:
    return importlib.import_module("triton.runtime").driver


def _set_host_triton_driver() -> None:
    _triton_driver().set_active(HostTritonDriver())


def _is_host_triton_driver() -> bool:
    driver = _triton_driver()
    # Newer Tritons make the driver when `active` is first read, and raise if no GPU is visible.
    return isinstance(driver._active if hasattr(driver, "_active") else driver.active, HostTritonDriver)


# --- is_cuda() ------------------------------------------------------------------------------------------------------

_COMMON: Final = "sglang.srt.utils.common"


def is_not_cuda() -> bool:
    """Replace SGLang's `is_cuda`, which is called to ask for sgl-kernel and flashinfer."""
    return False


is_not_cuda.cache_clear = lambda: None  # type: ignore[attr-defined]  # the original is an lru_cache


class _IsCudaFinder(importlib.abc.MetaPathFinder):
    """Waits in sys.meta_path until `common` is complete, replaces its `is_cuda`, and removes itself.

    `activate` runs in the middle of `common`'s own import; the modules that call it at import come right after.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        """Never find a module; each import is a chance to look."""
        del fullname, path, target
        common = sys.modules.get(_COMMON)
        if common is None or not hasattr(common, "is_cuda") or getattr(common.__spec__, "_initializing", False):
            return
        sys.meta_path.remove(self)
        replace_everywhere(common.is_cuda, is_not_cuda)


def replace_everywhere(original: object, replacement: object) -> int:
    """Replace the original in every loaded module that has a name for it; return the number of replacements."""
    count = 0
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is original:
                setattr(module, name, replacement)
                count += 1
    return count


def _watch_for_is_cuda() -> None:
    sys.meta_path.insert(0, _IsCudaFinder())


def _is_cuda_replaced_or_awaited() -> bool:
    if any(isinstance(finder, _IsCudaFinder) for finder in sys.meta_path):
        return True
    common = sys.modules.get(_COMMON)
    return common is not None and getattr(common, "is_cuda", None) is is_not_cuda


def _lacks_sgl_kernel() -> bool:
    return importlib.util.find_spec("sgl_kernel") is None


# --- hooks ----------------------------------------------------------------------------------------------------------

_GUARD_MODULE: Final = "sglang.srt.model_executor.model_runner_components.load_model_utils"
_GUARD: Final = "maybe_downgrade_dtype_for_legacy_gpu"
_SOFTCAP: Final = "sglang.kernels.ops.activation.softcap"
_LOAD_PATH: Final = "sglang.srt.managers.load_snapshot.shm_path_for"
_VERIFY_LOAD_FORMAT: Final = "sglang.srt.configs.load_config.LoadConfig._verify_load_format"


def use_float16(*, model_config: Any) -> None:
    """Replace SGLang's guard: float16 below compute capability 8.0, as there, but no refusal below 7.5."""
    import torch
    from sglang.srt.runtime_context import get_context

    if torch.cuda.get_device_capability()[0] < 8 and model_config.dtype == torch.bfloat16:
        get_context().override("sglang_pascal.use_float16", dtype="float16")
        model_config.dtype = torch.float16


def verify_load_format(original: Callable[[Any], None], config: Any) -> None:
    """Wrap `LoadConfig._verify_load_format`: the format becomes our loader class, which SGLang's factory calls."""
    from sglang_pascal.checkpoint.loader import PascalGgufLoader

    if config.load_format == LOAD_FORMAT:
        config.load_format = PascalGgufLoader
    else:
        original(config)


_UNRESOLVED: Final[dict[str, Any]] = {}
"""Folder -> its tokenizer between SGLang's two tries: loading one of 128,256 tokens takes more than a second."""


def prepared_tokenizer(original: Callable[..., Any], name: str | Path, *arguments: Any, **options: Any) -> Any:
    """Wrap how SGLang loads a tokenizer: for a folder made by `prepare`, take its tokenizer.json unchanged."""
    from sglang_pascal.checkpoint.prepare import MANIFEST

    if not Path(name, MANIFEST).is_file():
        return original(name, *arguments, **options)
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(name, clean_up_tokenization_spaces=False)
    _UNRESOLVED[str(name)] = tokenizer
    return tokenizer


def resolved_tokenizer(original: Callable[..., Any], name: str | Path, *arguments: Any, **options: Any) -> Any:
    """Wrap SGLang's second try, which takes ours for a generic one: it is that of the first try, a moment ago."""
    if str(name) not in _UNRESOLVED:
        prepared_tokenizer(lambda *_, **__: None, name)
    tokenizer = _UNRESOLVED.pop(str(name), None)
    return original(name, *arguments, **options) if tokenizer is None else tokenizer


def softcap_logits(logits: Any, cap: float | None, output: Any = None) -> Any:
    """Replace SGLang's Triton kernel: cap x tanh(logits / cap), in place or into a float32 output."""
    if output is not None:
        logits = output.copy_(logits)
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def temporary_load_path(original: Callable[[str], str], ipc_name: str) -> str:
    """Wrap SGLang's `shm_path_for`: the same file name in the folder of temporary files, the same for all workers."""
    return str(Path(tempfile.gettempdir(), Path(original(ipc_name)).name))


def _hook(target: str, function: Callable[..., Any], kind: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target, function, HookType[kind])


def _hook_at_once(*hooks: tuple[str, Callable[..., Any], str]) -> None:
    """Hook in the stage `worker`, when SGLang has already applied the hooks of the stage before."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    for hook in hooks:
        _hook(*hook)
    HookRegistry.apply_hooks()


def _is_hooked(*targets: str) -> bool:
    """Whether SGLang's registry has wrapped each function; this imports nothing."""
    return all(hasattr(_loaded(target), "__wrapped__") for target in targets)


def _loaded(target: str) -> Any:
    """Return the object of a `_hook` target, in the longest imported module of its name; None if none is imported."""
    names = target.split(".")
    for n in range(len(names) - 1, 0, -1):
        value: Any = sys.modules.get(".".join(names[:n]))
        if value is not None:
            for name in names[n:]:
                value = getattr(value, name, None)
            return value
    return None


_TOKENIZER: Final = "sglang.srt.utils.hf_transformers.tokenizer"
_TOKENIZER_TARGETS: Final = (
    f"{_TOKENIZER}._auto_tokenizer_from_pretrained",
    f"{_TOKENIZER}._resolve_tokenizers_backend",
)


def _register_tokenizer() -> None:
    for target, hook in zip(_TOKENIZER_TARGETS, (prepared_tokenizer, resolved_tokenizer), strict=True):
        _hook(target, hook, "AROUND")


def _register_attention() -> None:
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    add_attention_backend_choices(list(ATTENTION_BACKENDS))
    for name in ATTENTION_BACKENDS:
        register_attention_backend(name)(functools.partial(_create_attention_backend, name))


def _create_attention_backend(name: str, runner: Any) -> Any:
    from sglang_pascal.attention import backend, kernels_backend

    if name == ATTENTION_BACKENDS[0]:
        name = backend.NAME if str(runner.device).startswith("cpu") else kernels_backend.NAME
    return (kernels_backend if name == kernels_backend.NAME else backend).create_backend(runner)


def _attention_is_registered() -> bool:
    registry = sys.modules.get("sglang.srt.layers.attention.attention_registry")
    return registry is not None and set(ATTENTION_BACKENDS) <= set(registry.ATTENTION_BACKENDS)


def _register_load_format() -> None:
    from sglang.srt.arg_groups.choices import add_load_format_choices

    add_load_format_choices([LOAD_FORMAT])
    _hook(_VERIFY_LOAD_FORMAT, verify_load_format, "AROUND")


_KV_DTYPE: Final = "sglang.srt.mem_cache.kv_cache_dtype"
_POOL_SIZES: Final = "sglang.srt.model_executor.pool_configurator"
_KV_TARGETS: Final = (
    f"{_KV_DTYPE}.configure_kv_cache_dtype",
    f"{_POOL_SIZES}.DefaultPoolConfigurator._compute_cell_size",
    f"{_POOL_SIZES}.HybridSWAPoolConfigurator.__init__",
)


_RUN_SERVER: Final = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"


_FREEZE: Final = "sglang.srt.entrypoints.http_server._freeze_gc_after_server_warmup"
_HANDLE_REQUEST: Final = "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request"
_REFUSED: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_abort_finish_reason"
_READS_TOOL_CALLS: Final = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._tool_call_parsing_active"


@functools.cache
def _wrap_server() -> None:
    """Wrap the server once, for all rows of the table that need it."""
    from sglang_pascal import draining, openai_api, streams

    # One hook for all: SGLang warns about several hooks around one function.
    inner = functools.partial(streams.add_to_server, draining.add_to_server)
    _hook(_RUN_SERVER, functools.partial(openai_api.add_to_server, inner), "AROUND")


def _freeze_when_listening() -> None:
    from sglang_pascal.listening import when_listening

    _hook(_FREEZE, when_listening, "AROUND")


def _note_refusals() -> None:
    from sglang_pascal.streams import note_refusal

    _wrap_server()
    _hook(_REFUSED, note_refusal, "AROUND")


def _check_requests() -> None:
    from sglang_pascal.openai_api import check_request, reads_tool_calls

    _hook(_HANDLE_REQUEST, check_request, "AROUND")
    _hook(_READS_TOOL_CALLS, reads_tool_calls, "AROUND")


_TOOL_STREAM: Final = "sglang.srt.function_call.function_call_parser.FunctionCallParser.parse_stream_chunk"
_TOOL_STREAM_END: Final = "sglang.srt.function_call.function_call_parser.FunctionCallParser.parse_stream_end"


def _divide_tool_streams() -> None:
    from sglang_pascal.tool_streams import parse_end, parse_piece

    _hook(_TOOL_STREAM, parse_piece, "AROUND")
    _hook(_TOOL_STREAM_END, parse_end, "AROUND")


def _is_server() -> bool:
    """Whether this process may listen: a worker that SGLang spawned does not, and need not import the server."""
    return SPAWNED not in sys.orig_argv


def _add_int8_choice() -> None:
    from sglang_pascal.attention.kv_types import INT8, kv_cache_choices

    kv_cache_choices().append(INT8)


def _int8_is_a_choice() -> bool:
    if "sglang.srt.server_args" not in sys.modules:
        return False
    from sglang_pascal.attention.kv_types import INT8, kv_cache_choices

    return INT8 in kv_cache_choices()


def _register_kv_types() -> None:
    from sglang_pascal.attention import kv_types

    functions: tuple[tuple[Callable[..., Any], str], ...] = (
        (kv_types.configure_kv_cache_dtype, "AROUND"),
        (kv_types.compute_cell_size, "AROUND"),
        (kv_types.add_scales_to_hybrid_sizes, "AFTER"),
    )
    _hook_at_once(*((target, *function) for target, function in zip(_KV_TARGETS, functions, strict=True)))


_TRITON_LAUNCHES: Final = {
    "sglang.kernels.ops.memory.small_copy.try_small_copy": "try_small_copy",
    "sglang.kernels.ops.grammar.bitmask_ops.apply_token_bitmask_inplace_triton": "apply_token_bitmask",
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator._free_swa_pages_cuda": "free_swa_pages",
    "sglang.srt.layers.logsumexp.row_logsumexp": "row_logsumexp",
    "sglang.srt.layers.logsumexp.row_logsumexp_topk": "row_logsumexp_topk",
}
"""Launcher -> function of `plain_torch`: recorded decode steps, grammars, sliding windows, log-probabilities."""
_FORMS: Final = {
    "sglang.kernels.ops.grammar.token_filter_ops.set_token_filter_triton": (
        "sglang.srt.constrained.torch_ops.token_filter_torch_ops",
        "set_token_filter_torch",
    ),
    "sglang.kernels.ops.memory.common.get_last_loc_triton": ("sglang.srt.mem_cache.allocation", "get_last_loc_torch"),
}
"""Launcher -> module and name of SGLang's own other form."""
_SAMPLE: Final = "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch"
_DYNAMO: Final = "TORCHDYNAMO_DISABLE"


def _replace_triton_launches() -> None:
    from sglang_pascal import plain_torch

    ours = {target: getattr(plain_torch, name) for target, name in _TRITON_LAUNCHES.items()}
    forms = {target: getattr(importlib.import_module(module), name) for target, (module, name) in _FORMS.items()}
    _hook_at_once(*((target, function, "REPLACE") for target, function in (ours | forms).items()))


_WRITE_SLOTS: Final = "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func"


def _replace_slot_writer() -> None:
    from sglang_pascal.plain_torch import write_slots

    _hook_at_once((_WRITE_SLOTS, write_slots, "REPLACE"))


_RESERVE_SLOTS: Final = "sglang.srt.speculative.eagle_utils.eagle_prepare_for_decode"


def reserve_slots_for_several_steps() -> None:
    """Called by a worker that drafts: without speculation, the module would be imported in vain."""
    from sglang_pascal.speculation.slots import prepare_for_decode

    _hook_at_once((_RESERVE_SLOTS, prepare_for_decode, "AROUND"))


def _register_speculation() -> None:
    from sglang_pascal.speculation.algorithm import register

    register()


def _speculation_is_registered() -> bool:
    registry = sys.modules.get("sglang.srt.speculative.spec_registry")
    return registry is not None and registry.get_spec(LOOKUP) is not None


def _last_name(target: str) -> str:
    return target.rpartition(".")[2]


_LOAD_WEIGHTS: Final = "sglang.srt.model_loader.loader.DefaultModelLoader.load_weights_and_postprocess"


_SET_ENVIRONMENT: Final = "sglang.srt.entrypoints.engine._set_envs_and_config"


_DRAW: Final = "sglang.srt.layers.sampler.multinomial_with_seed"
_BATCH_INFO: Final = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"


def _register_seeds() -> None:
    from sglang_pascal.sampling_seed import draw_with_seeds, merge_seeds, seeds_of_requests

    _hook_at_once(
        (f"{_BATCH_INFO}.from_schedule_batch", seeds_of_requests, "AROUND"),
        (f"{_BATCH_INFO}.merge_batch", merge_seeds, "AROUND"),
        (_DRAW, draw_with_seeds, "REPLACE"),
    )


def _register_sampler() -> None:
    from sglang_pascal.plain_torch import sample_from_probs

    _hook_at_once((_SAMPLE, sample_from_probs, "AROUND"))


def _always() -> bool:
    return True


def _variable(
    variable: str,
    *,
    name: str,
    why: str,
    devices: tuple[str, ...],
    value: str = "1",
    is_needed: Callable[[], bool] = _always,
) -> Shim:
    """Return the shim for a variable that SGLang or a library reads: this value, unless the user set it."""
    return Shim(
        name=name,
        what=f"{variable}={value}, unless it is set",
        why=why,
        devices=devices,
        stage="activate",
        is_needed=is_needed,
        apply=lambda: _set_unless_chosen(variable, value),
        is_applied=lambda: variable in os.environ,
    )


def _hooked(
    target: str,
    hook: Callable[..., Any],
    kind: Literal["AROUND", "AFTER", "REPLACE"],
    *,
    name: str,
    what: str,
    why: str,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    is_needed: Callable[[], bool] = _always,
) -> Shim:
    """Return the shim that consists of one hook, for all processes."""
    return Shim(
        name=name,
        what=what,
        why=why,
        devices=devices,
        stage="register",
        is_needed=is_needed,
        apply=lambda: _hook(target, hook, kind),
        is_applied=lambda: _is_hooked(target),
    )


SHIMS: Final = (
    _variable(
        _ROPE_FP32,
        name="rotary table in float32",
        why="SGLang would keep the table in float16; the kernels read float32, which is also more exact",
        devices=("cpu", "cuda"),
    ),
    _variable(
        _NO_DLPACK_BUILD,
        name="no compiler at the first start",
        why="tvm_ffi (of xgrammar) would compile C++ at its first import: half a minute, for a faster DLPack",
        devices=("cpu", "cuda"),
        is_needed=_builds_dlpack_exchange,
    ),
    _variable(
        _MODELS,
        name="few modules of models",
        why="SGLang would import two hundred modules of models for one: seconds of every start",
        devices=("cpu", "cuda"),
        value="sglang_pascal.models",
    ),
    _variable(
        _NVML_CHECK,
        name="GPUs counted without CUDA",
        why="torch.cuda.is_available would initialise CUDA in the server, whose workers are then not forked",
        devices=("cuda",),
    ),
    _variable(
        _LOGPROB_CHUNK,
        name="few rows of logits at once",
        why="log-probabilities of a prompt would take the logits of a whole prefill chunk, more than a plan leaves",
        devices=("cuda",),
        value=_LOGPROB_ROWS,
    ),
    _variable(
        _WRITE_BARRIER,
        name="barrier between steps",
        why="SGLang's overlap scheduler prepares a step while the last one still reads the same tables; the barrier "
        "that keeps its writes behind those reads depends on is_cuda. It waits on the device only",
        devices=("cuda",),
    ),
    _variable(
        _FILL_INPUTS,
        name="inputs of a recorded step",
        why="before each step SGLang looks at the padding of a dozen inputs, though hardly any step has padding: host "
        "time of every token",
        devices=("cuda",),
    ),
    Shim(
        name="symbolic-shape guards",
        what="torch.fx.experimental.symbolic_shapes.guard_or_false and guard_or_true become bool",
        why="SGLang imports both names; torch 2.7.1, the last with sm_60 code on the package index, lacks them",
        devices=("cpu", "cuda"),
        stage="activate",
        is_needed=_lacks_guards,
        apply=_add_guards,
        is_applied=_has_guards,
    ),
    Shim(
        name="Triton driver",
        what="a driver object that is never asked to launch becomes Triton's active one",
        why='modules with Triton kernels ask for a driver at import: without a GPU they fail with "0 active drivers", '
        "with one Triton compiles its driver by the host's C compiler and initialises CUDA before workers are forked",
        devices=("cpu", "cuda"),
        stage="activate",
        is_needed=_always,
        apply=_set_host_triton_driver,
        is_applied=_is_host_triton_driver,
    ),
    Shim(
        name="is_cuda",
        what="sglang.srt.utils.common.is_cuda, and every copy of it, returns False",
        why="if it is True, SGLang imports sgl_kernel and flashinfer, which have no code for Pascal",
        devices=("cuda",),
        stage="activate",
        is_needed=_lacks_sgl_kernel,
        apply=_watch_for_is_cuda,
        is_applied=_is_cuda_replaced_or_awaited,
    ),
    _hooked(
        f"{_GUARD_MODULE}.{_GUARD}",
        use_float16,
        "REPLACE",
        name="sm75 guard",
        what=f"{_GUARD_MODULE}.{_GUARD} chooses float16 and refuses nothing",
        why='it raises "SGLang only supports sm75 and above" on Pascal, which its kernels need and ours do not',
        devices=("cuda",),
        is_needed=lambda: hasattr(importlib.import_module(_GUARD_MODULE), _GUARD),
    ),
    _hooked(
        f"{_SOFTCAP}._softcap_logits",
        softcap_logits,
        "REPLACE",
        name="logit soft cap",
        what=f"{_SOFTCAP}._softcap_logits in plain torch",
        why="it is a Triton kernel without another form (Gemma 2 needs it); Triton needs compute capability 7.0",
        is_needed=lambda: hasattr(importlib.import_module(_SOFTCAP), "_softcap_logits"),
    ),
    Shim(
        name="attention backend",
        what="--attention-backend pascal, pascal_kernels, pascal_torch",
        why="SGLang's torch_native pads each prefill chunk to the whole context and turns CUDA graphs off",
        devices=("cpu", "cuda"),
        stage="register",
        is_needed=_always,
        apply=_register_attention,
        is_applied=_attention_is_registered,
    ),
    Shim(
        name="load format",
        what="--load-format pascal_gguf, by a hook around LoadConfig._verify_load_format",
        why="SGLang accepts a loader class as load format, but has no way to name one on the command line",
        devices=("cpu", "cuda"),
        stage="register",
        is_needed=_always,
        apply=_register_load_format,
        is_applied=lambda: _is_hooked(_VERIFY_LOAD_FORMAT),
    ),
    _hooked(
        _LOAD_WEIGHTS,
        load_completely,
        "AROUND",
        name="no parameter without weights",
        what=f"{_LOAD_WEIGHTS} refuses a model if a parameter received no weights",
        why="SGLang fills what a folder's files name and serves the rest as it was allocated",
    ),
    Shim(
        name="the file's own tokenizer",
        what=f"{_TOKENIZER}.get_tokenizer takes tokenizer.json of a prepared folder as it is",
        why="transformers rebuilds a Qwen 2 model's tokenizer by Qwen's own rules and ignores the file's",
        devices=("cpu", "cuda"),
        stage="register",
        is_needed=_always,
        apply=_register_tokenizer,
        is_applied=lambda: _is_hooked(*_TOKENIZER_TARGETS),
    ),
    _hooked(
        _LOAD_PATH,
        temporary_load_path,
        "AROUND",
        name="no file left in /dev/shm",
        what=f"{_LOAD_PATH} names a file in the folder of temporary files (TMPDIR)",
        why="SGLang ends its workers with SIGKILL, and nothing removes the file in which they report their load",
    ),
    _hooked(
        _SET_ENVIRONMENT,
        fork_workers,
        "AFTER",
        name="imports once",
        what=f"{_SET_ENVIRONMENT} ends with the start method fork, unless CUDA is initialised by then",
        why="each of three processes would take a dozen seconds of CPU for the same imports",
        is_needed=_is_server,
    ),
    Shim(
        name="refusal while draining",
        what=f"{_RUN_SERVER} wraps its application: 503 for new work once SIGTERM came",
        why="SGLang continues to accept requests while it waits for the last one to end: under load it never ends",
        devices=("cpu", "cuda"),
        stage="register",
        is_needed=_is_server,
        apply=_wrap_server,
        is_applied=lambda: _is_hooked(_RUN_SERVER),
    ),
    Shim(
        name="collector frozen late",
        what=f"{_FREEZE} waits until the server listens",
        why="without a warm-up request SGLang asks itself to freeze the garbage collector before it listens: a "
        "traceback in the log, and pauses of the collector",
        devices=("cpu", "cuda"),
        stage="register",
        is_needed=_is_server,
        apply=_freeze_when_listening,
        is_applied=lambda: _is_hooked(_FREEZE),
    ),
    Shim(
        name="OpenAI's errors",
        what=f"the same wrapper gives errors OpenAI's shape; {_HANDLE_REQUEST} checks model, top_p and tools first; "
        f"{_READS_TOOL_CALLS} reads demanded calls without a parser",
        why="clients of OpenAI read `error.message`; SGLang has other shapes, answers for any name of a model, and "
        "returns a call as text if no parser is set",
        devices=("cpu", "cuda"),
        stage="register",
        is_needed=_is_server,
        apply=_check_requests,
        is_applied=lambda: _is_hooked(_RUN_SERVER, _HANDLE_REQUEST, _READS_TOOL_CALLS),
    ),
    Shim(
        name="pieces of tool calls",
        what=f"{_TOOL_STREAM} gets pieces that its parsers read completely",
        why="a busy server sends several tokens in one piece, and most parsers then lose part of a call",
        devices=("cpu", "cuda"),
        stage="register",
        is_needed=_is_server,
        apply=_divide_tool_streams,
        is_applied=lambda: _is_hooked(_TOOL_STREAM, _TOOL_STREAM_END),
    ),
    Shim(
        name="status of refused streams",
        what=f"if a stream's first event is an error, the same wrapper answers with the error's status; {_REFUSED} "
        "tells it which requests SGLang refused",
        why="SGLang reports a full queue to a streamed request with status 200, so no router tries another server, "
        "and under /v1/responses without a stream with 400",
        devices=("cpu", "cuda"),
        stage="register",
        is_needed=_is_server,
        apply=_note_refusals,
        is_applied=lambda: _is_hooked(_RUN_SERVER, _REFUSED),
    ),
    Shim(
        name="int8 KV cache, choice",
        what="--kv-cache-dtype int8",
        why="SGLang has no int8 KV cache: half of float16's bytes, and more exact than fp8_e5m2",
        devices=("cpu", "cuda"),
        stage="register",
        is_needed=_always,
        apply=_add_int8_choice,
        is_applied=_int8_is_a_choice,
    ),
    Shim(
        name="prompt lookup",
        what=f"--speculative-algorithm {LOOKUP}",
        why="SGLang's own speculation verifies trees by kernels of sgl_kernel and Triton",
        devices=("cpu", "cuda"),
        stage="register",
        is_needed=_always,
        apply=_register_speculation,
        is_applied=_speculation_is_registered,
    ),
    Shim(
        name="slots of a chain",
        what=f"{_WRITE_SLOTS} in plain torch",
        why="with speculation SGLang launches a Triton kernel for it, on every device",
        devices=("cpu", "cuda"),
        stage="worker",
        is_needed=_always,
        apply=_replace_slot_writer,
        is_applied=lambda: _is_hooked(_WRITE_SLOTS),
    ),
    Shim(
        name="int8 KV cache, pool",
        what="the type of the pool and its bytes per token for int8; fp8_e5m2 on the CPU",
        why="SGLang sizes its pools from the element size alone, and refuses fp8_e5m2 where its own kernels lack it",
        devices=("cpu", "cuda"),
        stage="worker",
        is_needed=_always,
        apply=_register_kv_types,
        is_applied=lambda: _is_hooked(*_KV_TARGETS),
    ),
    _variable(
        _DYNAMO,
        name="no torch.compile",
        why="torch.compile generates Triton for a CUDA device and refuses one below compute capability 7.0; on a CPU "
        "it compiles C++ at the first request",
        devices=("cpu", "cuda"),
    ),
    Shim(
        name="no compiler for decorators",
        what="torch.compile and torch.compiler.disable return the function itself, unless TORCHDYNAMO_DISABLE is 0",
        why="with compiling switched off they import torch's compiler all the same: a tenth of the imports",
        devices=("cpu", "cuda"),
        stage="activate",
        is_needed=lambda: os.environ.get(_DYNAMO) == "1",
        apply=deferred.compile_never,
        is_applied=deferred.compiles_never,
    ),
    Shim(
        name="imports of training",
        what=f"{', '.join(deferred.TRANSFORMERS)} are imported when something of theirs is used",
        why="transformers imports them for training: losses with SciPy, and sharding with torch's compiler",
        devices=("cpu", "cuda"),
        stage="activate",
        is_needed=_always,
        apply=deferred.defer_imports,
        is_applied=deferred.are_deferred,
    ),
    Shim(
        name="variables parsed once",
        what="SGLang's getters of environment variables parse a variable again only if it changed",
        why="it reads and parses some thirty variables in each step: host time of every token",
        devices=("cpu", "cuda"),
        stage="worker",
        is_needed=environment.keeps_bytes,
        apply=environment.parse_once,
        is_applied=environment.parses_once,
    ),
    Shim(
        name="Triton kernels",
        what=f"plain torch in place of {', '.join(map(_last_name, (*_TRITON_LAUNCHES, *_FORMS)))}",
        why="SGLang launches them for any CUDA tensor, though the platform says that it has no Triton",
        devices=("cuda",),
        stage="worker",
        is_needed=_always,
        apply=_replace_triton_launches,
        is_applied=lambda: _is_hooked(*_TRITON_LAUNCHES, *_FORMS),
    ),
    Shim(
        name="seeds",
        what=f"{_BATCH_INFO} of a batch with a seed has the seeds of its requests; {_DRAW} in plain torch",
        why="SGLang reads `seed` only under --enable-deterministic-inference, and draws by a kernel of sgl_kernel",
        devices=("cpu", "cuda"),
        stage="worker",
        is_needed=_always,
        apply=_register_seeds,
        is_applied=lambda: _is_hooked(f"{_BATCH_INFO}.from_schedule_batch", f"{_BATCH_INFO}.merge_batch", _DRAW),
    ),
    Shim(
        name="sampler",
        what=f"{_SAMPLE} draws by seed and token, also with min-p; on a GPU our kernel filters instead of a sort",
        why="its draw depends on the filters of other requests and fails an assertion on min-p; sorting takes long",
        devices=("cpu", "cuda"),
        stage="worker",
        is_needed=_always,
        apply=_register_sampler,
        is_applied=lambda: _is_hooked(_SAMPLE),
    ),
)
"""The table, in the order of application."""
