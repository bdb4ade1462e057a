"""The results of a benchmark as one JSON file, written after every run so that no measurement is lost."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from pascaline.bench.metrics import summarize
from pascaline.bench.run_result import Run
from pascaline.errors import ConfigurationError, StorageError
from pascaline.redaction import redact_all

SCHEMA = 1
"""Version of the document; readers refuse any other."""
FILE_NAME = "results.json"
REPORT_NAME = "report.html"


class Results:
    """A results file and its content."""

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        """Do not call this; use `create_or_resume` or `load`."""
        self.folder = folder
        self.document = document

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.folder / FILE_NAME

    @property
    def kind(self) -> str:
        """Name of the benchmark."""
        return str(self.document["kind"])

    def entry(self, name: str) -> dict[str, Any]:
        """Return the entry of a point; make it if it is missing."""
        points: list[dict[str, Any]] = self.document["points"]
        for entry in points:
            if entry["name"] == name:
                return entry
        entry = {"name": name, "runs": [], "summary": {}, "skipped": None}
        points.append(entry)
        return entry

    def runs(self, name: str) -> list[Run]:
        """Return the runs of a point."""
        return [Run.from_json(run) for run in self.entry(name)["runs"]]

    def add_run(self, name: str, run: Run) -> None:
        """Keep a run and write it to disk."""
        entry = self.entry(name)
        entry["runs"].append(run.to_json())
        entry["summary"] = summarize(self.runs(name))
        entry["skipped"] = None
        self.save()

    def skip(self, name: str, reason: str) -> None:
        """Record why a point cannot be measured."""
        self.entry(name)["skipped"] = reason
        self.save()

    def save(self) -> None:
        """Write the file in one step: readers never see half of it."""
        self.document["updated"] = time.time()
        partial: Path | None = None
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{FILE_NAME}.", dir=self.folder)
            partial = Path(name)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(redact_all(self.document), file, separators=(",", ":"))
            partial.chmod(0o644)
            partial.replace(self.path)
        except OSError as error:
            raise StorageError(f"failed to write {self.path}: {error.strerror}") from error
        finally:
            if partial is not None:
                partial.unlink(missing_ok=True)


def create_or_resume(folder: Path, kind: str, experiment: dict[str, Any]) -> Results:
    """Return new results, or those that an interrupted run of the same experiment left in the folder.

    Raises ConfigurationError if the folder holds results of another experiment.
    """
    if (folder / FILE_NAME).exists():
        results = load(folder)
        _check_same(results, kind, experiment)
        return results
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"failed to make {folder}: {error.strerror}") from error
    now = time.time()
    document = {
        "schema": SCHEMA,
        "kind": kind,
        "created": now,
        "updated": now,
        "complete": False,
        "experiment": experiment,
        "points": [],
    }
    return Results(folder, document)


def load(place: Path) -> Results:
    """Read results from their folder or file."""
    path = place / FILE_NAME if place.is_dir() else place
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"failed to read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"failed to read {path}: not JSON: {error}") from error
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        raise ConfigurationError(f"{path}: schema of the results must be {SCHEMA}, got {found!r}")
    return Results(path.parent, document)


def _check_same(results: Results, kind: str, experiment: dict[str, Any]) -> None:
    # Compare what JSON can hold: it has lists instead of tuples.
    wanted = {"kind": kind} | json.loads(json.dumps(experiment))
    found = {"kind": results.kind} | results.document["experiment"]
    different = [key for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
    if different:
        raise ConfigurationError(
            f"--output: {results.folder} holds results of another experiment ({', '.join(different)} differ); "
            "name another folder, or repeat the command that started them"
        )
