"""Writes the figures of docs/guide.md: the guide's claims beside theory, the plan and measurements.

    python benchmarks/guide.py            rewrites the marked parts of docs/guide.md, and docs/guide/*.svg
    python benchmarks/guide.py --check    exit code 1 if any of them would change
    python benchmarks/guide.py --adopt FOLDER    first copies the results of `pascaline bench quant` in a folder

Models are the published shapes of Llama 2 7B and Llama 3.1 8B with their true header and no weights. Measurements are
the results files in docs/results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from pascaline.bench.claims import ANCHORS, claims_for  # noqa: E402
from pascaline.bench.reference import Setting, planned, roofline  # noqa: E402
from pascaline.bench.result_charts import charts  # noqa: E402
from pascaline.bench.results import load  # noqa: E402
from pascaline.bench.results_table import quality_rows  # noqa: E402
from pascaline.bench.svg_chart import Chart, Mark, Series, bar_chart, line_chart  # noqa: E402
from pascaline.cards import load_card  # noqa: E402
from pascaline.models.gguf import read_gguf  # noqa: E402
from pascaline.planning import PlanRequest, make_plan  # noqa: E402
from pascaline.units import format_bytes  # noqa: E402
from support.models import SHAPES, write_gguf  # noqa: E402

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec
    from pascaline.planning import Plan

DOCUMENT, FOLDER = ROOT / "docs/guide.md", ROOT / "docs/guide"
QUANT_RESULTS = ROOT / "docs/results/quant-smollm2-135m-cpu.json"
GPU_QUANT_RESULTS = ROOT / "docs/results/quant-smollm2-135m-gpu.json"
CARD = load_card("tesla-p4")
SEVEN_BILLION, GROUPED = "llama-2-7b", "llama-3.1-8b"
"""A model with as many KV heads as heads, like the guide's, and one with a quarter of them."""
BATCHES, CONTEXTS = (1, 2, 4, 8), (2048, 4096, 8192)
TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")
PROMPT, OUTPUT = 128, 128
GUIDE_POOL_BYTES = 64 * 2**20
# Row 7: gigabytes as in the guide's list.
GUIDE_MEMORY = {"weights": 4.0, "KV cache": 0.06, "activations": 2.0, "runtime": 0.5, "context": 0.5, "headroom": 0.94}
OURS = {
    "weights": ("weights",),
    "KV cache": ("kv_pool",),
    "activations": ("activations", "logits", "tables", "workspace"),
    "runtime": ("library", "graphs", "rounding", "fragmentation"),
    "context": ("context",),
}
"""The guide's lines -> the plan's."""
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--adopt", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.adopt:
        adopt(load(arguments.adopt).document)
    written = generate()
    stale = [path for path, text in written.items() if not path.exists() or path.read_text() != text]
    if arguments.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale; run: python benchmarks/guide.py", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    for path, text in written.items():
        path.write_text(text)
    return 0


def adopt(document: dict[str, Any]) -> None:
    """Keep the measured results that the guide shows, without single requests and paths of the machine."""
    place = GPU_QUANT_RESULTS if document["machine"].get("gpus") else QUANT_RESULTS
    document["instance"]["server"].pop("model_path", None)
    document["instance"].pop("settings", None)
    for entry in document["points"]:
        entry["runs"] = []
    place.write_text(json.dumps(document, indent=1) + "\n")


def generate() -> dict[Path, str]:
    """Return every file with its text."""
    models = {(name, kind): spec(name, kind) for name in (SEVEN_BILLION, GROUPED) for kind in TYPES}
    seven = models[SEVEN_BILLION, "Q4_K_M"]
    pictures = {
        "batch": batch_picture(seven),
        "memory": memory_picture(seven),
        "context": context_picture(seven, models[GROUPED, "Q4_K_M"]),
        "types": types_picture(models),
    }
    blocks = {
        "batch": batch_table(seven),
        "memory": memory_table(seven),
        "pool": pool_sentence(seven),
        "context": context_table(seven, models[GROUPED, "Q4_K_M"]),
        "types": types_table(models),
    }
    document = load(QUANT_RESULTS).document
    # The last chart shows speeds of a shared machine, which mean nothing here.
    titles = ("size", "kl", "perplexity")
    pictures |= {f"quant-{title}": picture for title, picture in zip(titles, charts(document), strict=False)}
    blocks["quant"] = quant_table(document)
    blocks["served"] = served_table(load(GPU_QUANT_RESULTS).document)
    text = _BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]}\n{match[3]}", DOCUMENT.read_text())
    return {FOLDER / f"{name}.svg": picture for name, picture in pictures.items()} | {DOCUMENT: text}


def spec(name: str, kind: str) -> ModelSpec:
    """Return the header of a published shape in a type."""
    with tempfile.TemporaryDirectory() as folder:
        return read_gguf(write_gguf(Path(folder) / "model.gguf", SHAPES[name], kind, sparse=True))


def plan_for(model: ModelSpec, *, context: int = 4096, batch: int = 4, kv_dtype: str = "fp16") -> Plan:
    """Return the plan on the Tesla P4."""
    request = PlanRequest(
        card_bytes=CARD.memory_bytes, context_length=context, max_running_requests=batch, kv_dtype=kv_dtype
    )
    return make_plan(model, CARD, request)


# --- row 5 and 13: batch ----------------------------------------------------------------------------------------------

SETTING = Setting(engine="sglang", dtype="float16", kv_dtype="fp16", chunked_prefill_tokens=512)


def batch_rows(model: ModelSpec) -> list[tuple[int, float, float, float]]:
    """Return (batch, guide's claim, plan's estimate, roofline), output tokens per second."""
    claims = claims_for("batch", "output_throughput")
    return [
        (
            batch,
            claims[batch],
            planned(CARD, model, SETTING, batch, PROMPT, OUTPUT)["output_throughput"],
            roofline(CARD, model, SETTING, batch, PROMPT, OUTPUT),
        )
        for batch in BATCHES
    ]


def batch_picture(model: ModelSpec) -> str:
    """Return the chart of the guide's batch sweep beside theory."""
    rows = batch_rows(model)
    series = [
        Series(name, [Mark(n, row[column]) for n, row in enumerate(rows)], dashed=True)
        for name, column in (("guide's claim", 1), ("plan's estimate", 2), ("roofline of the card", 3))
    ]
    anchors = [Mark(0, anchor.output_throughput) for anchor in ANCHORS if anchor.card == CARD.name]
    series.append(Series("llama.cpp, 4B and 9B, measured", anchors, joined=False))
    title = f"7B Q4_K_M on a Tesla P4, {PROMPT} + {OUTPUT} tokens"
    return line_chart(Chart(title, "concurrent requests", "output tok/s", series, [str(batch) for batch in BATCHES]))


def batch_table(model: ModelSpec) -> str:
    """Return the same as a table."""
    rows = [["concurrent requests", "guide", "plan's estimate", "roofline"]]
    rows += [
        [str(row[0]), f"{row[1]:g} tok/s", *(f"{value:.0f} tok/s" for value in row[2:])] for row in batch_rows(model)
    ]
    return markdown(rows)


# --- row 6 and 7: memory ----------------------------------------------------------------------------------------------


def pool_sentence(model: ModelSpec) -> str:
    """Return a sentence about the tokens that 64 MiB hold."""
    per_token = plan_for(model).kv_bytes_per_token
    stored = f"Llama 2 7B stores {format_bytes(per_token)} of keys and values per token in fp16"
    held = f"{format_bytes(GUIDE_POOL_BYTES)} hold {GUIDE_POOL_BYTES // per_token} tokens"
    return f"{stored}: {held}, and 4 requests of 4096 tokens would need {format_bytes(4 * 4096 * per_token)}."


def memory_rows(model: ModelSpec) -> list[tuple[str, float, float]]:
    """Return (line, guide, plan), GiB. The plan gives the KV cache everything that is left."""
    plan = plan_for(model)
    known = {key for keys in OURS.values() for key in keys}
    unknown = {part.key for part in plan.parts} - known
    assert not unknown, f"the plan has parts without a line here: {unknown}"
    ours = {line: sum(plan.part(key) for key in keys) / 2**30 for line, keys in OURS.items()}
    ours["headroom"] = plan.headroom_bytes / 2**30
    return [(line, GUIDE_MEMORY[line], ours[line]) for line in GUIDE_MEMORY]


def memory_picture(model: ModelSpec) -> str:
    """Return both tables as bars."""
    rows = memory_rows(model)
    series = [
        Series(name, [Mark(n, row[column], label=f"{row[column]:.2f}") for n, row in enumerate(rows)], dashed=dashed)
        for name, column, dashed in (("guide", 1, True), ("pascaline plan", 2, False))
    ]
    title = "Memory of a 7B Q4_K_M on a Tesla P4, context 4096, 4 requests"
    return bar_chart(Chart(title, "", "GiB", series, [row[0] for row in rows]))


def memory_table(model: ModelSpec) -> str:
    """Return the same as a table."""
    rows = [["", "guide", "`pascaline plan`"]]
    found = memory_rows(model)
    rows += [[line, f"{guide:.2f} GB", f"{ours:.2f} GiB"] for line, guide, ours in found]
    rows.append(["together", f"{sum(row[1] for row in found):.2f} GB", f"{sum(row[2] for row in found):.2f} GiB"])
    return markdown(rows)


# --- row 8: context ---------------------------------------------------------------------------------------------------


def context_rows(seven: ModelSpec, grouped: ModelSpec) -> list[list[str]]:
    """Return what each context takes for one request, and how many such requests fit."""
    rows = [["context", "7B, 32 KV heads, fp16", "7B, int8 KV", "8B, 8 KV heads, fp16", "8B, int8 KV"]]
    for context in CONTEXTS:
        cells = [str(context)]
        for model in (seven, grouped):
            for kind in ("fp16", "int8"):
                plan = plan_for(model, context=context, batch=1, kv_dtype=kind)
                one = plan.kv_bytes_per_token * context
                room = (plan.kv_bytes + plan.headroom_bytes) / one
                cells.append(f"{format_bytes(one)}, {f'room for {room:.1f}' if plan.fits else 'does not fit'}")
        rows.append(cells)
    return rows


def context_table(seven: ModelSpec, grouped: ModelSpec) -> str:
    """Return the rows as Markdown."""
    return markdown(context_rows(seven, grouped))


def context_picture(seven: ModelSpec, grouped: ModelSpec) -> str:
    """Return the chart of one request's KV cache by context."""
    series = []
    for name, model in (("7B", seven), ("8B, grouped heads", grouped)):
        for kind in ("fp16", "int8"):
            per_token = plan_for(model, kv_dtype=kind).kv_bytes_per_token
            marks = [Mark(n, per_token * context / 2**30) for n, context in enumerate(CONTEXTS)]
            series.append(Series(f"{name}, {kind}", marks))
    left = (CARD.memory_bytes - plan_for(seven).weights_bytes) / 2**30
    series.append(Series("left beside 7B weights", [Mark(n, left) for n in range(len(CONTEXTS))], dashed=True))
    names = [str(context) for context in CONTEXTS]
    return line_chart(Chart("KV cache of one request", "context, tokens", "GiB", series, names))


# --- row 3 and 13: types of weights -----------------------------------------------------------------------------------


def types_rows(models: dict[tuple[str, str], ModelSpec]) -> list[tuple[str, float | None, float, float, bool]]:
    """Return (type, guide's tok/s, plan's tok/s, weights in GiB, whether it fits) for one request."""
    claims = claims_for("quant", "output_throughput")
    rows = []
    for kind in TYPES:
        plan = plan_for(models[SEVEN_BILLION, kind], batch=1)
        assert plan.speed is not None
        speed = plan.speed.single.tokens_per_second
        rows.append((kind, claims.get(kind), speed, plan.weights_bytes / 2**30, plan.fits))
    return rows


def types_picture(models: dict[tuple[str, str], ModelSpec]) -> str:
    """Return the chart of speed by type: the guide's order and the true one."""
    rows = types_rows(models)
    series = [
        Series("guide's claim", [Mark(n, row[1]) for n, row in enumerate(rows) if row[1] is not None], dashed=True),
        Series("plan's estimate", [Mark(n, row[2]) for n, row in enumerate(rows)]),
    ]
    title = "One request, 7B on a Tesla P4: fewer bytes are faster"
    return bar_chart(Chart(title, "type of the weights", "tok/s", series, [row[0] for row in rows]))


def types_table(models: dict[tuple[str, str], ModelSpec]) -> str:
    """Return the same as a table."""
    rows = [["type", "guide", "plan's estimate", "weights on the card", "context 4096 fits"]]
    for kind, claim, speed, weights, fits in types_rows(models):
        said = f"{claim:g} tok/s" if claim is not None else "-"
        rows.append([kind, said, f"{speed:.0f} tok/s", f"{weights:.2f} GiB", "yes" if fits else "no"])
    return markdown(rows)


def quant_table(document: dict[str, Any]) -> str:
    """Return the table of measured size and quality."""
    heading, *rows = quality_rows(document)
    shown = [n for n, name in enumerate(heading) if "memory" not in name]
    measured = [[row[n] for n in shown] for row in (heading, *rows) if len(row) == len(heading)]
    machine = document["machine"]
    where = f"{machine['cpu']}, {machine['cpu_count']} CPUs; {document['quality_note']}"
    return f"{markdown(measured)}\n\n{where}"


def served_table(document: dict[str, Any]) -> str:
    """Return quality and speed of each type as SGLang serves it on a GPU, beside llama.cpp's for the same file."""
    heads = ["bits a weight", "perplexity, llama.cpp", "perplexity, served", "KL, served, at least"]
    rows = [["", *heads, "tok/s, 1 request", "tok/s, 4 requests"]]
    speeds = {entry["name"]: entry["summary"].get("output_throughput") for entry in document["points"]}
    for entry in document["types"]:
        if "served_perplexity" not in entry:
            continue
        found = [speeds.get(f"{entry['name']} batch {n}") for n in (1, 4)]
        cells = [f"{speed['value']:.0f} ± {speed['high'] - speed['value']:.0f}" if speed else "-" for speed in found]
        # llama.cpp cannot read NF4, and the reference has no distance from itself.
        keys = {"bits_per_weight": 2, "perplexity": 3, "served_perplexity": 3, "served_kl_least": 5}
        quality = [f"{entry[key]:.{digits}f}" if key in entry else "-" for key, digits in keys.items()]
        rows.append([entry["name"], *quality, *cells])
    machine = document["machine"]
    packages = machine["packages"]
    return (
        f"{markdown(rows)}\n\n{', '.join(machine['gpus'])}, driver {machine['driver']}, SGLang {packages['sglang']}, "
        f"torch {packages['torch']}; {document['quality_note']} Speeds with 95 % intervals, 128 + 128 tokens."
    )


def markdown(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    sys.exit(main())
