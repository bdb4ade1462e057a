"""What the plugin can do, as plain data: `sglang-pascal facts`.

pascaline plans and starts SGLang without importing this package, often in another environment. It carries this data as
a file; `./dev facts` writes it, and a test compares the two.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gguf_acceptance.dimensions import Dimensions, wanted_tensors

from sglang_pascal import names, versions
from sglang_pascal.attention.kv_types import KV_TYPES
from sglang_pascal.checkpoint.architectures import ARCHITECTURES
from sglang_pascal.checkpoint.prepare import FORMAT, MANIFEST
from sglang_pascal.device import PLUGIN_NAME
from sglang_pascal.errors import UnsupportedVersionError
from sglang_pascal.kernels import formats
from sglang_pascal.kernels.build import HEAD_DIMS
from sglang_pascal.ops.attention import MOST_SPLIT, SPLITS
from sglang_pascal.quantization.storage import DENSE, LOSSLESS

if TYPE_CHECKING:
    from sglang_pascal.checkpoint.architectures import Architecture

_ONE_LAYER: Final = Dimensions(layers=1, hidden=1, feed_forward=1, heads=1, kv_heads=1, head_dim=2, vocabulary=1)
_PARSERS: Final = {
    "tool_call": ("srt/function_call/function_call_parser.py", "ToolCallParserEnum"),
    "reasoning": ("srt/parser/reasoning_parser.py", "DetectorMap"),
}
"""What is parsed -> SGLang's file, and the table in it."""


def collect() -> dict[str, Any]:
    """Return every fact. Raises UnsupportedVersionError if SGLang is missing or has another shape."""
    return {
        "sglang": list(versions.SUPPORTED_SGLANG),
        "bitsandbytes": {"tested": versions.BITSANDBYTES, "oldest": versions.OLDEST_BITSANDBYTES},
        "platform": PLUGIN_NAME,
        "load_format": names.LOAD_FORMAT,
        "quantization": names.QUANTIZATION,
        "variables": {
            "prefill_bits": names.PREFILL_BITS_VARIABLE,
            "decode_bits": names.DECODE_BITS_VARIABLE,
            "speculative_rows": names.ROWS_VARIABLE,
            "any_model": names.ANY_MODEL_VARIABLE,
        },
        "prepared": {"format": FORMAT, "manifest": MANIFEST},
        "weights": {
            "held_as": {name: name for name in formats.FORMATS} | LOSSLESS,
            "otherwise": DENSE,
            "row_multiple": formats.GROUP_ROWS,
            "column_multiple": formats.STEP_COLUMNS,
        },
        "activations": {"bits": list(formats.ACTIVATION_BITS), "block": formats.BLOCK},
        "kv_cache": {
            name: {"element_bytes": kind.element_bytes, "scale_bytes": kind.scale_bytes}
            for name, kind in KV_TYPES.items()
        },
        "attention": {
            "head_dims": list(HEAD_DIMS),
            "most_split": MOST_SPLIT,
            "most_splits": max(longest // split for longest, split in SPLITS.items()),
        },
        "speculation": {
            "lookup": names.LOOKUP,
            "draft": names.DRAFT,
            "columns": formats.SPECULATIVE_COLUMNS,
            "widths": list(formats.SPECULATIVE_WIDTHS),
        },
        "graph_batch_sizes": list(formats.RECORDED_BATCH_SIZES),
        "architectures": {name: _architecture(each) for name, each in ARCHITECTURES.items()},
        "parsers": {what: _keys_of(*place) for what, place in _PARSERS.items()},
    }


def _architecture(architecture: Architecture) -> dict[str, Any]:
    """Return the `model_type`s of Hugging Face folders, and the tensors of one layer under the names used there."""
    wanted = [each.name for each in wanted_tensors(architecture.name, _ONE_LAYER, biased=False) if each.required]
    layer = [str(architecture.hf_name(name)) for name in wanted if name.startswith("blk.")]
    return {
        "model_types": [architecture.model_type, *architecture.other_model_types],
        "layer_tensors": [name.removeprefix("model.layers.0.") for name in layer],
    }


def _keys_of(file: str, table: str) -> list[str]:
    """Return the keys of a table in SGLang's source. It is not imported: that takes seconds, and a GPU for some."""
    package = importlib.util.find_spec("sglang")
    if package is None or not package.submodule_search_locations:
        raise UnsupportedVersionError("SGLang is not installed; its parsers are part of the facts")
    path = Path(next(iter(package.submodule_search_locations))) / file
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        value = getattr(node, "value", None)
        if isinstance(value, ast.Dict) and any(isinstance(each, ast.Name) and each.id == table for each in targets):
            return sorted(str(key.value) for key in value.keys if isinstance(key, ast.Constant))
    raise UnsupportedVersionError(f"{path} has no table {table}; correct its place in sglang_pascal/facts.py")


def print_facts() -> int:
    """Print every fact as JSON."""
    sys.stdout.write(json.dumps(collect(), indent=2) + "\n")
    return 0
