"""bitsandbytes' NF4 in SGLang's layers: what Pascal may use, under which names, in which type it multiplies."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed, which is not locked: pip install --no-deps bitsandbytes==0.49.2",
)


def run_python(script):
    """A fresh interpreter, since SGLang's modules read the platform once."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "SGLANG_PLATFORM": "pascal"}
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_platform_gives_its_own_and_allows_pascal(in_sglang):
    facts = in_sglang.run("""
import json
from sglang.srt.platforms import current_platform
current_platform.device_name
from sglang.srt.layers.quantization import get_quantization_config
config = get_quantization_config("bitsandbytes")
print(json.dumps({
    "name": config.__name__,
    "capability": config.get_min_capability(),
    # What SGLang passes for 16-bit weights, and what a checkpoint of NF4 says of itself.
    "before": [config.from_config(each).is_quantized_before for each in (
        {"adapter_name_or_path": ""}, {"quant_method": "bitsandbytes", "load_in_4bit": True})],
}))
""")
    assert facts == {"name": "PascalNf4Config", "capability": 60, "before": [False, True]}


@needs_bitsandbytes
def test_products_are_of_the_dequantised_weights_in_the_type_of_the_activations():
    """Two matrices in one layer, as in a fused projection, filled as SGLang's loader fills them."""
    facts = run_python("""
import json
import numpy as np, torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from sglang.srt.platforms import current_platform
current_platform.device_name
from sglang_pascal.quantization.nf4 import PascalNf4Config, PascalNf4LinearMethod
from sglang.srt.utils import set_weight_attrs

torch.manual_seed(0)
matrices = [torch.randn(rows, 128, dtype=torch.float16) for rows in (64, 32)]
found = {}
for name, config in (("qweight", {}), ("weight", {"quant_method": "bitsandbytes"})):
    method, layer = PascalNf4LinearMethod(PascalNf4Config.from_config(config)), torch.nn.Module()
    method.create_weights(layer, 128, [64, 32], 128, 96, torch.float32)
    names = [each for each, _ in layer.named_parameters()]
    made = [quantize_4bit(matrix, compress_statistics=True, quant_type="nf4") for matrix in matrices]
    weight = getattr(layer, name)
    weight.data.copy_(torch.cat([packed for packed, _ in made]))
    counts = [state.shape.numel() // weight.pack_factor for _, state in made]
    set_weight_attrs(weight, {"bnb_quant_state": {n: state for n, (_, state) in enumerate(made)}})
    set_weight_attrs(weight, {"bnb_shard_offsets": torch.tensor(np.concatenate(([0], np.cumsum(counts))))})
    wide = torch.cat([dequantize_4bit(packed, state) for packed, state in made]).float()
    nested = all(state.nested and state.quant_type == "nf4" for _, state in made)
    for dtype in (torch.float16, torch.float32):
        for shape in ((128,), (3, 128), (2, 5, 128)):
            x = torch.randn(shape).to(dtype)
            bias = torch.randn(96).to(dtype)
            expected = x.float() @ wide.T + bias.float()
            result = method.apply(layer, x, bias)
            error = ((result.float() - expected).norm() / expected.norm()).item()
            found[f"{name} {dtype} {shape}"] = [str(result.dtype) == str(dtype), list(result.shape) == [*shape[:-1], 96],
                error < 2e-3, names == [name], nested]
print(json.dumps(found))
""")
    assert len(facts) == 12
    assert {name: values for name, values in facts.items() if not all(values)} == {}
