"""Whether a model is served: by the engine of the settings, or by any engine that this package has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.engines.registry import engine_named, engines
from pascaline.errors import ModelError
from pascaline.models import resolve
from pascaline.models.roles import own_role

if TYPE_CHECKING:
    from pathlib import Path

    from pascaline.engines.base import Engine
    from pascaline.models.spec import ModelSpec
    from pascaline.settings import Settings


def engine_for(spec: ModelSpec) -> Engine:
    """Return the engine to serve a model with: one that names its architecture, else one that decides itself.

    An engine that does not serve the role of the file is not asked.
    """
    by_certainty = sorted(engines().values(), key=lambda engine: engine.decides_itself)
    role = own_role(spec)
    fit = (engine for engine in by_certainty if engine.knows(spec) and engine.refuses_role(spec, role) is None)
    return next(fit, by_certainty[-1])


def refusal_of_all(spec: ModelSpec) -> str | None:
    """Say why no engine here serves a model; None if one does."""
    engine = engine_for(spec)
    sentence = engine.judge_as(spec).sentence
    return f"engine {engine.name} cannot serve it: {sentence}" if sentence else None


def read_served(settings: Settings, path: Path) -> ModelSpec:
    """Read the model's header. ModelError: the engine cannot serve it; ConfigurationError: settings exceed it."""
    spec = resolve.read_header(path)
    if sentence := engine_named(settings.engine).judge_as(spec, settings.role).sentence:
        raise ModelError(f"{path}: {sentence}")
    resolve.check_settings(settings, spec)
    return spec
