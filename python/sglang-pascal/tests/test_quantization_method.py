"""SGLang's side of a quantised layer: binding, loading by name, products, embeddings, and each error."""

from __future__ import annotations

import pytest

SCRIPT = """
import json, sys, types
import torch
from sglang.srt.platforms import current_platform
current_platform.device_name
import gguf, numpy as np
from gguf import GGMLQuantizationType as T
from sglang_pascal.checkpoint.dequantize import as_tensor
from sglang_pascal.errors import CheckpointError, PluginError
from sglang_pascal.kernels.driver import KernelError
from sglang_pascal.quantization.config import PascalGgufConfig
from sglang_pascal.quantization.method import QuantizedEmbeddingMethod, QuantizedLinearMethod
from sglang_pascal.quantization import binding
from sglang_pascal.quantization.binding import bind
from sglang_pascal.quantization.staging import Stager
from sglang_pascal.quantization.storage import storage_of
from sglang_pascal.quantization.weight_table import MatrixInfo

random = np.random.default_rng(0)
def part(name, shard, kind, rows, columns):
    values = random.normal(size=(rows, columns)).astype(np.float32)
    raw = gguf.quantize(values, T[kind]).view(np.uint8).reshape(rows, -1)
    wide = gguf.dequantize(raw if kind not in ("F32", "F16") else raw.view(np.float32 if kind == "F32" else np.float16), T[kind])
    return MatrixInfo(name, shard, storage_of(T[kind], name, (rows, columns)), rows, columns), raw, torch.from_numpy(np.array(wide, dtype=np.float32))

def made(parts, method=None, rows=None):
    layer, method = torch.nn.Module(), method or QuantizedLinearMethod()
    columns = parts[0][0].columns
    rows = rows or [p[0].rows for p in parts]
    method.create_weights(layer, columns, rows, columns, sum(rows), torch.float32)
    method.bind(layer, [p[0] for p in parts], Stager(method.device))
    return layer, method

def error_of(call):
    try:
        call()
    except (CheckpointError, PluginError, NotImplementedError) as error:
        return str(error)

facts = {}
qkv = [part("q", "q", "Q8_0", 128, 64), part("k", "k", "Q8_0", 64, 64), part("v", "v", "Q5_0", 64, 64)]
layer, method = made(qkv)
facts["incomplete"] = error_of(lambda: method.process_weights_after_loading(layer))
for info, raw, _ in reversed(qkv):
    layer.weight.weight_loader(layer.weight, as_tensor(raw), info.shard_id)
method.process_weights_after_loading(layer)
x, bias = torch.randn(2, 3, 64), torch.randn(256)
wanted = x @ torch.cat([p[2] for p in qkv]).T + bias
found = method.apply(layer, x, bias)
facts["merged"] = [list(found.shape), float((found - wanted).abs().max() / wanted.abs().max())]
facts["products"] = len(method._products)
facts["packed"] = method.is_packed
facts["bytes"] = layer.weight.numel()

mixed = [part("gate", 0, "Q4_1", 96, 96), part("up", 1, "F16", 96, 96)]
layer, method = made(mixed)
for info, raw, _ in mixed:
    layer.weight.weight_loader(layer.weight, as_tensor(raw), info.shard_id)
x = torch.randn(5, 96)
wanted = x @ torch.cat([p[2] for p in mixed]).T
facts["mixed"] = [float((method.apply(layer, x) - wanted).abs().max() / wanted.abs().max()), method.is_packed]

table = [part("embed", None, "Q8_0", 300, 64)]
layer, method = made(table, QuantizedEmbeddingMethod(), rows=[320])
layer.weight.weight_loader(layer.weight, as_tensor(table[0][1]))
ids = torch.tensor([0, 299, 33])
logits = method.apply(layer, x[:, :64].half())
facts["embedding"] = bool(torch.equal(method.embedding(layer, ids), table[0][2][ids]))
facts["logits"] = [list(logits.shape), str(logits.dtype)]

class Broken:
    rows, data = 300, layer.weight.data
    def fail(self, *_): raise KernelError("kernel k failed to start")
    multiply = lookup = load_rows = fail
loading, (method._matrices[None], method._products) = Stager(method.device), (Broken(), [Broken()])
facts["a product"] = error_of(lambda: method.apply(layer, x[:, :64]))
facts["a lookup"] = error_of(lambda: method.embedding(layer, ids))
facts["repacking"] = error_of(lambda: loading.load(Broken(), table[0][0], table[0][1]))

facts["wrong shape"] = error_of(lambda: made(table, rows=[320]))
facts["parallel"] = error_of(lambda: QuantizedLinearMethod().create_weights(None, 32, [64], 64, 64, torch.float32))
method = QuantizedLinearMethod()
with torch.device("meta"):
    method.create_weights(None, 64, [64], 64, 64, torch.float32)
facts["device"] = str(method.device)
facts["unbound"] = error_of(lambda: QuantizedLinearMethod().process_weights_after_loading(None))
facts["dtypes"] = [str(dtype) for dtype in PascalGgufConfig.from_config({}).get_supported_act_dtypes()]

class Table(dict):
    def parts_of(self, name): return self[name]
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(300, 64)
        self.embed.embed_scale = 8.0
        self.head = self.embed
model = Model()
held = bind(model, Table({"embed": [table[0][0]]}))
model.embed.weight.weight_loader(model.embed.weight, as_tensor(table[0][1]))
facts["adopted"] = [len(held), bool(torch.equal(model.embed(ids[None]), 8.0 * table[0][2][ids][None])), model.head is model.embed]

class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Embedding(300, 64) for _ in range(3))
stagers = []
binding.Stager = lambda device: stagers.append(device) or Stager(device)
bind(Layers(), Table({f"layers.{n}": [table[0][0]] for n in range(3)}))
facts["stagers"] = [str(device) for device in stagers]
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(in_sglang):
    """A process of its own: the script changes SGLang for its whole life."""
    return in_sglang.run(SCRIPT)


def test_merged_parts_of_two_types_are_one_product_where_they_are_held_alike(facts):
    assert facts["merged"][0] == [2, 3, 256]
    assert facts["merged"][1] < 1e-4
    assert facts["products"] == 1
    assert facts["packed"] is True
    assert facts["bytes"] == 256 * 64 // 32 * 34


def test_a_float_part_beside_a_quantised_one(facts):
    error, is_packed = facts["mixed"]
    assert error < 1e-3
    assert is_packed is False


def test_embeddings_and_logits(facts):
    assert facts["embedding"] is True
    assert facts["logits"] == [[5, 300], "torch.float32"]


def test_an_embedding_without_a_quantisation_gets_one(facts):
    assert facts["adopted"] == [1, True, True]


def test_weights_lie_where_torch_would_put_a_tensor(facts):
    """SGLang makes a model inside `with torch.device("cuda")`, which get_default_device() of torch 2.7 does not see."""
    assert facts["device"] == "meta"


def test_all_layers_share_the_pinned_buffers(facts):
    assert facts["stagers"] == ["cpu"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "incomplete",
            'tensor "q" of type Q8_0, shape [128, 64] was never loaded: the model file ended before it; copy it again',
        ),
        (
            "wrong shape",
            'tensor "embed" of type Q8_0, shape [300, 64] does not fit the model\'s configuration, which needs [320, 64]; '
            "prepare the model again",
        ),
        ("a product", 'multiplying with tensor "embed" of type Q8_0, shape [300, 64]: kernel k failed to start'),
        ("a lookup", 'looking up rows of tensor "embed" of type Q8_0, shape [300, 64]: kernel k failed to start'),
        ("repacking", 'repacking tensor "embed" of type Q8_0, shape [300, 64]: kernel k failed to start'),
        ("parallel", "quantised GGUF models are served on one device: use --tp-size 1"),
        ("unbound", "--quantization gguf needs --load-format pascal_gguf and a prepared model folder"),
    ],
)
def test_errors_name_cause_and_remedy(facts, case, message):
    assert facts[case] == message


def test_bfloat16_is_for_the_cpu(facts):
    assert facts["dtypes"] == ["torch.float16", "torch.float32", "torch.bfloat16"]
