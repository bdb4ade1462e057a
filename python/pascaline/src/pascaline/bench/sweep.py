"""A whole sweep: the instance, its description, the measurements, and what they are compared with."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pascaline.bench.environment import describe_machine
from pascaline.bench.experiment_runner import Runner
from pascaline.bench.instance import attach, read_api_key, started, to_flags
from pascaline.bench.progress import Progress
from pascaline.bench.reference import find_card, reference
from pascaline.bench.results import create_or_resume
from pascaline.bench.server import make_prompts
from pascaline.bench.stream import parse_endpoint
from pascaline.configuration import DEFAULT, setting_fields
from pascaline.engines.served import read_served
from pascaline.errors import ConfigurationError, PascalineError
from pascaline.models import resolve
from pascaline.models.reader import read_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pascaline.bench.experiment import Experiment
    from pascaline.bench.instance import Instance
    from pascaline.bench.results import Results
    from pascaline.configuration import Configuration
    from pascaline.models.spec import ModelSpec

LOG_NAME = "serve.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What to measure."""

    url: str | None
    """A server that already runs; None: start one."""
    exporter: str | None
    configuration: Configuration
    given: dict[str, Any]
    """Settings chosen by flags."""
    config_file: Path | None
    wanted: dict[str, Any]
    """Settings that the sweep needs; the user's choices take precedence."""

    @property
    def model_name(self) -> str:
        """Name of the model until the server reports one."""
        if self.url is not None:
            return "server"
        settings = self.configuration.settings
        return settings.served_model_name or Path(settings.model.replace(":", "-")).stem

    @property
    def card_name(self) -> str | None:
        """The card profile of a server that runs already, if it is named. An instance's plan names its own."""
        return None if self.url is None else self.given.get("card")

    @property
    def plain_settings(self) -> dict[str, str]:
        """Settings from flags, file and variables as text. Engine variables by name only: one may hold a key."""
        if self.url is not None:
            return {key: str(value) for key, value in self.given.items()}
        chosen = [key for key, _ in setting_fields() if self._is_chosen(key)]
        plain = {key: reduce(getattr, key.split("."), cast("Any", self.configuration.settings)) for key in chosen}
        return {key: " ".join(value) if key == "environment" else str(value) for key, value in plain.items()}

    def _is_chosen(self, key: str) -> bool:
        """Whether the user set it; the value in a card's profile is only a starting point."""
        origin = self.configuration.origins[key]
        return origin != DEFAULT and not origin.startswith("profile ")

    def serve_flags(self, spec: ModelSpec) -> list[str]:
        """Return the arguments for `pascaline serve`."""
        wanted = {key: value for key, value in self.wanted.items() if not self._is_chosen(key)}
        if "context_length" in wanted and spec.context_length:
            wanted["context_length"] = min(wanted["context_length"], spec.context_length)
        config = ["--config", str(self.config_file)] if self.config_file else []
        return [*config, *to_flags(self.given | wanted)]


def run_sweep(target: Target, experiment: Experiment, folder: Path) -> Results:
    """Measure an experiment; keep what an earlier call left in the folder."""
    results = create_or_resume(folder, experiment.kind, experiment.to_json())
    progress = Progress(len(experiment.points) * experiment.repeats)
    try:
        with instance_of(target, folder, progress) as instance:
            spec = spec_of(target, instance)
            describe_instance(results, instance, target, spec, experiment)
            prompts = make_prompts(instance.endpoint, instance.server)
            with instance.gpu(target.exporter) as gpu:
                Runner(instance, prompts, gpu, progress, experiment).measure(results)
    finally:
        progress.close()
    results.document["complete"] = True
    results.save()
    return results


@contextlib.contextmanager
def instance_of(target: Target, folder: Path, progress: Progress) -> Iterator[Instance]:
    """Give the instance of a target; if it has to be started, it runs until the block ends."""
    key = read_api_key(target.configuration.settings.api_key_file)
    if target.url is not None:
        yield attach(parse_endpoint(target.url, key))
        return
    spec = _named_spec(target)
    with started(target.serve_flags(spec), folder / LOG_NAME, key, progress.waiting) as instance:
        progress.say(f"the instance is ready after {instance.start_seconds:.1f} s")
        yield instance


def describe_instance(
    results: Results, instance: Instance, target: Target, spec: ModelSpec | None, experiment: Experiment
) -> None:
    """Record what is measured and on which machine, with the roofline, the plan and the guide's claims."""
    machine, settings = describe_machine(), target.plain_settings
    measured = asdict(instance.server) | {"settings given": settings, "GPUs": machine.get("gpus")}
    check_same_target(results, measured)
    results.document["machine"] = machine
    results.document["instance"] = {
        "url": instance.endpoint.url if target.url else None,
        "start_seconds": instance.start_seconds,
        "server": asdict(instance.server),
        "settings": settings,
        "model": describe_model(spec),
    }
    plan = results.document["plan"] = instance.plan()
    here = machine.get("gpus", []) if instance.endpoint.is_local else []
    card = find_card(target.card_name, here, plan)
    results.document["reference"] = reference(card, spec, plan, instance.server.engine, experiment)
    results.save()


# These may differ between two starts of the same instance.
_CHANGING = frozenset({"model_path", "max_total_tokens"})


def check_same_target(results: Results, now: dict[str, Any]) -> None:
    """Raise ConfigurationError if the folder's earlier runs were measured on something else.

    now: the server's own report, with `settings given` and `GPUs`.
    """
    document = results.document
    if not any(entry["runs"] for entry in document["points"]):
        return
    instance = document.get("instance") or {}
    before = (instance.get("server") or {}) | {
        "settings given": instance.get("settings") or {},
        "GPUs": (document.get("machine") or {}).get("gpus"),
    }
    # Compare what JSON can hold: it has lists instead of tuples.
    plain = json.loads(json.dumps(now))
    different = [key for key in plain if key in before and key not in _CHANGING and plain[key] != before[key]]
    if different:
        words = "; ".join(f"{key.replace('_', ' ')}: {before[key]}, now {plain[key]}" for key in different)
        raise ConfigurationError(
            f"--output: {results.folder} holds runs of another instance ({words}); "
            "name another folder, or measure with the settings of those runs"
        )


def describe_model(spec: ModelSpec | None) -> dict[str, Any] | None:
    """Return the facts about a model that a result holds."""
    if spec is None:
        return None
    return {
        "name": spec.name,
        "architecture": spec.architecture,
        "parameters": spec.n_parameters,
        "weights_bytes": spec.weights_bytes,
        "file_type": spec.file_type,
        "file_bytes": spec.file_bytes,
    }


def spec_of(target: Target, instance: Instance) -> ModelSpec | None:
    """Return the header of the served model; None if its file is not on this machine."""
    if target.url is None or "model" in target.given:
        return _named_spec(target)
    path = instance.model_path()
    if path is None or not instance.endpoint.is_local:
        return None
    with contextlib.suppress(PascalineError):
        return read_model(Path(path))
    return None


def _named_spec(target: Target) -> ModelSpec:
    settings = target.configuration.settings
    path, _ = resolve.locate(settings)
    return read_served(settings, path)
