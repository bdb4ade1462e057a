"""Measures the kernels on this machine's GPU: bandwidth, instruction rates, products and attention, as plain values.

Each time is the median of several replays of a CUDA graph with many launches, so launches by the host do not count.
Weights rotate through copies that together exceed the L2 cache several times ("cold", as in a model), unless `copies`
is 1 ("hot", as in other projects' tests).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from sglang_pascal.kernels import driver
from sglang_pascal.kernels.arguments import Probe, ProbeStream
from sglang_pascal.ops.activations import Activations, quantize
from sglang_pascal.ops.attention import Sequences, attention_decode, attention_prefill
from sglang_pascal.ops.kv_cache import KvPool
from sglang_pascal.ops.matmul import matmul
from sglang_pascal.ops.weights import PackedWeight, allocate_packed, dequantize

if TYPE_CHECKING:
    from collections.abc import Callable

REPLAYS: Final = 7
MOST_US: Final = 1e6
"""Most time for all replays of one measurement, unless one round takes longer: slow work needs no repetition."""
_COLD_FACTOR: Final = 4
"""Cold copies of a weight together have this many times the size of the L2 cache."""
_PROBE_THREADS: Final = 1024
_PROBE_INSTRUCTIONS: Final = 256 * 16
"""Instructions of a thread: ITERATIONS x UNROLL in probe.cu."""
CODE_PROBES: Final = {"code_11k": 1024 * 48, "code_33k": 3072 * 16, "code_49k": 4608 * 11}
"""Probe, named by the KB of code in its loop -> instructions of a thread."""
PROBES: Final = ("ffma", "dp4a", "integer_to_float", "half_to_float", "shuffle", "shared_broadcast", *CODE_PROBES)
SHAPES: Final = {
    "Qwen3-4B qkv": ("Q4_K", 6144, 2560),
    "Qwen3-4B o": ("Q4_K", 2560, 4096),
    "Qwen3-4B gate+up": ("Q4_K", 19456, 2560),
    "Qwen3-4B down": ("Q6_K", 2560, 9728),
    "Qwen3-4B head": ("Q6_K", 151936, 2560),
    "Qwen2.5-7B qkv": ("Q4_K", 4608, 3584),
    "Qwen2.5-7B o": ("Q4_K", 3584, 3584),
    "Qwen2.5-7B gate+up": ("Q4_K", 37888, 3584),
    "Qwen2.5-7B down": ("Q6_K", 3584, 18944),
    "Qwen2.5-7B head": ("Q6_K", 152064, 3584),
    "Llama-3.1-8B qkv": ("Q4_K", 6144, 4096),
    "Llama-3.1-8B o": ("Q4_K", 4096, 4096),
    "Llama-3.1-8B gate+up": ("Q4_K", 28672, 4096),
    "Llama-3.1-8B down": ("Q6_K", 4096, 14336),
    "Llama-3.1-8B down (Q4_K)": ("Q4_K", 4096, 14336),
    "Llama-3.1-8B head": ("Q6_K", 128256, 4096),
    "tall": ("Q4_K", 131072, 4096),
    "tall Q6_K": ("Q6_K", 131072, 4096),
    "tall Q8_0": ("Q8_0", 131072, 4096),
}
"""Name -> type, rows, columns. q, k, v and gate, up are one product each. `tall` fills any card."""
WIDTHS: Final = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Product:
    """Times of one shape for one number of rows of x, in microseconds."""

    name: str
    tensor_type: str
    rows: int
    columns: int
    n: int
    cold_us: float
    """The product alone, weights from device memory."""
    hot_us: float
    """Quantising x and the product, the same weights each time."""
    torch_us: float
    """torch with weights dequantised to float16 beforehand, the product alone; cold."""
    torch_dequantize_us: float
    """Dequantising the weights, which torch must do before each product if they stay quantised."""
    weight_bytes: int
    bits: int = 8
    """Bits of x."""

    @property
    def bandwidth(self) -> float:
        """Bytes of weights per second, cold."""
        return self.weight_bytes / self.cold_us * 1e6


def median_us(functions: list[Callable[[], object]], rounds: int = 1) -> float:
    """Return the median time of one call, in microseconds; the functions take turns in a CUDA graph.

    rounds: turns of all functions in one graph; fewer if they would take longer than MOST_US.
    """

    def take_turns() -> None:
        for function in functions:
            function()

    take_turns()
    torch.cuda.synchronize()
    rounds = max(1, min(rounds, int(MOST_US / REPLAYS / max(_elapsed_us(take_turns), 1.0))))
    graph = torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            take_turns()
    times = [_elapsed_us(graph.replay) for _ in range(REPLAYS)]
    return statistics.median(times) / (rounds * len(functions))


def _elapsed_us(work: Callable[[], object]) -> float:
    """Return the device time of the work that `work` starts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()  # type: ignore[no-untyped-call]
    work()
    end.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3  # type: ignore[no-untyped-call]


def _copies(n_bytes: int, device: torch.device) -> int:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(32, _COLD_FACTOR * cache // n_bytes))


def _random_weight(tensor_type: str, rows: int, columns: int, device: torch.device) -> PackedWeight:
    """Return random bytes: a product's time does not depend on them (a NaN is as fast as a number)."""
    weight = allocate_packed(tensor_type, rows, columns, device)
    weight.data.random_(0, 100)
    return weight


def product(name: str, n: int, device: torch.device, *, bits: int = 8, with_torch: bool = True) -> Product:
    """Measure one of SHAPES with x of 8 or 16 bits."""
    tensor_type, rows, columns = SHAPES[name]
    first = _random_weight(tensor_type, rows, columns, device)
    weights = [
        first,
        *(_random_weight(tensor_type, rows, columns, device) for _ in range(_copies(first.data.numel(), device) - 1)),
    ]
    x = torch.randn(n, columns, device=device).half()
    is_16_bit = bits == 16
    activations, out = quantize(x, is_16_bit=is_16_bit), torch.empty(n, rows, dtype=torch.float16, device=device)
    rounds = max(1, 24 // len(weights))
    cold = median_us([_multiply(activations, weight, out, is_16_bit) for weight in weights], rounds)
    hot = median_us([lambda: matmul(quantize(x, is_16_bit=is_16_bit), first, is_16_bit=is_16_bit, out=out)], 24)
    torch_us = dequantize_us = 0.0
    if with_torch:
        dequantize_us = median_us([lambda: dequantize(first, torch.float16)], 3)
        dense = [dequantize(first, torch.float16) for _ in range(_copies(2 * rows * columns, device))]
        torch_us = median_us([_dense_multiply(x, weight) for weight in dense], max(1, 12 // len(dense)))
    return Product(name, tensor_type, rows, columns, n, cold, hot, torch_us, dequantize_us, first.data.numel(), bits)


def repeated_product(name: str, n: int, bits: int, device: torch.device) -> Callable[[], object]:
    """Return a function that multiplies one of SHAPES once, for an endless load."""
    tensor_type, rows, columns = SHAPES[name]
    weight = _random_weight(tensor_type, rows, columns, device)
    is_16_bit = bits == 16
    x = quantize(torch.randn(n, columns, device=device).half(), is_16_bit=is_16_bit)
    out = torch.empty(n, rows, dtype=torch.float16, device=device)
    return _multiply(x, weight, out, is_16_bit)


def _multiply(x: Activations, weight: PackedWeight, out: torch.Tensor, is_16_bit: bool) -> Callable[[], object]:
    return lambda: matmul(x, weight, is_16_bit=is_16_bit, out=out)


def _dense_multiply(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    return lambda: x @ weight.T


@dataclass(frozen=True)
class Attention:
    """Times of attention with Llama-3.1-8B's heads (32 over 8 of 128), in microseconds."""

    phase: str
    """decode, or prefill of new tokens without a prefix."""
    kv_type: str
    sequences: int
    length: int
    ours_us: float
    torch_us: float
    """scaled_dot_product_attention over ready float16 keys and values: without paging and widening."""
    kv_bytes: int
    """Bytes that a decode step must read."""
    new: int = 1
    """Queries of each sequence."""


def attention(
    phase: str,
    kv_type: str,
    n: int,
    length: int,
    device: torch.device,
    *,
    new: int | None = None,
    with_torch: bool = True,
) -> Attention:
    """Measure decode or prefill of n sequences of equal length; prefill of their last `new` tokens, all by default."""
    heads, kv_heads, head_dim = 32, 8, 128
    slots = n * length
    dtype = {"F16": torch.float16, "E5M2": torch.float8_e5m2, "INT8": torch.int8}[kv_type]
    keys, values = (torch.zeros(slots, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
    scales = [torch.ones(slots, kv_heads, dtype=torch.float16, device=device) for _ in range(2)]
    pool = KvPool(keys, values, *(scales if kv_type == "INT8" else []))
    table = torch.randperm(slots, device=device).int().view(n, length)
    sequences = Sequences(table, torch.arange(n, device=device), torch.full((n,), length, device=device))
    new = 1 if phase == "decode" else new or length
    query = torch.randn(n * new, heads, head_dim, device=device).half()
    dense = [torch.randn(n, kv_heads, length, head_dim, device=device).half() for _ in range(2)]
    rows = query.view(n, new, heads, head_dim).transpose(1, 2)
    starts = torch.arange(n + 1, device=device, dtype=torch.int32) * new

    def ours() -> object:
        if phase == "decode":
            return attention_decode(query, pool, sequences, scale=head_dim**-0.5, max_length=length)
        return attention_prefill(query, pool, sequences, starts, scale=head_dim**-0.5, max_new=new)

    def torchs() -> object:
        return torch.nn.functional.scaled_dot_product_attention(
            rows, dense[0], dense[1], is_causal=phase == "prefill", enable_gqa=True
        )

    rounds = 20 if phase == "decode" else 2
    kv_bytes = 2 * slots * kv_heads * (head_dim * dtype.itemsize + (2 if kv_type == "INT8" else 0))
    torch_us = median_us([torchs], rounds) if with_torch else 0.0
    return Attention(phase, kv_type, n, length, median_us([ours], rounds), torch_us, kv_bytes, new)


def stream_bandwidth(device: torch.device, n_bytes: int = 1 << 30) -> float:
    """Return the bytes per second of reading memory once."""
    data = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    sink = torch.zeros(1, dtype=torch.int32, device=device)
    kernel = driver.kernel("probe", "probe_stream", 256, device.index or 0)
    grid = (driver.multiprocessors(device.index or 0) * 8, 1, 1)
    arguments = ProbeStream(data=data.data_ptr(), sink=sink.data_ptr(), count=n_bytes // 16)
    us = median_us([lambda: kernel.launch(grid, arguments)])
    return n_bytes / us * 1e6


def instructions_per_clock(probe: str, device: torch.device) -> float:
    """Return lane instructions per clock and multiprocessor of one of PROBES."""
    count = driver.multiprocessors(device.index or 0)
    clocks, sink = (torch.zeros(count, dtype=torch.int32, device=device) for _ in range(2))
    kernel = driver.kernel("probe", f"probe_{probe}", _PROBE_THREADS, device.index or 0)
    best = []
    for _ in range(3):
        kernel.launch((count, 1, 1), Probe(clocks=clocks.data_ptr(), sink=sink.data_ptr()))
        best.append(float(clocks.double().median()))
    return _PROBE_THREADS * CODE_PROBES.get(probe, _PROBE_INSTRUCTIONS) / min(best)
