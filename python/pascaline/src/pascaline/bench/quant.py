"""Compares types of weights from F16 to Q3_K: size, planned and measured memory, quality and speed of each.

llama.cpp's llama-quantize makes the files from one source and its llama-perplexity scores them on one text. The engine
that the settings name then serves them one after the other. A later call skips the types that are already done.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import as_file
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline.bench import llama_tools
from pascaline.bench.environment import describe_machine
from pascaline.bench.experiment import Experiment, batch_points
from pascaline.bench.experiment_runner import Runner
from pascaline.bench.instance import read_api_key, started
from pascaline.bench.progress import Progress
from pascaline.bench.reference import reference
from pascaline.bench.results import create_or_resume
from pascaline.bench.served_quality import compare_scores, load_scores, score_server
from pascaline.bench.server import make_prompts
from pascaline.bench.sweep import LOG_NAME, Target, check_same_target, describe_model
from pascaline.bench.workload import SHIPPED_TEXT
from pascaline.engines import engine_named
from pascaline.errors import ConfigurationError, EngineError
from pascaline.models import store
from pascaline.models.reader import read_model
from pascaline.plugin import PLUGIN
from pascaline.quantize import Options, Tools, quantize
from pascaline.serving.task import place_instance

if TYPE_CHECKING:
    from collections.abc import Callable

    from pascaline.bench.instance import Instance
    from pascaline.bench.results import Results
    from pascaline.bench.workload import Prompts
    from pascaline.models.spec import ModelSpec
    from pascaline.settings import Settings

DEFAULT_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q3_K_S")
NF4 = "NF4"
"""bitsandbytes' 4-bit type. Only SGLang serves it."""
NF4_METHOD = "bitsandbytes"
"""The value of `quantization` that makes it."""
BITSANDBYTES = f"bitsandbytes=={PLUGIN.bitsandbytes}"
"""Not a locked package: 180 MB for one method. With CUDA 12.6 it has code for sm_60; SGLang asks for
PLUGIN.oldest_bitsandbytes."""
REFERENCE_TYPE = "F16"
_PRECISE = {"F32", "F16", "BF16"}
PRECISE_BYTES = 2
"""Bits per weight in the reference that is made."""
MODELS_FOLDER = "models"
SERVED_REFERENCE = "served.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What to compare, and how."""

    types: tuple[str, ...]
    sizes: tuple[int, ...]
    """Concurrent requests of the speed measurement."""
    chunks: int
    """Number of chunks, each of llama_tools.WINDOW_TOKENS tokens of the shipped text."""
    prompt_tokens: str
    output_tokens: str
    requests: int | None
    repeats: int
    seed: int
    timeout: float
    keep_models: bool
    tools: Tools = field(default_factory=Tools)

    def experiment(self) -> Experiment:
        """Return the speed measurement of each type."""
        points = batch_points(self.sizes, self.prompt_tokens, self.output_tokens, self.requests)
        return Experiment(kind="quant", points=points, repeats=self.repeats, seed=self.seed, timeout=self.timeout)


def run_quant(target: Target, comparison: Comparison, folder: Path) -> Results:
    """Compare the types; keep what an earlier call left in the folder."""
    path, name = store.locate(target.configuration.settings)
    results = create_or_resume(folder, "quant", asdict(comparison.experiment()) | _identity(comparison, name))
    progress = Progress(len(comparison.types) * (1 + comparison.repeats * len(comparison.sizes)))
    try:
        _Quant(target, comparison, results, progress, path, name).run()
    finally:
        progress.close()
    results.document["complete"] = True
    results.save()
    return results


def _identity(comparison: Comparison, name: str) -> dict[str, Any]:
    """Return what decides the results, except the requests."""
    return {"types": list(comparison.types), "chunks": comparison.chunks, "model": name}


class _Quant:
    """One comparison in progress."""

    def __init__(
        self, target: Target, comparison: Comparison, results: Results, progress: Progress, path: Path, name: str
    ) -> None:
        self._target = target
        self._comparison = comparison
        self._results = results
        self._progress = progress
        self._source = path
        self._name = name
        self._spec = read_model(path)
        self._machine = describe_machine()
        self._placement = place_instance(target.configuration)
        self._card = self._placement.card
        self._models = results.folder / MODELS_FOLDER
        self._scores = results.folder / "reference.kld"
        self._results.document.setdefault("types", [])

    def run(self) -> None:
        document = self._results.document
        check_same_target(
            self._results, {"settings given": self._target.plain_settings, "GPUs": self._machine.get("gpus")}
        )
        document["machine"] = self._machine
        document["quality_note"] = self._quality_note()
        document["instance"] = {
            "server": {"model": self._name},
            "settings": self._target.plain_settings,
            "model": describe_model(self._spec),
        }
        document["reference"] = reference(self._card, None, None, "", self._comparison.experiment())
        self._require()
        self._results.save()  # making and scoring files takes minutes before the first result exists
        self._models.mkdir(exist_ok=True)
        for kind in self._comparison.types:
            self._measure(kind)
        if not self._comparison.keep_models:
            shutil.rmtree(self._models)
            self._scores.unlink(missing_ok=True)
            (self._results.folder / SERVED_REFERENCE).unlink(missing_ok=True)

    def _require(self) -> None:
        """Raise MissingError or StorageError at once if the comparison could not be finished; it takes an hour."""
        kinds = [kind for kind in self._comparison.types if kind != NF4 and not self._is_done(kind, self._entry(kind))]
        for tool in ("quantize", "perplexity") if kinds else ():
            self._comparison.tools.command(tool)
        if kinds and self._spec.format == "safetensors":
            self._comparison.tools.command("convert")
        if kinds and not self._scores.exists():
            self._require_space()

    def _require_space(self) -> None:
        """Check the room for the reference's probabilities and, if the reference is still to be made, for its file."""
        scores = llama_tools.reference_bytes(self._comparison.chunks, self._spec.vocab_size)
        is_here = self._spec.file_type in _PRECISE or self._made_file(REFERENCE_TYPE).exists()
        file = 0 if is_here else PRECISE_BYTES * self._spec.n_parameters
        # The conversion of a folder lies beside the file that is made from it.
        needed = file + max(scores, file if self._spec.format == "safetensors" else 0)
        llama_tools.check_space(self._results.folder, needed, "measuring quality")

    def _measure(self, kind: str) -> None:
        entry = self._entry(kind)
        entry.pop("skipped", None)  # a missing program may have been installed since
        reason = self._reason_to_skip(kind)
        if reason is not None:
            entry["skipped"] = reason
            self._progress.say(f"{kind}: skipped: {reason}")
            self._progress.skipped(1 + self._comparison.repeats * len(self._comparison.sizes))
            self._results.save()
            return
        if self._is_done(kind, entry):
            self._progress.skipped(1 + self._comparison.repeats * len(self._comparison.sizes))
            return
        model = self._source if kind == NF4 else self._file(kind)
        if "file_bytes" not in entry:
            entry |= _size_of(read_model(model))
        if kind != NF4 and "perplexity" not in entry:
            entry |= self._quality(kind, model)
        self._results.save()
        self._progress.skipped(1)
        self._speed(kind, model, entry)
        # Keep the user's own file, which may be one of the types, and the reference, the source of all others.
        if model.parent == self._models and kind != REFERENCE_TYPE and not self._comparison.keep_models:
            _remove(model)

    def _is_done(self, kind: str, entry: dict[str, Any]) -> bool:
        points = [self._results.entry(f"{kind} {point.name}") for point in self._comparison.experiment().points]
        measured = all(point["skipped"] or len(point["runs"]) >= self._comparison.repeats for point in points)
        return measured and (kind == NF4 or "perplexity" in entry)

    def _entry(self, kind: str) -> dict[str, Any]:
        types: list[dict[str, Any]] = self._results.document["types"]
        found = next((entry for entry in types if entry["name"] == kind), None)
        if found is None:
            found = {"name": kind}
            types.append(found)
        return found

    def _reason_to_skip(self, kind: str) -> str | None:
        """Return why a type cannot be measured here."""
        if kind != NF4:
            return None
        settings = self._target.configuration.settings
        if self._spec.format != "safetensors" or NF4_METHOD not in engine_named(settings.engine).folder_methods:
            return "bitsandbytes quantises a Hugging Face folder in SGLang; --model and --engine name another"
        if self._placement.device != "cuda":
            return "SGLang's bitsandbytes loader needs CUDA, and the instance runs on the CPU"
        python = str(settings.engine_executable or sys.executable)
        if subprocess.run([python, "-c", "import bitsandbytes"], capture_output=True, check=False).returncode:
            return f"SGLang needs a package that is missing: {python} -m pip install --no-deps {BITSANDBYTES}"
        return None

    # --- files

    def _file(self, kind: str) -> Path:
        """Return the model in a type; make it if it is missing."""
        if kind == self._spec.file_type:
            return self._source
        file = self._made_file(kind)
        if not file.exists():
            source = self._source if kind == REFERENCE_TYPE else self._precise_file()
            # The measurement shows whether it works.
            options = Options(tools=self._comparison.tools, allow_requantize=True, verify=False)
            quantize(source, kind, file, options=options, on_step=self._on_step)
        return file

    def _made_file(self, kind: str) -> Path:
        return self._models / f"{self._name}-{kind}.gguf"

    def _precise_file(self) -> Path:
        """Return the file that the others are made from and compared with: the source if precise, otherwise its F16."""
        return self._source if self._spec.file_type in _PRECISE else self._file(REFERENCE_TYPE)

    def _on_step(self, what: str, done: int, total: int) -> None:
        self._progress.running(what, done / max(1, total))

    def _quality_note(self) -> str:
        reference = self._spec.file_type if self._spec.file_type in _PRECISE else REFERENCE_TYPE
        text = f"{self._comparison.chunks} chunks of {llama_tools.WINDOW_TOKENS} tokens of chapters of "
        text += "Alice's Adventures in Wonderland (shipped with pascaline); KL divergence in nats per token from "
        text += f"{reference}."
        if self._spec.format == "gguf" and self._spec.file_type not in _PRECISE:
            text += f" The source is {self._spec.file_type} already: F16 is that file's weights, not the original's."
        return text

    # --- quality

    def _quality(self, kind: str, model: Path) -> dict[str, float]:
        with as_file(SHIPPED_TEXT) as text:
            return self._scores_of(kind, model, text)

    def _scores_of(self, kind: str, model: Path, text: Path) -> dict[str, float]:
        comparison = self._comparison
        scoring = llama_tools.Scoring(
            text=text,
            chunks=comparison.chunks,
            on_gpu=bool(self._machine.get("gpus")) and self._target.configuration.settings.device != "cpu",
            threads=len(os.sched_getaffinity(0)),
            tools=comparison.tools,
        )

        def on_chunk(done: int) -> None:
            label = f"{kind}: quality, chunk {done} of {comparison.chunks}"
            self._progress.running(label, done / comparison.chunks)

        if not self._scores.exists():
            self._score_reference(scoring, on_chunk)
        found = llama_tools.score(model, scoring, self._scores, on_chunk)
        shown = f"perplexity {found['perplexity']:.3f}, mean KL {found['kl_mean']:.5f}"
        self._progress.say(f"{kind}: {shown}, same top token {found['same_top']:.2%}")
        return found

    def _score_reference(self, scoring: llama_tools.Scoring, on_chunk: Callable[[int], None]) -> None:
        needed = llama_tools.reference_bytes(scoring.chunks, self._spec.vocab_size)
        llama_tools.check_space(self._results.folder, needed, "measuring quality")
        partial = self._scores.with_suffix(".partial")
        llama_tools.score_reference(self._precise_file(), scoring, partial, on_chunk)
        partial.replace(self._scores)

    # --- speed and memory

    def _speed(self, kind: str, model: Path, entry: dict[str, Any]) -> None:
        experiment = self._comparison.experiment()
        names = [f"{kind} {point.name}" for point in experiment.points]
        if all(len(self._results.entry(name)["runs"]) >= experiment.repeats for name in names):
            self._progress.skipped(len(names) * experiment.repeats)
            return
        target = self._serving(kind, model)
        key = read_api_key(target.configuration.settings.api_key_file)
        flags = target.serve_flags(read_model(model))
        try:
            with started(flags, self._results.folder / LOG_NAME, key, self._progress.waiting) as instance:
                self._describe(kind, entry, instance)
                prompts = make_prompts(instance.endpoint, instance.server)
                self._served_quality(kind, entry, instance, prompts)
                with instance.gpu(target.exporter) as gpu:
                    Runner(instance, prompts, gpu, self._progress, experiment).measure(self._results, f"{kind} ")
        except EngineError as error:
            # A type that the engine cannot serve must not stop the others.
            entry["skipped"] = str(error)
            self._progress.say(f"{kind}: not served: {error}")
        self._note_memory(names, entry)

    def _served_quality(self, kind: str, entry: dict[str, Any], instance: Instance, prompts: Prompts) -> None:
        """Let the engine score the text itself, if it can; the F16 of this comparison is the reference."""
        if prompts.tokens is None or "served_perplexity" in entry:
            return
        chunks, file = self._comparison.chunks, self._results.folder / SERVED_REFERENCE
        scores = score_server(
            instance.endpoint,
            prompts.tokens,
            chunks,
            lambda done: self._progress.running(f"{kind}: served quality, chunk {done} of {chunks}", 0.0),
        )
        if scores is None:
            return
        entry["served_perplexity"] = scores.perplexity
        if kind == REFERENCE_TYPE:
            scores.save(file)
        elif file.exists():
            entry |= compare_scores(load_scores(file), scores)
        self._progress.say(f"{kind}: perplexity as served {scores.perplexity:.3f}")
        self._results.save()

    def _serving(self, kind: str, model: Path) -> Target:
        """Return the target that serves one type."""
        given: dict[str, Any] = self._target.given | {"model": str(model), "served_model_name": f"{self._name}-{kind}"}
        given.pop("model_sha256", None)
        if kind == NF4:
            given |= {"quantization": NF4_METHOD}
        return replace(self._target, given=given)

    def _describe(self, kind: str, entry: dict[str, Any], instance: Instance) -> None:
        document = self._results.document
        document["instance"]["server"] |= asdict(instance.server) | {"model": self._name}
        entry["load_seconds"] = instance.start_seconds
        plan = instance.plan()
        if plan is not None:
            entry["planned_bytes"] = plan["total_bytes"]
            if kind == NF4:
                # Its file is the 16-bit one; the plan knows its size in memory.
                entry["bits_per_weight"] = 8 * plan["weights_bytes"] / self._spec.n_parameters
            spec = read_model(self._file(kind)) if kind != NF4 else None
            expected = reference(self._card, spec, plan, instance.server.engine, self._comparison.experiment())
            document["reference"]["points"] |= {f"{kind} {name}": point for name, point in expected["points"].items()}
            document["reference"]["note"] = expected["note"]
        self._results.save()

    def _note_memory(self, names: list[str], entry: dict[str, Any]) -> None:
        """Keep the highest memory use of all points: of the GPU or, without one, of the engine's processes."""
        for key in ("gpu_memory_bytes", "host_memory_bytes"):
            summaries = [self._results.entry(name)["summary"] for name in names]
            values = [summary[key]["value"] for summary in summaries if key in summary]
            if values:
                entry["memory_bytes"] = max(values)
                entry["memory_of"] = key.partition("_")[0]
                break
        self._results.save()


def default_types(settings: Settings) -> tuple[str, ...]:
    """Return the types if the user names none; with NF4 if the engine can quantise the model while it loads."""
    can = NF4_METHOD in engine_named(settings.engine).folder_methods
    return (*DEFAULT_TYPES, NF4) if can and Path(settings.model).expanduser().is_dir() else DEFAULT_TYPES


def check_types(types: tuple[str, ...]) -> None:
    """Raise ConfigurationError for an unknown type."""
    known = {*DEFAULT_TYPES, NF4, "Q3_K_L", "Q4_K_S", "Q5_K_S", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K"}
    if unknown := [kind for kind in types if kind not in known]:
        raise ConfigurationError(f"--types: unknown type {unknown[0]!r}, must be one of: {', '.join(sorted(known))}")


def _remove(model: Path) -> None:
    """Delete a model and the checksum beside it."""
    model.unlink()
    model.with_name(f"{model.name}.sha256").unlink(missing_ok=True)


def _size_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the size of a file and the number of bits per weight, by each tensor's actual type."""
    by_type: dict[str, int] = {}
    for tensor in spec.tensors:
        by_type[tensor.tensor_type] = by_type.get(tensor.tensor_type, 0) + tensor.n_bytes
    return {
        "file_bytes": spec.file_bytes,
        "weights_bytes": spec.weights_bytes,
        "bits_per_weight": 8 * spec.weights_bytes / spec.n_parameters,
        "tensor_bytes": dict(sorted(by_type.items(), key=lambda item: -item[1])),
    }
