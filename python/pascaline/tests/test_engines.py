"""Both engines' command lines, what their pages and words mean, and that no setting is lost on the way."""

from __future__ import annotations

import ctypes
import json
import stat
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.engines import ENGINES, Cause, Diagnosis, Engine, Launch, Progress, Task
from pascaline.engines.base import sum_of_series
from pascaline.engines.causes import CUDA_FAULTS, CudaError
from pascaline.engines.client import reachable
from pascaline.engines.llama_cpp import LlamaCppEngine
from pascaline.engines.sglang import SglangEngine
from pascaline.engines.speculation import NO_SPECULATION, Speculation
from pascaline.errors import ConfigurationError, MissingError
from pascaline.gpu.devices import GpuIdentity, device_variables
from pascaline.models.resolve import ResolvedModel
from pascaline.models.spec import ModelSpec
from pascaline.serving.console import try_command
from pascaline.settings import PlacementSettings, Settings
from support.instance import FAKE_ENGINE

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.warm_sglang import WarmSGLang

SGLANG, LLAMA_CPP = SglangEngine(), LlamaCppEngine()
IDLE_SECONDS = 1.7491296849999998
"""Of the scheduler, in the recorded page."""
SGLANG_PAGE = Path(__file__).parents[3] / "tests/monitoring/pages/sglang.prom"
SPEC = ModelSpec(
    format="gguf",
    files=(Path("/m/emily.gguf"),),
    architecture="llama",
    num_hidden_layers=2,
    hidden_size=8,
    intermediate_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    v_head_dim=2,
    vocab_size=16,
    context_length=2048,
)
GGUF = ResolvedModel("gguf", Path("/m/emily.gguf"), SPEC, "emily", ("0" * 64,), Path("/cache/prepared/0-v1"))
FOLDER = ResolvedModel("huggingface", Path("/m/emily"), replace(SPEC, format="safetensors"), "emily")


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Task]:
    def make(model: ResolvedModel = GGUF, api_key: str | None = None, device: str = "cpu", **settings: Any) -> Task:
        """What the planner decides is what is asked for, as far as anything is."""
        given = Settings.model_validate(settings)
        return Task(
            settings=given,
            model=model,
            device=device,
            dtype="float32" if given.dtype == "auto" else given.dtype,
            threads=given.threads or 2,
            context_length=given.context_length or 2048,
            max_total_tokens=given.kv_cache.max_tokens or given.kv_cache.max_bytes or 8192,
            mem_fraction_static=given.mem_fraction_static,
            prefill_bits=16 if given.activation_bits.prefill == "auto" else given.activation_bits.prefill,
            decode_bits=16 if given.activation_bits.decode == "auto" else given.activation_bits.decode,
            speculation=NO_SPECULATION
            if given.speculative.method == "auto"
            else Speculation(given.speculative.method, given.speculative.tokens or 7, 16),
            runtime_dir=tmp_path,
            api_key=api_key,
        )

    return make


def llama_task(task: Callable[..., Task], **settings: Any) -> Task:
    model = ResolvedModel("gguf", Path("/m/emily.gguf"), SPEC, "emily")
    return task(model, **({"engine_executable": FAKE_ENGINE} | settings))


class TestTryCommand:
    """What `serve` prints when it is ready works with the model at hand."""

    def test_a_question(self, task: Callable[..., Task]) -> None:
        assert "/v1/chat/completions -H" in try_command(task())

    def test_the_start_of_a_sentence_where_there_is_no_chat_template(self, task: Callable[..., Task]) -> None:
        command = try_command(task(replace(GGUF, has_chat_template=False)))
        assert "/v1/completions -H" in command
        assert '"prompt": "The capital of France is"' in command


class TestSglangCommand:
    def test_the_whole_of_it(self, task: Callable[..., Task]) -> None:
        command = SGLANG.launch(task()).command
        assert command[:3] == (sys.executable, "-m", "sglang.launch_server")
        assert " ".join(command[3:]) == (
            "--model-path /cache/prepared/0-v1 --served-model-name emily --load-format pascal_gguf "
            "--device cpu --dtype float32 --host 127.0.0.1 --port 30000 --context-length 2048 "
            "--max-running-requests 4 --max-total-tokens 8192 --chunked-prefill-size 512 --schedule-policy fcfs "
            "--tp-size 1 --pp-size 1 --enable-metrics --sleep-on-idle --skip-server-warmup --kv-cache-dtype auto "
            "--log-level-http warning"
        )

    def test_a_folder_is_served_as_it_is(self, task: Callable[..., Task]) -> None:
        command = SGLANG.launch(task(FOLDER)).command
        assert command[3:5] == ("--model-path", "/m/emily")
        assert "--load-format" not in command

    def test_bitsandbytes_quantises_with_a_loader_of_its_own(self, task: Callable[..., Task]) -> None:
        command = " ".join(SGLANG.launch(task(FOLDER, quantization="bitsandbytes")).command)
        assert " --quantization bitsandbytes --load-format bitsandbytes " in command

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"host": "0.0.0.0", "port": 8000}, "--host 0.0.0.0 --port 8000"),
            ({"mem_fraction_static": 0.85}, "--mem-fraction-static 0.85"),
            ({"max_queued_requests": 16}, "--max-queued-requests 16"),
            ({"tensor_parallel": 2, "pipeline_parallel": 3}, "--tp-size 2 --pp-size 3"),
            ({"kv_cache": {"dtype": "fp8_e5m2"}}, "--kv-cache-dtype fp8_e5m2"),
            ({"kv_cache": {"dtype": "fp16"}}, "--kv-cache-dtype auto"),
            ({"radix_cache": False}, "--disable-radix-cache"),
            ({"attention_backend": "torch_native"}, "--attention-backend torch_native"),
            ({"quantization": "awq"}, "--quantization awq"),
            ({"debug": True}, "--log-level debug"),
            ({"schedule_policy": "lpm"}, "--schedule-policy lpm"),
            ({"extra_args": ["--log-level-http=info", "--sleep-on-idle"]}, "--log-level-http=info --sleep-on-idle"),
        ],
    )
    def test_a_setting_becomes_an_argument(
        self, task: Callable[..., Task], settings: dict[str, Any], expected: str
    ) -> None:
        assert f" {expected} " in " ".join(SGLANG.launch(task(**settings)).command) + " "

    def test_the_api_key_goes_by_a_file(self, task: Callable[..., Task], tmp_path: Path) -> None:
        for _ in range(2):  # a restart writes it again
            launch = SGLANG.launch(task(api_key='se"same'))
        path = tmp_path / "sglang.yaml"
        assert launch.command[-2:] == ("--config", str(path))
        assert json.loads(path.read_text()) == {"api-key": 'se"same'}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "same" not in " ".join((*launch.command, *launch.environment.values())).replace(str(path), "")

    def test_the_api_key_is_not_in_the_tasks_words(self, task: Callable[..., Task]) -> None:
        assert "sesame" not in repr(task(api_key="sesame"))

    def test_variables(self, task: Callable[..., Task]) -> None:
        environment = SGLANG.launch(task(threads=7)).environment
        assert (environment["SGLANG_PLATFORM"], environment["CUDA_VISIBLE_DEVICES"]) == ("pascal", "")
        assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == ("7", "PASSIVE")
        assert "CUDA_LAUNCH_BLOCKING" not in environment

    @pytest.mark.parametrize("make", [lambda task: SGLANG.launch(task), lambda task: LLAMA_CPP.launch(task)])
    def test_a_gpu_is_counted_as_the_plan_counts(
        self, task: Callable[..., Task], make: Callable[[Task], Launch]
    ) -> None:
        """Whatever the settings say of the order: the placement has read it and names the same card."""
        given = task(device="cuda", engine_executable=FAKE_ENGINE, environment={"CUDA_VISIBLE_DEVICES": "1"})
        launch = make(given)
        assert launch.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert launch.environment["CUDA_VISIBLE_DEVICES"] == "1"
        placed = replace(given, device_variables=device_variables("cuda", [GpuIdentity(1, "GPU-b", "0000:02:00")]))
        assert make(placed).environment["CUDA_VISIBLE_DEVICES"] == "GPU-b"

    def test_every_start_has_an_empty_folder_for_temporary_files(
        self, task: Callable[..., Task], tmp_path: Path
    ) -> None:
        folder = Path(SGLANG.launch(task()).environment["TMPDIR"])
        assert folder == tmp_path / "tmp"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "socket").touch()
        assert SGLANG.launch(task()).environment["TMPDIR"] == str(folder)
        assert list(folder.iterdir()) == []

    def test_what_is_compiled_is_kept_in_the_cache_folder(
        self, task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SGLang's default is in the home folder, which may be read-only."""
        monkeypatch.delenv("SGLANG_CACHE_DIR", raising=False)
        launched = SGLANG.launch(task(cache_dir=tmp_path / "cache"))
        assert launched.environment["SGLANG_CACHE_DIR"] == str(tmp_path / "cache/sglang")
        monkeypatch.setenv("SGLANG_CACHE_DIR", "/elsewhere")
        assert "SGLANG_CACHE_DIR" not in SGLANG.launch(task()).environment

    @pytest.mark.parametrize(
        ("chosen", "spins"),
        [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    )
    def test_threads_of_llama_server_spin_shortly_unless_the_settings_say_otherwise(
        self, task: Callable[..., Task], chosen: dict[str, str], spins: str | None
    ) -> None:
        environment = LLAMA_CPP.launch(llama_task(task, environment=chosen)).environment
        assert environment.get("GOMP_SPINCOUNT") == spins
        assert environment.get("OMP_WAIT_POLICY") == chosen.get("OMP_WAIT_POLICY")

    @pytest.mark.parametrize("divided", [{"expert_layers_on_host": 1}, {"gpu_layers": 3}])
    def test_threads_that_wait_for_the_gpu_in_every_layer_spin_as_libgomp_has_it(
        self, task: Callable[..., Task], divided: dict[str, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pascaline.engines.llama_cpp.engine._require_cuda", lambda *_: None)
        assert "GOMP_SPINCOUNT" not in LLAMA_CPP.launch(replace(llama_task(task), device="cuda", **divided)).environment

    def test_variables_of_the_settings_win(self, task: Callable[..., Task]) -> None:
        chosen = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE", "CUDA_LAUNCH_BLOCKING": "0"}
        launch = SGLANG.launch(task(debug=True, environment=chosen))
        assert {name: launch.environment[name] for name in chosen} == chosen

    def test_an_interpreter_that_is_not_there(self, task: Callable[..., Task]) -> None:
        with pytest.raises(MissingError) as raised:
            SGLANG.launch(task(engine_executable="/none/python"))
        assert str(raised.value) == (
            "engine_executable: /none/python is not a program, must be a Python that can import sglang"
        )


class TestLlamaCppCommand:
    def test_the_whole_of_it(self, task: Callable[..., Task]) -> None:
        launch = LLAMA_CPP.launch(llama_task(task))
        assert launch.command[0] == str(FAKE_ENGINE)
        assert " ".join(launch.command[1:]) == (
            "--model /m/emily.gguf --alias emily --host 127.0.0.1 --port 30000 --threads 2 --ctx-size 8192 --parallel 4 "
            "--batch-size 512 --ubatch-size 512 --n-gpu-layers 0 --cache-type-k f16 --cache-type-v f16 --metrics"
        )
        assert launch.environment == {"CUDA_VISIBLE_DEVICES": "", "GOMP_SPINCOUNT": "1000"}

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"device": "cuda"}, "--n-gpu-layers 999"),
            ({"context_length": 1000, "max_running_requests": 3}, "--ctx-size 3000 --parallel 3"),
            ({"chunked_prefill_tokens": 16}, "--batch-size 32"),
            ({"kv_cache": {"dtype": "int8"}}, "--cache-type-k q8_0 --cache-type-v q8_0"),
            ({"debug": True}, "--verbose"),
            ({"extra_args": ["--no-warmup"]}, "--no-warmup"),
        ],
    )
    def test_a_setting_becomes_an_argument(
        self, task: Callable[..., Task], settings: dict[str, Any], expected: str
    ) -> None:
        assert f" {expected} " in " ".join(LLAMA_CPP.launch(llama_task(task, **settings)).command) + " "

    def test_the_api_key_goes_by_its_file(self, task: Callable[..., Task], tmp_path: Path) -> None:
        launch = LLAMA_CPP.launch(llama_task(task, api_key="sesame", api_key_file=tmp_path / "key"))
        assert launch.command[-2:] == ("--api-key-file", str(tmp_path / "key"))
        assert "sesame" not in " ".join(launch.command)

    def test_a_type_of_the_pool_that_it_does_not_have(self, task: Callable[..., Task]) -> None:
        with pytest.raises(ConfigurationError) as raised:
            LLAMA_CPP.launch(llama_task(task, kv_cache={"dtype": "fp8_e5m2"}))
        assert str(raised.value) == (
            "kv_cache.dtype: llama.cpp has no 'fp8_e5m2', must be one of: auto, fp16, bf16, int8"
        )

    @pytest.mark.parametrize(
        ("answer", "seen"),
        [
            ("Available devices:\n  (none)", "none"),
            ("Available devices:\n  Vulkan0: Intel (4096 MiB)", "Vulkan0"),
            ("Available devices:\n  CUDA0: Tesla P4 (7611 MiB, 7500 MiB free)", ""),
            ("error: invalid argument: --list-devices", ""),
        ],
    )
    def test_a_build_that_would_compute_on_the_cpu(
        self, task: Callable[..., Task], tmp_path: Path, answer: str, seen: str
    ) -> None:
        program = tmp_path / "llama-server"
        program.write_text(f"#!/bin/sh\necho '{answer}'\n")
        program.chmod(0o755)
        asked = llama_task(task, device="cuda", engine_executable=str(program))
        if not seen:
            assert LLAMA_CPP.launch(asked).command[0] == str(program)
            return
        with pytest.raises(MissingError) as raised:
            LLAMA_CPP.launch(asked)
        assert str(raised.value) == (
            f"engine_executable: {program} sees no NVIDIA GPU ({program} --list-devices: {seen}) and would compute "
            "on the CPU; install a llama.cpp that is built with CUDA, repair the driver, or set device to cpu"
        )
        assert LLAMA_CPP.launch(llama_task(task, device="cpu", engine_executable=str(program))).command

    def test_a_program_that_is_not_on_path(self, task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/none")
        with pytest.raises(MissingError) as raised:
            LLAMA_CPP.launch(task())
        assert str(raised.value) == (
            "engine_executable: llama-server is not on PATH; "
            "install llama.cpp, or name its llama-server in engine_executable"
        )


class TestExtraArguments:
    @pytest.mark.parametrize(
        ("engine", "flag"), [(engine.name, flag) for engine in ENGINES.values() for flag in engine.setting_flags]
    )
    def test_what_a_setting_stands_for_is_refused(self, engine: str, flag: str) -> None:
        setting = ENGINES[engine].setting_flags[flag]
        for argument in (flag, f"{flag}=1"):
            with pytest.raises(ConfigurationError) as raised:
                ENGINES[engine].check_extra_args([argument])
            assert str(raised.value) == (
                f"extra_args: {flag} is set by {setting}, must be left out; set {setting} instead"
            )

    def test_an_abbreviation_is_no_way_around(self) -> None:
        with pytest.raises(ConfigurationError) as raised:
            SGLANG.check_extra_args(["--context-len", "4096"])
        assert str(raised.value) == (
            "extra_args: --context-len (--context-length) is set by context_length, must be left out; "
            "set context_length instead"
        )

    def test_everything_else_is_passed_on(self) -> None:
        SGLANG.check_extra_args(["--watchdog-timeout", "600", "--sleep-on-idle"])
        LLAMA_CPP.check_extra_args(["--no-warmup", "--jinja", "-fa", "on"])

    @pytest.mark.parametrize("engine", ENGINES)
    def test_a_flag_stands_for_a_setting_that_exists(self, engine: str) -> None:
        known = {*Settings.model_fields, *(f"kv_cache.{name}" for name in ("max_tokens", "dtype"))}
        known |= {f"placement.{name}" for name in PlacementSettings.model_fields}
        known |= {f"speculative.{name}" for name in ("method", "tokens", "draft_model")}
        assert set(ENGINES[engine].setting_flags.values()) - {"the settings of pascaline"} <= known


# Setting -> another value than the default. What only supervision and planning read is not here.
OTHER_VALUES: dict[str, Any] = {
    "served_model_name": None,  # by the resolved model, below
    "host": "0.0.0.0",
    "port": 8000,
    "device": "cuda",
    "dtype": "bfloat16",
    "context_length": 1024,
    "max_running_requests": 9,
    "max_queued_requests": 5,
    "mem_fraction_static": 0.5,
    "schedule_policy": "lpm",
    "role": "embed",
    "any_model_name": True,
    "tool_call_parser": "mistral",
    "reasoning_parser": "qwen3",
    "chunked_prefill_tokens": 64,
    "kv_cache": {"dtype": "int8"},
    "activation_bits": {"prefill": 8, "decode": 8},
    "placement": {"weights": "mapped"},
    "radix_cache": False,
    "speculative": {"method": "lookup", "tokens": 3},
    "attention_backend": "torch_native",
    "quantization": "awq",
    "tensor_parallel": 2,
    "pipeline_parallel": 2,
    "threads": 5,
    "extra_args": ["--something"],
    "environment": {"A": "1"},
    "debug": True,
    "api_key_file": "/run/key",
    "engine_executable": "/bin/sh",
}
NOT_THE_ENGINES = {
    *("model", "model_sha256", "card", "engine", "agent_host", "agent_port", "cache_dir", "allow_overcommit"),
    "allow_unauthenticated",
    *("start_timeout", "drain_timeout", "stall_timeout", "probe_interval", "max_restarts", "on_oom"),
}
# The plan keeps to them with either engine; llama-server itself computes as it was built to.
THE_PLANS = {("llama.cpp", "placement"), ("llama.cpp", "dtype"), ("llama.cpp", "mem_fraction_static")}


class TestNoSettingIsLost:
    def test_every_setting_is_known_here(self) -> None:
        assert OTHER_VALUES.keys() | NOT_THE_ENGINES == set(Settings.model_fields)

    @pytest.mark.parametrize(
        ("engine", "name"),
        [
            (engine, name)
            for engine in ENGINES
            for name in OTHER_VALUES
            if name != "served_model_name" and (engine, name) not in THE_PLANS
        ],
    )
    def test_it_reaches_the_engine_or_is_refused(self, task: Callable[..., Task], engine: str, name: str) -> None:
        value = OTHER_VALUES[name]
        given = {"device": value} if name == "device" else {name: value, "device": "cpu"}
        model = GGUF if engine == "sglang" else ResolvedModel("gguf", GGUF.path, SPEC, "emily")
        if any(
            key.partition(".")[0] == name
            for key, _ in ENGINES[engine].problems(Settings.model_validate({"engine": engine, name: value}))
        ):
            return
        defaults = {"engine_executable": str(FAKE_ENGINE)}
        key = "sesame" if name == "api_key_file" else None
        changed = ENGINES[engine].launch(task(model, api_key=key, **(defaults | given)))
        assert changed != ENGINES[engine].launch(task(model, **defaults, device="cpu"))

    @pytest.mark.parametrize("engine", ENGINES)
    def test_the_models_name(self, task: Callable[..., Task], engine: str) -> None:
        command = (
            ENGINES[engine].launch(task(replace(GGUF, served_name="bob"), engine_executable=str(FAKE_ENGINE))).command
        )
        assert "bob" in command


class TestProgress:
    def test_of_a_real_page(self) -> None:
        page = SGLANG_PAGE.read_text()
        progress = SGLANG.progress(page)
        assert progress is not None
        assert (progress.tokens, progress.running, progress.queued) == (155.0 + 163.0, 0, 0)
        # Five first tokens, 156 further ones, 168 in answers that are finished.
        assert progress.answers == 5.0 + 156.0 + 168.0
        assert (progress.prefill, progress.decode, progress.prompts) == (155.0, 163.0, 6.0)
        assert progress.idle_seconds == pytest.approx(IDLE_SECONDS)

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("page", ["", "# HELP nothing\n", "other_series 1\n"])
    def test_of_a_page_without_the_series(self, engine: str, page: str) -> None:
        assert ENGINES[engine].progress(page) is None

    def test_of_all_ranks_together(self) -> None:
        page = "".join(
            f'sglang:realtime_tokens_total{{mode="{mode}",tp_rank="{rank}"}} 10.0\n'
            f'sglang:num_running_reqs{{tp_rank="{rank}"}} 1.0\nsglang:num_queue_reqs{{tp_rank="{rank}"}} 2.0\n'
            for rank, mode in enumerate(("decode", "prefill_compute"))
        )
        assert SGLANG.progress(page) == Progress(20.0, 2, 4, answers=0.0, prefill=10.0, decode=10.0)

    def test_of_llama_server(self) -> None:
        page = (
            "# TYPE llamacpp:prompt_tokens_total counter\nllamacpp:prompt_tokens_total 7\n"
            "llamacpp:tokens_predicted_total 3\nllamacpp:n_decode_total 4\n"
            "llamacpp:requests_processing 2\nllamacpp:requests_deferred 1\n"
        )
        assert LLAMA_CPP.progress(page) == Progress(14.0, 2, 1)

    @pytest.mark.parametrize(("running", "queued", "expected"), [(0, 0, False), (1, 0, True), (0, 1, True)])
    def test_work(self, running: int, queued: int, expected: bool) -> None:
        assert Progress(0.0, running, queued).has_work is expected

    def test_a_series_whose_name_begins_alike_is_another(self) -> None:
        page = 'a_total 1\na_total_more 10\na_total{x="a_total 5"} 2\nxa_total 100\na_totals 7\n'
        assert sum_of_series(page, "a_total") == 3.0

    def test_a_value_that_is_no_number_counts_nothing(self) -> None:
        assert sum_of_series('a{b="1"} NaN\na{b="2"} 2\n', "a") == 2.0
        assert sum_of_series("b 1\n", "a") is None


class TestOutput:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("[2026-11-23 20:15:01] Load weight begin.", ("INFO", "Load weight begin.")),
            ("[2026-11-23 20:15:01 TP0] Load weight begin.", ("INFO", "Load weight begin.")),
            ("[2026-11-23 20:15:01] WARNING server_args.py:1: x", ("WARNING", "server_args.py:1: x")),
            ("[2026-11-23 20:15:01] ERROR: it failed", ("ERROR", "it failed")),
            ("INFO:     Started server process [7]", ("INFO", "Started server process [7]")),
            ("Traceback (most recent call last):", ("ERROR", "Traceback (most recent call last):")),
            ("  File 'x.py'", ("INFO", "  File 'x.py'")),
            ("", ("INFO", "")),
        ],
    )
    def test_of_sglang(self, line: str, expected: tuple[str, str]) -> None:
        assert SGLANG.parse_line(line) == expected

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("0.00.123.456 I srv  load_model: loading", ("INFO", "srv  load_model: loading")),
            ("0.00.123.456 E srv  failed", ("ERROR", "srv  failed")),
            ("llama_model_load: error loading model", ("ERROR", "llama_model_load: error loading model")),
            ("warning: no usable GPU found", ("WARNING", "warning: no usable GPU found")),
            ("main: server is listening", ("INFO", "main: server is listening")),
        ],
    )
    def test_of_llama_server(self, line: str, expected: tuple[str, str]) -> None:
        assert LLAMA_CPP.parse_line(line) == expected


class TestExplanations:
    @pytest.mark.parametrize(
        ("lines", "expected"),
        [
            (
                ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB.", "Killed"],
                "not enough memory on the device; lower mem_fraction_static, context_length or max_running_requests",
            ),
            (["RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."], None),
            (["pynvml.NVMLError_GpuIsLost: GPU is lost", "CUDA out of memory"], "the GPU is lost"),
            (["OSError: [Errno 98] Address already in use"], "its port is in use"),
            (
                [
                    "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network "
                    "address. port: 26718, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"
                ],
                "a port that SGLang had chosen for its own processes was taken by another program; start it again",
            ),
            (["all is well"], None),
            ([], None),
        ],
    )
    def test_of_sglang(self, lines: list[str], expected: str | None) -> None:
        memory = "not enough memory on the device; lower mem_fraction_static, context_length or max_running_requests"
        assert SGLANG.explain(lines) == (memory if "Not enough memory" in "".join(lines) else expected)

    @pytest.mark.parametrize("error", CUDA_FAULTS, ids=lambda error: str(error.code))
    @pytest.mark.parametrize("engine", [SGLANG, LLAMA_CPP], ids=lambda engine: engine.name)
    def test_cuda_faults_in_each_phrasing(self, engine: Engine, error: CudaError) -> None:
        """torch's exception and its check at the start, ggml's two forms, and the names that the kernels write."""
        for words in (
            f"torch.AcceleratorError: CUDA error: {error.message}",
            f"RuntimeError: Unexpected error from cudaGetDeviceCount(). Error {error.code}: {error.message}",
            f"ggml_cuda_init: failed to initialize CUDA: {error.message}",
            f"CUDA error: {error.message}",
            f"CUDA error {error.code} ({error.names[1]})",
        ):
            diagnosis = engine.diagnose(["before", words, "Aborted"])
            assert diagnosis is not None, words
            assert diagnosis.cause is Cause.CUDA_FAULT
            assert diagnosis.text == f"CUDA says: {error.message} ({error.names[0]}, {error.code})"

    def test_other_words_are_no_cuda_fault(self) -> None:
        for words in (
            "an unknown error",
            "CUDA error: an illegal memory access was encountered",
            "CUDA graphs: unknown",
        ):
            assert SGLANG.diagnose([words]) is None
        for name in ("device doesn't have valid Grid license", "invalid device context"):
            assert SGLANG.diagnose([f"CUDA error: {name}"]) is None

    def test_the_messages_are_the_installed_runtimes(self) -> None:
        package = find_spec("nvidia.cuda_runtime")
        if package is None or not package.submodule_search_locations:
            pytest.skip("no CUDA runtime is installed")
        runtime = ctypes.CDLL(str(next(Path(package.submodule_search_locations[0]).glob("lib/libcudart.so*"))))
        runtime.cudaGetErrorString.restype = runtime.cudaGetErrorName.restype = ctypes.c_char_p
        for error in CUDA_FAULTS:
            assert runtime.cudaGetErrorString(error.code).decode() == error.message
            assert runtime.cudaGetErrorName(error.code).decode() == error.names[0]

    def test_what_the_plugin_raised_is_said_in_its_words(self) -> None:
        lines = [
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 64.00 MiB.",
            "The above exception was the direct cause of the following exception:",
            'sglang_pascal.errors.DeviceMemoryError: cuda:0 ran out of memory while repacking tensor "x"; stop others',
            "",
            "[2026-11-26 21:48:00] SIGQUIT received. signum=None, frame=None. It usually means one child failed.",
            "[2026-11-26 21:48:05] kill_process_tree called: parent_pid=1, include_parent=True, pid=1",
        ]
        assert SGLANG.explain(lines) == 'cuda:0 ran out of memory while repacking tensor "x"; stop others'
        assert SGLANG.explain([*lines, "GPU 0: GPU is lost"]) == "the GPU is lost"

    def test_what_the_plugins_kernels_raised_is_about_the_gpu(self) -> None:
        said = "kernel q4_k_matmul failed: CUDA error 719 (CUDA_ERROR_LAUNCH_FAILED)"
        assert SGLANG.diagnose([f"sglang_pascal.errors.KernelError: {said}"]) == Diagnosis(Cause.CUDA_FAULT, said)

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            (
                "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 8192.00 MiB on device 0: cudaMalloc failed: "
                "out of memory",
                "not enough memory on the device; lower context_length or max_running_requests",
            ),
            ("srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080", "its port is in use"),
            (
                "error loading model architecture: unknown model architecture: 'x'",
                "llama.cpp does not know the model's architecture",
            ),
            (
                "llama_model_load: error loading model: tensor 'blk.0.attn_q.weight' data is not within the file bounds",
                "the model file is damaged",
            ),
        ],
    )
    def test_of_llama_server(self, line: str, expected: str) -> None:
        assert LLAMA_CPP.explain(["main: loading", line, "main: exiting"]) == expected


@pytest.mark.parametrize(
    ("listening", "expected"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("10.0.0.1", "10.0.0.1"), ("h", "h")]
)
def test_a_wildcard_is_reached_by_loopback(listening: str, expected: str) -> None:
    assert reachable((listening, 1)) == (expected, 1)


SPELLINGS = """
import argparse, json
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
print(json.dumps({action.dest: action.option_strings for action in parser._actions}))
"""


@pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not installed")
def test_every_argument_is_one_that_sglang_knows(in_sglang: WarmSGLang) -> None:
    """SGLang's own parser: no argument of ours is unknown to it, and no other spelling of one gets past the check."""
    spellings = in_sglang.run(SPELLINGS)
    known = {option: dest for dest, options in spellings.items() for option in options}
    for flag in SGLANG.setting_flags:
        if flag != "--config":
            assert flag in known, flag
            assert set(spellings[known[flag]]) <= set(SGLANG.setting_flags), flag
    # An abbreviation that is refused must not be an option of its own.
    shorter = {
        option for option in known for flag in SGLANG.setting_flags if option != flag and flag.startswith(option)
    }
    assert shorter <= set(SGLANG.setting_flags)
