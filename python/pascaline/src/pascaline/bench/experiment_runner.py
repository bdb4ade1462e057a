"""Runs an experiment on one instance: warm-up, runs, readings. Points that are already measured are skipped."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from pascaline.bench.experiment import reason_to_skip, requests_of, warmup_of
from pascaline.bench.load import run_load
from pascaline.bench.run_result import Run
from pascaline.bench.sampling import Sampler
from pascaline.bench.speculation import difference, read_speculation
from pascaline.errors import EngineError

if TYPE_CHECKING:
    from pascaline.bench.experiment import Experiment, Point
    from pascaline.bench.instance import Instance
    from pascaline.bench.load import Load, Record
    from pascaline.bench.progress import Progress
    from pascaline.bench.results import Results
    from pascaline.bench.sampling import GpuSource
    from pascaline.bench.workload import Prompts, Request


class Runner:
    """One instance under measurement."""

    def __init__(
        self, instance: Instance, prompts: Prompts, gpu: GpuSource | None, progress: Progress, experiment: Experiment
    ) -> None:
        """gpu: None leaves out the GPU's figures."""
        self._instance = instance
        self._prompts = prompts
        self._sampler = Sampler(gpu, instance.engine_pid)
        self._progress = progress
        self._experiment = experiment

    def measure(self, results: Results, prefix: str = "") -> None:
        """Measure every point that the results lack. prefix: put before the points' names in the results."""
        for point in self._experiment.points:
            name = prefix + point.name
            reason = reason_to_skip(point, self._instance.server)
            if reason:
                results.skip(name, reason)
                self._progress.say(f"{name}: skipped: {reason}")
                self._progress.skipped(self._experiment.repeats)
                continue
            self._measure_point(point, name, results)

    def _measure_point(self, point: Point, name: str, results: Results) -> None:
        done = len(results.entry(name)["runs"])
        self._progress.skipped(min(done, self._experiment.repeats))
        if done >= self._experiment.repeats:
            return
        self._progress.running(f"{name}: warm-up", 0.0)
        self._load(point, warmup_of(point, self._prompts, f"{self._experiment.seed}/{name}/warm-up/{done}"), "")
        for repeat in range(done, self._experiment.repeats):
            label = f"{name}, run {repeat + 1} of {self._experiment.repeats}"
            run = self._run(point, f"{self._experiment.seed}/{name}/{repeat}", label)
            if all(record.error for record in run.records):
                raise EngineError(f"{label}: no request succeeded; the first failed with: {run.records[0].error}")
            results.add_run(name, run)
            self._progress.finished(label, run)

    def _run(self, point: Point, seed: str, label: str) -> Run:
        requests = requests_of(point, self._prompts, seed)
        instance, started = self._instance, time.time()
        before = read_speculation(instance.endpoint, instance.server.engine)
        with self._sampler as sampler:
            load = self._load(point, requests, label)
        after = read_speculation(instance.endpoint, instance.server.engine)
        return Run(
            seed=seed,
            started=started,
            seconds=load.seconds,
            cpu_seconds=load.cpu_seconds,
            records=load.records,
            samples=sampler.samples,
            speculation=difference(before, after),
        )

    def _load(self, point: Point, requests: list[Request], label: str) -> Load:
        ended = 0

        def on_done(_: Record) -> None:
            nonlocal ended
            ended += 1
            if label:
                self._progress.running(f"{label}: {ended} of {len(requests)} requests", ended / len(requests))

        return asyncio.run(
            run_load(
                self._instance.endpoint,
                self._instance.server.model,
                requests,
                concurrency=point.concurrency,
                timeout=self._experiment.timeout,
                on_done=on_done,
            )
        )
