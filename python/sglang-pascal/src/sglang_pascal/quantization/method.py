"""SGLang's linear and embedding methods for matrices that stay quantised.

A layer has one parameter `weight`: the bytes of all its matrices, one after the other. SGLang's models load it by name
like any weight; its loader takes the file's raw rows and repacks them into place.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase

from sglang_pascal.errors import CheckpointError, PluginError
from sglang_pascal.kernels.driver import KernelError
from sglang_pascal.kernels.formats import GROUP_ROWS
from sglang_pascal.names import LOAD_FORMAT, QUANTIZATION
from sglang_pascal.ops.weights import PackedWeight
from sglang_pascal.quantization.handover import take_activations
from sglang_pascal.quantization.matrix import DenseMatrix, Input, Matrix, PackedMatrix, join_adjacent
from sglang_pascal.quantization.precision import activations_are_16_bit
from sglang_pascal.quantization.staging import out_of_memory
from sglang_pascal.quantization.storage import aligned

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sglang_pascal.ops.activations import Activations
    from sglang_pascal.quantization.staging import Stager
    from sglang_pascal.quantization.weight_table import MatrixInfo


class QuantizedLinearMethod(LinearMethodBase):  # type: ignore[misc]  # SGLang publishes no types
    """One layer's matrices. Each layer has its own method object, which holds them.

    SGLang makes it with the layer, whose name some models do not report at that time; `bind` later gives it the file's
    matrices.
    """

    def __init__(self) -> None:
        self.parts: list[MatrixInfo] = []
        """In row order; empty before `bind`."""
        self._columns = 0
        self._rows: list[int] = []
        self._dtype = torch.float16
        self._device = torch.device("cpu")
        self._matrices: dict[str | int | None, Matrix] = {}
        self._products: list[Matrix] = []
        self._missing: set[str | int | None] = set()
        self._stager: Stager | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """SGLang's hook: keep the shape, and torch's current default device."""
        del layer, output_size
        if input_size_per_partition != input_size:
            raise NotImplementedError("quantised GGUF models are served on one device: use --tp-size 1")
        self._columns, self._rows, self._dtype = input_size, output_partition_sizes, params_dtype
        # torch 2.7's get_default_device() knows set_default_device() alone, not `with device:`, which SGLang uses.
        self._device = torch.empty(0).device

    @property
    def device(self) -> torch.device:
        """The device that holds the matrices."""
        return self._device

    def bind(self, layer: torch.nn.Module, parts: list[MatrixInfo], stager: Stager) -> None:
        """Allocate memory for these matrices of the file, in row order, and give the layer its parameter.

        stager: copies the rows to `device`. All layers of a model share it, because its buffers are pinned host memory.
        """
        self._check_shapes(parts)
        self.parts, self._missing = parts, {part.shard_id for part in parts}
        sizes = [aligned(part.storage.n_bytes(part.rows, part.columns)) for part in parts]
        weight = torch.nn.Parameter(self._allocate(sum(sizes)), requires_grad=False)
        weight.weight_loader = self._load  # type: ignore[attr-defined]  # SGLang's models look for it here
        layer.register_parameter("weight", weight)
        for part, data in zip(parts, torch.split(weight.data, sizes), strict=True):
            self._matrices[part.shard_id] = _matrix(part, data)
        self._products = join_adjacent(list(self._matrices.values()))
        self._stager = stager

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """SGLang's hook: check that every matrix was loaded."""
        del layer
        if not self.parts:
            raise PluginError(
                f"--quantization {QUANTIZATION} needs --load-format {LOAD_FORMAT} and a prepared model folder"
            )
        for part in self.parts:
            if part.shard_id in self._missing:
                raise CheckpointError(f"{part} was never loaded: the model file ended before it; copy it again")
        self._stager = None

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply `[..., columns]` to `[..., rows]` in x's type."""
        del layer
        return self._multiply(x, x.dtype, bias)

    @property
    def is_packed(self) -> bool:
        """Whether every matrix multiplies int8 activations; false if one is held as float16."""
        return all(isinstance(matrix, PackedMatrix) for matrix in self._products)

    def apply_quantized(
        self, activations: Activations, dtype: torch.dtype, bias: torch.Tensor | None = None, *, is_16_bit: bool
    ) -> torch.Tensor:
        """Like `apply`, for n rows of activations that are already quantised to 8 or 16 bits. Requires `is_packed`."""
        return self._products_of(Input(None, activations, is_16_bit=is_16_bit), dtype, bias)

    def _multiply(self, x: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        result = self._products_of(Input(flat, take_activations(x), is_16_bit=activations_are_16_bit()), dtype, bias)
        return result.view(*x.shape[:-1], -1)

    def _products_of(self, inputs: Input, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
        rows = [matrix.rows for matrix in self._products]
        result = torch.empty(inputs.n, sum(rows), dtype=dtype, device=self._products[0].data.device)
        with self._named("multiplying with"):
            for matrix, out in zip(self._products, torch.split(result, rows, dim=1), strict=True):
                matrix.multiply(inputs, out)
        if bias is not None:
            result += bias
        return result

    @contextlib.contextmanager
    def _named(self, action: str) -> Iterator[None]:
        """Add the tensors' names to a kernel's error: a kernel knows shapes only."""
        try:
            yield
        except KernelError as exc:
            raise KernelError(f"{action} {', '.join(map(str, self.parts))}: {exc}") from exc

    def _allocate(self, n_bytes: int) -> torch.Tensor:
        try:
            return torch.zeros(n_bytes, dtype=torch.uint8, device=self._device)
        except torch.cuda.OutOfMemoryError as exc:
            names = ", ".join(map(str, self.parts))
            raise out_of_memory(f"allocating {n_bytes} bytes for {names}", self._device) from exc

    def _check_shapes(self, parts: list[MatrixInfo]) -> None:
        for part, rows in zip(parts, self._rows, strict=True):
            if (part.rows, part.columns) != (self._wanted_rows(part, rows), self._columns):
                raise CheckpointError(
                    f"{part} does not fit the model's configuration, which needs [{rows}, {self._columns}]; "
                    "prepare the model again"
                )

    def _wanted_rows(self, part: MatrixInfo, rows: int) -> int:
        """Return the rows that a matrix must have if SGLang's layer has `rows`."""
        del part
        return rows

    def _load(self, _parameter: torch.nn.Parameter, loaded: torch.Tensor, shard_id: str | int | None = None) -> None:
        """SGLang's models call this with the file's raw rows, uint8 `[rows, bytes per row]`."""
        (part,) = (part for part in self.parts if part.shard_id == shard_id)
        assert self._stager is not None
        self._stager.load(self._matrices[shard_id], part, loaded.numpy())
        self._missing.discard(shard_id)


class QuantizedEmbeddingMethod(QuantizedLinearMethod):
    """The token embedding and the output head; a tied model uses one such object for both."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits in float32: float16 would round close ones to the same number."""
        del layer
        return self._multiply(x, torch.float32, bias)

    def embedding(self, layer: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """Look up `[n]` token ids: `[n, columns]` in the model's type."""
        del layer
        (matrix,) = self._matrices.values()
        with self._named("looking up rows of"):
            return matrix.lookup(ids, self._dtype)

    def _wanted_rows(self, part: MatrixInfo, rows: int) -> int:
        """Return the vocabulary's rows: SGLang's models pad it, but the padding has no rows here."""
        return min(part.rows, rows)


def _matrix(part: MatrixInfo, data: torch.Tensor) -> Matrix:
    """Return a matrix in the first bytes of `data`, in the type that `part` names."""
    data = data[: part.storage.n_bytes(part.rows, part.columns)]
    if part.storage.is_dense:
        return DenseMatrix(data.view(torch.float16).view(part.rows, part.columns))
    tickets = torch.zeros(-(-part.rows // GROUP_ROWS), dtype=torch.int32, device=data.device)
    return PackedMatrix(PackedWeight(data, part.storage.held, part.rows, part.columns, tickets))
