"""Well-known models by their shapes, so that an owner sees in one command what a card and a host could run.

The shapes are data (catalog.toml); a file's tensors and their types follow from them as llama-quantize chooses them.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pascaline.engines import ENGINES
from pascaline.errors import ConfigurationError
from pascaline.models.ggml_types import BLOCKS
from pascaline.models.spec import ModelSpec, TensorSpec
from pascaline.planning.hints import with_hints
from pascaline.planning.mixtures import requantized
from pascaline.planning.plan import make_plan
from pascaline.planning.request import request_from_placement
from pascaline.text_table import LEFT, RIGHT, Column, table_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pascaline.planning.placement import Placement
    from pascaline.planning.plan import Plan
    from pascaline.settings import Settings

MIXTURE = "Q4_K_M"
"""The quantisation in which the models are planned, except those that are published in MXFP4 only."""
MXFP4_FAMILY = "gpt-oss"

_Sizes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class CatalogRow:
    """One model on this card: the engine and placement that are fastest for one request among those that fit."""

    name: str
    confirmed: bool
    """Whether the whole shape was read for this model."""
    file_bytes: int
    plan: Plan
    """Does not fit if none does."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"name": self.name, "confirmed": self.confirmed, "file_bytes": self.file_bytes} | self.plan.to_json()


@cache
def shapes() -> tuple[Mapping[str, Any], ...]:
    """Return the models of catalog.toml."""
    text = files("pascaline.planning").joinpath("catalog.toml").read_text()
    return tuple(tomllib.loads(text)["model"])


def catalog(
    settings: Settings, placement: Placement, *, engines: Sequence[str] = (), chunk_is_free: bool = True
) -> list[CatalogRow]:
    """Plan every model that one of the engines serves under the same settings, the smallest first.

    placement: device and host. engines: those to choose from, all if empty. chunk_is_free: whether the chunk of the
    settings is a default.
    """
    names = engines or tuple(ENGINES)
    rows = [row for shape in shapes() if (row := _row(shape, settings, placement, names, chunk_is_free))]
    return sorted(rows, key=lambda row: row.file_bytes)


def _row(
    shape: Mapping[str, Any], settings: Settings, placement: Placement, engines: Sequence[str], chunk_is_free: bool
) -> CatalogRow | None:
    spec = catalog_spec(shape)
    plans = [plan for engine in engines if (plan := _plan(engine, spec, settings, placement, chunk_is_free))]
    if not plans:
        return None
    best = max(plans, key=lambda plan: (plan.fits, _single(plan), plan.headroom_bytes))
    return CatalogRow(shape["name"], shape.get("confirmed", True), spec.weights_bytes, best)


def _plan(engine: str, spec: ModelSpec, settings: Settings, placement: Placement, chunk_is_free: bool) -> Plan | None:
    """Return the plan of an engine that serves the architecture; None if it does not, or not with these settings."""
    if not ENGINES[engine].knows(spec) and not ENGINES[engine].decides_itself:
        return None
    context = min(settings.context_length or 4096, spec.context_length)
    wanted = settings.model_copy(update={"engine": engine, "context_length": context})
    try:
        request = request_from_placement(wanted, spec, placement)
    except ConfigurationError:
        return None
    plan = make_plan(spec, placement.card, request)
    return with_hints(plan, spec, placement.card, request, chunk_is_free=chunk_is_free)


def _single(plan: Plan) -> float:
    return plan.speed.single.tokens_per_second if plan.speed else 0.0


def catalog_spec(shape: Mapping[str, Any]) -> ModelSpec:
    """Return what reading a GGUF file of this shape would give."""
    sizes = _sizes(shape)
    recurrent = tuple(layer for layer in range(shape["layers"]) if _is_recurrent(shape, layer))
    kv_heads = shape.get("kv_heads", shape["heads"])
    head_dim = _head_dim(shape)
    sliding = tuple(layer for layer in range(shape["layers"]) if _slides(shape, layer))
    delta = shape.get("delta_value_heads", 0) * shape.get("delta_head_dim", 0)
    spec = ModelSpec(
        format="gguf",
        files=(),
        architecture=shape["architecture"],
        name=shape["name"],
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape.get("ffn", shape.get("expert_width", 0)),
        num_heads=shape["heads"],
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=shape.get("v_head_dim", head_dim),
        vocab_size=shape["vocab"],
        context_length=shape["context"],
        layer_kv_heads=tuple(0 if layer in recurrent else kv_heads for layer in range(shape["layers"]))
        if recurrent
        else None,
        sliding_window=shape.get("sliding_window"),
        sliding_layers=len(sliding),
        sliding_layer_ids=sliding,
        kv_lora_rank=shape.get("kv_lora_rank"),
        qk_rope_head_dim=shape.get("qk_rope_head_dim"),
        num_experts=shape.get("experts"),
        num_experts_per_token=shape.get("experts_used"),
        moe_intermediate_size=shape.get("expert_width"),
        ssm_state_size=shape.get("delta_head_dim"),
        ssm_conv_kernel=shape.get("conv_kernel"),
        ssm_inner_size=delta or None,
        ssm_num_heads=shape.get("delta_value_heads"),
        ssm_num_groups=shape.get("delta_key_heads"),
        state_layer_ids=recurrent,
        tied_embeddings=shape["tied"],
        tensors=tuple(TensorSpec(name, size, "F16", 0) for name, size in sizes.items()),
    )
    return _as_mxfp4(spec) if shape["architecture"] == MXFP4_FAMILY else requantized(spec, MIXTURE)


def _slides(shape: Mapping[str, Any], layer: int) -> bool:
    if every := shape.get("full_attention_every"):
        return (layer + 1) % int(every) != 0
    return "sliding_every" in shape and layer % int(shape["sliding_every"]) == 0


def _head_dim(shape: Mapping[str, Any]) -> int:
    if "kv_lora_rank" in shape:
        return int(shape["qk_nope_head_dim"] + shape["qk_rope_head_dim"])
    return int(shape.get("head_dim") or shape["hidden"] // shape["heads"])


def _is_recurrent(shape: Mapping[str, Any], layer: int) -> bool:
    return "attention_every" in shape and (layer + 1) % int(shape["attention_every"]) != 0


def _sizes(shape: Mapping[str, Any]) -> _Sizes:
    hidden, vocabulary = shape["hidden"], shape["vocab"]
    sizes: _Sizes = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    if not shape["tied"]:
        sizes["output.weight"] = (vocabulary, hidden)
    for layer in range(shape["layers"]):
        parts = _delta(shape) if _is_recurrent(shape, layer) else _attention(shape)
        parts |= {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
        is_dense = "experts" not in shape or layer < shape.get("dense_layers", 0)
        parts |= _mlp(shape) if is_dense else _experts(shape)
        sizes |= {f"blk.{layer}.{name}": size for name, size in parts.items()}
    return sizes


def _attention(shape: Mapping[str, Any]) -> _Sizes:
    hidden, heads = shape["hidden"], shape["heads"]
    if rank := shape.get("kv_lora_rank"):
        nope, rope, value = shape["qk_nope_head_dim"], shape["qk_rope_head_dim"], shape["v_head_dim"]
        query = heads * (nope + rope)
        low = shape.get("q_lora_rank")
        queries: _Sizes = (
            {"attn_q_a.weight": (low, hidden), "attn_q_b.weight": (query, low)} if low
            else {"attn_q.weight": (query, hidden)}
        )  # fmt: skip
        return queries | {
            "attn_kv_a_mqa.weight": (rank + rope, hidden),
            "attn_k_b.weight": (heads, rank, nope),
            "attn_v_b.weight": (heads, value, rank),
            "attn_output.weight": (hidden, heads * value),
        }
    dim, kv_heads = _head_dim(shape), shape.get("kv_heads", heads)
    # The delta-net family has a gate beside each query.
    rows = heads * dim * (2 if "attention_every" in shape else 1)
    return {
        "attn_q.weight": (rows, hidden),
        "attn_k.weight": (kv_heads * dim, hidden),
        "attn_v.weight": (kv_heads * dim, hidden),
        "attn_output.weight": (hidden, heads * dim),
    }


def _delta(shape: Mapping[str, Any]) -> _Sizes:
    """A gated-delta layer (llama.cpp, models/qwen35.cpp)."""
    hidden, dim = shape["hidden"], shape["delta_head_dim"]
    keys, values = shape["delta_key_heads"] * dim, shape["delta_value_heads"] * dim
    return {
        "attn_qkv.weight": (2 * keys + values, hidden),
        "attn_gate.weight": (values, hidden),
        "ssm_conv1d.weight": (2 * keys + values, shape["conv_kernel"]),
        "ssm_alpha.weight": (shape["delta_value_heads"], hidden),
        "ssm_beta.weight": (shape["delta_value_heads"], hidden),
        "ssm_out.weight": (hidden, values),
    }


def _mlp(shape: Mapping[str, Any]) -> _Sizes:
    hidden, inner = shape["hidden"], shape["ffn"]
    return {
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
    }


def _experts(shape: Mapping[str, Any]) -> _Sizes:
    hidden, count, inner = shape["hidden"], shape["experts"], shape["expert_width"]
    sizes: _Sizes = {
        "ffn_gate_inp.weight": (count, hidden),
        "ffn_gate_exps.weight": (count, inner, hidden),
        "ffn_up_exps.weight": (count, inner, hidden),
        "ffn_down_exps.weight": (count, hidden, inner),
    }
    if shared := shape.get("shared_expert_width"):
        sizes |= {
            "ffn_gate_shexp.weight": (shared, hidden),
            "ffn_up_shexp.weight": (shared, hidden),
            "ffn_down_shexp.weight": (hidden, shared),
        }
    return sizes


def _as_mxfp4(spec: ModelSpec) -> ModelSpec:
    """Return the published mixture of gpt-oss: experts in MXFP4, other matrices in Q8_0, router and vectors in F32."""
    tensors = tuple(_with_type(tensor, _mxfp4_type(tensor)) for tensor in spec.tensors)
    size = sum(tensor.n_bytes for tensor in tensors)
    return replace(spec, tensors=tensors, file_type="MXFP4", file_bytes=size)


def _mxfp4_type(tensor: TensorSpec) -> str:
    if len(tensor.shape) < 2 or "ffn_gate_inp" in tensor.name:
        return "F32"
    return "MXFP4" if "_exps" in tensor.name else "Q8_0"


def _with_type(tensor: TensorSpec, name: str) -> TensorSpec:
    elements, n_bytes = BLOCKS[name]
    return replace(tensor, tensor_type=name, n_bytes=tensor.n_elements // elements * n_bytes)


def fitting_with_layers_on_host(rows: Sequence[CatalogRow], settings: Settings, placement: Placement) -> list[str]:
    """Return the models that do not fit, but would with `placement.layers` auto; none if that is set otherwise."""
    if settings.placement.layers != "gpu":
        return []
    changed = settings.placement.model_copy(update={"layers": "auto"})
    wanted = settings.model_copy(update={"placement": changed})
    missing = {row.name for row in rows if not row.plan.fits}
    engines = [name for name, engine in ENGINES.items() if engine.keeps_weights_on_host]
    found = (_row(shape, wanted, placement, engines, True) for shape in shapes() if shape["name"] in missing)
    return [row.name for row in sorted(filter(None, found), key=lambda row: row.file_bytes) if row.plan.fits]


def catalog_flags(rows: Sequence[CatalogRow]) -> list[str]:
    """Return the engines' flags in lines: what all models of an engine have in common, then what each has besides."""
    lines = []
    plans = {row.name: row.plan for row in rows if row.plan.fits}
    for engine in dict.fromkeys(plan.request.engine for plan in plans.values()):
        flags = {name: _pairs(plan.engine_args) for name, plan in plans.items() if plan.request.engine == engine}
        first, *others = flags.values()
        common = [pair for pair in first if all(pair in other for other in others)]
        lines.append(f"flags of {engine}: {' '.join(common)}{', and' if len(flags) > 1 else ''}")
        own: dict[str, list[str]] = {}
        for name, pairs in flags.items():
            own.setdefault(" ".join(pair for pair in pairs if pair not in common) or "no others", []).append(name)
        lines += [f"  {text}: {', '.join(names)}" for text, names in own.items() if len(flags) > 1]
    return lines


def _pairs(arguments: Sequence[str]) -> list[str]:
    """Return each flag with its value."""
    pairs: list[str] = []
    for argument in arguments:
        if argument.startswith("--") or not pairs:
            pairs.append(argument)
        else:
            pairs[-1] += f" {argument}"
    return pairs


def catalog_table(rows: Sequence[CatalogRow]) -> str:
    """Return one line per model; those that do not fit come last, with the reason; then the engines' flags."""
    titles = ("model", "file GiB", "engine", "where", "tok/s", "prompt tok/s")
    fitting = [titles, *(_fitting_cells(row) for row in rows if row.plan.fits)]
    others = [(*_model_cells(row), f"does not fit: {row.plan.reasons[0]}") for row in rows if not row.plan.fits]
    model, size = Column(min_width=max(len(_model_cells(row)[0]) for row in rows)), Column(right=True, min_width=8)
    lines = table_lines(fitting, [model, size, LEFT, LEFT, RIGHT, RIGHT])
    lines += table_lines(others, [model, size, LEFT])
    if not all(row.confirmed for row in rows):
        lines.append("* part of the shape was not read for this model")
    return "\n".join([*lines, "", *catalog_flags(rows)]).rstrip()


def _model_cells(row: CatalogRow) -> tuple[str, str]:
    return row.name + ("" if row.confirmed else " *"), f"{row.file_bytes / 2**30:.1f}"


def _fitting_cells(row: CatalogRow) -> tuple[str, ...]:
    speed = row.plan.speed
    decode = f"{speed.single.low:,.0f} to {speed.single.high:,.0f}" if speed else "-"
    prompt = f"{speed.prefill.low:,.0f} to {speed.prefill.high:,.0f}" if speed else "-"
    return *_model_cells(row), row.plan.request.engine, row.plan.where, decode, prompt
