"""What llama-server keeps in the host's memory while a GPU computes: which tensors, in how many bytes.

The rules are those of llama.cpp's src/llama-model-loader.cpp and common/arg.cpp. Sizes equal the "model buffer size"
lines of its log.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from pascaline.engines.plan_request import ALL_LAYERS
from pascaline.engines.tensors import is_embedding, padded
from pascaline.models.ggml_types import BLOCKS

if TYPE_CHECKING:
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec, TensorSpec

HOST_ALIGNMENT = 32
"""Bytes that each tensor of a buffer in the host's memory is rounded up to (ggml-backend.cpp, TENSOR_ALIGNMENT)."""
DEVICE_ALIGNMENT, ROW_PADDING = 128, 512
"""The same on a GPU; and values that the last row of a quantised matrix is padded to (ggml-cuda.cu,
MATRIX_ROW_PADDING)."""
MOST_EXPERTS = 1024
"""LLAMA_MAX_EXPERTS (llama-hparams.h)."""
_LAYER = re.compile(r"^blk\.(\d+)\.")
_EXPERTS = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")
"""The expression of --n-cpu-moe: experts of a layer with their biases, but neither router nor shared experts."""


def layer_of(name: str) -> int | None:
    """Return the layer of a tensor; None for one outside of the layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def layers_on_host(spec: ModelSpec, request: PlanRequest) -> int:
    """Return how many of the first layers are on the host as a whole, while a GPU computes the others."""
    if request.device != "cuda" or request.gpu_layers is None:
        return 0
    return max(0, min(spec.num_hidden_layers, spec.num_hidden_layers + 1 - request.gpu_layers))


def is_on_host(name: str, spec: ModelSpec, request: PlanRequest) -> bool:
    """Whether the host's memory holds it although a GPU computes. The input embedding always is there."""
    if request.device != "cuda":
        return False
    layer = layer_of(name)
    if layer is None:
        return is_embedding(name)
    if layer < layers_on_host(spec, request):
        return True
    return layer < (request.expert_layers_on_host or 0) and bool(_EXPERTS.search(name))


def is_offloading(spec: ModelSpec, request: PlanRequest) -> bool:
    """Whether anything besides the input embedding is in the host's memory while a GPU computes."""
    return bool(layers_on_host(spec, request)) or (request.device == "cuda" and bool(request.expert_layers_on_host))


def device_bytes(tensor: TensorSpec) -> int:
    """Return what a tensor takes on a GPU."""
    elements, block = BLOCKS.get(tensor.tensor_type, (1, 0))
    rest = tensor.shape[-1] % ROW_PADDING if tensor.shape else 0
    padding = (ROW_PADDING - rest) // elements * block if elements > 1 and rest else 0
    return padded(tensor.n_bytes + padding, DEVICE_ALIGNMENT)


def host_bytes(tensor: TensorSpec) -> int:
    """Return what a tensor takes in the host's memory."""
    return padded(tensor.n_bytes, HOST_ALIGNMENT)


def host_weights_bytes(spec: ModelSpec, request: PlanRequest) -> int:
    """Return the bytes of the weights in the host's memory; all of them on a CPU."""
    tensors = (tensor for tensor in spec.tensors if request.device == "cpu" or is_on_host(tensor.name, spec, request))
    return sum(map(host_bytes, tensors))


def expert_layers(spec: ModelSpec) -> int:
    """Return the value of --n-cpu-moe that moves all experts: one more than the last layer with experts, or 0."""
    layers = (layer_of(tensor.name) for tensor in spec.tensors if _EXPERTS.search(tensor.name))
    # A damaged header may name any layer.
    return max((layer + 1 for layer in layers if layer is not None and layer < spec.num_hidden_layers), default=0)


def expert_refusals(spec: ModelSpec) -> list[str]:
    """Return why llama.cpp aborts on the numbers of experts in a header (llama-model.cpp), one sentence each."""
    count, used = spec.num_experts or 0, spec.num_experts_per_token or 0
    if not count:
        if not used and not expert_layers(spec):
            return []
        return ["it has experts, but expert_count is 0 or absent; take another copy of the file"]
    if count > MOST_EXPERTS:
        return [f"expert_count is {count:,}, llama.cpp reads at most {MOST_EXPERTS:,}"]
    if not 0 < used <= count:
        return [
            f"expert_used_count is {used or '0 or absent'}, must be 1 to expert_count ({count:,}); take another copy"
        ]
    return []


def candidates(spec: ModelSpec, request: PlanRequest) -> list[PlanRequest]:
    """Return requests with the decisions that are left to the plan made, those with the most on the GPU first.

    Each later one needs less of the GPU's memory, except that the first one that moves anything also needs the buffer
    for its copies there.
    """
    if request.device != "cuda":
        return [replace(request, expert_layers_on_host=0, gpu_layers=ALL_LAYERS)]
    most, layers = expert_layers(spec), spec.num_hidden_layers
    experts = range(most + 1) if request.expert_layers_on_host is None else (request.expert_layers_on_host,)
    on_gpu = (ALL_LAYERS, *range(layers, 0, -1)) if request.gpu_layers is None else (request.gpu_layers,)
    found = [replace(request, expert_layers_on_host=count, gpu_layers=on_gpu[0]) for count in experts]
    return found + [replace(request, expert_layers_on_host=experts[-1], gpu_layers=count) for count in on_gpu[1:]]
