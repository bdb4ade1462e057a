"""Whether SGLang with the plugin serves a model, judged by its header alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gguf_acceptance import Header, Tensor, Verdict, accept
from gguf_acceptance.header import is_number
from gguf_acceptance.rope import DEFAULT_BASE, RopeError, llama3_scaling, shortest

from pascaline.engines.rope_factors import rope_factors
from pascaline.engines.sglang.folder_tensors import FLOATS, folder_problems
from pascaline.engines.sglang.weights import BITSANDBYTES
from pascaline.models.roles import LAST
from pascaline.plugin import PLUGIN

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec, TensorSpec
    from pascaline.settings import Role, Settings

GGUF_ARCHITECTURES = tuple(sorted(PLUGIN.architectures))
"""`general.architecture` of GGUF files that the plugin loads; Mistral files call themselves llama."""
MODEL_TYPES = tuple(sorted(PLUGIN.model_types))
"""`model_type` of config.json."""
SERVED_METHOD = BITSANDBYTES
"""The only quantisation of a folder that the plugin supports."""


def judge(spec: ModelSpec) -> Verdict:
    """Return why the model is refused, and which defaults are assumed. Pure; never raises."""
    if not knows(spec):
        return Verdict(
            [
                f"unsupported architecture {spec.architecture!r}, must be one of: {', '.join(_architectures(spec))}; "
                "engine llama.cpp may know it"
            ]
        )
    if spec.format == "gguf":
        return accept(
            Header(spec.metadata, {tensor.name: Tensor(tensor.tensor_type, tensor.shape) for tensor in spec.tensors})
        )
    return _folder(spec)


def rope_refusals(spec: ModelSpec) -> list[str]:
    """Return what is wrong with Llama 3's factors in a file on this machine; SGLang has a rule for them, no table."""
    factors = rope_factors(spec)
    base = spec.metadata.get(f"{spec.architecture}.rope.freq_base", DEFAULT_BASE)
    if factors is None or not is_number(base) or base <= 0:
        return []
    try:
        llama3_scaling(factors, shortest(base))
    except RopeError as error:
        return [str(error)]
    return []


def role_problems(settings: Settings) -> list[tuple[str, str]]:
    """Return (key, sentence) for a role that SGLang does not serve, whatever the model."""
    if settings.role != "rerank":
        return []
    return [("role", "'rerank' is not served by SGLang here, must be generate or embed, or engine be llama.cpp")]


def role_refusal(spec: ModelSpec, role: Role) -> str | None:
    """Return why SGLang does not serve a model in a role; None if it does."""
    elsewhere = "set engine to llama.cpp, which serves it from a GGUF file"
    if role == "rerank":
        return f"SGLang is not set up for reranking models here; {elsewhere}"
    if role == "embed" and not spec.causal:
        return f"{spec.architecture} is an encoder, and SGLang embeds with causal models here; {elsewhere}"
    if role == "embed" and spec.pooling != LAST:
        return f"its vectors are pooled by {spec.pooling}, and SGLang takes that of the last token here; {elsewhere}"
    return None


def knows(spec: ModelSpec) -> bool:
    """Whether the plugin loads models of this architecture."""
    return spec.architecture in _architectures(spec)


def _architectures(spec: ModelSpec) -> tuple[str, ...]:
    return GGUF_ARCHITECTURES if spec.format == "gguf" else MODEL_TYPES


def _folder(spec: ModelSpec) -> Verdict:
    """A folder of safetensors with quantised weights cannot be computed on these cards, nor on the CPU here."""
    method, said = spec.quantization, "quantization_config"
    if method is None:
        packed = next((tensor for tensor in spec.tensors if _is_packed(tensor)), None)
        if packed is None:
            return Verdict(folder_problems(spec))
        method, said = packed.tensor_type.lower(), f"tensor {packed.name!r} of type {packed.tensor_type}"
    if method == SERVED_METHOD:
        return Verdict(folder_problems(spec))
    return Verdict(
        [
            f"its weights are quantised by {method} ({said}), whose kernels need a newer GPU than Pascal; "
            "serve the model as a GGUF file, or the folder that it was quantised from"
        ]
    )


def _is_packed(tensor: TensorSpec) -> bool:
    """Whether a weight is stored as anything but floats of 16 or 32 bits."""
    return tensor.name.endswith(("weight", "qweight")) and tensor.tensor_type not in FLOATS
