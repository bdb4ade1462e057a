"""Feeds damaged model headers to the readers until one answers with anything but a model or a clear error.

    python tests/fuzz/fuzz_models.py --inputs 1000000 --seed 1

The same seed gives the same inputs. Each input has a time limit and the process a memory limit; an input that breaks a
rule is saved in --save and ends the run with code 1. `--replay FILE` runs a saved input again.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

from pascaline.errors import ModelError
from pascaline.models.gguf import read_gguf_parts
from pascaline.models.safetensors import INDEX_NAME, read_safetensors_parts
from support.raw_models import CONFIG, LLAMA, MemoryFolder, gguf_file, safetensors_file, string, tensor, value

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec

MEMORY_LIMIT_BYTES = 1 << 30
TIME_LIMIT_SECONDS = 10.0
MAX_MESSAGE = 600
INTERESTING = (
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    12,
    31,
    32,
    255,
    256,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 60,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
JSON_PIECES = (
    b"-1",
    b"1e400",
    b"NaN",
    b"null",
    b"true",
    b'"\\ud800"',
    b"18446744073709551616",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 2000,
    b"[]",
    b"{}",
    b'"F16"',
    b'"F4"',
    b"[0,0]",
    b"\xff",
    b'"__metadata__"',
    b'"../x.safetensors"',
)

Files = dict[str, bytes]


class TooSlowError(Exception):
    """An input took longer than it may."""


def gguf_seeds() -> list[Files]:
    """Sound GGUF models that between them hold every kind of value, and one in two parts."""
    pair = [tensor("token_embd.weight", (256, 4), 12, 0), tensor("blk.0.attn_q.weight", (32, 8), 8, 576)]
    values = LLAMA | {
        "general.alignment": value("uint32", 64),
        "general.file_type": value("uint32", 15),
        "tokenizer.ggml.tokens": value("array", ("string", ["a", "bc", "", "déf"])),
        "tokenizer.ggml.scores": value("array", ("float32", [0.0, -1.0])),
        "nested": value("array", ("array", [("uint8", [1, 2]), ("array", [("string", ["x"])])])),
        "llama.attention.sliding_window": value("uint32", 16),
        "llama.attention.sliding_window_pattern": value("array", ("bool", [True, False])),
        "llama.attention.head_count_kv": value("array", ("int32", [2, 0])),
        "real": value("float64", 0.5),
    }
    mixed = LLAMA | {
        "general.architecture": value("string", "deepseek2"),
        **{key.replace("llama", "deepseek2"): content for key, content in LLAMA.items() if key.startswith("llama.")},
        "deepseek2.attention.kv_lora_rank": value("uint16", 4),
        "deepseek2.expert_count": value("uint64", 8),
        "deepseek2.ssm.state_size": value("int64", 8),
    }
    part = {"split.no": value("uint16", 0), "split.count": value("uint16", 2), "split.tensors.count": value("int32", 2)}
    second = {**part, "split.no": value("uint16", 1)}
    return [
        {"m.gguf": gguf_file(LLAMA, pair)},
        {"m.gguf": gguf_file(values, pair, alignment=64)},
        {"m.gguf": gguf_file(LLAMA | {"long": value("string", "y" * 5000), "far": value("uint8", 1)}, pair)},
        {"m.gguf": gguf_file(mixed, pair[:1], version=2)},
        {
            "m-00001-of-00002.gguf": gguf_file(LLAMA | part, pair[:1]),
            "m-00002-of-00002.gguf": gguf_file(second, [tensor("output.weight", (32, 8), 8, 0)]),
        },
    ]


def safetensors_seeds() -> list[Files]:
    """Sound Hugging Face folders: one file, shards with an index, a multimodal configuration."""
    entry = {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}
    other = {"dtype": "F4", "shape": [3, 2], "data_offsets": [64, 67]}
    single = safetensors_file({"__metadata__": {"format": "pt"}, "model.embed": entry, "b": other}, data_bytes=67)
    shard = safetensors_file({"lm_head.weight": entry}, data_bytes=64)
    index = {"metadata": {}, "weight_map": {"model.embed": "a.safetensors", "lm_head.weight": "b.safetensors"}}
    hybrid = {"model_type": "gemma3", "text_config": CONFIG | {"model_type": "gemma3_text", "sliding_window": 8}}
    layered = CONFIG | {
        "layer_types": ["sliding_attention", "linear_attention"],
        "sliding_window": 4,
        "kv_lora_rank": 4,
    }
    return [
        {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": single},
        {"config.json": json.dumps(layered).encode(), "model.safetensors": single},
        {
            "config.json": json.dumps(hybrid).encode(),
            INDEX_NAME: json.dumps(index).encode(),
            "a.safetensors": single,
            "b.safetensors": shard,
        },
    ]


def read(files: Files, tail_bytes: int) -> ModelSpec:
    """Read the model in these files with the reader of its format."""
    # Every byte of a safetensors file belongs to a tensor, so that those of the seeds have theirs already.
    folder = MemoryFolder(files, 0 if "config.json" in files else tail_bytes)
    if "config.json" in files:
        names = None if INDEX_NAME in files else ["model.safetensors"]
        return read_safetensors_parts("folder", folder.open, str, names)
    return read_gguf_parts(min(files), folder.open, str)


def check(files: Files, tail_bytes: int) -> str:
    """Run one input and return its outcome; an AssertionError or any other exception is a broken rule."""
    try:
        spec = read(files, tail_bytes)
    except ModelError as error:
        message = str(error)
        assert len(message) <= MAX_MESSAGE, f"a message of {len(message)} characters"
        assert message.isprintable(), "a message with control characters"
        message.encode()
        assert not message.endswith("."), "a message that ends in a full stop"
        return "refused"
    size = sum(len(data) + tail_bytes for data in files.values())
    assert spec.weights_bytes <= size, "tensors larger than their files"
    assert len({tensor.name for tensor in spec.tensors}) == len(spec.tensors), "two tensors of one name"
    assert 1 <= spec.num_hidden_layers <= 1 << 10, "a number of layers out of range"
    assert all(layer < spec.num_hidden_layers for layer in spec.sliding_layer_ids), "a layer that is not there"
    return "read"


def mutate(rng: random.Random, files: Files) -> Files:
    """One to six changes in one of the files."""
    damaged = dict(files)
    name = rng.choice(sorted(files))
    data = bytearray(damaged[name])
    is_json = "config.json" in files
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        rng.choice(_JSON_CHANGES if is_json and rng.random() < 0.7 else _BYTE_CHANGES)(rng, data)
    damaged[name] = bytes(data)
    if rng.random() < 0.02 and len(damaged) > 1:
        del damaged[rng.choice(sorted(damaged))]
    if rng.random() < 0.02:
        first, second = rng.choice(sorted(damaged)), rng.choice(sorted(damaged))
        damaged[first] = damaged[second]
    return damaged


def _tail(rng: random.Random) -> int:
    """Bytes after the header: enough for the tensors of the seeds, too few, or a sparse file of many GiB."""
    choice = rng.random()
    if choice < 0.9:
        return 1024
    return rng.randrange(1024) if choice < 0.999 else 1 << rng.randrange(20, 45)


def _place(rng: random.Random, data: bytearray) -> int:
    return rng.randrange(len(data) + 1)


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _number(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    width, code = rng.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
    data[at : at + width] = struct.pack("<" + code, rng.choice(INTERESTING) & ((1 << 8 * width) - 1))


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[_place(rng, data) :]


def _delete(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    del data[at : at + rng.randrange(1, 17)]


def _repeat(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    data[at:at] = data[at : at + rng.randrange(1, 65)]


def _insert(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    data[at:at] = rng.choice((string(rng.randbytes(rng.randrange(9))), rng.randbytes(rng.randrange(1, 9)), bytes(8)))


def _json_piece(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    data[at : at + rng.choice((0, 0, 1, 2, 4))] = rng.choice(JSON_PIECES)


def _json_number(rng: random.Random, data: bytearray) -> None:
    """Replace a number by another, and correct the header's length if there is one."""
    digits = [at for at, byte in enumerate(data) if 48 <= byte <= 57 and (at == 0 or not 48 <= data[at - 1] <= 57)]
    if not digits:
        return
    start = rng.choice(digits)
    end = start
    while end < len(data) and 48 <= data[end] <= 57:
        end += 1
    data[start:end] = str(rng.choice(INTERESTING)).encode()
    _mend_length(data)


def _json_entry(rng: random.Random, data: bytearray) -> None:
    """Repeat a piece between two commas, so that keys are there twice and lists grow."""
    commas = [at for at, byte in enumerate(data) if byte == ord(",")]
    if len(commas) > 1:
        start, end = sorted(rng.sample(commas, 2))
        data[start:start] = data[start:end]
        _mend_length(data)


def _mend_length(data: bytearray) -> None:
    end = data.rfind(b"}")
    if len(data) > 8 and data[8:9] == b"{" and end > 8:
        data[:8] = struct.pack("<Q", end + 1 - 8)


_BYTE_CHANGES = (_flip, _flip, _number, _number, _number, _truncate, _delete, _repeat, _insert)
_JSON_CHANGES = (_json_piece, _json_number, _json_number, _json_entry)


def run(inputs: int, seed: int, save: Path) -> int:
    """Run the inputs; returns the exit code."""
    rng = random.Random(seed)
    families = {"gguf": gguf_seeds(), "safetensors": safetensors_seeds()}
    outcomes: Counter[str] = Counter()
    slowest, started = 0.0, time.perf_counter()
    for number in range(inputs):
        family = rng.choice(("gguf", "gguf", "safetensors"))
        files = mutate(rng, rng.choice(families[family]))
        tail = _tail(rng)
        begun = time.perf_counter()
        try:
            outcomes[f"{family} {_limited(files, tail)}"] += 1
        except Exception as error:
            return _report(files, tail, error, number, save)
        slowest = max(slowest, time.perf_counter() - begun)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{inputs} inputs in {seconds:.0f} s: {inputs / seconds:.0f} inputs/s")
    print(f"slowest {slowest:.2f} s, peak {peak:.0f} MiB resident")
    print(", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())))
    return 0


def _limited(files: Files, tail: int) -> str:
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_SECONDS)
    try:
        return check(files, tail)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _report(files: Files, tail: int, error: Exception, number: int, save: Path) -> int:
    save.mkdir(parents=True, exist_ok=True)
    target = save / f"input-{number}.json"
    target.write_text(json.dumps({"tail_bytes": tail, "files": {name: data.hex() for name, data in files.items()}}))
    print(f"input {number} breaks a rule: {type(error).__name__}: {error}; saved as {target}", file=sys.stderr)
    return 1


def replay(path: Path) -> int:
    """Run one saved input without catching what it raises."""
    saved = json.loads(path.read_text())
    print(check({name: bytes.fromhex(data) for name, data in saved["files"].items()}, saved["tail_bytes"]))
    return 0


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="how many damaged models to read (default 20000)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same inputs (default 1)")
    parser.add_argument("--save", type=Path, default=Path("fuzz-failures"), help="folder for inputs that break a rule")
    parser.add_argument("--replay", type=Path, help="run one saved input again")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    signal.signal(signal.SIGALRM, _too_slow)
    if arguments.replay:
        return replay(arguments.replay)
    return run(arguments.inputs, arguments.seed, arguments.save)


def _too_slow(_signal: int, _frame: object) -> None:
    raise TooSlowError(f"it took more than {TIME_LIMIT_SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())
