"""Memory of a model's weights on the device and bytes that a step reads, tensor by tensor from the header."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from pascaline.engines import engine_named
from pascaline.engines.memory_model import Weights
from pascaline.engines.tensors import DTYPE_BYTES, is_embedding, is_experts, is_matrix, is_output, is_vocabulary

if TYPE_CHECKING:
    from pascaline.engines.memory_model import HeldTensor
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec, TensorSpec

_LAYER = re.compile(r"(blk\.|(.*\.)?layers\.)\d+\.")


def weights_on_device(spec: ModelSpec, request: PlanRequest) -> Weights:
    """Return memory and cost of the weights under an engine on a device; per GPU if several share the model."""
    sums = _Sums(spec, request)
    for tensor in spec.tensors:
        sums.add(tensor)
    return sums.result()


class WeightsByPlacement:
    """The weights of one model for requests that differ in nothing that its tensors depend on but their placement.

    A search plans one file hundreds of times, and each plan tries several placements.
    """

    def __init__(self, spec: ModelSpec) -> None:
        """Start with none."""
        self._spec = spec
        self._found: dict[tuple[int | None, int | None], Weights] = {}

    def of(self, request: PlanRequest) -> Weights:
        """Return what `weights_on_device` does."""
        key = request.gpu_layers, request.expert_layers_on_host
        if key not in self._found:
            self._found[key] = weights_on_device(self._spec, request)
        return self._found[key]


class _Sums:
    """Adds up tensors."""

    def __init__(self, spec: ModelSpec, request: PlanRequest) -> None:
        self._spec, self._request, self._model = spec, request, engine_named(request.engine).memory
        self._has_output = any(is_output(tensor.name) for tensor in spec.tensors)
        self._bytes = self._host = self._rounding = 0
        self._dense = self._experts = self._macs = self._output_macs = self._largest = 0
        self._expert_macs = self._host_dense = self._host_experts = self._host_largest = 0
        self._host_expert_layers, self._host_layers = set[str](), set[str]()
        # Of the experts, one token uses this part.
        self._used = min(1.0, (spec.num_experts_per_token or 0) / spec.num_experts) if spec.num_experts else 1.0
        self._by_type: dict[str, int] = {}
        self._matrices: dict[str, float] = {}

    def add(self, tensor: TensorSpec) -> None:
        """Count one tensor."""
        embeds = is_embedding(tensor.name)
        tied = embeds and (self._spec.tied_embeddings or not self._has_output)
        held = self._model.held(tensor, self._spec, self._request, tied=tied)
        if held is None:
            return
        self._host += held.n_bytes if held.on_host else 0
        if not held.on_device:
            if not embeds:
                self._count_host_work(tensor, held)
            return
        self._bytes += held.n_bytes
        self._rounding += self._model.rounding_bytes(held.n_bytes)
        self._by_type[tensor.tensor_type] = self._by_type.get(tensor.tensor_type, 0) + held.n_bytes
        if is_matrix(tensor) and not is_vocabulary(tensor.name):
            self._largest = max(self._largest, tensor.n_elements * DTYPE_BYTES[self._request.dtype])
        if not embeds or tied:
            self._count_work(tensor, held, is_last=is_output(tensor.name) or tied)

    def _count_work(self, tensor: TensorSpec, held: HeldTensor, *, is_last: bool) -> None:
        kind, size = held.tensor_type, held.n_bytes
        if is_experts(tensor.name):
            self._experts += size
            self._expert_macs += tensor.n_elements
            self._matrices[kind] = self._matrices.get(kind, 0) + size * self._used
            return
        self._dense += size
        if is_matrix(tensor):
            self._macs += tensor.n_elements
            self._matrices[kind] = self._matrices.get(kind, 0) + size
            if is_last:
                self._output_macs += tensor.n_elements

    def _count_host_work(self, tensor: TensorSpec, held: HeldTensor) -> None:
        if is_matrix(tensor):
            self._host_largest = max(self._host_largest, tensor.n_bytes)
        layer = _LAYER.match(tensor.name)
        if is_experts(tensor.name):
            self._host_experts += held.n_bytes
            self._expert_macs += tensor.n_elements
            self._host_expert_layers |= {layer[0]} if layer else set()
            return
        if is_matrix(tensor) and layer:
            self._host_layers.add(layer[0])
        self._host_dense += held.n_bytes
        self._macs += tensor.n_elements if is_matrix(tensor) else 0

    def result(self) -> Weights:
        """The sums for one of the GPUs that share the model."""
        spec, share = self._spec, self._request.tensor_parallel * self._request.pipeline_parallel
        types = ", ".join(
            f"{kind} {size / 2**20:,.1f} MiB" for kind, size in sorted(self._by_type.items(), key=lambda item: -item[1])
        )
        formula = f"sum over {len(spec.tensors)} tensors, by the file's types: {types}"
        if share > 1:
            formula += f"; of {share} GPUs each holds an equal part"
        return Weights(
            n_bytes=-(-self._bytes // share),
            host_bytes=self._host,
            rounding_bytes=-(-self._rounding // share),
            dense_read_bytes=-(-self._dense // share),
            expert_read_bytes=int(self._experts * self._used / share),
            expert_bytes=-(-self._experts // share),
            host_dense_read_bytes=self._host_dense,
            host_expert_read_bytes=int(self._host_experts * self._used),
            host_expert_bytes=self._host_experts,
            host_largest_matrix_bytes=self._host_largest,
            host_switches=len(self._host_expert_layers - self._host_layers),
            matrix_read_bytes={kind: math.ceil(size / share) for kind, size in self._matrices.items()},
            macs=int((self._macs + self._expert_macs * self._used) / share),
            output_macs=self._output_macs // share,
            largest_matrix_bytes=self._largest,
            formula=formula,
        )
