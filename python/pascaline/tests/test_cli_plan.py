"""`pascaline plan`: text, JSON, exit codes, pictures."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.cli import main
from support.hf_models import write_folder
from support.models import SHAPES, tiny, write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable

OK, CONFIGURATION, MODEL, DOES_NOT_FIT, STORAGE = 0, 2, 3, 7, 9


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 7B file of the published size, sparse."""
    return write_gguf(
        tmp_path_factory.mktemp("models") / "llama-2-7b.gguf", SHAPES["llama-2-7b"], "Q4_K_M", sparse=True
    )


def plan(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, as its start takes longer than a plan."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = main(["plan", *map(str, arguments)])
        except SystemExit as end:  # of argparse
            code = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pascaline", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def document(*arguments: object) -> Any:
    return json.loads(plan(*arguments, "--json").stdout)


@pytest.mark.parametrize("run", [process, plan])
def test_it_fits(llama: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run(llama, "--card", "tesla-p4")
    assert result.returncode == OK
    assert "fits: a KV cache of 5,025 tokens, 512.00 KiB each" in result.stdout
    assert "flags of sglang: --context-length 4096 --max-running-requests 4 --max-total-tokens 5025 " in result.stdout


@pytest.mark.parametrize("run", [process, plan])
def test_it_does_not_fit(llama: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run(llama, "--card", "tesla-p4", "--kv-cache-max-bytes", "64 MiB")
    assert result.returncode == DOES_NOT_FIT
    assert (
        "does not fit: kv_cache.max_bytes: 64.00 MiB holds 128 tokens of this model (512.00 KiB each) and cannot serve "
        "a 4,096-token request"
    ) in result.stdout
    assert "nearest that fit:\n  1. kv_cache.max_bytes 2.00 GiB" in result.stdout


def test_json_of_a_refusal_names_the_nearest(llama: Path) -> None:
    found = document(llama, "--card", "tesla-p4", "--context", 4096, "--requests", 4, "--engine", "llama.cpp")
    assert not found["fits"]
    assert found["kv_bytes"] == 4 * 4096 * 524288
    assert [list(change["settings"]) == ["engine"] for change in found["nearest"]] == [False, False, False, True]
    assert all({"settings", "sentence", "total_bytes"} == set(change) for change in found["nearest"])


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose positions are scaled in a way that SGLang cannot be given."""
    folder = tmp_path_factory.mktemp("refused")
    return write_gguf(folder / "m.gguf", tiny("qwen3"), "Q8_0", metadata={"qwen3.rope.scaling.type": "longrope"})


class TestWhatServeRefuses:
    """A plan says that a model fits only where serve would serve it."""

    def test_the_table_says_why_and_not_that_it_fits(self, refused: Path) -> None:
        result = plan(refused, "--card", "tesla-p4")
        assert result.returncode == MODEL
        assert 'cannot be served: "qwen3.rope.scaling.type" is "longrope", which is not supported' in result.stdout
        assert "fits" not in result.stdout

    def test_json(self, refused: Path) -> None:
        found = document(refused, "--card", "tesla-p4")
        assert (found["fits"], found["reasons"], len(found["refusals"])) == (False, [], 1)

    @pytest.mark.parametrize("many", [("--sweep", "requests"), ("--optimize", "latency")])
    def test_many_plans(self, refused: Path, many: tuple[str, str]) -> None:
        result = plan(refused, "--card", "tesla-p4", *many)
        assert result.returncode == MODEL
        assert "longrope" in result.stderr

    def test_llama_cpp_decides_for_itself(self, refused: Path) -> None:
        assert plan(refused, "--card", "tesla-p4", "--engine", "llama.cpp").returncode == OK

    @pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
    def test_a_folder_of_quantised_weights(self, tmp_path: Path, method: str) -> None:
        folder = write_folder(tmp_path / "m", tiny("llama"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
        result = plan(folder, "--card", "tesla-p4")
        assert result.returncode == MODEL
        assert f"its weights are quantised by {method} (quantization_config)" in result.stdout


def test_short_names_are_those_settings(llama: Path) -> None:
    found = document(llama, "--card", "tesla-p40", "--context", 2048, "--requests", 7, "--kv-dtype", "int8")
    assert (found["context_length"], found["max_running_requests"], found["kv_dtype"]) == (2048, 7, "int8")


def test_another_quantisation_needs_no_file(llama: Path) -> None:
    small, large = (document(llama, "--card", "tesla-p40", "--quant", quant) for quant in ("Q4_K_M", "Q8_0"))
    assert large["weights_bytes"] > 1.7 * small["weights_bytes"]


def test_explain_shows_formulas(llama: Path) -> None:
    assert (
        "x 524,288 B; one token: 32 layers x 32 KV heads x (2 x 128 x 2 B)"
        in plan(llama, "--card", "tesla-p4", "--explain").stdout
    )


@pytest.mark.parametrize("over", ["context", "requests", "quant"])
def test_sweeps(llama: Path, over: str) -> None:
    found = document(llama, "--card", "tesla-p4", "--sweep", over)
    assert len(found) > 2
    assert any(row["fits"] for row in found)
    assert "verdict" in plan(llama, "--card", "tesla-p4", "--sweep", over).stdout


def test_optimize(llama: Path) -> None:
    choices = document(llama, "--card", "tesla-p4", "--optimize", "throughput")
    rates = [choice["tokens_per_second"] for choice in choices]
    assert rates == sorted(rates, reverse=True)
    assert choices[0]["engine_args"]


def test_nothing_to_choose_from(llama: Path) -> None:
    result = plan(llama, "--card", "tesla-p4", "--optimize", "latency", "--min-quant", "Q8_0")
    assert (result.returncode, result.stdout) == (
        DOES_NOT_FIT, "nothing down to Q8_0 fits tesla-p4; lower --min-quant, --context or --requests\n"
    )  # fmt: skip


def test_a_speed_that_is_not_known_ranks_nothing(llama: Path) -> None:
    """As on a host without a GPU: the cause is not that nothing fits."""
    result = plan(llama, "--card", "cpu", "--optimize", "latency")
    assert (result.returncode, result.stdout, result.stderr) == (
        CONFIGURATION,
        "",
        "pascaline plan: --optimize: the speed of cpu is not known, so nothing can be best for latency; "
        "name a GPU with --card, or take --optimize context\n",
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimize", "latency"], "--optimize: is set beside --sweep, must be the only one of the two"),
        (["--explain"], "--explain: shows one plan, must not be set beside --sweep, which makes many"),
        (["--picture", "a.svg"], "--picture: shows one plan, must not be set beside --sweep, which makes many"),
    ],
)
def test_nothing_that_was_asked_for_is_left_out_in_silence(llama: Path, flags: list[str], message: str) -> None:
    result = plan(llama, "--card", "tesla-p4", "--sweep", "quant", *flags)
    assert (result.returncode, result.stdout, result.stderr) == (CONFIGURATION, "", f"pascaline plan: {message}\n")


@pytest.mark.parametrize(("name", "begin"), [("a.svg", b"<svg"), ("A.SVG", b"<svg"), ("a.png", b"\x89PNG")])
def test_pictures(llama: Path, tmp_path: Path, name: str, begin: bytes) -> None:
    result = plan(llama, "--card", "tesla-p4", "--picture", tmp_path / name)
    if "PNG needs a font" in result.stderr:
        pytest.skip("PNG needs a font, and this host has none")
    assert result.returncode == OK
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_a_name_of_the_library_is_a_model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = tmp_path / "pascaline/models/emily"
    folder.mkdir(parents=True)
    (folder / "emily.gguf").symlink_to(llama)
    found = document("emily", "--card", "tesla-p4", "--context", 512)
    assert found["weights_bytes"] == document(llama, "--card", "tesla-p4", "--context", 512)["weights_bytes"]


def test_several_pictures_at_once(llama: Path, tmp_path: Path) -> None:
    names = [tmp_path / "a.svg", tmp_path / "b.svg"]
    assert plan(llama, "--card", "tesla-p4", "--picture", names[0], "--picture", names[1]).returncode == OK
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_wrong_flag_is_named_in_one_line(llama: Path) -> None:
    result = plan(llama, "--contxt", "4096")
    assert (result.returncode, result.stdout, result.stderr) == (
        CONFIGURATION,
        "",
        "pascaline plan: error: unrecognized arguments: --contxt 4096\npascaline plan --help lists all options\n",
    )


def test_a_wrong_flag_in_place_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--frob"])
    error = "pascaline: error: unrecognized arguments: --frob\npascaline --help lists all options\n"
    assert (ended.value.code, capsys.readouterr().err) == (CONFIGURATION, error)


def test_a_picture_of_another_kind(llama: Path, tmp_path: Path) -> None:
    result = plan(llama, "--card", "tesla-p4", "--picture", tmp_path / "a.gif")
    assert (result.returncode, result.stderr) == (
        CONFIGURATION, f"pascaline plan: --picture: {tmp_path}/a.gif must end in .svg or .png\n"
    )  # fmt: skip


def test_a_picture_that_cannot_be_written(llama: Path, tmp_path: Path) -> None:
    result = plan(llama, "--card", "tesla-p4", "--picture", tmp_path / "none/a.svg")
    assert (result.returncode, result.stderr) == (
        STORAGE, f"pascaline plan: failed to write {tmp_path}/none/a.svg: No such file or directory\n"
    )  # fmt: skip


def test_without_a_card_it_is_what_is_here(llama: Path) -> None:
    """The host's memory, on a machine without a GPU."""
    found = document(llama, "--device", "cpu", "--context", 512)
    assert found["card"] == "cpu"
    assert found["weights_bytes"] >= 2 * 6_700_000_000


def test_no_model(tmp_path: Path) -> None:
    result = plan(tmp_path / "none.gguf", "--card", "tesla-p4")
    assert (result.returncode, result.stderr) == (
        MODEL,
        f"pascaline plan: failed to read {tmp_path}/none.gguf: there is no such file; "
        "name a GGUF file or a Hugging Face folder\n",
    )
