"""Every shim is in place in the real SGLang and torch, and says when it is not needed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from sglang_pascal import compat
from sglang_pascal.checkpoint.architectures import ARCHITECTURES
from sglang_pascal.checkpoint.prepare import prepare
from sglang_pascal.compat import SHIMS, SUPPORTED_SGLANG, check_sglang_version, shims_for, softcap_logits
from sglang_pascal.errors import UnsupportedVersionError
from support.models import tiny, write_gguf


def run_python(script, **environment):
    """A fresh interpreter, since SGLang's modules read the platform once."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SGLANG_", "CUDA_"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=clean | {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_COMPILE_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_table_is_complete():
    for shim in SHIMS:
        assert shim.what
        assert shim.why
        assert set(shim.devices) <= {"cpu", "cuda"}
    assert len({shim.name for shim in SHIMS}) == len(SHIMS)


def test_rows_of_a_device_and_a_stage():
    assert [shim.name for shim in shims_for("cpu", "register")] == [
        "logit soft cap",
        "attention backend",
        "load format",
        "no parameter without weights",
        "the file's own tokenizer",
        "no file left in /dev/shm",
        "imports once",
        "refusal while draining",
        "collector frozen late",
        "OpenAI's errors",
        "pieces of tool calls",
        "status of refused streams",
        "int8 KV cache, choice",
        "prompt lookup",
    ]
    assert [shim.name for shim in shims_for("cpu", "worker")] == [
        "slots of a chain",
        "int8 KV cache, pool",
        "variables parsed once",
        "seeds",
        "sampler",
    ]
    assert "is_cuda" not in [shim.name for shim in shims_for("cpu")]


SUPPORTED = SUPPORTED_SGLANG[-1]


@pytest.mark.parametrize("found", ["0.5.1", f"{SUPPORTED}.post1", "0.6.0", "not installed"])
def test_another_sglang_is_refused_with_the_command_that_helps(found):
    with pytest.raises(UnsupportedVersionError) as error:
        check_sglang_version(found)
    assert (
        str(error.value) == f"SGLang is {found}; sglang-pascal supports {SUPPORTED}: pip install 'sglang=={SUPPORTED}'"
    )


def test_the_installed_sglang_is_supported():
    assert check_sglang_version() in SUPPORTED_SGLANG


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """What a real SGLang looks like after its own start-up sequence on a CPU."""
    compiled = tmp_path_factory.mktemp("compiled")
    return run_python(
        """
import json, os, torch
from sglang.srt.platforms import current_platform
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
from sglang.srt.arg_groups import choices
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.model_loader.loader import get_model_loader
from sglang_pascal.compat import shims_for
import torch.fx.experimental.symbolic_shapes as shapes
import triton
import sglang.srt.model_executor.model_runner  # as a worker does
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization import get_quantization_config
from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype
def kv(name):
    return [str(x) for x in configure_kv_cache_dtype(server_args_kv_cache_dtype=name, model=None, model_dtype=torch.float32,
        is_draft_worker=False, is_dflash=False, speculative_draft_attention_backend="")]
print(json.dumps({
    "platform": type(current_platform).__name__,
    "out_of_tree": current_platform.is_out_of_tree(),
    "attention": current_platform.get_default_attention_backend(),
    "applied": {shim.name: shim.is_applied() for shim in shims_for("cpu")},
    "needed": {shim.name: shim.is_needed() for shim in shims_for("cpu")},
    "guard": shapes.guard_or_false(1),
    "triton": str(triton.runtime.driver.active.get_current_target().backend),
    "attention_choice": "pascal" in choices.ATTENTION_BACKEND_CHOICES and "pascal" in ATTENTION_BACKENDS,
    "load_format_choice": "pascal_gguf" in choices.LOAD_FORMAT_CHOICES,
    "loader": type(get_model_loader(LoadConfig(load_format="pascal_gguf"))).__name__,
    "other_loader": type(get_model_loader(LoadConfig(load_format="auto"))).__name__,
    "cuda_initialised": torch.cuda.is_initialized(),
    "kv": {name: kv(name) for name in ("int8", "fp8_e5m2", "auto")},
    "pools": [getattr(current_platform.get_kv_pool_cls(kind=kind), "__name__", None) for kind in ("mha", "mla")],
    "quantization": [get_quantization_config(name).__name__ for name in ("gguf", "fp8")],
    "norm": RMSNorm._oot_forward_registry["native"][RMSNorm].__name__,
    "rope": os.environ["SGLANG_ROPE_CACHE_FP32"],
    "load": __import__("sglang.srt.managers.load_snapshot", fromlist=["x"]).shm_path_for("0123"),
    "compiled": __import__("tvm_ffi") and os.listdir(os.environ["TVM_FFI_CACHE_DIR"]),
}))
""",
        TVM_FFI_CACHE_DIR=str(compiled),
    )


def test_the_platform_is_ours(on_cpu):
    assert (on_cpu["platform"], on_cpu["out_of_tree"], on_cpu["attention"]) == ("PascalCpuPlatform", True, "pascal")


def test_every_shim_is_needed_and_applied(on_cpu):
    assert set(on_cpu["applied"].values()) == {True}, on_cpu["applied"]
    assert set(on_cpu["needed"].values()) == {True}, on_cpu["needed"]


def test_shims_do_what_they_say(on_cpu):
    assert on_cpu["guard"] is True
    assert on_cpu["triton"] == "cpu"
    assert on_cpu["attention_choice"]
    assert on_cpu["load_format_choice"]
    assert on_cpu["loader"] == "PascalGgufLoader"
    assert on_cpu["other_loader"] == "DefaultModelLoader"
    assert on_cpu["rope"] == "1"
    assert on_cpu["compiled"] == []
    assert re.fullmatch(rf"{tempfile.gettempdir()}/sglang_loads_0123_[0-9a-f]{{8}}\.shm", on_cpu["load"])


def test_kv_types_pools_and_quantisation_are_ours_where_they_must_be(on_cpu):
    assert on_cpu["kv"] == {
        "int8": ["int8", "torch.int8"],
        "fp8_e5m2": ["None", "torch.float8_e5m2"],
        "auto": ["None", "torch.float32"],
    }
    assert on_cpu["pools"] == ["PascalKVPool", None]
    assert on_cpu["quantization"] == ["PascalGgufConfig", "Fp8Config"]
    assert on_cpu["norm"] == "rms_norm_layer"


def test_the_soft_cap_is_plain_torch_in_place_or_into_float32():
    logits = torch.tensor([[-100.0, 0.5], [3.0, 100.0]], dtype=torch.float16)
    expected = 30 * torch.tanh(logits.float() / 30)
    output = torch.empty(2, 2)
    assert softcap_logits(logits, 30.0, output) is output
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(softcap_logits(logits, None, output), logits.float())
    assert softcap_logits(logits, 30.0) is logits
    torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0)


def test_cuda_is_not_initialised(on_cpu):
    assert on_cpu["cuda_initialised"] is False


def test_the_barrier_of_the_overlap_scheduler_is_on_unless_the_user_chose(monkeypatch):
    """SGLang turns it on if its own is_cuda, which we replace, returns True."""
    (shim,) = (shim for shim in SHIMS if shim.name == "barrier between steps")
    assert shim.devices == ("cuda",)
    package = Path(next(iter(importlib.util.find_spec("sglang").submodule_search_locations)))
    scheduler = (package / "srt/managers/scheduler.py").read_text()
    assert "self._war_barrier_enabled = is_cuda() or envs.SGLANG_ENABLE_WAR_BARRIER.get()" in scheduler
    monkeypatch.setenv("SGLANG_ENABLE_WAR_BARRIER", "")
    monkeypatch.delenv("SGLANG_ENABLE_WAR_BARRIER")
    shim.apply()
    assert os.environ["SGLANG_ENABLE_WAR_BARRIER"] == "1"
    monkeypatch.setenv("SGLANG_ENABLE_WAR_BARRIER", "0")
    shim.apply()
    assert os.environ["SGLANG_ENABLE_WAR_BARRIER"] == "0"


def test_a_variable_that_the_user_chose_stays(monkeypatch):
    (shim,) = (shim for shim in SHIMS if shim.name == "few rows of logits at once")
    monkeypatch.delenv("SGLANG_LOGPROB_CHUNK_SIZE", raising=False)
    assert not shim.is_applied()
    shim.apply()
    assert os.environ["SGLANG_LOGPROB_CHUNK_SIZE"] == "8"
    monkeypatch.setenv("SGLANG_LOGPROB_CHUNK_SIZE", "512")
    shim.apply()
    assert os.environ["SGLANG_LOGPROB_CHUNK_SIZE"] == "512"


def test_a_triton_that_makes_its_driver_when_it_is_asked_for_is_not_asked(monkeypatch):
    """Triton 3.4 and newer: without a visible GPU reading `active` raises."""

    class LazyDriver:
        _active = None

        @property
        def active(self):
            raise RuntimeError("0 active drivers ([]). There should only be one.")

    driver = LazyDriver()
    monkeypatch.setattr(compat, "_triton_driver", lambda: driver)
    assert not compat._is_host_triton_driver()
    driver._active = compat.HostTritonDriver()
    assert compat._is_host_triton_driver()


@pytest.fixture(scope="module")
def on_pascal():
    """The CUDA platform where torch says that there is a Tesla P4; SGLang's modules are real."""
    return run_python("""
import json, sys, types
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (6, 1)
torch.cuda.get_device_name = lambda device=None: "Tesla P4"
torch.cuda.device_count = lambda: 1
import sglang_pascal.device as device
device.devices = lambda: (device.Device(0, "Tesla P4", (6, 1), 8 << 30),)
from sglang_pascal.compat import is_not_cuda, shims_for
from sglang.srt.utils import common
from sglang.srt.platforms import current_platform
from sglang.srt.plugins import load_plugins
load_plugins()
import sglang.srt.model_executor.model_runner as runner
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.model_executor.model_runner_components import load_model_utils
stale = [name for name, module in list(sys.modules.items())
         if name.startswith("sglang") and getattr(module, "__dict__", {}).get("_is_cuda") is True]
overrides = []
import sglang.srt.runtime_context as context
context.get_context = lambda: types.SimpleNamespace(override=lambda who, **values: overrides.append(values))
config = types.SimpleNamespace(dtype=torch.bfloat16)
runner.maybe_downgrade_dtype_for_legacy_gpu(model_config=config)
full = types.SimpleNamespace(dtype=torch.float32)
runner.maybe_downgrade_dtype_for_legacy_gpu(model_config=full)
from sglang.srt.model_executor.cuda_graph_config import default_cuda_graph_config
from sglang_pascal.platform import graph_config
free = graph_config(default_cuda_graph_config(), set())
locked = graph_config(default_cuda_graph_config(), {("decode", "bs"), ("prefill", "backend")})
print(json.dumps({
    "platform": type(current_platform).__name__,
    "models": sorted(ModelRegistry.models),
    "others_imported": "sglang.srt.models.mixtral" in sys.modules,
    "is_cuda": common.is_cuda(),
    "is_ours": common.is_cuda is is_not_cuda,
    "finders": sum(type(finder).__name__ == "_IsCudaFinder" for finder in sys.meta_path),
    "stale": stale,
    "applied": {shim.name: shim.is_applied() for shim in shims_for("cuda")},
    "dtype": str(config.dtype),
    "full": str(full.dtype),
    "overrides": overrides,
    "runner": current_platform.get_graph_runner_cls().__name__,
    "device": str(current_platform.get_group_coordinator_device(1)),
    "backend": current_platform.get_torch_distributed_backend_str(),
    "bytes": current_platform.get_device_total_memory(0),
    "graphs": current_platform.capabilities.graph_capture,
    "triton": current_platform.capabilities.supports_triton,
    "decode_sizes": list(free.decode.bs),
    "prefill": str(free.prefill.backend),
    "kept": [locked.decode.bs, str(locked.prefill.backend)] == [
        default_cuda_graph_config().decode.bs, str(default_cuda_graph_config().prefill.backend)],
}))
""")


class TestPascal:
    def test_the_platform_is_ours(self, on_pascal):
        assert on_pascal["platform"] == "PascalCudaPlatform"
        assert (on_pascal["graphs"], on_pascal["triton"]) == (True, False)
        assert (on_pascal["device"], on_pascal["backend"]) == ("cuda:1", "nccl")
        assert on_pascal["runner"] == "ChainGraphRunner"
        assert on_pascal["bytes"] == 8 << 30

    def test_is_cuda_is_false_everywhere_and_the_finder_is_gone(self, on_pascal):
        assert (on_pascal["is_cuda"], on_pascal["is_ours"]) == (False, True)
        assert on_pascal["stale"] == []
        assert on_pascal["finders"] == 0

    def test_every_shim_is_applied(self, on_pascal):
        assert set(on_pascal["applied"].values()) == {True}, on_pascal["applied"]

    def test_the_guard_chooses_float16_instead_of_refusing(self, on_pascal):
        assert on_pascal["dtype"] == "torch.float16"
        assert on_pascal["overrides"] == [{"dtype": "float16"}]

    def test_float32_stays_when_it_was_asked_for(self, on_pascal):
        assert on_pascal["full"] == "torch.float32"

    def test_few_decode_graphs_and_no_prefill_graph_unless_the_user_says_otherwise(self, on_pascal):
        assert on_pascal["decode_sizes"] == [*range(1, 15), 16, 17, 18, 20, 22, 24, 25, 26, 28, 32, 40, 48, 56, 64]
        assert "disabled" in on_pascal["prefill"].lower()
        assert on_pascal["kept"]


SERVER_START = """
import json, multiprocessing.process, os, runpy, sys
import torch

calls = []

def noted(name, answer):
    def call(*arguments, **options):
        calls.append(name)
        return answer
    return call

# What a P4 and its driver answer. The first three are how every use of CUDA begins.
torch._C._cuda_getDeviceCount = noted("_cuda_getDeviceCount", 1)
torch.cuda._lazy_init = noted("_lazy_init", None)
torch.cuda.get_device_properties = noted("get_device_properties", None)
torch.cuda._device_count_nvml = lambda: 1
torch.cuda._get_nvml_device_index = lambda device=0: 0
import pynvml
pynvml.nvmlInit = pynvml.nvmlShutdown = lambda: None
pynvml.nvmlDeviceGetHandleByIndex = lambda index: index
pynvml.nvmlDeviceGetCudaComputeCapability = lambda handle: (6, 1)
import sglang_pascal.device as device
device.devices = lambda: (device.Device(0, "Tesla P4", (6, 1), 8 << 30),)
device.visible_devices = noted("visible_devices", [])
from sglang_pascal import orphans

def start(process):
    facts = {"calls": calls, "method": multiprocessing.get_start_method(), "target": process._target.__name__}
    print(json.dumps(facts | {"torch": orphans.in_a_fork(orphans._torchs_answer)}))
    sys.stdout.flush()
    os._exit(0)

multiprocessing.process.BaseProcess.start = start
sys.argv = ["sglang.launch_server", "--model-path", os.environ["MODEL"], "--load-format", "pascal_gguf", "--device", "cuda",
            "--max-total-tokens", "1024", "--port", "1", "--log-level", "error"]
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


@pytest.mark.slow("imports all of SGLang")
def test_a_server_on_a_gpu_starts_its_first_worker_before_it_has_touched_cuda(tmp_path):
    """Only then it can fork them."""
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "Q4_0")
    prepare(tmp_path / "m.gguf", tmp_path / "model")
    facts = run_python(SERVER_START, MODEL=str(tmp_path / "model"), SGLANG_PLATFORM="pascal", HF_HUB_OFFLINE="1")
    assert facts == {"calls": [], "method": "fork", "target": "run_scheduler_process", "torch": "allowed"}


def test_only_the_modules_of_gguf_models_are_imported_for_one(on_pascal):
    """The architectures of the table are all there; SGLang imports its others when one is asked for."""
    assert on_pascal["models"] == sorted(arch.model_class for arch in ARCHITECTURES.values())
    assert on_pascal["others_imported"] is False


def test_on_a_newer_card_sglang_keeps_its_own_platform():
    facts = run_python("""
import json
import sglang_pascal.device as device
device.devices = lambda: (device.Device(0, "Tesla T4", (7, 5)),)
import sglang_pascal
from sglang_pascal.compat import shims_for
sglang_pascal.register()
applied = [shim.name for shim in shims_for("cuda", "register") if shim.is_applied()]
print(json.dumps({"platform": sglang_pascal.activate(), "applied": applied}))
""")
    assert facts == {"platform": None, "applied": []}


def test_importing_the_package_is_cheap():
    facts = run_python("""
import json, sys
import sglang_pascal
print(json.dumps(sorted({"torch", "sglang", "numpy", "transformers"} & set(sys.modules))))
""")
    assert facts == []
