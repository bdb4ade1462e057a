"""Which operations a step of a real model in SGLang starts: each is one launch of a kernel on a GPU, but for attention's
two. A kernel that is there but not called, or an operation too many per layer, is seen here."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow("starts a real engine of its own"), pytest.mark.timeout(900)]
BENCHMARKS = Path(__file__).parents[4] / "benchmarks"
LAYERS = 4
SCRIPT = """
import collections, json, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from sglang_in_process import InProcessEngine
from sglang_pascal.checkpoint.prepare import prepare

folder = Path(tempfile.mkdtemp()) / "model"
prepare(Path(sys.argv[2]), folder)
engine = InProcessEngine(folder, "--device", "cpu", "--quantization", "gguf", "--attention-backend", "pascal_kernels",
                         "--max-total-tokens", "1024", "--mem-fraction-static", "0.2", "--dtype", sys.argv[3])
from sglang_pascal import fused_layers
from sglang_pascal.attention import kernels_backend
from sglang_pascal.quantization import matrix

counts = collections.Counter()

def counted(name, original):
    def call(*arguments, **named):
        counts[name] += 1
        return original(*arguments, **named)
    return call

OPERATIONS = {
    fused_layers: ("rms_norm", "rms_norm_quantize", "silu_mul_quantize"),
    kernels_backend: ("rope_and_store", "attention_decode", "attention_prefill"),
    matrix: ("quantize", "matmul", "matmul_half", "dequantize"),
}
for module, names in OPERATIONS.items():
    for name in names:
        setattr(module, name, counted(name, getattr(module, name)))
facts = {}
logits, batch = engine.prefill([[3, 4, 5], [6, 7]])
facts["prefill"] = dict(counts)
counts.clear()
engine.decode(logits.argmax(-1), batch)
facts["decode"] = dict(counts)
print(json.dumps(facts))
"""


@pytest.fixture
def launches(sglang_worker, build_model, tmp_path):
    """launches(model, tensor type, dtype) -> phase -> operation -> calls."""

    def get(name: str, kind: str, dtype: str) -> dict[str, dict[str, int]]:
        build_model(name, tmp_path / "m.gguf", tensor_type=gguf.GGMLQuantizationType[kind])
        return sglang_worker.run(SCRIPT, str(BENCHMARKS), str(tmp_path / "m.gguf"), dtype, timeout=800)

    return get


@pytest.mark.parametrize(("name", "kind"), [("qwen3", "Q4_1"), ("llama-3.2", "Q8_0")])
def test_a_layer_is_nine_operations_and_nothing_is_quantised_apart(launches, name, kind):
    per_layer = {"rms_norm_quantize": 2, "rope_and_store": 1, "silu_mul_quantize": 1}
    around = {"rms_norm": 1, "quantize": 1, "dequantize": 1}  # the last norm, the head's input, the embedding
    found = launches(name, kind, "float32")
    decode = {key: LAYERS * count for key, count in per_layer.items()} | around
    assert found["decode"] == decode | {"attention_decode": LAYERS, "matmul": 4 * LAYERS + 1}
    # A prefill's attention gives floats: the output projection quantises them.
    prefill = decode | {"attention_prefill": LAYERS, "matmul": 4 * LAYERS + 1, "quantize": LAYERS + 1}
    assert found["prefill"] == prefill


def test_float16_weights_are_multiplied_by_our_kernel(launches):
    found = launches("llama-3.2", "F16", "float16")
    per_layer = {"rope_and_store": LAYERS, "rms_norm": 2 * LAYERS + 1, "matmul_half": 4 * LAYERS + 1}
    assert found["decode"] == per_layer | {"attention_decode": LAYERS}
