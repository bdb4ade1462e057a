"""ModelSpec of a Hugging Face folder: config.json, and the headers of its safetensors files.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from pascaline.errors import ModelError
from pascaline.models.hf_config import HfConfig
from pascaline.models.impostors import head_of, impostor, text_impostor
from pascaline.models.json_file import MAX_JSON_BYTES, parse_object
from pascaline.models.layers import differing, most_common_heads
from pascaline.models.refusal import printable, refuse, shown
from pascaline.models.roles import ENCODERS, folder_pooling
from pascaline.models.source import Source, file_mode, open_file
from pascaline.models.spec import ModelSpec, TensorSpec
from pascaline.models.tensor_checks import check_extents

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
POOLING_NAME = "1_Pooling/config.json"
MAX_TENSORS = 1 << 18
MAX_SHARDS = 1024
MAX_DIMENSIONS = 8
NAMED_TENSORS = 3
"""Most missing tensors that a message names: the first ones and the last."""
MAX_NAME = 255
"""Longest name of a shard, characters (Linux's NAME_MAX)."""

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Bits of one element (safetensors' `Dtype`)."""

_NUMBERED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<shards>\d{5})\.safetensors", re.ASCII)
_OTHER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)
_AGAIN = "download the folder again (git lfs pull, if it was cloned by git)"

OpenPart = Callable[[str], AbstractContextManager[Source]]


def read_safetensors(directory: Path | str) -> ModelSpec:
    """Read a folder with config.json and safetensors: one file, or shards with their index."""
    directory = Path(directory)

    def open_part(name: str) -> AbstractContextManager[Source]:
        if file_mode(directory / name) is None:
            raise ModelError(f"failed to read {directory / name}: there is no such file; {_AGAIN}")
        return open_file(directory / name)

    if file_mode(directory / "config.json") is None:
        raise ModelError(
            f"failed to read {directory}: it has no config.json; name a GGUF file, or a folder as downloaded from "
            "Hugging Face"
        )
    spec = read_safetensors_parts(str(directory), open_part, lambda name: directory / name, _file_names(directory))
    _check_other_files(directory)
    return replace(spec, pooling=None if file_mode(directory / POOLING_NAME) is None else read_pooling(open_part))


def read_pooling(open_part: OpenPart) -> str:
    """How the folder says that its vectors become one, as sentence-transformers writes it, in POOLING_NAME."""
    file, config = _read_json(open_part, POOLING_NAME)
    pooling = folder_pooling(config)
    if pooling is None:
        raise ModelError(f"failed to read {file}: it names no single pooling of mean, cls and last token")
    return pooling


def _check_other_files(directory: Path) -> None:
    """Refuse a folder with something else in place of its tokenizer or configuration: the engine would start."""
    for name in _OTHER_FILES:
        if file_mode(directory / name) is not None:
            with open_file(directory / name) as source:
                if what := text_impostor(head_of(source), is_json=name.endswith(".json")):
                    refuse(source.name, what)


def read_safetensors_parts(
    place: str, open_part: OpenPart, locate: Callable[[str], Path | str], names: list[str] | None
) -> ModelSpec:
    """Read config.json and the headers of the files of these names (None: those that the index names)."""
    config = HfConfig(*_read_json(open_part, "config.json"))
    places = _indexed_places(open_part) if names is None else {}
    names = sorted(set(places.values())) if names is None else names
    tensors: list[TensorSpec] = []
    file_bytes = 0
    for index, name in enumerate(names):
        with _open_shard(open_part, name, len(names)) as source:
            tensors += read_header(source, index)
            file_bytes += source.size
        if len(tensors) > MAX_TENSORS:
            raise ModelError(f"failed to read {place}: it has more than {MAX_TENSORS} tensors")
    _check_shards(place, names, tensors, places)
    _check_numbered(place, names)
    return _spec(config, Path(place).name, tuple(map(locate, names)), tuple(tensors), file_bytes)


@contextmanager
def _open_shard(open_part: OpenPart, name: str, count: int) -> Iterator[Source]:
    try:
        with open_part(name) as source:
            yield source
    except ModelError as error:
        if count == 1:
            raise
        raise ModelError(f"one of the model's {count} shards cannot be read: {error}") from error


def _check_numbered(place: str, names: Sequence[str]) -> None:
    """Refuse shards whose names imply others that are missing: the index or the download is incomplete."""
    for name in names:
        if (match := _NUMBERED.fullmatch(name)) is None:
            continue
        for number in range(1, min(int(match["shards"]), MAX_SHARDS) + 1):
            sibling = f"{match['stem']}-{number:05d}-of-{match['shards']}.safetensors"
            if sibling not in names:
                raise ModelError(
                    f"failed to read {place}: {shown(name)} is there, or in the index, and {shown(sibling)} is not; "
                    f"{_AGAIN}"
                )


def _check_shards(place: str, names: Sequence[str], tensors: Sequence[TensorSpec], places: Mapping[str, str]) -> None:
    """Refuse a tensor that two shards hold, and one that the index names but no shard holds."""
    holder: dict[str, int] = {}
    for tensor in tensors:
        if (other := holder.get(tensor.name)) is not None:
            _refuse_twice(place, tensor.name, names[other], names[tensor.file_index])
        holder[tensor.name] = tensor.file_index
    missing = [name for name in places if name not in holder]
    if missing:
        some = missing if len(missing) <= NAMED_TENSORS else [*missing[: NAMED_TENSORS - 1], missing[-1]]
        raise ModelError(
            f"failed to read {place}: no shard holds {len(missing)} of the {len(places)} tensors that {INDEX_NAME} "
            f"names: {', '.join(map(shown, some))}; {_AGAIN}"
        )


def _refuse_twice(place: str, tensor: str, one: str, other: str) -> NoReturn:
    where = f"in {shown(one)} and in {shown(other)}" if one != other else f"twice in {shown(one)}"
    raise ModelError(f"failed to read {place}: tensor {shown(tensor)} is {where}; {_AGAIN}")


def read_header(source: Source, file_index: int = 0) -> list[TensorSpec]:
    """Read the positions of the tensors in one safetensors file, without their data."""
    if what := impostor(head_of(source)):
        refuse(source.name, what)
    if source.size < 8:
        refuse(
            source.name,
            f"it is truncated: it has {source.size} bytes, the length of its header alone needs 8; download it again",
        )
    (length,) = struct.unpack("<Q", source.read_at(0, 8))
    if length > MAX_JSON_BYTES:
        refuse(source.name, f"its header has {length} bytes, at most {MAX_JSON_BYTES} are read: it is not safetensors")
    if length > source.size - 8:
        refuse(
            source.name,
            f"it is truncated: {length + 8 - source.size} bytes of its header are missing; download it again",
        )
    header = parse_object(f"the header of {source.name}", source.read_at(8, length))
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        refuse(source.name, f"it has {len(header)} tensors, at most {MAX_TENSORS} are read")
    tensors = tuple(_tensor(source, name, entry, 8 + length, file_index) for name, entry in header.items())
    check_extents(source.name, source.size, tensors)
    _check_covered(source, tensors, 8 + length)
    return list(tensors)


def _check_covered(source: Source, tensors: Sequence[TensorSpec], data_start: int) -> None:
    """Refuse bytes that belong to no tensor, as the format requires: tensors fill the file up to its end."""
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.data_offset, tensor.n_bytes)):
        if tensor.data_offset != end:
            refuse(
                source.name,
                f"{tensor.data_offset - end} bytes before tensor {shown(tensor.name)} belong to none; {_AGAIN}",
            )
        end += tensor.n_bytes
    if end != source.size:
        refuse(source.name, f"{source.size - end} bytes at its end belong to no tensor; {_AGAIN}")


def _tensor(source: Source, name: str, entry: object, data_start: int, file_index: int) -> TensorSpec:
    what = f"tensor {shown(name)}"
    if not isinstance(entry, dict):
        refuse(source.name, f"{what} is not described by an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        kind = shown(dtype) if isinstance(dtype, str) else "missing or not a string"
        refuse(source.name, f"the dtype of {what} is {kind}, must be one of {', '.join(DTYPE_BITS)}")
    shape = _numbers(source, entry.get("shape"), f"the shape of {what}", MAX_DIMENSIONS)
    offsets = _numbers(source, entry.get("data_offsets"), f"data_offsets of {what}", 2)
    bits = DTYPE_BITS[dtype]
    for dimension in shape:
        bits *= dimension
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != bits:
        refuse(
            source.name,
            f"{what} of shape {list(shape)} in {dtype} needs {bits // 8} bytes, its data_offsets are {list(offsets)}",
        )
    return TensorSpec(name, shape, dtype, offsets[1] - offsets[0], data_start + offsets[0], file_index)


def _numbers(source: Source, value: object, what: str, limit: int) -> tuple[int, ...]:
    """A list of whole numbers that fit in 63 bits."""
    if not isinstance(value, list) or len(value) > limit:
        refuse(source.name, f"{what} must be a list of at most {limit} numbers")
    for number in value:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 63:
            refuse(source.name, f"{what} must hold whole numbers from 0 to 2^63 - 1")
    return tuple(value)


def _file_names(directory: Path) -> list[str] | None:
    """The safetensors files of a folder without an index; None if there is an index."""
    if file_mode(directory / INDEX_NAME) is not None:
        return None
    try:
        # `consolidated` files hold the same weights again, in another project's layout.
        names = sorted(
            entry.name for entry in directory.glob("*.safetensors") if not entry.name.startswith("consolidated")
        )
    except OSError as error:
        raise ModelError(f"failed to read {directory}: {error.strerror}") from error
    if not names:
        raise ModelError(f"failed to read {directory}: it has no .safetensors file; convert the model to safetensors")
    return names


def _indexed_places(open_part: OpenPart) -> dict[str, str]:
    """Return the shard of each tensor that the index names."""
    file, index = _read_json(open_part, INDEX_NAME)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"failed to read {file}: weight_map is missing or empty")
    names = {name if isinstance(name, str) else "" for name in weight_map.values()}
    for name in names:
        if not name.endswith(".safetensors") or "/" in name or not name.isprintable() or len(name) > MAX_NAME:
            raise ModelError(f"failed to read {file}: {shown(name)} is not the name of a safetensors file beside it")
    if len(names) > MAX_SHARDS:
        raise ModelError(f"failed to read {file}: it names {len(names)} files, at most {MAX_SHARDS} are read")
    return dict(weight_map)


def _read_json(open_part: OpenPart, name: str) -> tuple[str, dict[str, object]]:
    with open_part(name) as source:
        if source.size > MAX_JSON_BYTES:
            refuse(source.name, f"it has {source.size} bytes, at most {MAX_JSON_BYTES} are read")
        head = head_of(source)
        if not head.lstrip().startswith(b"{") and (what := impostor(head)):
            refuse(source.name, what)
        return source.name, parse_object(source.name, source.read_at(0, source.size))


def _spec(
    config: HfConfig, name: str, files: tuple[Path | str, ...], tensors: tuple[TensorSpec, ...], file_bytes: int
) -> ModelSpec:
    layers = config.layer_count()
    hidden = config.count("hidden")
    heads = config.optional("heads") or 0
    kv_heads = config.kv_heads(layers, heads)
    head_dim = _head_dim(config, hidden, heads)
    sliding = config.sliding(layers)
    return ModelSpec(
        format="safetensors",
        files=files,
        quantization=config.quantization,
        architecture=printable(config.architecture),
        name=printable(name),
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=config.optional("intermediate") or 4 * hidden,
        num_heads=heads,
        num_kv_heads=most_common_heads(kv_heads),
        head_dim=head_dim,
        v_head_dim=config.optional("v_head_dim") or head_dim,
        vocab_size=config.count("vocab_size"),
        context_length=config.count("context") if heads else config.optional("context") or 0,
        layer_kv_heads=differing(kv_heads),
        sliding_window=config.optional("sliding_window") if sliding else None,
        sliding_layers=len(sliding),
        sliding_layer_ids=sliding,
        kv_lora_rank=config.optional("kv_lora_rank"),
        qk_rope_head_dim=config.optional("qk_rope_head_dim"),
        num_experts=config.optional("experts"),
        num_experts_per_token=config.optional("experts_per_token"),
        moe_intermediate_size=config.optional("moe_intermediate"),
        ssm_state_size=config.optional("ssm_state"),
        ssm_conv_kernel=config.optional("ssm_conv"),
        ssm_inner_size=_ssm_inner_size(config, heads),
        ssm_num_heads=config.optional("ssm_heads"),
        ssm_num_groups=config.optional("ssm_groups"),
        causal=config.architecture not in ENCODERS,
        tied_embeddings=_is_tied(config, tensors),
        attention_bias=config.flag("attention_bias", default=False),
        ties_embeddings=config.flag("tie_word_embeddings", default=False),
        file_bytes=file_bytes,
        tensors=tensors,
    )


def _head_dim(config: HfConfig, hidden: int, heads: int) -> int:
    """Size of a key head; with MLA the part before compression and the part with positions together."""
    without_positions, with_positions = config.optional("qk_nope_head_dim"), config.optional("qk_rope_head_dim")
    if without_positions and with_positions:
        return without_positions + with_positions
    return config.optional("head_dim") or (hidden // heads if heads else 0)


def _ssm_inner_size(config: HfConfig, heads: int) -> int | None:
    """Width of a recurrent layer, for which families use three names."""
    if not config.optional("ssm_state"):
        return None
    if not heads:
        # Mamba has only recurrent layers, so intermediate_size is their width.
        return config.optional("intermediate")
    linear = (config.optional("linear_num_value_heads") or 0) * (config.optional("linear_value_head_dim") or 0)
    return config.optional("ssm_inner") or linear or None


def _is_tied(config: HfConfig, tensors: tuple[TensorSpec, ...]) -> bool:
    has_head = any(tensor.name.endswith("lm_head.weight") for tensor in tensors)
    return not has_head or config.flag("tie_word_embeddings", default=False)
