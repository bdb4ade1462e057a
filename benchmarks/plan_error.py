"""The plan beside what SGLang really allocates: weights, KV cache and tables to the byte, on a GPU the whole as well.

    python benchmarks/plan_error.py [--device cpu|cuda] [--models llama,qwen3] [--contexts 512,1024,2048] [--json]

Each model has random weights and is loaded by SGLang itself, in a process of its own, with the flags of the plan
(tests/support/sglang_allocations.py). On the CPU each takes half a minute, most of it imports. On a GPU, models of a
gigabyte are made, and the driver's count of used memory, after a prefill and some decode steps, is compared with the
plan's total. --card names the profile whose constants are used; without it they are those of a GPU without a profile,
and the size of its CUDA context, which no plan can know, is taken as measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.hf_models import write_folder, write_mixture_of_experts  # noqa: E402
from support.models import Shape, tiny, write_gguf  # noqa: E402

MIB = 1 << 20
REQUESTS = 4
TIMEOUT_SECONDS = 600
ALLOWED_SHARE, ALLOWED_BYTES = 0.03, 150 * MIB
"""A total may miss by the larger of the two."""
CHILD = ROOT / "tests/support/sglang_allocations.py"

LARGE = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16, "head_dim": 128, "vocab_size": 32064}
"""About a gigabyte in float16: small enough to be written in seconds, large enough for 3 % to mean something."""


@dataclass
class Row:
    """One model at one context; bytes."""

    model: str
    context: int
    dtype: str
    weights_plan: int
    weights_true: int
    kv_plan: int
    kv_true: int
    tables_plan: int
    tables_true: int
    total_plan: int | None = None
    total_true: int | None = None
    """On a GPU: what the driver counts beyond what was used before, after some work."""
    context_true: int | None = None
    """On a GPU: what the driver counts once torch has made its context, before anything is loaded."""

    @property
    def is_exact(self) -> bool:
        """Whether weights and KV cache are equal to the byte."""
        return self.weights_plan == self.weights_true and self.kv_plan == self.kv_true

    @property
    def total_is_close(self) -> bool:
        """Whether the total is within what is allowed; True where there is none."""
        if self.total_plan is None or self.total_true is None:
            return True
        return abs(self.total_plan - self.total_true) <= max(ALLOWED_SHARE * self.total_true, ALLOWED_BYTES)


def shapes(*, large: bool) -> dict[str, Shape]:
    """The models: with and without grouped queries, four families, sliding windows, a vocabulary that is padded."""
    sizes = {"num_heads": 16, "num_kv_heads": 4, **LARGE} if large else {}
    heads = 16 if large else 8
    return {
        "llama": tiny("llama", **sizes),
        "llama-mha": tiny("llama", **(sizes | {"num_kv_heads": heads})),
        "qwen2": tiny("qwen2", **(sizes | {"vocab_size": 32000 + 7 if large else 500})),
        "qwen3": tiny("qwen3", **(sizes | {"tied_embeddings": True})),
        "gemma2": tiny("gemma2", **sizes),
        "gemma3": tiny("gemma3", **(sizes | {"rope_theta": 1_000_000.0})),
        "qwen3-moe": tiny("qwen3", **sizes),
    }


def write_model(folder: Path, name: str, shape: Shape, *, gguf: str | None) -> Path:
    """Write the model that a name stands for; gguf: the mixture of a GGUF file instead of a folder."""
    if gguf is not None:
        caps = {"gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0}
        metadata = caps if shape.architecture == "gemma2" else None
        return write_gguf(folder / f"{name}.gguf", shape, gguf, metadata=metadata)
    if name == "qwen3-moe":
        size = shape.intermediate_size // 4
        return write_mixture_of_experts(folder / name, shape, experts=8, used=2, expert_size=size)
    return write_folder(folder / name, shape)


def measure(model: Path, flags: list[str], *, python: str = sys.executable) -> dict:
    """What SGLang allocates for a model under these flags."""
    environment = os.environ | {
        "SGLANG_PLATFORM": "pascal",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if flags[flags.index("--device") + 1] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [python, str(CHILD), "--model-path", str(model), *flags]
    answer = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_SECONDS, check=False
    )
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"SGLang ended with {answer.returncode}:\n{answer.stderr[-3000:]}")
    return json.loads(lines[-1])


def compare(
    place: Path,
    name: str,
    context: int,
    *,
    device: str,
    card: str | None,
    kv_dtype: str = "auto",
    quantization: str | None = None,
    python: str = sys.executable,
) -> Row:
    """Plan a model, let SGLang allocate it with the plan's flags, and put both side by side."""
    from pascaline.cards import load_card, unknown_card
    from pascaline.models.reader import read_model
    from pascaline.planning import PlanRequest, make_plan

    dtype = "float32" if device == "cpu" else "float16"
    kv_dtype = {"float32": "fp32", "float16": "fp16"}[dtype] if kv_dtype == "auto" else kv_dtype
    spec = read_model(place)
    # Only constants come from the profile: the memory is that of a card on which everything fits.
    profile = load_card("cpu") if device == "cpu" else load_card(card) if card else unknown_card("GPU", 0)
    request = PlanRequest(
        card_bytes=64 << 30, device=device, dtype=dtype, kv_dtype=kv_dtype,
        context_length=context, max_running_requests=REQUESTS, max_total_tokens=REQUESTS * context,
        quantization=quantization,
    )  # fmt: skip
    plan = make_plan(spec, profile, request)
    assert plan.fits, plan.reasons
    flags = [*plan.engine_args, "--device", device, "--dtype", dtype]
    # The fraction is of this machine's memory, whatever the plan's card has.
    flags[flags.index("--mem-fraction-static") + 1] = "0.5"
    place = prepared(place, python)
    if quantization is not None:
        flags += ["--quantization", quantization]
    if place.is_dir() and (place / "pascal.json").exists():
        flags += ["--load-format", "pascal_gguf"]
    found = measure(place, flags, python=python)
    row = Row(
        name, context, dtype, plan.weights_bytes, found["parameters_bytes"], plan.kv_bytes, found["kv_bytes"],
        plan.part("tables"), found["weights_bytes"] - found["parameters_bytes"] + found["request_table_bytes"],
    )  # fmt: skip
    if device == "cuda":
        row.total_plan, row.total_true, row.context_true = plan.total_bytes, found["used_bytes"], found["context_bytes"]
        if card is None:
            row.total_plan += row.context_true - plan.part("context")
    return row


def prepared(place: Path, python: str) -> Path:
    """The folder that SGLang starts from: a GGUF file's is made by the plugin."""
    if place.suffix != ".gguf":
        return place
    folder = place.with_suffix("")
    command = [python, "-m", "sglang_pascal", "prepare", str(place), str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"failed to prepare {place.name}: {answer.stderr}")
    return folder


def table(rows: list[Row]) -> str:
    """The rows as text: planned sizes in MiB, and by how many bytes they miss."""
    lines = [
        f"{'':<22}{'weights':^26}{'KV cache':^26}{'tables':^26}{'total':^38}{'context':>10}",
        f"{'model':<14}{'context':>8}" + f"{'plan, MiB':>14}{'off by, B':>12}" * 3 + f"{'plan, MiB':>14}{'off by':>18}",
    ]
    for row in rows:
        cells = ""
        for plan, true in ((row.weights_plan, row.weights_true), (row.kv_plan, row.kv_true),
                           (row.tables_plan, row.tables_true)):  # fmt: skip
            cells += f"{plan / MIB:>14,.2f}{plan - true:>12,}"
        if row.total_plan is not None and row.total_true is not None:
            off = row.total_plan - row.total_true
            cells += f"{row.total_plan / MIB:>14,.1f}{off / MIB:>10,.1f} MiB{off / row.total_true:>8.1%}"
            cells += f"{(row.context_true or 0) / MIB:>10,.0f} MiB"
        lines.append(f"{row.model:<14}{row.context:>8,}{cells}")
    return "\n".join(lines)


def main() -> int:
    """Make the models, ask both, print the table; 1 if anything is off by more than is allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", help="names, separated by commas (default: all)")
    parser.add_argument("--contexts", default="512,1024,2048", help="tokens (default: %(default)s)")
    parser.add_argument("--gguf", metavar="MIXTURE", help="load GGUF files of this mixture instead of folders")
    parser.add_argument("--kv-dtype", default="auto", help="type of the KV cache: auto, int8, fp8_e5m2, bf16")
    parser.add_argument(
        "--quantization", help="as SGLang's flag; gguf keeps a GGUF file's types in memory on a CPU too"
    )
    parser.add_argument("--card", help="profile whose constants the plan takes on a GPU")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter that can import sglang (default: this one)"
    )
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    arguments = parser.parse_args()
    contexts = [int(context) for context in arguments.contexts.split(",")]
    available = shapes(large=arguments.device == "cuda")
    names = arguments.models.split(",") if arguments.models else [
        name for name in available if not (arguments.gguf and name == "qwen3-moe")
    ]  # fmt: skip
    rows = []
    for name in names:
        shape = replace(available[name], context_length=max(contexts))
        with tempfile.TemporaryDirectory() as folder:
            place = write_model(Path(folder), name, shape, gguf=arguments.gguf)
            for context in contexts:
                rows.append(compare(
                    place, name, context, device=arguments.device, card=arguments.card, python=arguments.python,
                    kv_dtype=arguments.kv_dtype, quantization=arguments.quantization,
                ))  # fmt: skip
                print(f"{name} {context}", file=sys.stderr, flush=True)
    print(json.dumps([asdict(row) for row in rows], indent=2) if arguments.json else table(rows))
    bad = [row for row in rows if not row.is_exact or not row.total_is_close]
    for row in bad:
        print(f"{row.model} at {row.context}: the plan is off by more than is allowed", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
