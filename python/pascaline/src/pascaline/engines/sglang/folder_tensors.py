"""Which tensors a folder of safetensors must hold, and of what shape: one for every parameter, and no others.

SGLang leaves a parameter without a tensor uninitialised, and skips tensors that it has no parameter for: the layers
beyond `num_hidden_layers`, a bias that config.json does not mention. The names are those of transformers' modelling
code (modeling_llama.py and so on), which SGLang's loaders expect; the plugin knows them, because it translates the
names in GGUF files into them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pascaline.models.refusal import shown
from pascaline.models.safetensors import NAMED_TENSORS
from pascaline.plugin import PLUGIN

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pascaline.models.spec import ModelSpec, TensorSpec

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
LAYER_TENSORS = {name: architecture.layer_tensors for name, architecture in PLUGIN.model_types.items()}
"""`model_type` -> tensors of each layer."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of a tensor that is not packed; a packed one has a shape of its own."""
_PREFIXES = {"qwen3": ("model.", ""), "gemma3": ("language_model.model.", "model.language_model.", "model.")}
"""What stands before the names of the text model, if it can be anything but `model.`; SGLang adds it for qwen3."""
_LEFT_OUT = {
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$": "SGLang computes it from config.json",
    r"\.(weight|bias)\.|\.SCB$|\.weight_format$": "the packing of a weight by bitsandbytes",
}
"""Tensors that are no parameters (a pattern), with the reason why they may be there."""
_VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


def folder_problems(spec: ModelSpec) -> list[str]:
    """Return why the tensors of a folder are not those of its architecture; empty if they are."""
    held = {tensor.name: tensor for tensor in spec.tensors}
    wanted = wanted_shapes(spec)
    found = (
        _missing(spec, [name for name in wanted if name not in held]),
        _misshapen(wanted, held),
        _left_over(spec, [name for name in held if name not in wanted and not _may_be_left_out(name, spec)]),
    )
    return [problem for problem in found if problem is not None]


def wanted_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the folder's architecture has, in the model's order."""
    prefix = _prefix(spec)
    vocabulary = (spec.vocab_size, spec.hidden_size)
    wanted: dict[str, tuple[int, ...]] = {f"{prefix}{EMBEDDING}": vocabulary}
    of_layer = dict(_layer_shapes(spec))
    for layer in range(spec.num_hidden_layers):
        wanted |= {f"{prefix}layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    wanted[f"{prefix}norm.weight"] = (spec.hidden_size,)
    if spec.ties_embeddings is False:
        wanted[_head(spec)] = vocabulary
    return wanted


def _prefix(spec: ModelSpec) -> str:
    held = {tensor.name for tensor in spec.tensors}
    prefixes = _PREFIXES.get(spec.architecture, ("model.",))
    return next((prefix for prefix in prefixes if f"{prefix}{EMBEDDING}" in held), prefixes[0])


def _head(spec: ModelSpec) -> str:
    """Name of the output head: the one that is there, if its family has several names for it."""
    return next((tensor.name for tensor in spec.tensors if tensor.name.endswith(f".{HEAD}")), HEAD)


def _layer_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    rows = _rows(spec)
    columns = dict.fromkeys(rows, spec.hidden_size)
    columns |= {"o_proj": spec.num_heads * spec.head_dim, "down_proj": spec.intermediate_size}
    names = LAYER_TENSORS[spec.architecture]
    for name in names:
        module, _, kind = name.removeprefix("self_attn.").removeprefix("mlp.").partition(".")
        if module not in rows:
            yield name, (spec.head_dim if module in ("q_norm", "k_norm") else spec.hidden_size,)
        else:
            yield name, (rows[module], columns[module]) if kind == "weight" else (rows[module],)
    if spec.attention_bias and "self_attn.q_proj.bias" not in names:
        yield from ((f"self_attn.{each}_proj.bias", (rows[f"{each}_proj"],)) for each in "qkvo")


def _rows(spec: ModelSpec) -> dict[str, int]:
    kv, inner = spec.num_kv_heads * spec.head_dim, spec.intermediate_size
    attention = {"q_proj": spec.num_heads * spec.head_dim, "k_proj": kv, "v_proj": kv, "o_proj": spec.hidden_size}
    return attention | {"gate_proj": inner, "up_proj": inner, "down_proj": spec.hidden_size}


def _may_be_left_out(name: str, spec: ModelSpec) -> bool:
    if name.endswith(HEAD):
        return spec.ties_embeddings is True
    if spec.architecture == "gemma3" and _VISION.search(name):
        return True
    return any(re.search(pattern, name) for pattern in _LEFT_OUT)


def _missing(spec: ModelSpec, names: list[str]) -> str | None:
    if not names:
        return None
    some = names if len(names) <= NAMED_TENSORS else [*names[: NAMED_TENSORS - 1], names[-1]]
    return (
        f"no file of the folder holds {len(names)} of the tensors that {spec.architecture} needs: "
        f"{', '.join(map(shown, some))}; download the folder again (git lfs pull, if it was cloned by git)"
    )


def _misshapen(wanted: Mapping[str, tuple[int, ...]], held: Mapping[str, TensorSpec]) -> str | None:
    """Say which tensor has another shape than config.json implies, the first of them."""
    wrong = [
        name
        for name, shape in wanted.items()
        if name in held and held[name].shape != shape and held[name].tensor_type in FLOATS
    ]
    if not wrong:
        return None
    name, more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return (
        f"tensor {shown(name)}{more} has shape {list(held[name].shape)}, must be {list(wanted[name])} by config.json; "
        "download config.json and the weights again, from the same model"
    )


def _left_over(spec: ModelSpec, names: list[str]) -> str | None:
    if not names:
        return None
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return (
        f"tensor {shown(names[0])}{more} is not part of {spec.architecture} with the {spec.num_hidden_layers} layers "
        "and the biases that config.json says, so SGLang would leave it out; download config.json and the weights "
        "again, from the same model"
    )
