"""What the plugin sglang-pascal can do, from its own data: this package never imports it.

plugin.json is the output of `sglang-pascal facts`. `./dev facts` writes it again; a test compares the two.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class KvType:
    """How a KV pool stores one key or value. Bytes."""

    element_bytes: int
    scale_bytes: int
    """Bytes of the scale of each key and each value, per token and head."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model architecture that the plugin serves."""

    model_types: tuple[str, ...]
    """Values of `model_type` in Hugging Face folders."""
    layer_tensors: tuple[str, ...]
    """Tensors of each layer by the names of those folders, without `model.layers.N.`."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """Facts about the plugin, and about the SGLang that it is made for."""

    sglang: tuple[str, ...]
    """Versions that it supports, newest last."""
    bitsandbytes: str
    """The version of the package bitsandbytes that it was tested with."""
    oldest_bitsandbytes: str
    """The oldest that SGLang accepts."""
    platform: str
    """Value of SGLANG_PLATFORM that names it: its entry point."""
    load_format: str
    """SGLang's load format of a prepared folder."""
    quantization: str
    """SGLang's quantisation method that keeps the weights as they are in a GGUF file."""
    variables: Mapping[str, str]
    """prefill_bits, decode_bits, speculative_rows, any_model -> the variable that sets it."""
    prepared_format: int
    """Layout of a prepared folder."""
    manifest: str
    """The file in a prepared folder that names its format."""
    held_as: Mapping[str, str]
    """Type of a matrix in a GGUF file -> the type in which it is held on a GPU."""
    dense: str
    """The type in which a matrix of any other type is held."""
    row_multiple: int
    column_multiple: int
    """The layout on a GPU pads a quantised matrix to multiples of these."""
    activation_block: int
    """Activations that share a scale."""
    kv_types: Mapping[str, KvType]
    """Type of a KV pool, by the plugin's name -> how it stores a value."""
    head_dims: tuple[int, ...]
    """Sizes of a head for which attention has kernels."""
    most_split: int
    """Most tokens of one part of a sequence in decode attention."""
    most_splits: int
    """Most parts of a sequence that is shorter than most_splits * most_split tokens."""
    lookup: str
    """SGLang's speculative algorithm for prompt lookup."""
    draft: str
    """The same for a draft model."""
    speculative_columns: int
    """int8 columns of a product that a step may have which verifies drafts."""
    speculative_widths: tuple[int, ...]
    """Rows that a request may have in a step, from 1; CUDA graphs are recorded for each."""
    graph_batch_sizes: tuple[int, ...]
    """Batch sizes of decode steps that are recorded as CUDA graphs."""
    architectures: Mapping[str, Architecture]
    """By `general.architecture` of a GGUF file."""
    tool_call_parsers: tuple[str, ...]
    reasoning_parsers: tuple[str, ...]
    """Names that SGLang has for parsers of answers."""

    @property
    def model_types(self) -> dict[str, Architecture]:
        """`model_type` of a Hugging Face folder -> its architecture."""
        return {name: each for each in self.architectures.values() for name in each.model_types}


def parse(facts: Mapping[str, Any]) -> Plugin:
    """Return the facts in types. Raises KeyError if one is missing."""
    weights, attention, prepared = facts["weights"], facts["attention"], facts["prepared"]
    return Plugin(
        sglang=tuple(facts["sglang"]),
        bitsandbytes=facts["bitsandbytes"]["tested"],
        oldest_bitsandbytes=facts["bitsandbytes"]["oldest"],
        platform=facts["platform"],
        load_format=facts["load_format"],
        quantization=facts["quantization"],
        variables=facts["variables"],
        prepared_format=prepared["format"],
        manifest=prepared["manifest"],
        held_as=weights["held_as"],
        dense=weights["otherwise"],
        row_multiple=weights["row_multiple"],
        column_multiple=weights["column_multiple"],
        activation_block=facts["activations"]["block"],
        kv_types={name: KvType(**each) for name, each in facts["kv_cache"].items()},
        head_dims=tuple(attention["head_dims"]),
        most_split=attention["most_split"],
        most_splits=attention["most_splits"],
        lookup=facts["speculation"]["lookup"],
        draft=facts["speculation"]["draft"],
        speculative_columns=facts["speculation"]["columns"],
        speculative_widths=tuple(facts["speculation"]["widths"]),
        graph_batch_sizes=tuple(facts["graph_batch_sizes"]),
        architectures={
            name: Architecture(tuple(each["model_types"]), tuple(each["layer_tensors"]))
            for name, each in facts["architectures"].items()
        },
        tool_call_parsers=tuple(facts["parsers"]["tool_call"]),
        reasoning_parsers=tuple(facts["parsers"]["reasoning"]),
    )


PLUGIN: Final = parse(json.loads(files("pascaline").joinpath("plugin.json").read_text()))
"""The facts that were written when this version was released."""
