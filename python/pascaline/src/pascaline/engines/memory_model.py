"""The memory model of an engine: what it allocates for a model under given settings. Pure functions, no I/O.

`pascaline.planning` puts these answers together and knows no engine by its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pascaline.engines.kv_layers import KvType, layer_groups
from pascaline.engines.plan_request import ALL_LAYERS
from pascaline.engines.speculation import NO_SPECULATION
from pascaline.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pascaline.cards import Card
    from pascaline.engines.data import EngineData, KvTypeEntry
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.engines.speculation import Speculation
    from pascaline.models.spec import ModelSpec, TensorSpec
    from pascaline.settings import Settings

Origin = Literal["exact", "measured", "documented", "estimated"]

CONSTANT_NAMES = {
    "graphs_bytes": "CUDA graphs",
    "context_bytes": "CUDA context",
    "library_bytes": "libraries",
    "process_bytes": "processes",
    "fragmentation_bytes": "fragmentation",
}
"""Key of a constant in an engine's data -> what the table calls it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the memory table."""

    key: str
    name: str
    n_bytes: int
    formula: str
    """The calculation with its numbers."""
    origin: Origin
    source: str = ""
    """Where the constants come from; empty if everything is in the model's header."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "key": self.key,
            "name": self.name,
            "bytes": self.n_bytes,
            "formula": self.formula,
            "origin": self.origin,
            "source": self.source,
        }


@dataclass(frozen=True, slots=True)
class Pool:
    """A KV cache."""

    tokens: int
    """Tokens that all requests together can use."""
    n_bytes: int
    formula: str


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """How and where an engine holds a tensor."""

    tensor_type: str
    """Name of the type in model files, or NF4."""
    n_bytes: int
    on_device: bool = True
    on_host: bool = False
    """Whether the host's memory holds it, beside or instead of a GPU's; False on the CPU, which is the device."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's weights on one device. Bytes; operations per token."""

    n_bytes: int
    """Bytes on the device."""
    host_bytes: int
    """Kept in the host's memory (llama.cpp: the input embedding)."""
    rounding_bytes: int
    """Bytes that the allocator takes in addition."""
    dense_read_bytes: int
    """Bytes that every step reads: all except the input embedding and the experts."""
    expert_read_bytes: int
    """Bytes of the experts that one token uses."""
    expert_bytes: int
    """Bytes of all experts."""
    host_dense_read_bytes: int
    """Bytes in the host's memory that every step reads, while a GPU computes."""
    host_expert_read_bytes: int
    """Bytes of the experts there that one token uses."""
    host_expert_bytes: int
    """Bytes of all experts there."""
    host_largest_matrix_bytes: int
    """Largest matrix there, the input embedding left out, which is not multiplied with."""
    host_switches: int
    """Layers that the device computes but for their experts there: a decode step goes to the host and back in each."""
    matrix_read_bytes: Mapping[str, int]
    """Matrices that a decode step of one request multiplies with, by the type in which the engine holds them: what
    read_bytes(1) counts without the vectors (norms, biases)."""
    macs: int
    """Multiply-accumulates that one token costs, output layer included."""
    output_macs: int
    """The part in the output layer, which prefill computes for the last token only."""
    largest_matrix_bytes: int
    """Largest matrix outside of the vocabulary, in the type of the computation."""
    formula: str

    def read_bytes(self, batch: int) -> float:
        """Bytes on the device that one step of `batch` tokens reads; different tokens use different experts."""
        return self.dense_read_bytes + _used(self.expert_bytes, self.expert_read_bytes, batch)

    def host_read_bytes(self, batch: int) -> float:
        """The same of the weights in the host's memory."""
        return self.host_dense_read_bytes + _used(self.host_expert_bytes, self.host_expert_read_bytes, batch)


def _used(every: int, one: int, batch: int) -> float:
    """Return the bytes of the experts that some of `batch` tokens use, if each token chooses evenly and by itself."""
    return every * (1 - (1 - one / every) ** batch) if every else 0.0


class MemoryModel(ABC):
    """What planning asks about an engine's memory. Instances hold no state but the engine's data."""

    weights_source: ClassVar[str]
    """Source of the way in which it holds weights; empty if it holds them as in the file."""
    pool_source: ClassVar[str]
    """Where the size of its KV cache comes from."""
    has_memory_fraction: ClassVar[bool]
    """Whether mem_fraction_static limits weights and KV pool."""
    shares_pool: ClassVar[bool]
    """Whether requests share a pool of any size; if not, each has room for a whole context."""

    def __init__(self, data: EngineData) -> None:
        """Answer with the constants in these data."""
        self.data = data
        self.kv_types: Mapping[str, KvType] = {name: self.kv_type(entry) for name, entry in data.kv_types.items()}
        """Types of a stored key or value that the engine has, by our names."""

    def kv_type(self, entry: KvTypeEntry) -> KvType:
        """Return a type of the engine's data with its bytes."""
        assert entry.value_bytes is not None, f"{self.data.name}: {entry} has no value_bytes"
        return KvType(
            entry.value_bytes,
            flag=entry.flag,
            added_perplexity=entry.added_perplexity,
            can_be_set=entry.can_be_set,
        )

    def kv_problem(self, chosen: str) -> str | None:
        """Say why the setting kv_cache.dtype cannot be this; None if it can."""
        allowed = ["auto", *(name for name, kind in self.kv_types.items() if kind.can_be_set)]
        return None if chosen in allowed else self._lacks(chosen, allowed)

    def check_kv_type(self, request: PlanRequest) -> None:
        """Raise ConfigurationError if the engine has no such type."""
        if request.kv_dtype not in self.kv_types:
            raise ConfigurationError(f"kv_cache.dtype: {self._lacks(request.kv_dtype, self.kv_types)}")

    def _lacks(self, name: str, allowed: Iterable[str]) -> str:
        return f"{self.data.name} has no {name!r}, must be one of: {', '.join(allowed)}"

    def lossy_kv_types(self) -> list[str]:
        """Return the types that save memory and cost quality, the best first."""
        kinds = [(kind.added_perplexity, name) for name, kind in self.kv_types.items() if kind.added_perplexity]
        return [name for _, name in sorted(kinds)]

    @abstractmethod
    def kv_dtype(self, chosen: str, dtype: str) -> str:
        """Return the KV type for the setting kv_cache.dtype and the type of the computation."""

    def kv_flag(self, chosen: str, dtype: str) -> str:
        """Return the engine's name of the KV type for the setting kv_cache.dtype and the type of the computation."""
        return self.kv_types[self.kv_dtype(chosen, dtype)].flag

    def activation_bits(self, settings: Settings, spec: ModelSpec, *, device: str) -> tuple[int | None, int | None]:
        """Return the bits of activations in prompts and decode steps, with auto decided; None if there is no choice.

        Raises ConfigurationError if bits are set that the model's weights do not allow.
        """
        del settings, spec, device
        return None, None

    def speculation(self, settings: Settings, spec: ModelSpec, *, device: str, decode_bits: int | None) -> Speculation:
        """Return what is drafted, with auto decided. decode_bits: as `activation_bits` returns them."""
        del settings, spec, device, decode_bits
        return NO_SPECULATION

    def check(self, settings: Settings, spec: ModelSpec) -> None:
        """Raise ConfigurationError for settings that the engine would reject only while it loads this model."""
        del settings, spec

    @abstractmethod
    def activation_columns(self, bits: int | None) -> int:
        """Return how many int8 columns an activation of this many bits takes in a matrix product."""

    @abstractmethod
    def held(self, tensor: TensorSpec, spec: ModelSpec, request: PlanRequest, *, tied: bool) -> HeldTensor | None:
        """Return how it holds a tensor; None if it does not load it. tied: the input embedding is the output too."""

    def candidates(self, spec: ModelSpec, request: PlanRequest) -> list[PlanRequest]:
        """Return requests with every decision made that the request leaves to the plan, the fastest first.

        The plan takes the first that fits; a later one never needs more of the device's memory than the one before,
        except the second.
        """
        del spec
        return [replace(request, expert_layers_on_host=0, gpu_layers=ALL_LAYERS)]

    def rounding_bytes(self, n_bytes: int) -> int:
        """Return what the allocator takes beyond a tensor's bytes."""
        del n_bytes
        return 0

    @abstractmethod
    def pool(self, spec: ModelSpec, request: PlanRequest, weights: Weights, dynamic: Sequence[Part]) -> Pool:
        """Return its KV cache. dynamic: what the requests and the runtime need besides."""

    def kv_bytes_per_token(self, spec: ModelSpec, request: PlanRequest) -> int:
        """Return the bytes that one token takes, all layers together: keys and values of every KV head."""
        groups = layer_groups(
            spec, tensor_parallel=request.tensor_parallel, pipeline_parallel=request.pipeline_parallel
        )
        return round(sum(group.token_bytes(self.kv_types[request.kv_dtype]) for group in groups))

    def kv_bytes(self, spec: ModelSpec, request: PlanRequest, tokens: int) -> int:
        """Return the bytes of the smallest pool that holds these tokens."""
        return tokens * self.kv_bytes_per_token(spec, request)

    def static_parts(self, spec: ModelSpec, request: PlanRequest, weights: Weights, pool: Pool) -> list[Part]:
        """Return what is allocated once, before the first request."""
        del spec, request
        return [
            Part("weights", "weights", weights.n_bytes, weights.formula, "exact", self.weights_source),
            Part("kv_pool", "KV cache", pool.n_bytes, pool.formula, "exact", self.pool_source),
        ]

    def host_parts(self, spec: ModelSpec, request: PlanRequest, weights: Weights) -> list[Part]:
        """Return what is in the host's memory while a GPU computes."""
        del spec, request
        text = "the input embedding, of which a step reads one row"
        return [Part("host_weights", "weights", weights.host_bytes, text, "exact")] if weights.host_bytes else []

    def dynamic_parts(self, spec: ModelSpec, request: PlanRequest, weights: Weights, card: Card) -> list[Part]:
        """Return what is allocated while requests run, and what the runtime itself needs."""
        return [*self.buffers(spec, request, weights), *self._constants(request, card)]

    @abstractmethod
    def buffers(self, spec: ModelSpec, request: PlanRequest, weights: Weights) -> list[Part]:
        """Return what is allocated while requests run."""

    def _constants(self, request: PlanRequest, card: Card) -> list[Part]:
        """Constants of engine and card, which do not depend on the model."""
        facts = self.data.constants(card)
        parts = []
        for key, name in CONSTANT_NAMES.items():
            if (fact := facts.get(key)) is not None:
                n_bytes, text = self.constant(key, int(fact.value), request) or (
                    int(fact.value),
                    f"constant of {card.name}",
                )
                parts.append(Part(key.removesuffix("_bytes"), name, n_bytes, text, fact.origin, fact.source))
        return parts

    def constant(self, key: str, n_bytes: int, request: PlanRequest) -> tuple[int, str] | None:
        """Return bytes and calculation of a constant that the engine needs several times; None if it is one."""
        del key, n_bytes, request
        return None

    def fraction(self, request: PlanRequest, parts: Sequence[Part]) -> float | None:
        """Return the share of the memory that is passed to the engine; None if it has no such setting."""
        del request, parts
        return None

    def reasons(self, request: PlanRequest, parts: Sequence[Part]) -> list[str]:
        """Return why a plan that the card has room for does not fit this engine, one sentence each."""
        del request, parts
        return []

    def notes(self, spec: ModelSpec, request: PlanRequest) -> list[str]:
        """Return remarks about how it holds the model."""
        del spec, request
        return []

    @abstractmethod
    def arguments(self, request: PlanRequest, kv_tokens: int, fraction: float | None) -> tuple[str, ...]:
        """Return the flags that determine memory, as the engine is started with; a test compares the two."""
