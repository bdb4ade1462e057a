"""Quantising: by llama.cpp's real tools if they are installed, and by stand-ins that fail in every way that tools do."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pascaline.errors import ConfigurationError, MissingError, ModelError, StorageError
from pascaline.models.reader import read_model
from pascaline.quantize import Options, Quantized, Tools, quantize, quantize_all
from pascaline.quantize.steps import planned_bytes, stem_of
from support.hf_models import write_folder
from support.models import tiny, write_gguf

real_tools = pytest.mark.skipif(
    not (shutil.which("llama-quantize") and (shutil.which("llama-completion") or shutil.which("llama-cli"))),
    reason="llama-quantize and llama-completion are not on PATH (Debian: llama.cpp-tools)",
)
PATIENCE_SECONDS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny-F16.gguf", tiny("llama"), "F16")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Quantized]:
    return quantize_all(model, ["Q4_K_M", "q8_0", "Q4_K_M"], tmp_path_factory.mktemp("out"))


@real_tools
class TestRealTools:
    def test_results(self, results: list[Quantized]) -> None:
        """Each type once, in a file of its name, of that type, that generates."""
        assert [(r.type, r.path.name, r.was_there) for r in results] == [
            ("Q4_K_M", "tiny.Q4_K_M.gguf", False),
            ("Q8_0", "tiny.Q8_0.gguf", False),
        ]
        assert [read_model(result.path).file_type for result in results] == ["Q4_K_M", "Q8_0"]
        assert all(result.text for result in results)
        assert [result.bytes for result in results] == [result.path.stat().st_size for result in results]

    def test_checksum_files(self, results: list[Quantized]) -> None:
        """sha256sum -c accepts them, and nothing else is left in the folder."""
        folder = results[0].path.parent
        names = [result.path.name for result in results]
        assert left_in(folder) == sorted([*names, *(f"{name}.sha256" for name in names)])
        command = ["sha256sum", "--check", "--strict", *(f"{name}.sha256" for name in names)]
        assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0

    def test_again_makes_only_what_is_missing(self, results: list[Quantized], model: Path) -> None:
        """An interrupted run goes on: what is whole is kept, what was damaged or is missing is made."""
        folder = results[0].path.parent
        results[1].path.write_bytes(b"damaged")
        again = quantize_all(model, ["Q4_K_M", "Q8_0", "Q6_K"], folder, options=Options(verify=False))
        assert [(r.type, r.was_there) for r in again] == [("Q4_K_M", True), ("Q8_0", False), ("Q6_K", False)]
        assert again[1].sha256 == results[1].sha256

    def test_result_of_another_source(self, tmp_path: Path) -> None:
        """After a change of the source its results are made again, although complete files with their names exist."""
        source = write_gguf(tmp_path / "m-F16.gguf", tiny("llama"), "F16")
        options = Options(verify=False)
        first = quantize(source, "Q8_0", tmp_path / "m.Q8_0.gguf", options=options)
        write_gguf(source, tiny("llama"), "F16", seed=1)
        second = quantize(source, "Q8_0", tmp_path / "m.Q8_0.gguf", options=options)
        assert (second.was_there, second.sha256 != first.sha256) == (False, True)
        assert quantize(source, "Q8_0", tmp_path / "m.Q8_0.gguf", options=options).was_there

    def test_planned_size(self, results: list[Quantized], model: Path) -> None:
        """The size that the disk is checked for is the size of the file, and never less."""
        for result in results:
            planned = planned_bytes(Tools(), model, result.type)
            assert result.bytes <= planned <= result.bytes * 1.05

    def test_progress(self, model: Path, tmp_path: Path) -> None:
        """Every tensor is reported, then the generation and the checksum."""
        seen: list[tuple[str, int, int]] = []
        quantize(model, "Q6_K", tmp_path / "x.gguf", on_step=lambda *step: seen.append(step))
        tensors = [done for what, done, _ in seen if what == "Q6_K"]
        assert tensors == list(range(1, len(read_model(model).tensors) + 1))
        assert [what for what, _, _ in seen][-1] == "Q6_K: checksum"
        assert ("Q6_K: generate", 1, 1) in seen

    def test_source_that_is_quantised_already(self, results: list[Quantized], tmp_path: Path) -> None:
        """Loss upon loss must be asked for."""
        source = next(result.path for result in results if result.type == "Q4_K_M")
        with pytest.raises(ModelError) as caught:
            quantize(source, "Q3_K_M", tmp_path / "x.gguf")
        assert str(caught.value) == (
            f"{source} is quantised already (Q4_K, Q6_K), must be of type F16, BF16 or F32; "
            "take the original, or accept the loss with --allow-requantize"
        )
        options = Options(allow_requantize=True, verify=False)
        assert quantize(source, "Q3_K_M", tmp_path / "x.gguf", options=options).bytes < source.stat().st_size

    @pytest.mark.skipif(not shutil.which("llama-imatrix"), reason="llama-imatrix is not on PATH")
    def test_importance_matrix(self, model: Path, tmp_path: Path) -> None:
        """Computed once from a text, and used: the file differs from the one without."""
        text = tmp_path / "text.txt"
        # Two chunks of the 512 tokens that llama-imatrix takes at least; each letter is a token of this model.
        text.write_text("".join(chr(97 + i * i % 26) for i in range(1100)))
        without = quantize(model, "Q3_K_M", tmp_path / "without.gguf", options=Options(verify=False))
        options = Options(calibration=text, verify=False)
        result = quantize(model, "Q3_K_M", tmp_path / "with.gguf", options=options)
        matrices = list(tmp_path.glob("tiny.text.*.imatrix.gguf"))
        assert len(matrices) == 1
        assert result.bytes != without.bytes or result.sha256 != without.sha256
        # The same text again takes the matrix that is there, another of the same name does not.
        assert quantize(model, "Q3_K_M", tmp_path / "again.gguf", options=options).sha256 == result.sha256
        assert list(tmp_path.glob("tiny.text.*.imatrix.gguf")) == matrices
        text.write_text("".join(chr(97 + i * i * i % 26) for i in range(1200)))
        quantize(model, "Q3_K_M", tmp_path / "other.gguf", options=options)
        assert len(list(tmp_path.glob("tiny.text.*.imatrix.gguf"))) == 2

    def test_disk_that_fills(self, model: Path, tmp_path: Path) -> None:
        """On a file system of one megabyte it is refused before the first byte, with the numbers."""
        small = tmp_path / "small"
        small.mkdir()
        program = f"{sys.executable} -m pascaline quantize {model} --type Q8_0 -o {small}; echo $?; ls -A {small}"
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
             f"mount -t tmpfs -o size=1m none {small} && {{ {program}; }}"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if "unshare" in done.stderr or "mount:" in done.stderr:
            pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
        planned = planned_bytes(Tools(), model, "Q8_0")
        assert done.stdout == "9\n"
        assert done.stderr == (
            f"pascaline quantize: no space in {small}: {2**20} bytes are free, tiny.Q8_0.gguf needs {planned}; "
            "make room, or name another folder with --output\n"
        )

    @pytest.mark.skipif(not shutil.which("convert_hf_to_gguf.py"), reason="convert_hf_to_gguf.py is not on PATH")
    def test_hugging_face_folder(self, tmp_path: Path) -> None:
        """A folder is converted once, quantised, and the conversion does not stay."""
        from pascaline.models.resolve import builtin_model

        vocabulary = 49152
        source = tmp_path / "emily"
        prepared = tmp_path / "prepared"
        command = [sys.executable, "-m", "sglang_pascal", "prepare", str(builtin_model()), str(prepared)]
        subprocess.run(command, check=True, capture_output=True)
        source.mkdir()
        write_folder(source, tiny("llama", vocab_size=vocabulary))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(prepared / name, source / name)
        results = quantize_all(source, ["Q8_0", "Q4_K_M"], tmp_path / "out")
        assert [read_model(result.path).vocab_size for result in results] == [vocabulary, vocabulary]
        assert left_in(tmp_path / "out") == [
            "emily.Q4_K_M.gguf",
            "emily.Q4_K_M.gguf.sha256",
            "emily.Q8_0.gguf",
            "emily.Q8_0.gguf.sha256",
        ]

    def test_command(self, model: Path, tmp_path: Path) -> None:
        """The program prints its results, for people or programs."""
        command = [sys.executable, "-m", "pascaline", "quantize", str(model), "--type", "Q4_0", "-o", str(tmp_path)]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, check=False)
        path = tmp_path / "tiny.Q4_0.gguf"
        [result] = json.loads(done.stdout)
        assert (result["path"], result["type"], result["was_there"]) == (str(path), "Q4_0", False)
        assert result["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert again.stdout.startswith(f"{path}: was there already, ")


QUANTIZER = """#!{python}
import os, shutil, sys, time
arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
if "--dry-run" in sys.argv:
    print("quant size  =     {planned} MiB (4.5 BPW)")
    sys.exit(0)
source, target, name = arguments[:3]
print("[   1/   2] output.weight - size", flush=True)
{act}
"""
GENERATOR = """#!/bin/sh
echo "loading" >&2
{act}
"""


class StandIns:
    """Programs of llama.cpp's names that do what a test wants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.write("llama-completion", GENERATOR.format(act="echo Paris."))

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def quantizer(self, act: str, planned: str = "1.00") -> None:
        self.write("llama-quantize", QUANTIZER.format(python=sys.executable, act=act, planned=planned))

    @property
    def options(self) -> Options:
        return Options(tools=Tools(self.folder))


@pytest.fixture
def stand_ins(tmp_path: Path) -> StandIns:
    return StandIns(tmp_path / "tools")


class TestFailures:
    def test_quantizer_that_fails(self, stand_ins: StandIns, model: Path, tmp_path: Path) -> None:
        """Its last words are the message, and nothing is left."""
        stand_ins.quantizer('open(target, "w").write("half"); print("llama_quantize: failed to quantize"); sys.exit(1)')
        with pytest.raises(ModelError) as caught:
            quantize(model, "Q4_K_M", tmp_path / "out/x.gguf", options=stand_ins.options)
        assert str(caught.value) == (
            f"failed to quantise to Q4_K_M {model}: exit code 1: llama_quantize: failed to quantize"
        )
        assert left_in(tmp_path / "out") == []

    def test_quantizer_that_dies(self, stand_ins: StandIns, model: Path, tmp_path: Path) -> None:
        """A signal is named."""
        stand_ins.quantizer("os.kill(os.getpid(), 9)")
        with pytest.raises(ModelError) as caught:
            quantize(model, "Q4_K_M", tmp_path / "out/x.gguf", options=stand_ins.options)
        assert str(caught.value) == (
            f"failed to quantise to Q4_K_M {model}: signal SIGKILL: [   1/   2] output.weight - size"
        )

    def test_result_of_another_type(self, stand_ins: StandIns, model: Path, tmp_path: Path) -> None:
        """A file that is not what was asked for is not accepted, although the program was content."""
        stand_ins.quantizer("shutil.copy(source, target)")
        with pytest.raises(ModelError) as caught:
            quantize(model, "Q4_K_M", tmp_path / "out/x.gguf", options=stand_ins.options)
        assert str(caught.value).endswith("says that it is F16, must be Q4_K_M")
        assert left_in(tmp_path / "out") == []

    def test_truncated_result(self, stand_ins: StandIns, model: Path, tmp_path: Path) -> None:
        """A file that was cut off is found by its header."""
        stand_ins.quantizer('open(target, "wb").write(open(source, "rb").read()[:-1000])')
        with pytest.raises(ModelError, match="truncated"):
            quantize(model, "F16", tmp_path / "out/x.gguf", options=stand_ins.options)

    def test_result_that_does_not_generate(self, stand_ins: StandIns, model: Path, tmp_path: Path) -> None:
        """A file that loads nowhere is no result."""
        stand_ins.quantizer("shutil.copy(source, target)")
        for act, reason in (("exit 3", "exit code 3: loading"), ("exit 0", "exit code 0: loading")):
            stand_ins.write("llama-completion", GENERATOR.format(act=act))
            with pytest.raises(ModelError) as caught:
                quantize(model, "F16", tmp_path / "out/x.gguf", options=stand_ins.options)
            assert str(caught.value).endswith(f" does not generate: {reason}")
        assert left_in(tmp_path / "out") == []

    def test_disk_that_is_too_small(self, stand_ins: StandIns, model: Path, tmp_path: Path) -> None:
        """The planned size is compared with the free bytes before anything is written."""
        stand_ins.quantizer("shutil.copy(source, target)", planned="1099511627776.00")
        with pytest.raises(StorageError, match=r"bytes are free, x\.gguf needs \d+; make room, or name another folder"):
            quantize(model, "F16", tmp_path / "out/x.gguf", options=stand_ins.options)
        assert left_in(tmp_path / "out") == []

    def test_disk_that_fills_meanwhile(self, stand_ins: StandIns, model: Path, tmp_path: Path) -> None:
        """The tool's own words for a full disk are understood."""
        stand_ins.quantizer('print("error: No space left on device"); sys.exit(1)')
        with pytest.raises(StorageError, match="more are needed; make room, or name another folder with --output"):
            quantize(model, "Q4_K_M", tmp_path / "out/x.gguf", options=stand_ins.options)

    def test_release_without_dry_run(self, stand_ins: StandIns, model: Path) -> None:
        """An old llama-quantize plans nothing; then a result may be as large as its source."""
        stand_ins.write("llama-quantize", "#!/bin/sh\necho usage\nexit 1\n")
        assert planned_bytes(Tools(stand_ins.folder), model, "Q4_K_M") == model.stat().st_size

    def test_tools_that_are_not_here(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The message says where it was looked for and how to get them."""
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(MissingError) as caught:
            quantize(model, "Q4_K_M", tmp_path / "x.gguf")
        assert str(caught.value) == (
            "llama-quantize is not on PATH; install llama.cpp (Debian: llama.cpp-tools and llama.cpp-tools-extra, "
            "Nix: llama-cpp), "
            "or name it with --tools"
        )

    def test_the_last_tool_is_asked_for_first(
        self, stand_ins: StandIns, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """llama-completion, which comes in a package of its own, was missed when the result was written."""
        monkeypatch.setenv("PATH", str(tmp_path))
        stand_ins.quantizer(f'open({str(tmp_path / "ran")!r}, "w")')
        (stand_ins.folder / "llama-completion").unlink()
        with pytest.raises(MissingError, match=r"^llama-completion or llama-cli is not in "):
            quantize(model, "Q4_K_M", tmp_path / "out/x.gguf", options=stand_ins.options)
        assert not (tmp_path / "ran").exists()

    def test_unknown_type(self, model: Path, tmp_path: Path) -> None:
        """A type that does not exist is refused, and the message lists those that do."""
        with pytest.raises(ConfigurationError, match=r"--type: unknown type 'Q4_K_X', must be one of: F32, F16, Q4_0"):
            quantize(model, "Q4_K_X", tmp_path / "x.gguf")

    def test_source_as_output(self, stand_ins: StandIns, model: Path) -> None:
        """The source is never overwritten."""
        stand_ins.quantizer("shutil.copy(source, target)")
        with pytest.raises(ConfigurationError) as caught:
            quantize(model, "F16", model, options=stand_ins.options)
        assert str(caught.value) == f"output: {model} is the source itself, must be another file"

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_interrupt(self, stand_ins: StandIns, model: Path, tmp_path: Path, number: signal.Signals) -> None:
        """Whatever ends it ends the tool too, and leaves nothing; after SIGKILL the next run takes the rest away."""
        note = tmp_path / "pid"
        stand_ins.quantizer(f'open("{note}", "w").write(str(os.getpid())); open(target, "w"); time.sleep(600)')
        out = tmp_path / "out"
        command = [sys.executable, "-m", "pascaline", "quantize", str(model), "--type", "Q4_K_M", "-o", str(out)]
        process = subprocess.Popen([*command, "--tools", str(stand_ins.folder)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (note.exists() and note.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(PATIENCE_SECONDS) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        while Path("/proc", note.read_text(), "exe").exists():  # a zombie has none
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if number == signal.SIGKILL:
            assert len(left_in(out)) == 1
            stand_ins.quantizer("sys.exit(1)")
            with pytest.raises(ModelError):
                quantize(model, "Q4_K_M", out / "tiny.Q4_K_M.gguf", options=stand_ins.options)
        assert left_in(out) == []


class TestNames:
    @pytest.mark.parametrize(
        ("source", "stem"),
        [
            ("a/emily-F16.gguf", "emily"),
            ("emily.bf16.gguf", "emily"),
            ("emily.gguf", "emily"),
            ("a/emily-7b", "emily-7b"),
        ],
    )
    def test_stem(self, source: str, stem: str) -> None:
        """Results are named after the model, not after the type that it had."""
        assert stem_of(Path(source)) == stem
