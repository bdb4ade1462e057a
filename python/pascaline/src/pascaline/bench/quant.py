"""Compares types of weights from F16 to Q3_K: size, planned and measured memory, quality and speed of each.

llama.cpp's llama-quantize makes the files from one source and its llama-perplexity scores them on one text. The engine
that the settings name then serves them one after the other. A later call skips the types that are already done.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline.bench.environment import describe_machine
from pascaline.bench.experiment import Experiment, batch_points
from pascaline.bench.experiment_runner import Runner
from pascaline.bench.instance import read_api_key, started
from pascaline.bench.progress import Progress
from pascaline.bench.quant_files import REFERENCE_TYPE, TypeFiles, size_of
from pascaline.bench.quant_quality import QualityScorer
from pascaline.bench.reference import reference
from pascaline.bench.results import create_or_resume
from pascaline.bench.served_quality import compare_scores, load_scores, score_server
from pascaline.bench.server import make_prompts
from pascaline.bench.sweep import LOG_NAME, Target, check_same_target, describe_model
from pascaline.engines import engine_named
from pascaline.errors import ConfigurationError, EngineError
from pascaline.models import resolve
from pascaline.models.reader import read_model
from pascaline.plugin import PLUGIN
from pascaline.quantize import Tools
from pascaline.serving.task import place_instance

if TYPE_CHECKING:
    from pascaline.bench.instance import Instance
    from pascaline.bench.results import Results
    from pascaline.bench.workload import Prompts
    from pascaline.settings import Settings

DEFAULT_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q3_K_S")
NF4 = "NF4"
"""bitsandbytes' 4-bit type. Only SGLang serves it."""
NF4_METHOD = "bitsandbytes"
"""The value of `quantization` that makes it."""
BITSANDBYTES = f"bitsandbytes=={PLUGIN.bitsandbytes}"
"""Not a locked package: 180 MB for one method. With CUDA 12.6 it has code for sm_60; SGLang asks for
PLUGIN.oldest_bitsandbytes."""
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
    path, name = resolve.locate(target.configuration.settings)
    results = create_or_resume(folder, "quant", asdict(comparison.experiment()) | _identity(comparison, name))
    progress = Progress(len(comparison.types) * (1 + comparison.repeats * len(comparison.sizes)))
    try:
        _TypeComparison(target, comparison, results, progress, path, name).run()
    finally:
        progress.close()
    results.document["complete"] = True
    results.save()
    return results


def _identity(comparison: Comparison, name: str) -> dict[str, Any]:
    """Return what decides the results, except the requests."""
    return {"types": list(comparison.types), "chunks": comparison.chunks, "model": name}


class _TypeComparison:
    """One comparison in progress."""

    def __init__(
        self, target: Target, comparison: Comparison, results: Results, progress: Progress, path: Path, name: str
    ) -> None:
        self._target = target
        self._comparison = comparison
        self._results = results
        self._progress = progress
        self._name = name
        self._spec = read_model(path)
        self._machine = describe_machine()
        self._placement = place_instance(target.configuration)
        self._card = self._placement.card
        self._files = TypeFiles(
            source=path,
            spec=self._spec,
            name=name,
            folder=results.folder / MODELS_FOLDER,
            tools=comparison.tools,
            on_step=lambda what, done, total: progress.running(what, done / max(1, total)),
        )
        self._quality = QualityScorer(
            files=self._files,
            folder=results.folder,
            chunks=comparison.chunks,
            on_gpu=bool(self._machine.get("gpus")) and target.configuration.settings.device != "cpu",
            progress=progress,
        )
        self._results.document.setdefault("types", [])

    def run(self) -> None:
        document = self._results.document
        check_same_target(
            self._results, {"settings given": self._target.plain_settings, "GPUs": self._machine.get("gpus")}
        )
        document["machine"] = self._machine
        document["quality_note"] = self._quality.note
        document["instance"] = {
            "server": {"model": self._name},
            "settings": self._target.plain_settings,
            "model": describe_model(self._spec),
        }
        document["reference"] = reference(self._card, None, None, "", self._comparison.experiment())
        self._require()
        self._results.save()  # making and scoring files takes minutes before the first result exists
        self._files.folder.mkdir(exist_ok=True)
        for kind in self._comparison.types:
            self._measure(kind)
        if not self._comparison.keep_models:
            self._files.discard_all()
            self._quality.scores.unlink(missing_ok=True)
            (self._results.folder / SERVED_REFERENCE).unlink(missing_ok=True)

    def _require(self) -> None:
        """Raise MissingError or StorageError at once if the comparison could not be finished; it takes an hour."""
        kinds = [kind for kind in self._comparison.types if kind != NF4 and not self._is_done(kind, self._entry(kind))]
        for tool in ("quantize", "perplexity") if kinds else ():
            self._comparison.tools.command(tool)
        if kinds and self._spec.format == "safetensors":
            self._comparison.tools.command("convert")
        if kinds:
            self._quality.require_space()

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
        model = self._files.source if kind == NF4 else self._files.in_type(kind)
        if "file_bytes" not in entry:
            entry |= size_of(read_model(model))
        if kind != NF4 and "perplexity" not in entry:
            entry |= self._quality.score(kind, model)
        self._results.save()
        self._progress.skipped(1)
        self._speed(kind, model, entry)
        if kind != NF4 and not self._comparison.keep_models:
            self._files.discard(kind)

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
            spec = read_model(self._files.in_type(kind)) if kind != NF4 else None
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
