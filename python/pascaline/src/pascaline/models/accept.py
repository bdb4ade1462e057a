"""Whether an engine serves a model, judged by its header alone; plan, serve, verify and doctor all ask this."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gguf_acceptance import Header, Tensor, Verdict, accept

from pascaline.models.architectures import SGLANG_GGUF, SGLANG_HUGGING_FACE
from pascaline.models.folder_tensors import missing_tensors
from pascaline.models.gguf_header import shown
from pascaline.models.safetensors import NAMED_TENSORS

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec, TensorSpec

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
SERVED_METHOD = "bitsandbytes"
"""The only quantisation of a folder that the plugin supports."""


def judge(spec: ModelSpec, engine: str) -> Verdict:
    """Return why an engine refuses a model, and which defaults it assumes. Pure; never raises.

    llama.cpp itself refuses what it cannot load, so this function refuses nothing for llama.cpp that it would serve.
    """
    if engine == "llama.cpp":
        return _for_llama_cpp(spec)
    supported = SGLANG_GGUF if spec.format == "gguf" else SGLANG_HUGGING_FACE
    if spec.architecture not in supported:
        return Verdict(
            [
                f"unsupported architecture {spec.architecture!r}, must be one of: {', '.join(supported)}; "
                "engine llama.cpp may know it"
            ]
        )
    if spec.format == "gguf":
        return accept(
            Header(spec.metadata, {tensor.name: Tensor(tensor.tensor_type, tensor.shape) for tensor in spec.tensors})
        )
    return _folder(spec)


def _for_llama_cpp(spec: ModelSpec) -> Verdict:
    if spec.format != "gguf":
        return Verdict(["llama.cpp serves GGUF files only; set engine to sglang, or convert the model"])
    if not spec.tensors:
        return Verdict(["it has no tensors: it holds a vocabulary or other settings, and no weights"])
    return Verdict()


def _folder(spec: ModelSpec) -> Verdict:
    """A folder of safetensors with quantised weights cannot be computed on these cards, nor on the CPU here."""
    method, said = spec.quantization, "quantization_config"
    if method is None:
        packed = next((tensor for tensor in spec.tensors if _is_packed(tensor)), None)
        if packed is None:
            return _whole_folder(spec)
        method, said = packed.tensor_type.lower(), f"tensor {packed.name!r} of type {packed.tensor_type}"
    if method == SERVED_METHOD:
        return _whole_folder(spec)
    return Verdict(
        [
            f"its weights are quantised by {method} ({said}), whose kernels need a newer GPU than Pascal; "
            "serve the model as a GGUF file, or the folder that it was quantised from"
        ]
    )


def _whole_folder(spec: ModelSpec) -> Verdict:
    missing = missing_tensors(spec)
    if not missing:
        return Verdict()
    some = missing if len(missing) <= NAMED_TENSORS else [*missing[: NAMED_TENSORS - 1], missing[-1]]
    return Verdict(
        [
            f"no file of the folder holds {len(missing)} of the tensors that {spec.architecture} needs: "
            f"{', '.join(map(shown, some))}; download the folder again (git lfs pull, if it was cloned by git)"
        ]
    )


def _is_packed(tensor: TensorSpec) -> bool:
    """Whether a weight is stored as anything but floats of 16 or 32 bits."""
    return tensor.name.endswith(("weight", "qweight")) and tensor.tensor_type not in FLOATS
