"""Everything that keeps an instance from serving: the whole message and the exit code, as a user meets them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.errors import ExitCode
from support.instance import FAKE_ENGINE, PATIENCE
from support.ledger import stretch
from support.ports import free_port
from support.privileges import ordinary
from support.raw_models import CONFIG, LLAMA, folder_tensors, gguf_file, safetensors_file, value

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.instance import Instance

    Serve = Callable[..., Instance]


def refusal(serve: Serve, code: ExitCode, **settings: Any) -> str:
    """Return the message with which an instance ends by itself, whose exit code must be this one."""
    instance = serve(**settings)
    assert instance.wait() == code, instance.text
    assert "Traceback" not in instance.error
    return instance.error


def time_to_generate() -> int:
    """Return a start_timeout, seconds, within which the fake engine gets to its first generation on this machine."""
    return round(4 * stretch())


class TestConfiguration:
    """Exit code 2, before anything is started."""

    def test_an_unknown_key(self, serve: Serve, tmp_path: Path) -> None:
        path = tmp_path / "settings.toml"
        path.write_text("max_runing_requests = 4\n")
        message = refusal(serve, ExitCode.CONFIGURATION, config=path)
        assert message == f"max_runing_requests: unknown key, did you mean max_running_requests? ({path}:1)"

    def test_a_number_out_of_range(self, serve: Serve) -> None:
        message = refusal(serve, ExitCode.CONFIGURATION, max_running_requests=0)
        assert message == (
            "max_running_requests: invalid value '0', must be a whole number between 1 and 4096 "
            "(flag --max-running-requests)"
        )

    def test_two_mistakes_are_reported_together(self, serve: Serve) -> None:
        message = refusal(serve, ExitCode.CONFIGURATION, port=0, dtype="int4")
        assert message.splitlines() == [
            "port: invalid value '0', must be a whole number between 1 and 65535 (flag --port)",
            "dtype: invalid value 'int4', must be one of: auto, float16, bfloat16, float32 (flag --dtype)",
        ]

    def test_a_context_above_the_models(self, serve: Serve) -> None:
        message = refusal(serve, ExitCode.CONFIGURATION, context_length=100_000)
        assert message == "context_length: 100000 is above the model's, must be at most 2048"

    def test_a_pool_that_cannot_hold_one_request(self, serve: Serve) -> None:
        message = refusal(serve, ExitCode.CONFIGURATION, context_length=512, kv_cache__max_tokens=256)
        assert message == (
            "kv_cache.max_tokens: 256 tokens cannot hold one request, must be at least context_length (512) "
            "(flag --kv-cache-max-tokens)"
        )

    def test_no_time_for_a_test_generation(self, serve: Serve) -> None:
        message = refusal(serve, ExitCode.CONFIGURATION, stall_timeout=20, probe_interval=15)
        assert message == (
            "stall_timeout: 20 s leaves no time for a test generation, must be at least twice probe_interval (15 s) "
            "(flag --stall-timeout)"
        )

    def test_an_api_key_file_that_is_not_there(self, serve: Serve, tmp_path: Path) -> None:
        message = refusal(serve, ExitCode.CONFIGURATION, api_key_file=tmp_path / "none")
        assert message == (
            f"api_key_file: failed to read {tmp_path / 'none'}: No such file or directory; "
            "it must be a file that this user may read (flag --api-key-file)"
        )

    def test_an_api_key_file_that_may_not_be_read(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.touch(mode=0)
        command = ordinary([sys.executable, "-m", "pascaline", "serve", "--api-key-file", str(path)])
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert result.returncode == ExitCode.CONFIGURATION
        assert result.stderr == (
            f"pascaline serve: api_key_file: failed to read {path}: Permission denied; "
            "it must be a file that this user may read (flag --api-key-file)\n"
        )

    def test_an_api_key_file_that_is_a_folder(self, serve: Serve, tmp_path: Path) -> None:
        assert refusal(serve, ExitCode.CONFIGURATION, api_key_file=tmp_path) == (
            f"api_key_file: failed to read {tmp_path}: Is a directory; "
            "it must be a file that this user may read (flag --api-key-file)"
        )

    def test_an_empty_api_key_file(self, serve: Serve, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.write_text("\n")
        message = refusal(serve, ExitCode.CONFIGURATION, api_key_file=path)
        assert message == f"api_key_file: {path} is empty, must hold one key and nothing else (flag --api-key-file)"

    @pytest.mark.parametrize("key", ["sésame-open", "sesame\0open", "sesame\x7fopen"])
    def test_an_api_key_that_no_header_can_carry(self, serve: Serve, tmp_path: Path, key: str) -> None:
        path = tmp_path / "key"
        path.write_text(key, encoding="utf-8")
        message = refusal(serve, ExitCode.CONFIGURATION, api_key_file=path)
        assert message == (
            f"api_key_file: {path} holds characters that an HTTP header cannot carry, must be printable ASCII "
            "(flag --api-key-file)"
        )

    def test_an_engine_argument_that_a_setting_stands_for(self, serve: Serve) -> None:
        message = refusal(serve, ExitCode.CONFIGURATION, extra_args=["--port=1"])
        assert message == ("extra_args: --port is set by port, must be left out; set port instead (flag --extra-args)")

    def test_a_gpu_that_is_not_there(self, serve: Serve) -> None:
        if Path("/proc/driver/nvidia/gpus").exists():
            pytest.skip("this machine has an NVIDIA GPU")
        message = refusal(serve, ExitCode.CONFIGURATION, device="cuda")
        assert message == (
            "device: cuda is wanted, but the NVIDIA driver shows no GPU; check nvidia-smi, or set device to cpu"
        )


class TestModel:
    """Exit code 3: the model is the cause."""

    def test_missing(self, serve: Serve, tmp_path: Path) -> None:
        path = tmp_path / "none.gguf"
        assert refusal(serve, ExitCode.MODEL, model=path) == (
            f"failed to read {path}: there is no such file; name a GGUF file or a Hugging Face folder"
        )

    def test_empty(self, serve: Serve, tmp_path: Path) -> None:
        path = tmp_path / "empty.gguf"
        path.touch()
        assert refusal(serve, ExitCode.MODEL, model=path) == f"failed to read {path}: it is empty; download it again"

    def test_no_model(self, serve: Serve, tmp_path: Path) -> None:
        path = tmp_path / "letter.gguf"
        path.write_text("Dear Sir or Madam, this is not a model.")
        assert refusal(serve, ExitCode.MODEL, model=path) == (
            f"failed to read {path}: it is not a GGUF file: it starts with b'Dear', must start with b'GGUF'; it is the text "
            "'Dear Sir or Madam, this is not a model.', which a server may have sent in place of the file: download it "
            "again; if the server asks for a login, with a token (pascaline models add --token-file FILE)"
        )

    def test_truncated(self, serve: Serve, tmp_path: Path, model: Path) -> None:
        path = tmp_path / "half.gguf"
        path.write_bytes(model.read_bytes()[:-1])
        message = refusal(serve, ExitCode.MODEL, model=path)
        assert re.fullmatch(
            rf"failed to read {path}: it is truncated: 1 bytes are missing, from tensor '[a-z0-9._]+' on; "
            "download it again",
            message,
        )

    def test_another_checksum(self, serve: Serve, model: Path) -> None:
        message = refusal(serve, ExitCode.MODEL, model_sha256="0" * 64)
        digest = subprocess.run(["sha256sum", model], capture_output=True, text=True, check=True).stdout.split()[0]
        assert message == (f"{model} has sha256 {digest}, must be {'0' * 64} (model_sha256); copy or download it again")

    def test_a_folder_without_config(self, serve: Serve, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        assert refusal(serve, ExitCode.MODEL, model=folder) == (
            f"failed to read {folder}: it has no config.json; "
            "name a GGUF file, or a folder as downloaded from Hugging Face"
        )

    def test_an_unknown_architecture(self, serve: Serve, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        metadata = {key.replace("llama.", "falcon."): content for key, content in LLAMA.items()}
        path.write_bytes(gguf_file(metadata | {"general.architecture": value("string", "falcon")}))
        assert refusal(serve, ExitCode.MODEL, model=path) == (
            f"{path}: unsupported architecture 'falcon', must be one of: gemma2, gemma3, llama, qwen2, qwen3; "
            "engine llama.cpp may know it"
        )

    def test_an_unknown_built_in_model(self, serve: Serve) -> None:
        assert refusal(serve, ExitCode.MODEL, model="builtin:gpt-9") == (
            "model: unknown built-in model 'builtin:gpt-9', must be builtin:smollm2-135m"
        )

    def test_a_folder_for_llama_cpp(self, serve: Serve, tmp_path: Path) -> None:
        folder = small_folder(tmp_path / "folder")
        assert refusal(serve, ExitCode.MODEL, model=folder, engine="llama.cpp") == (
            f"{folder}: llama.cpp serves GGUF files only; set engine to sglang, or convert the model"
        )

    def test_a_model_that_the_plugin_refuses(self, serve: Serve) -> None:
        assert refusal(serve, ExitCode.MODEL, faults="prepare_error=3") == "the fake engine was told to fail"


class TestHost:
    """Exit codes 4, 8 and 9: ports, programs, disks."""

    @pytest.mark.parametrize("setting", ["port", "agent_port"])
    def test_a_port_in_use(self, serve: Serve, setting: str) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            message = refusal(serve, ExitCode.PORT_IN_USE, **{setting: port})
        purpose = {"port": "engine", "agent_port": "agent"}[setting]
        name = Path("/proc/self/comm").read_text().strip()
        assert message == (
            f"{setting}: port {port} for the {purpose} is in use by {name} (pid {os.getpid()}); "
            f"stop that process, or set {setting} to a free port"
        )

    def test_an_interpreter_that_is_not_there(self, serve: Serve, tmp_path: Path) -> None:
        path = tmp_path / "python"
        message = refusal(serve, ExitCode.MISSING, engine_executable=path)
        assert message == f"engine_executable: {path} is not a program, must be a Python that can import sglang"

    def test_an_interpreter_without_the_engine(self, serve: Serve) -> None:
        python = shutil.which("python3", path="/usr/bin")
        if (
            python is None
            or subprocess.run([python, "-c", "import sglang_pascal"], capture_output=True).returncode == 0
        ):
            pytest.skip("/usr/bin/python3 is missing, or has sglang_pascal")
        message = refusal(serve, ExitCode.MISSING, engine_executable=python)
        assert message == (
            f"{python} cannot import the engine ({python}: No module named sglang_pascal); "
            "install sglang-pascal, or set engine_executable"
        )

    def test_no_llama_server(self, serve: Serve, tmp_path: Path) -> None:
        message = refusal(serve, ExitCode.MISSING, engine="llama.cpp", engine_executable=tmp_path / "llama-server")
        assert message == (
            f"engine_executable: {tmp_path / 'llama-server'} is not a program; "
            "install llama.cpp, or name its llama-server in engine_executable"
        )

    def test_a_cache_that_is_no_folder(self, serve: Serve, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        message = refusal(serve, ExitCode.STORAGE, cache_dir=path)
        assert message == (
            f"failed to write to {path}/checksums: Not a directory; set cache_dir to a folder of this user"
        )

    def test_a_full_disk(self, model: Path, tmp_path: Path) -> None:
        small = tmp_path / "small"
        small.mkdir()
        script = 'mount -t tmpfs -o size=1M none "$0" && shift 0 && exec "$@"'
        command = [sys.executable, "-m", "pascaline", "serve", f"--model={model}", f"--cache-dir={small}"]
        command += [
            f"--engine-executable={FAKE_ENGINE}",
            "--device=cpu",
            f"--port={free_port()}",
            f"--agent-port={free_port()}",
        ]
        unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(small)]
        if subprocess.run([*unshare, "true"], capture_output=True).returncode:
            pytest.skip("this machine allows no user namespace with a mount of its own")
        ended = subprocess.run([*unshare, *command], capture_output=True, text=True, timeout=PATIENCE)
        assert ended.returncode == ExitCode.STORAGE, ended.stderr
        message = ended.stderr.rpartition("pascaline serve: ")[2].strip()
        assert re.sub(r"\d+ bytes are free", "N bytes are free", message) == (
            f"no space in {small}/prepared: N bytes are free, 33554432 are needed; "
            "make room, or set cache_dir to another disk"
        )


class TestEngine:
    """Exit code 5: the engine could not be loaded; its own words are explained."""

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            (
                "out-of-memory",
                "signal SIGKILL: not enough memory on the device; "
                "lower mem_fraction_static, context_length or max_running_requests",
            ),
            ("gpu-lost", "signal SIGKILL: the GPU is lost"),
            ("driver", "exit code 1: the NVIDIA driver is too old for this torch"),
            ("truncated", "signal SIGKILL: a safetensors file is truncated; copy it again"),
            ("architecture", "exit code 1: SGLang does not know the model's architecture"),
            ("port", "exit code 1: its port is in use"),
            ("import", "exit code 1: sglang cannot be imported; see engine_executable"),
            ("host-memory", "exit code 1: the host has too little memory"),
            ("unknown", "exit code 3: something that nobody has seen before"),
            ("silent", "exit code 1: it wrote no error; its last line: Load weight begin. avail mem=7.31 GB"),
        ],
    )
    def test_a_failed_load(self, serve: Serve, name: str, expected: str) -> None:
        message = refusal(serve, ExitCode.ENGINE_FAILED, faults=f"load_error={name}")
        # A lack of memory is followed by its stage, the engine's words and the plan's numbers.
        reason, _, details = message.partition(" (while it loaded the model); it said: ")
        assert reason == f"the engine ended with {expected}"
        assert bool(details) == name.endswith("memory")
        assert ("; the plan: " in details) == name.endswith("memory")

    def test_start_timeout(self, serve: Serve) -> None:
        instance = serve(start_timeout=2, faults="start_seconds=600")
        assert instance.wait() == ExitCode.ENGINE_FAILED
        assert instance.error == "the engine was not ready within start_timeout (2 s)"
        assert any(line.startswith("ERROR   pascaline: load failed after ") for line in instance.lines)

    def test_it_never_generates(self, serve: Serve) -> None:
        seconds = time_to_generate()
        message = refusal(serve, ExitCode.ENGINE_FAILED, start_timeout=seconds, faults="error_status=500")
        assert message == (
            f"the engine was not ready within start_timeout ({seconds} s); the last test generation: "
            'status 500: {"object": "error", "message": "the fake engine was told to fail", "code": 500}'
        )

    def test_it_answers_without_a_token(self, serve: Serve) -> None:
        """Status 200 is not yet a generation."""
        seconds = time_to_generate()
        message = refusal(serve, ExitCode.ENGINE_FAILED, start_timeout=seconds, faults="empty_answers=1")
        assert message.startswith(
            f"the engine was not ready within start_timeout ({seconds} s); the last test generation: "
            'no token in the answer: {"id": "fake-'
        )


def small_folder(path: Path) -> Path:
    """A Hugging Face folder that can be read."""
    header, data_bytes = folder_tensors()
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    (path / "model.safetensors").write_bytes(safetensors_file(header, data_bytes=data_bytes))
    return path
