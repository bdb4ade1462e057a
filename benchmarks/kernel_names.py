"""Records the name of every GPU kernel that serving launches, feature by feature, for `docs/results/kernel-names.json`.

    python benchmarks/kernel_names.py MODEL.gguf [FILE.json] [--smoke] [--device cuda] [--only CONFIGURATION …]
    python benchmarks/kernel_names.py --page docs/results/kernel-names.json > docs/results/kernel-names.md

MODEL.gguf is the built-in model; the others are made on the spot, tiny and random. Each configuration is a real SGLang
with the plugin. torch's profiler (CUPTI) records its scheduler process twice: while it loads and records its steps as
CUDA graphs, and during each feature's requests. A name is kept with what launched it: the operator of torch, if there
was one, and whether it ran as part of a recorded step. All configurations run at once (--parallel), on any NVIDIA card
with 8 GB for each; with --device cpu torch's operators take the kernels' place, which shows that the program works.

`tests/gpu/test_kernel_names.py` holds the names against the locked wheels. Exit codes: 0 done, 1 a configuration or a
feature failed (the file says which), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from pascaline.profile.trace import is_whole, load_events
from server_process import process
from support.hf_models import write_folder
from support.models import tiny, write_gguf
from support.ports import free_port
from support.pretended import REAL_NAME, another_card

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Sequence

READY_SECONDS = {"cuda": 240, "cpu": 900}
REQUEST_SECONDS, TRACE_SECONDS = 60, 60
CONTEXT = 4096
SHAPE = {"context_length": CONTEXT, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
"""64 is the smallest head that attention has a kernel for, and hidden_size / heads, which Qwen 2 supposes."""
COMMON = (
    "--host",
    "127.0.0.1",
    "--mem-fraction-static",
    "0.2",
    "--max-total-tokens",
    "20480",
    "--max-running-requests",
)
COMMON += ("16", "--chunked-prefill-size", "512", "--sleep-on-idle", "--log-level-http", "warning")
GGUF = ("--load-format", "pascal_gguf")
TOKENS = "--skip-tokenizer-init"
RECORDER = '''
"""A plugin of SGLang for one measurement: records what a scheduler launches while it starts."""
import os

def record(original, scheduler, *arguments, **named):
    import torch

    activities = torch.profiler.ProfilerActivity
    kinds = [activities.CPU] + ([activities.CUDA] if torch.cuda.is_available() else [])
    with torch.profiler.profile(activities=kinds) as profiler:
        original(scheduler, *arguments, **named)
    profiler.export_chrome_trace(os.environ["KERNEL_NAMES_START"])

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", record, HookType.AROUND)
'''
METADATA = "Metadata-Version: 2.1\nName: kernel-names\nVersion: 0\n"
ENTRY_POINTS = "[sglang.srt.plugins]\nkernel_names = kernel_names_recorder:register\n"
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
NESTED = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}


@dataclass(frozen=True)
class Configuration:
    """One engine: its model, how SGLang is started, and the requests that it gets."""

    model: str
    """builtin, gguf ARCHITECTURE MIXTURE, or hf ARCHITECTURE."""
    options: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


class Engine:
    """A running SGLang, by its HTTP API."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self.url, self._client = url, client

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._client.post(path, json=body)
        if answer.status_code != httpx.codes.OK:
            raise RuntimeError(f"{path} answered {answer.status_code}: {answer.text[:300]}")
        return answer

    def chat(self, text: str = "Tell me a story.", **options: Any) -> dict[str, Any]:
        body = {"model": "default", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
        return self.post("/v1/chat/completions", body | options).json()

    def generate(
        self, ids: Sequence[int], n_tokens: int = 12, more: dict[str, Any] | None = None, **sampling: Any
    ) -> Any:
        parameters = {"temperature": 0, "max_new_tokens": n_tokens, "ignore_eos": True} | sampling
        return self.post("/generate", {"input_ids": list(ids), "sampling_params": parameters} | (more or {})).json()

    def stream(self, body: dict[str, Any], path: str, lines: int | None = None) -> None:
        """Read a stream to its end, or hang up after this number of lines."""
        with self._client.stream("POST", path, json=body | {"stream": True}) as answer:
            for number, _ in enumerate(answer.iter_lines()):
                if lines is not None and number >= lines:
                    return

    def together(self, count: int, n_tokens: int = 12, **sampling: Any) -> None:
        """Send a number of requests at once, with prompts of different lengths."""
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda i: self.generate(prompt(5 + 9 * i, i), n_tokens + i, **sampling), range(count)))


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids that every vocabulary here has."""
    return [(7 * number + 31 * seed) % 180 + 10 for number in range(length)]


def concurrency(engine: Engine) -> None:
    for count in (2, 3, 4, 5, 6, 8, 9, 12, 13, 16):
        engine.together(count)


def chunked(engine: Engine) -> None:
    engine.generate(prompt(2200, 1), 4)


def cached(engine: Engine) -> None:
    engine.generate(prompt(700, 2), 4)
    engine.generate([*prompt(700, 2), 11, 12, 13], 4)


def whole_context(engine: Engine) -> None:
    engine.generate(prompt(3500, 3), 40)


def abort(engine: Engine) -> None:
    body = {"input_ids": prompt(40, 4), "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}}
    engine.stream(body, "/generate", lines=10)
    engine.generate(prompt(20, 5), 4)


def stream(engine: Engine) -> None:
    engine.stream({"input_ids": prompt(30), "sampling_params": {"max_new_tokens": 12, "ignore_eos": True}}, "/generate")


def sampled(engine: Engine) -> None:
    for more in ({}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"top_p": 0.9, "top_k": 20, "min_p": 0.05}):
        engine.generate(prompt(20), 6, temperature=0.8, **more)
    engine.together(4, temperature=0.7, top_p=0.9)


def logprobs(engine: Engine) -> None:
    wanted = {"return_logprob": True, "top_logprobs_num": 3}
    engine.generate(prompt(20), 6, wanted)
    engine.generate(prompt(20), 6, wanted | {"token_ids_logprob": [11, 12]}, temperature=0.8, top_p=0.9)


def prompt_logprobs(engine: Engine) -> None:
    wanted = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "token_ids_logprob": [11, 12]}
    engine.generate(prompt(700, 6), 2, wanted)
    engine.generate(prompt(30, 7), 2, {"return_logprob": True, "logprob_start_len": 5})


def penalties(engine: Engine) -> None:
    wanted = {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.2}
    engine.generate(prompt(20), 8, **wanted)
    engine.together(3, temperature=0.8, **wanted)


def embed(engine: Engine) -> None:
    for length in (8, 700):
        engine.post("/v1/embeddings", {"model": "default", "input": prompt(length)})
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda i: engine.post("/v1/embeddings", {"model": "default", "input": prompt(9 * i + 5)}), range(4)
            )
        )


def repeated(engine: Engine) -> None:
    engine.generate(prompt(60) * 4, 60)
    engine.generate(prompt(60) * 4, 30, temperature=0.8, top_p=0.9)
    engine.generate(prompt(60) * 4, 20, {"return_logprob": True, "top_logprobs_num": 2})
    engine.together(4, 30)


FEATURES: dict[str, Callable[[Engine], Any]] = {
    "chat": lambda engine: engine.chat(),
    "generate": lambda engine: engine.generate(prompt(20)),
    "stream": stream,
    "sampled": sampled,
    "seeds": lambda engine: engine.generate(prompt(20), 8, temperature=0.8, sampling_seed=7, top_p=0.9),
    "logprobs": logprobs,
    "prompt logprobs": prompt_logprobs,
    "penalties": penalties,
    "least tokens": lambda engine: engine.generate(prompt(20), 8, min_new_tokens=5),
    "logit bias": lambda engine: engine.generate(prompt(20), 8, logit_bias={"15": 5.0, "16": -100.0}),
    "choices": lambda engine: engine.generate(prompt(20), 6, n=3, temperature=0.8),
    "json schema": lambda engine: engine.chat("Answer as JSON.", response_format=NESTED, max_tokens=24),
    "sampled json schema": lambda engine: engine.chat(
        "Answer.", response_format=NESTED, max_tokens=24, temperature=0.7, top_k=20
    ),
    "regex": lambda engine: engine.chat("Which year?", regex="[12][0-9]{3}"),
    "concurrency": concurrency,
    "chunked prefill": chunked,
    "cached prefill": cached,
    "whole context": whole_context,
    "abort": abort,
    "embeddings": embed,
    "repeated text": repeated,
}
PLAIN = ("generate", "stream", "sampled", "logprobs", "prompt logprobs", "penalties", "concurrency", "chunked prefill")
PLAIN += ("cached prefill", "abort")
ALL = tuple(name for name in FEATURES if name not in ("embeddings", "repeated text"))
MIXED = ("generate", "concurrency", "chunked prefill", "cached prefill", "prompt logprobs")
CONFIGURATIONS = {
    "builtin": Configuration("builtin", GGUF, ALL),
    "prompt lookup": Configuration(
        "builtin", (*GGUF, "--speculative-algorithm", "PASCAL_LOOKUP"), ("repeated text", *PLAIN, "json schema")
    ),
    "gemma2": Configuration("gguf gemma2 Q4_K_M", (*GGUF, TOKENS), (*PLAIN, "whole context")),
    "int8 KV": Configuration("builtin", (*GGUF, "--kv-cache-dtype", "int8"), MIXED),
    "fp8 KV": Configuration("builtin", (*GGUF, "--kv-cache-dtype", "fp8_e5m2"), MIXED),
    "NF4": Configuration(
        "hf llama", (TOKENS, "--quantization", "bitsandbytes", "--load-format", "bitsandbytes"), MIXED
    ),
    "embeddings": Configuration("gguf qwen3 Q8_0", (*GGUF, TOKENS, "--is-embedding"), ("embeddings",)),
    "no graphs": Configuration("builtin", (*GGUF, "--cuda-graph-backend-decode=disabled"), ALL),
    "8 bits": Configuration(
        "builtin",
        GGUF,
        MIXED,
        (("SGLANG_PASCAL_PREFILL_BITS", "8"), ("SGLANG_PASCAL_DECODE_BITS", "8")),
    ),
    "qwen2 Q4_K_M": Configuration("gguf qwen2 Q4_K_M", (*GGUF, TOKENS), MIXED),
    "llama Q5_K_M": Configuration("gguf llama Q5_K_M", (*GGUF, TOKENS), MIXED),
    "gemma3 Q4_0": Configuration("gguf gemma3 Q4_0", (*GGUF, TOKENS), MIXED),
    "float16": Configuration("hf qwen3", (TOKENS,), MIXED),
}
SMOKE = ("builtin", "prompt lookup", "gemma2", "embeddings")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builtin", type=Path, metavar="MODEL.gguf", help="with --page: the record")
    parser.add_argument(
        "--page", action="store_true", help="print the page of a record instead; needs the locked torch"
    )
    parser.add_argument("output", type=Path, nargs="?", default=Path("kernel-names.json"), metavar="FILE.json")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, metavar="CONFIGURATION", help="default: all")
    parser.add_argument("--add", action="store_true", help="keep what FILE.json holds of other configurations")
    parser.add_argument("--smoke", action="store_true", help=f"two features of {', '.join(SMOKE)}")
    parser.add_argument("--parallel", type=int, default=8, metavar="N", help="engines at once (default: 8)")
    parser.add_argument("--logs", type=Path, help="folder for the logs of engines that failed")
    args = parser.parse_args()
    if not args.builtin.is_file():
        parser.error(f"there is no file {args.builtin}")
    if args.page:
        print(page(json.loads(args.builtin.read_text())), end="")
        return 0
    names = args.only or (SMOKE if args.smoke else tuple(CONFIGURATIONS))
    found: dict[str, Any] = {"environment": environment(args.device), "configurations": {}, "kernels": {}}
    if args.add and args.output.is_file():
        found |= without(json.loads(args.output.read_text()), names)

    lock = threading.Lock()

    def one(name: str) -> None:
        result = measure(name, args)
        with lock:
            merge(found, name, result)
            write(args.output, found)
        print(f"{name}: {result['state']}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(one, names))
    states = [each["state"] for each in found["configurations"].values()]
    return 0 if states and all(state == "done" for state in states) else 1


def page(found: dict[str, Any]) -> str:
    """Return the page of docs/results about a record."""
    from support.kernel_classes import classify, own_kernels, parts, plain, torch_index

    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, entry in found["kernels"].items():
        match = classify(name, entry["operators"], torch_index(), own_kernels())
        base, functors = parts(plain(name))
        label = f"{base}<{', '.join(sorted(functors))}>" if functors else base
        row = rows.setdefault(
            (match.owner, label, match.how), {"recorded": 0, "unrecorded": 0, "by": set(), "of": set()}
        )
        row["recorded"] += entry["recorded"]
        row["unrecorded"] += entry["unrecorded"]
        row["by"] |= set(entry["operators"])
        row["of"] |= {feature.partition(":")[0] for feature in entry["features"]}
    where = found["environment"]
    states = {name: each["state"] for name, each in found["configurations"].items() if each["state"] != "done"}
    lines = [
        PAGE.format(kernels=len(found["kernels"]), configurations=len(found["configurations"]), **where),
        *(f"- **{name}** did not complete: {' '.join(state.split())[:200]}" for name, state in sorted(states.items())),
        "" if states else "Every configuration and feature completed.\n",
        "| owner | kernels | in recorded steps | elsewhere |",
        "|---|---|---|---|",
    ]
    for owner in sorted({key[0] for key in rows}):
        of_it = [row for key, row in rows.items() if key[0] == owner]
        sums = (sum(row[part] for row in of_it) for part in ("recorded", "unrecorded"))
        lines.append(f"| {owner} | {len(of_it)} | " + " | ".join(f"{number:,}" for number in sums) + " |")
    lines += [
        "",
        "| owner | kernel | recognised by | launches in recorded steps | elsewhere | operators | configurations |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for (owner, label, how), row in sorted(rows.items()):
        by, of = ", ".join(sorted(row["by"])), ", ".join(sorted(row["of"]))
        of = "all" if len(row["of"]) == len(found["configurations"]) else of
        counts = f"{row['recorded']:,} | {row['unrecorded']:,}"
        lines.append(f"| {owner} | `{label.replace('|', '/')}` | {how} | {counts} | {by} | {of} |")
    return "\n".join(lines) + "\n"


PAGE = """# The kernels that serving launches, and whether Pascal has them

{kernels} kernels, launched by {configurations} configurations of the server on {card}, torch {torch}, Python
{python}, {date}. `benchmarks/kernel_names.py` recorded [their names](kernel-names.json) with torch's profiler in
the scheduler process, while it started and during each feature's requests, and wrote this page.
`tests/gpu/test_kernel_names.py` holds the names against the locked wheels, without a GPU.

- *ours*: compiled for sm_60 and sm_61 ([kernels.md](../kernels.md)).
- *torch*: the locked torch holds this kernel as machine code for sm_60, which 6.1 runs. Recognised by its whole
  *name*, or, because the card's torch is a newer release with other template parameters, by its *parts*: the
  kernel's own name and the functions and functors among its parameters.
  A *successor* is a kernel that only newer releases have: the locked torch computes the same operator by an older
  one, which `SUCCESSORS` of `tests/support/kernel_classes.py` names and which it holds for sm_60.
- *cuBLAS*: launched by a matrix product of torch. cuBLAS chooses its kernels by card, so these names do not exist
  on Pascal; the locked cuBLAS has machine code for sm_60 and sm_61 (`sglang-pascal info --card 6.1`). Its products:
  one of 16 x 16 at each start, by which SGLang initialises it; prompts, of more than 16 rows, of weights in float16;
  and prompts of weights in NF4, which bitsandbytes expands before. No recorded decode step may contain one.
- *bitsandbytes*: its library for CUDA 12.6 holds it for sm_60.
- *forbidden* (flash attention, cuDNN, Triton, bfloat16) and *unknown* are failures.

What this cannot show: that a kernel of the same name computes the same on Pascal, and which kernel cuBLAS chooses
there.
"""


def environment(device: str) -> dict[str, Any]:
    """Where and when the names were recorded."""
    import torch

    on_gpu = device == "cuda" and torch.cuda.is_available()
    return {
        "card": card_name(torch.cuda.get_device_name(0)) if on_gpu else "CPU",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def card_name(name: str) -> str:
    """Return a card's name; with `tests/support/pretended` the real card's too."""
    real = os.environ.get(REAL_NAME)
    return f"{real}, which pretends to be a {name}" if real else name


def without(record: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a record's configurations and kernels without these, which are measured again.

    A kernel's launches are counted for all configurations together, so those of the others keep the whole number.
    """
    kernels = {}
    for kernel, entry in record["kernels"].items():
        features = [feature for feature in entry["features"] if feature.partition(":")[0] not in names]
        if features:
            kernels[kernel] = entry | {"features": features}
    configurations = {name: each for name, each in record["configurations"].items() if name not in names}
    return {"configurations": configurations, "kernels": kernels}


def merge(found: dict[str, Any], name: str, result: dict[str, Any]) -> None:
    """Add one configuration's kernels to the table of all."""
    for feature, kernels in result.pop("kernels").items():
        for kernel, (operators, recorded, unrecorded) in kernels.items():
            entry = found["kernels"].setdefault(
                kernel, {"operators": [], "recorded": 0, "unrecorded": 0, "features": []}
            )
            entry["operators"] = sorted({*entry["operators"], *operators})
            entry["recorded"] += recorded
            entry["unrecorded"] += unrecorded
            entry["features"].append(f"{name}: {feature}")
    found["configurations"][name] = result


def write(path: Path, found: dict[str, Any]) -> None:
    text = json.dumps(found | {"kernels": dict(sorted(found["kernels"].items()))}, indent=1)
    path.with_suffix(".part").write_text(text + "\n")
    path.with_suffix(".part").replace(path)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one configuration. Returns its state, failed features, and feature -> kernels."""
    configuration = CONFIGURATIONS[name]
    features = configuration.features[:2] if args.smoke else configuration.features
    result: dict[str, Any] = {"state": "done", "failed": {}, "kernels": {}}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "engine.log"
        try:
            with running(configuration, args, Path(folder), log) as engine:
                result["kernels"]["start"] = names_in(Path(folder) / "start.json")
                for feature in features:
                    try:
                        result["kernels"][feature] = record(engine, FEATURES[feature], Path(folder), feature)
                    except Exception as error:
                        result["failed"][feature] = f"{type(error).__name__}: {error}"[:600]
        except Exception as error:
            result["state"] = f"failed: {type(error).__name__}: {error}"[:600]
        if result["failed"]:
            result["state"] = f"{len(result['failed'])} features failed"
        if result["state"] != "done" and args.logs and log.is_file():
            (args.logs / f"{name.replace(' ', '-')}.log").write_text(log.read_text(errors="replace")[-30000:])
    return result


@contextlib.contextmanager
def running(configuration: Configuration, args: argparse.Namespace, folder: Path, log: Path) -> Iterator[Engine]:
    """Start SGLang with the recorder of its start, wait until it answers, and end all its processes."""
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model(configuration, args, folder))]
    command += ["--device", args.device, "--port", str(port), "--context-length", str(CONTEXT)]
    command += [*COMMON, *configuration.options]
    if args.device == "cpu" and "--kv-cache-dtype" not in command:
        command += ["--dtype", "float32"]
    with (
        process(command, log, variables(configuration, args, folder), patience=5) as server,
        httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            timeout=REQUEST_SECONDS if args.device == "cuda" else 600,
            trust_env=False,
        ) as client,
    ):
        wait_until_ready(server, client, log, READY_SECONDS[args.device])
        yield Engine(f"http://127.0.0.1:{port}", client)


def model(configuration: Configuration, args: argparse.Namespace, folder: Path) -> Path:
    """Make the configuration's model, and return the folder to serve."""
    from sglang_pascal.checkpoint.prepare import prepare

    kind, *words = configuration.model.split()
    if kind == "hf":
        return write_folder(folder / "model", tiny(words[0], **SHAPE))
    file = args.builtin
    if kind == "gguf":
        file = write_gguf(folder / "model.gguf", tiny(words[0], **SHAPE), words[1])
    prepare(file, folder / "model")
    return folder / "model"


def variables(configuration: Configuration, args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Return the engine's environment, with the recorder as one more plugin of SGLang."""
    plugin = folder / "plugin"
    information = plugin / "kernel_names-0.dist-info"
    information.mkdir(parents=True)
    (plugin / "kernel_names_recorder.py").write_text(RECORDER)
    (information / "METADATA").write_text(METADATA)
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    path = os.pathsep.join(filter(None, [str(plugin), os.environ.get("PYTHONPATH")]))
    chosen = {
        "SGLANG_PLATFORM": "pascal",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
        "KERNEL_NAMES_START": str(folder / "start.json"),
        "PYTHONPATH": path,
    }
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    return os.environ | another_card(folder) | chosen | hidden | dict(configuration.environment)


def wait_until_ready(process: subprocess.Popen[bytes], client: httpx.Client, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"SGLang ended with {process.returncode}: {last_words(log)}")
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == httpx.codes.OK:
                return
        time.sleep(0.3)
    raise RuntimeError(f"SGLang was not ready after {seconds:g} s: {last_words(log)}")


def last_words(log: Path) -> str:
    """Return the last error in an engine's log, else its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"\S*(Error|Exception)\b", line)]
    return (errors or lines or ["no output"])[-1][:400]


def record(engine: Engine, ask: Callable[[Engine], Any], folder: Path, name: str) -> dict[str, Any]:
    """Return the kernels of one feature's requests."""
    output = folder / f"trace-{name.replace(' ', '-')}"
    output.mkdir()
    wanted = {"output_dir": str(output), "activities": ["CPU", "GPU"], "with_stack": False, "record_shapes": False}
    engine.post("/start_profile", wanted)
    try:
        ask(engine)
    finally:
        engine.post("/stop_profile", {})
    deadline = time.monotonic() + TRACE_SECONDS
    while not any(is_whole(path) for path in output.rglob("*.trace.json*")):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no trace within {TRACE_SECONDS} s")
        time.sleep(0.1)
    (path,) = output.rglob("*.trace.json*")
    return names_in(path)


def names_in(trace: Path) -> dict[str, tuple[list[str], int, int]]:
    """Return kernel -> (operators that launched it, launches in recorded steps, other launches).

    The CPU launches no kernels: there the names of torch's operators are returned.
    """
    events = [event for event in load_events(trace) if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not kernels:
        return {event["name"]: ([], 0, 1) for event in events if event.get("cat") == "cpu_op"}
    graphs = {event["args"].get("correlation") for event in events if event["name"].startswith("cudaGraphLaunch")}
    operators = {event["args"].get("External id"): event["name"] for event in events if event.get("cat") == "cpu_op"}
    found: dict[str, tuple[set[str], list[int]]] = {}
    for event in kernels:
        by, counts = found.setdefault(event["name"], (set(), [0, 0]))
        is_recorded = event["args"].get("correlation") in graphs
        counts[0 if is_recorded else 1] += 1
        operator = operators.get(event["args"].get("External id"))
        if operator and not is_recorded:
            by.add(operator)
    return {name: (sorted(by), recorded, other) for name, (by, (recorded, other)) in found.items()}


if __name__ == "__main__":
    sys.exit(main())
