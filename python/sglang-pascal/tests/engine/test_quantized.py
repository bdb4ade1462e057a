"""SGLang on the CPU with weights that stay quantised in memory."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from sglang_pascal.checkpoint.prepare import MANIFEST, prepare

pytestmark = [pytest.mark.engine, pytest.mark.slow("starts a real engine of its own"), pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[4]
TINY = {
    "qwen3": ("Q4_1", "--attention-backend", "pascal_kernels"),
    "gemma2": ("Q5_0", "--attention-backend", "pascal_kernels"),
    "gemma3": ("Q8_0",),
    "llama-3.2": ("F16",),
}
"""Model -> tensor type (native, converted without loss, held as float16), and flags."""

LOADED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from sglang_in_process import InProcessEngine
try:
    InProcessEngine(sys.argv[2], "--device", "cpu", "--quantization", "gguf", "--max-total-tokens", "1024")
    print(json.dumps({"kind": "", "error": ""}))
except Exception as error:
    print(json.dumps({"kind": type(error).__name__, "error": str(error)}))
"""


def test_the_answer_makes_sense(quantized_engine):
    """A completion whose next word is far ahead of all others: int8 keys and values move probabilities by some percent."""
    body = {"model": "default", "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
    answer = quantized_engine.client.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == " Paris"


def test_weights_and_keys_are_held_in_their_few_bytes(quantized_engine):
    log = quantized_engine.log.read_text()
    assert "weights held: Q4_1 210, Q8_0 1" in log
    assert "loading weights: 100 % of 0.10 GB" in log
    # 16384 tokens and the padding page x 30 layers x 3 heads x (64 + 2) bytes, for keys and for values.
    assert "K size: 0.09 GB, V size: 0.09 GB" in log


@pytest.fixture
def numerics(sglang_worker):
    """numerics(path, *flags) -> what benchmarks/numerics.py prints; it fails if the program does."""
    script = "import sys\nsys.path.insert(0, sys.argv[1])\nimport numerics\nsys.exit(numerics.main(sys.argv[2:]))"
    folder = str(ROOT / "benchmarks")
    return lambda path, *flags: sglang_worker.output(script, folder, str(path), *flags, timeout=1500)


def test_the_builtin_model_is_as_good_as_in_float32(builtin_gguf, numerics):
    printed = numerics(builtin_gguf, "--tokens", "256", "--steps", "4", "--batch", "2")
    assert "2 of 2 sequences of 4 tokens are the same alone and together" in printed


@pytest.mark.parametrize("name", TINY)
def test_every_way_to_hold_a_matrix_is_as_good_as_float32(name, build_model, numerics, tmp_path):
    kind, *flags = TINY[name]
    build_model(name, tmp_path / "m.gguf", tensor_type=gguf.GGMLQuantizationType[kind])
    numerics(tmp_path / "m.gguf", "--tokens", "200", "--steps", "16", "--batch", "8", *flags)


def test_a_file_that_changed_since_it_was_prepared_is_refused(build_model, sglang_worker, tmp_path):
    """By SGLang's loader; a worker of the engine ends with this error."""
    build_model("llama", tmp_path / "m.gguf")
    prepare(tmp_path / "m.gguf", tmp_path / "model")
    with (tmp_path / "m.gguf").open("ab") as file:
        file.write(b"more")
    found = sglang_worker.run(LOADED, str(ROOT / "benchmarks"), str(tmp_path / "model"))
    assert found["kind"] == "CheckpointError"
    assert f'when "{tmp_path / "model"}" was prepared; prepare it again' in found["error"]
    assert (tmp_path / "model" / MANIFEST).is_file()
