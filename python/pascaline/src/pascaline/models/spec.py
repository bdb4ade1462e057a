"""ModelSpec: everything that planning and serving need to know about a model, read from its header alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model file."""

    name: str
    shape: tuple[int, ...]
    """Dimensions, outermost first (rows, columns): the reverse of GGUF's own order."""
    tensor_type: str
    """GGML's name in a GGUF file (`Q4_K`, `F16`), else torch's short name in upper case (`BF16`, `F32`)."""
    n_bytes: int
    data_offset: int = 0
    """Bytes from the start of the file that holds it."""
    file_index: int = 0
    """Which of the model's files holds it."""

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        count = 1
        for dimension in self.shape:
            count *= dimension
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model as its header describes it. Sizes in bytes or elements; None if the model has no such thing."""

    format: Literal["gguf", "safetensors"]
    files: tuple[Path | str, ...]
    """The files in order (parts of a split model); URLs as strings."""
    architecture: str
    """GGUF's `general.architecture` or config.json's `model_type`: `llama`, `qwen2`, `gemma3`, …"""
    name: str = ""
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    """KV heads of most layers; `layer_kv_heads` has them per layer if layers differ."""
    head_dim: int
    """Size of one key head."""
    v_head_dim: int
    """Size of one value head; equal to head_dim in most models."""
    vocab_size: int
    context_length: int
    """The longest context that the model was made for, tokens; 0 if a recurrent model names none."""
    layer_kv_heads: tuple[int, ...] | None = None
    """KV heads that each layer stores, if layers differ: 0 in a recurrent layer, or one that uses another's."""
    sliding_window: int | None = None
    """Tokens that a sliding-window layer looks back."""
    sliding_layers: int = 0
    """How many of the layers use the sliding window."""
    sliding_layer_ids: tuple[int, ...] = ()
    """Which layers those are."""
    sliding_head_dim: int | None = None
    """Size of a key or value head in sliding-window layers, if it differs from the other layers."""
    kv_lora_rank: int | None = None
    """MLA: size of the compressed key/value vector."""
    qk_rope_head_dim: int | None = None
    num_experts: int | None = None
    num_experts_per_token: int | None = None
    moe_intermediate_size: int | None = None
    ssm_state_size: int | None = None
    ssm_conv_kernel: int | None = None
    ssm_inner_size: int | None = None
    ssm_num_heads: int | None = None
    """Heads of a Mamba-2 or gated-delta layer (`ssm.time_step_rank`); rank of the time step in a Mamba-1 layer."""
    ssm_num_groups: int | None = None
    state_layer_ids: tuple[int, ...] = ()
    """Layers that keep a recurrent state, by their tensors; empty if a header does not distinguish them."""
    shortconv_columns: int | None = None
    """LFM2: columns of a short convolution, of which all but one are kept."""
    wkv_head_size: int | None = None
    """RWKV: size of a head's state."""
    token_shift_count: int | None = None
    """RWKV: previous tokens that a layer keeps; None: 2."""
    kda_head_dim: int | None = None
    """Kimi Linear: size of a head of a delta-attention layer."""
    tied_embeddings: bool = False
    ties_embeddings: bool | None = None
    """Whether config.json, or the family's default, says that the output head is tied; None for a GGUF file."""
    attention_bias: bool = False
    """Whether config.json says that the projections of attention have biases."""
    pooling: str | None = None
    """How the file says that its vectors become one: a name of roles.POOLINGS; None for a model that generates."""
    causal: bool = True
    """Whether a token attends to earlier ones only; an encoder's attend to all."""
    file_type: str | None = None
    """The mixture that a GGUF file names for itself (`Q4_K_M`); the type of a single tensor may differ."""
    file_bytes: int = 0
    quantization: str | None = None
    """Method that config.json names for the weights (`gptq`, `fp8`); None if it names none, and for a GGUF file."""
    tensors: tuple[TensorSpec, ...] = field(default=(), repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Every metadata key of a GGUF file; large arrays and strings as acceptance.Unread."""

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def n_parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.n_elements for tensor in self.tensors)
