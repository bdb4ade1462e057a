"""Settings from all sources: precedence, origins, and a whole message for every mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pascaline.configuration import OTHER_VARIABLES, load, setting_fields
from pascaline.errors import ConfigurationError, ExitCode


def problems(**sources: Any) -> list[str]:
    """Return the sentences that loading from these sources fails with."""
    sources.setdefault("environment", {})
    with pytest.raises(ConfigurationError) as caught:
        load(**sources)
    return str(caught.value).splitlines()


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text)
        return path

    return write


class TestPrecedence:
    """Profile, file, variable, flag: the later wins, and the origin says which it was."""

    def test_flag_beats_variable_beats_file_beats_profile(self, toml: Any) -> None:
        path = toml("context_length = 1024\nmax_running_requests = 2\nport = 1111\n")
        environment = {"PASCALINE_MAX_RUNNING_REQUESTS": "3", "PASCALINE_PORT": "2222"}
        loaded = load({"card": "tesla-p4", "port": "3333"}, path, environment)
        assert loaded.settings.mem_fraction_static == 0.9
        assert loaded.settings.context_length == 1024
        assert loaded.settings.max_running_requests == 3
        assert loaded.settings.port == 3333
        assert loaded.origins["mem_fraction_static"] == "profile tesla-p4"
        assert loaded.origins["context_length"] == f"{path}:1"
        assert loaded.origins["max_running_requests"] == "variable PASCALINE_MAX_RUNNING_REQUESTS"
        assert loaded.origins["port"] == "flag --port"
        assert loaded.origins["agent_port"] == "default"

    def test_the_guides_values_are_the_defaults_of_a_p4(self) -> None:
        settings = load({"card": "tesla-p4"}, environment={}).settings
        chosen = (
            settings.tensor_parallel,
            settings.pipeline_parallel,
            settings.mem_fraction_static,
            settings.max_running_requests,
            settings.schedule_policy,
            settings.dtype,
            settings.context_length,
        )
        assert chosen == (1, 1, 0.9, 4, "fcfs", "float16", 4096)

    def test_variable_may_name_the_file(self, toml: Any) -> None:
        path = toml("port = 4444\n")
        assert load(environment={"PASCALINE_CONFIG": str(path)}).settings.port == 4444

    def test_groups_are_tables_flags_and_variables_alike(self, toml: Any) -> None:
        path = toml('[kv_cache]\nmax_bytes = "64 MiB"\n')
        assert load(config_file=path, environment={}).settings.kv_cache.max_bytes == 64 * 2**20
        assert load({"kv_cache.max_bytes": "1GB"}, path, {}).settings.kv_cache.max_bytes == 10**9
        assert load(environment={"PASCALINE_KV_CACHE_MAX_TOKENS": "512"}).settings.kv_cache.max_tokens == 512

    def test_lists_and_pairs_in_variables(self) -> None:
        environment = {"PASCALINE_EXTRA_ARGS": "--sleep-on-idle,--page-size=1", "PASCALINE_ENVIRONMENT": "X=1,Y=2"}
        settings = load(environment=environment).settings
        assert settings.extra_args == ("--sleep-on-idle", "--page-size=1")
        assert settings.environment == {"X": "1", "Y": "2"}

    def test_every_setting_can_be_told_by_flag_and_variable(self) -> None:
        """Names stay unique when dots and underscores become dashes."""
        keys = [key for key, _ in setting_fields()]
        assert len({key.replace(".", "_") for key in keys}) == len(keys)
        assert all(field.description for _, field in setting_fields())


class TestMistakes:
    """Each is one sentence: the key, what is wrong, the value, what is allowed, and the place."""

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("port = 70000", "port: invalid value 70000, must be a whole number between 1 and 65535 ({file}:1)"),
            ("\nport = true", "port: invalid value True, must be a whole number between 1 and 65535 ({file}:2)"),
            ("modell = 'x'", "modell: unknown key, did you mean model? ({file}:1)"),
            (
                "[kv_cache]\n\nmax_byte = 1",
                "kv_cache.max_byte: unknown key, did you mean kv_cache.max_bytes? ({file}:3)",
            ),
            (
                "kv_cache = { dtype = 'fp4' }",
                "kv_cache.dtype: invalid value 'fp4', must be one of: auto, fp16, bf16, fp8_e5m2, int8 ({file}:1)",
            ),
            (
                "placement.experts = 'all'",
                "placement.experts: invalid value 'all', must be one of: auto, gpu, cpu, or a whole number between 0 and "
                "4096 ({file}:1)",
            ),
            (
                "kv_cache.max_bytes = '3 furlongs'",
                "kv_cache.max_bytes: unknown unit 'furlongs', must be KiB, MiB, GiB, kB, MB, GB or none for bytes ({file}:1)",
            ),
            (
                "drain_timeout = '5 weeks'",
                "drain_timeout: unknown unit 'weeks', must be ms, s, m, h or none for seconds ({file}:1)",
            ),
            (
                "mem_fraction_static = 1.0",
                "mem_fraction_static: invalid value 1.0, must be a number above 0.0 and below 1.0 ({file}:1)",
            ),
            (
                "context_length = 1e30",
                "context_length: invalid value 1e+30, must be a whole number between 16 and 16777216 ({file}:1)",
            ),
            (
                "model_sha256 = 'abc'",
                "model_sha256: invalid value 'abc', must be 64 hexadecimal digits; for a split model, 64 for each of "
                "its parts, in order ({file}:1)",
            ),
            (
                f"model_sha256 = ['{'0' * 64}', 7]",
                "model_sha256: invalid value 7, must be 64 hexadecimal digits; for a split model, 64 for each of "
                "its parts, in order ({file}:1)",
            ),
            (
                "model_sha256 = []",
                "model_sha256: invalid value [], must be 64 hexadecimal digits; for a split model, 64 for each of "
                "its parts, in order ({file}:1)",
            ),
            (
                "card = 'tesla-t4'",
                "card: unknown card 'tesla-t4', must be one of: tesla-p4, tesla-p40, tesla-p6, tesla-p100, "
                "tesla-p100-16gb, tesla-p100-sxm2, gtx-1050, gtx-1050-ti, gtx-1060-3gb, gtx-1060-6gb, gtx-1070, "
                "gtx-1070-ti, gtx-1080, gtx-1080-ti, titan-x-pascal, titan-xp, quadro-p2000, quadro-p2200, "
                "quadro-p4000, quadro-p5000, quadro-p6000, quadro-gp100, mx150, mx350, cpu ({file}:1)",
            ),
            ("agent_port = 30000", "agent_port: 30000 is the engine's port too, must be another ({file}:1)"),
            *(
                (
                    f"{key} = '{host}'",
                    f"{key}: '{host}' can be reached from beyond this host and there is no API key, must be a loopback "
                    "address; set api_key_file, or allow_unauthenticated if the network itself keeps others away "
                    "({file}:1)",
                )
                for key, host in (("host", "0.0.0.0"), ("agent_host", "::"), ("host", "gpu-1"))
            ),
            (
                "kv_cache.max_tokens = 100\ncontext_length = 4096",
                "kv_cache.max_tokens: 100 tokens cannot hold one request, must be at least context_length (4096) ({file}:1)",
            ),
            (
                "[kv_cache]\nmax_tokens = 100\nmax_bytes = 100",
                "kv_cache.max_bytes: is set beside kv_cache.max_tokens, must be the only one of the two ({file}:3)",
            ),
            ("model = ''", "model: invalid value '', must be a text that is not empty ({file}:1)"),
            (
                "environment = ['A=1']",
                "environment: invalid value ['A=1'], must be pairs NAME=VALUE ({file}:1)",
            ),
            (
                "extra_args = ['--sleep-on-idle', '--tp=2']",
                "extra_args: --tp (--tp-size) is set by tensor_parallel, must be left out; "
                "set tensor_parallel instead ({file}:1)",
            ),
            (
                "engine = 'llama.cpp'\nextra_args = ['-hf', 'someone/model']",
                "extra_args: -hf is set by model, must be left out; set model instead ({file}:2)",
            ),
            (
                "engine = 'llama.cpp'\n[kv_cache]\ndtype = 'fp8_e5m2'",
                "kv_cache.dtype: llama.cpp has no 'fp8_e5m2', must be one of: auto, fp16, bf16, int8 ({file}:3)",
            ),
            (
                "engine = 'llama.cpp'\nquantization = 'bitsandbytes'",
                "quantization: 'bitsandbytes' has no counterpart in llama.cpp, "
                "must be left out or engine be sglang ({file}:2)",
            ),
        ],
    )
    def test_in_the_file(self, toml: Any, text: str, sentence: str) -> None:
        path = toml(text + "\n")
        assert problems(config_file=path) == [sentence.format(file=path)]

    def test_unknown_variable(self) -> None:
        assert problems(environment={"PASCALINE_PROT": "1"}) == [
            "PASCALINE_PROT: unknown variable, did you mean PASCALINE_PORT?"
        ]

    def test_a_pair_without_a_value(self) -> None:
        environment = {"PASCALINE_ENVIRONMENT": "A=1,DEBUG"}
        assert problems(environment=environment) == [
            "environment: invalid value 'DEBUG', must be pairs NAME=VALUE (variable PASCALINE_ENVIRONMENT)"
        ]

    def test_all_problems_are_reported_at_once(self, toml: Any) -> None:
        path = toml("port = 0\nnonsense = 1\n")
        found = problems(flags={"agent_port": "0"}, config_file=path)
        assert [sentence.split(":")[0] for sentence in found] == ["nonsense", "port", "agent_port"]

    def test_missing_file(self, tmp_path: Path) -> None:
        path = tmp_path / "absent.toml"
        assert problems(config_file=path) == [f"failed to read {path}: No such file or directory"]

    def test_file_that_is_not_toml(self, toml: Any) -> None:
        path = toml("port = \n")
        assert problems(config_file=path) == [f"failed to read {path}: not TOML: Invalid value (at line 1, column 8)"]


class TestApiKeyFile:
    """The key's file is read only by the host that serves, and the key never appears in a message."""

    def test_unreadable(self, tmp_path: Path) -> None:
        # A folder cannot be read as a file even by root.
        assert problems(flags={"api_key_file": str(tmp_path)}) == [
            f"api_key_file: failed to read {tmp_path}: Is a directory; "
            "it must be a file that this user may read (flag --api-key-file)"
        ]

    @pytest.mark.parametrize(("content", "found"), [("", "is empty"), ("one two\n", "holds more than one word")])
    def test_not_one_key(self, tmp_path: Path, content: str, found: str) -> None:
        path = tmp_path / "key"
        path.write_text(content)
        assert problems(flags={"api_key_file": str(path)}) == [
            f"api_key_file: {path} {found}, must hold one key and nothing else (flag --api-key-file)"
        ]

    def test_not_checked_for_another_host(self, tmp_path: Path) -> None:
        flags = {"api_key_file": str(tmp_path / "absent")}
        assert load(flags, environment={}, check_host=False).settings.api_key_file == tmp_path / "absent"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PASCALINE_")}
    command = [sys.executable, "-m", "pascaline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**inherited, **environment})


class TestCommand:
    """`pascaline config` as a user calls it."""

    def test_check_reports_and_exits(self) -> None:
        result = run("config", "check", PASCALINE_PORT="x")
        assert result.returncode == ExitCode.CONFIGURATION
        assert result.stderr == (
            "pascaline config: port: invalid value 'x', must be a whole number between 1 and 65535 (variable PASCALINE_PORT)\n"
        )

    def test_check_of_pairs_and_arguments(self) -> None:
        result = run("config", "check", "--environment", "A=1", "--environment", "B", "--extra-args=--a")
        assert (result.returncode, result.stderr) == (
            ExitCode.CONFIGURATION,
            "pascaline config: environment: invalid value 'B', must be pairs NAME=VALUE (flag --environment)\n",
        )

    def test_check_of_a_sound_file(self, toml: Any) -> None:
        result = run("config", "check", str(toml('card = "tesla-p4"\n')))
        assert (result.returncode, result.stdout) == (0, "valid: 10 settings chosen, card profile tesla-p4\n")

    def test_show_names_every_origin(self) -> None:
        shown = json.loads(run("config", "show", "--json", "--port", "1234", "--card", "gtx-1080").stdout)
        assert shown["port"] == {"value": 1234, "origin": "flag --port"}
        assert shown["dtype"] == {"value": "float16", "origin": "profile gtx-1080"}
        assert set(shown) == {key for key, _ in setting_fields()}

    def test_schema_refuses_what_the_program_refuses(self) -> None:
        schema = json.loads(run("config", "schema").stdout)
        assert schema["additionalProperties"] is False
        assert schema["properties"]["port"] | {"title": "", "description": ""} == {
            "default": 30000, "maximum": 65535, "minimum": 1, "type": "integer", "title": "", "description": "",
        }  # fmt: skip

    def test_documentation_is_current(self) -> None:
        page = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"
        assert run("config", "docs").stdout == page.read_text(), "run: ./dev run config docs > docs/configuration.md"


class TestLightness:
    """The control plane never loads the engine."""

    @pytest.mark.parametrize(
        "statement", ["import pascaline", "import pascaline.cli.serve", "import pascaline.cli.config"]
    )
    def test_import_loads_no_engine(self, statement: str) -> None:
        code = f"{statement}; import sys; print([m for m in ('torch', 'sglang', 'transformers', 'numpy') if m in sys.modules])"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert result.stdout == "[]\n", result.stderr

    def test_help_loads_neither_pydantic_nor_an_engine(self) -> None:
        code = "import sys; from pascaline.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        code += "print([m for m in ('torch', 'sglang', 'pydantic') if m in sys.modules])"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert result.stdout.endswith("[]\n"), result.stderr


def test_variables_of_dev_and_the_tests_are_no_settings() -> None:
    """With one that is set, every command that a test runs would refuse it as an unknown setting."""
    root = Path(__file__).parents[3]
    files = [root / "dev", root / ".ci/run", *(root / "tests").rglob("*.py")]
    read = re.compile(r"""(?:environ(?:\.get)?[\[(]"|\$\{?|f")(PASCALINE_[A-Z_]+)""")
    found = {name for file in files for name in read.findall(file.read_text())}
    assert {"PASCALINE_ENV", "PASCALINE_TEST_WORKERS", "PASCALINE_BARE_USER"} <= found
    assert {name for name in found if name != "PASCALINE_ENVIRONMENT"} <= OTHER_VARIABLES
