"""Supervision of one engine: the only place that starts and ends it and that changes the instance's state.

One task runs through the life of an instance: resolve and verify the model, then start the engine, watch it, and
start it again when it dies or falls silent. Signals and POST /drain only set a flag; this task acts on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import traceback
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline import __version__
from pascaline.digests import combined_sha256, shown_sha256s
from pascaline.engines import ENGINES, Task
from pascaline.errors import EngineError, ExitCode, GaveUpError, PascalineError
from pascaline.gpu import loss
from pascaline.models import store
from pascaline.models.chat_template import chat_templates
from pascaline.redaction import read_secret
from pascaline.serving import ports
from pascaline.serving.agent import create_server, serve
from pascaline.serving.engine_api import FIRST_GENERATION_SECONDS, POLL_TIMEOUT_SECONDS, EngineApi, Probe
from pascaline.serving.failure import Ending, Failure, FailureKind, judge
from pascaline.serving.health import Health, Judge, State, backoff_seconds
from pascaline.serving.metrics import Metrics
from pascaline.serving.process import EngineProcess
from pascaline.serving.runtime_folder import RuntimeFolder
from pascaline.serving.starts import Starts
from pascaline.serving.task import make_task, place_instance, plan_instance
from pascaline.serving.threads import is_own_failure, start_in_thread
from pascaline.units import format_bytes

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine

    from pascaline.configuration import Configuration
    from pascaline.engines import Progress
    from pascaline.models.spec import ModelSpec
    from pascaline.models.store import ResolvedModel
    from pascaline.planning import Plan
    from pascaline.planning.placement import Placement
    from pascaline.serving.console import Console
    from pascaline.serving.notify import Notifier
    from pascaline.settings import Settings

SOCKET_NAME = "agent.sock"
"""In $RUNTIME_DIRECTORY: the agent for those who may open it, without a key."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The service manager's, Ctrl-C's, and a closed terminal's."""
POLL_SECONDS = 1.0
"""How often counters are read; a scrape of SGLang takes some milliseconds."""
DRAIN_POLL_SECONDS = 0.2
"""The same while the instance drains, when somebody waits for the end."""
BLIND_SECONDS = POLL_SECONDS + POLL_TIMEOUT_SECONDS + 4.0
"""Between two looks at an engine; more means that this process was stopped, or the machine slept."""
EXTEND_SECONDS = 30.0
"""Start and stop time that the service manager is asked for, again and again while there is progress."""
BACKOFF_SECONDS = 1.0
BACKOFF_CAP_SECONDS = 60.0
GPU_LOST_SECONDS = 300.0
"""Wait after the GPU is lost: restarts do not bring it back, a reset by a person does."""
GPU_LOOK_SECONDS = 15.0
"""Between two questions to NVML whether a lost GPU is back."""
STUCK_SECONDS = 30.0
"""Between two looks whether a process that could not be killed has ended."""
STABLE_SECONDS = 600.0
"""An engine that served this long has recovered: its next crash is the first again."""
NO_CHAT_TEMPLATE = (
    "the model has no chat template: /v1/completions works, /v1/chat/completions needs a model file that carries one"
)
KILL_GRACE_SECONDS = 20.0
"""From SIGTERM after draining to SIGKILL; SGLang takes up to 5 s to notice and 3 s to end."""


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Raised within the main task when the instance is to stop."""


@dataclass(slots=True)
class Watch:
    """What is known while one run of an engine is watched."""

    api: EngineApi
    judge: Judge
    began: float
    """On the monotonic clock."""
    probe: asyncio.Task[Probe] | None = None
    settled: bool = False
    """Whether it served for so long that its start counts as one that went well."""
    looked: float = field(init=False)
    """When it was last looked at."""
    understood: float = field(init=False)
    """When a look last went as it should."""

    def __post_init__(self) -> None:
        """The first look is the start."""
        self.looked = self.understood = self.began

    def look(self, *, in_vain: bool) -> float:
        """Return the time; what passed unseen since the last look is not held against the engine.

        in_vain: whether a question since then failed in this process.
        """
        now = time.monotonic()
        if now - self.looked > BLIND_SECONDS or in_vain:
            self.judge.missed(now - self.looked)
        self.looked = now
        return now


class Supervisor:
    """One instance, from start to exit."""

    def __init__(self, configuration: Configuration, console: Console, notifier: Notifier) -> None:
        """Nothing happens before `run`."""
        self.settings: Settings = configuration.settings
        self.health = Health(State.PLANNED, time.time(), "starting up")
        self.metrics = Metrics()
        self.model: ResolvedModel | None = None
        self.plan: dict[str, Any] | None = None
        self.last_probe: Probe | None = None
        self.restarts = 0
        self.requests: Progress | None = None
        """What the engine last said of its requests; None while it says nothing."""
        self.versions = {"pascaline": __version__}
        """Of pascaline, and of the engine once it is ready."""
        self._configuration = configuration
        self._console = console
        self._notifier = notifier
        self._engine = ENGINES[self.settings.engine]
        self._runtime_folder = RuntimeFolder()
        self._process: EngineProcess | None = None
        self._placement: Placement | None = None
        self._api: EngineApi | None = None
        """Of the engine that was started last."""
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._failed_to_ask = False
        """Whether a question since the last look failed in this process, and not in the engine."""
        self._starts = Starts.from_environment()
        self._signalled = False

    @property
    def engine_pid(self) -> int | None:
        """Process of the engine; None while none runs."""
        return self._process.pid if self._process and self._process.exit_code is None else None

    def stop(self, reason: str) -> None:
        """Ask for an orderly end; asked again, or at the end, it changes nothing."""
        if self._stop.is_set() or self.health.state in {State.FAILED, State.STOPPED}:
            return
        self._change(State.DRAINING, reason)
        self._notifier.stopping()
        self._stop.set()

    def _on_signal(self, name: str) -> None:
        """Stop in order; at a second signal at once. One after POST /drain is a first one."""
        if self._signalled:
            self._stop_now.set()
        self._signalled = True
        self.stop(name)

    async def run(self) -> ExitCode:
        """Serve until asked to stop; raises PascalineError where the instance cannot serve."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            # nohup has SIGHUP ignored, and means it.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._on_signal, number.name)
        listener = ports.bind(self.settings.agent_host, self.settings.agent_port, "agent", "agent_port")
        ports.check_free(self.settings.host, self.settings.port, "engine", "port")
        server = create_server(self)
        serving = asyncio.create_task(serve(server, listener, *self._unix_listeners()))
        try:
            self._count_start(self._starts.begin)
            with self._runtime_folder:
                return await self._live()
        finally:
            server.should_exit = True
            await serving

    def read_api_key(self) -> str | None:
        """Return the key that requests must carry, None where none is set; raises OSError, UnicodeDecodeError."""
        path = self.settings.api_key_file
        return read_secret(path) if path is not None else None

    def _unix_listeners(self) -> list[socket.socket]:
        """Open the agent's socket in the folder that the service manager made for this unit, where there is one."""
        folder = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        try:
            return [ports.bind_unix(Path(folder, SOCKET_NAME))] if folder else []
        except OSError as error:
            self._console.line("WARNING", "pascaline", f"failed to listen on {folder}/{SOCKET_NAME}: {error}")
            return []

    async def _live(self) -> ExitCode:
        try:
            task = await self._prepare()
            await self._keep_running(task)
        except Stopped:
            return await self._drain()
        except PascalineError as error:
            self._change(State.FAILED, str(error).partition("\n")[0])
            raise
        except Exception as error:
            self._note_mistake("a mistake of pascaline itself", error)
            text = f"a mistake of pascaline itself ({error!r}); please report it with the traceback that the log holds"
            self._change(State.FAILED, text)
            raise PascalineError(text) from error
        finally:
            if self._process is not None and await self._process.kill() is None:
                self._console.line("ERROR", "pascaline", f"left behind: {_stuck(self._process)}")
            self.metrics.engine_up.set(0)
        raise AssertionError("an instance ends by Stopped or an error")

    # --- before the engine runs ---------------------------------------------------------------------------------------

    async def _prepare(self) -> Task:
        settings = self.settings
        with self._console.stage("resolve") as stage:
            path, name = await self._in_thread(store.locate, settings)
            spec = await self._in_thread(store.read, settings, path)
            files = store.model_files(spec, path)
            path = files[0]
            stage.note = f": {path} ({spec.architecture}, {spec.n_parameters / 1e6:.0f} M parameters)"
        self._record_stage("resolve", stage.seconds)
        plan = await self._plan(spec)
        with self._console.stage("verify") as stage:
            digests = await self._in_thread(store.verify, settings, files, stage.progress)
            prepared = None
            if digests and settings.engine == "sglang":
                prepared = await self._in_thread(store.prepare, settings, path, combined_sha256(digests))
            stage.note = f": sha256 {shown_sha256s(digests)}" if digests else ""
        self._record_stage("verify", stage.seconds)
        templates = chat_templates(spec, path)
        if not templates:
            self._console.line("WARNING", "pascaline", NO_CHAT_TEMPLATE)
        self.model = store.ResolvedModel(
            "gguf" if digests else "huggingface", path, spec, name, digests, prepared, bool(templates), templates
        )
        task = make_task(self._configuration, self.model, plan, self._runtime_folder.path(), self._placement)
        self.metrics.set_task(task, self._configuration.card)
        return task

    async def _plan(self, spec: ModelSpec) -> Plan:
        """Plan the memory; raises DoesNotFitError where it does not fit and that is not allowed."""
        with self._console.stage("plan") as stage:
            self._placement = await self._in_thread(place_instance, self._configuration)
            plan: Plan = await self._in_thread(plan_instance, self._configuration, spec, self._placement)
            total, card = format_bytes(plan.total_bytes), format_bytes(plan.card_bytes)
            stage.note = f": {total} of {card} on {plan.card}, {plan.kv_tokens:,} tokens of KV cache"
        self._record_stage("plan", stage.seconds)
        for reason in plan.reasons:
            self._console.line("WARNING", "pascaline", f"allow_overcommit: {reason}")
        for note in plan.notes:
            self._console.line("INFO", "pascaline", f"plan: {note}")
        self.plan = plan.to_json() | {"placement": self._placement.to_json(), "allocated": None}
        self.metrics.set_plan(plan)
        return plan

    def _record_stage(self, name: str, seconds: float) -> None:
        self.metrics.stage_seconds.labels(name).set(seconds)

    # --- while the engine runs ----------------------------------------------------------------------------------------

    async def _keep_running(self, task: Task) -> None:
        """Start the engine, watch it, and start it again, until there is nothing more to hope for."""
        in_a_row, was_ready = 0, False
        while True:
            try:
                task = await self._as_verified(task)
                served, failure = await self._run_once(task)
            except OSError as error:
                if not is_own_failure(error):
                    raise
                served, failure = 0.0, Failure(FailureKind.HOST, f"this host lacks what a start takes: {error}")
            if self._stop.is_set():
                raise Stopped
            was_ready = was_ready or served > 0
            if not was_ready:
                raise EngineError(failure.text)
            if failure.kind is FailureKind.HOST:
                # The engine did nothing wrong.
                await self._pause_before_restart(in_a_row + 1, failure)
                continue
            in_a_row = 1 if served > STABLE_SECONDS else in_a_row + 1
            if in_a_row > self.settings.max_restarts:
                raise GaveUpError(
                    f"the engine failed {in_a_row} times in a row, max_restarts is {self.settings.max_restarts}; "
                    f"last: {failure.text}"
                )
            await self._pause_before_restart(in_a_row, failure)

    async def _as_verified(self, task: Task) -> Task:
        """Verify the model's files once more; files that changed since are read and planned again.

        Raises ModelError where they are not those that model_sha256 demands. Cheap where nothing changed.
        """
        model = task.model
        digests = await self._in_thread(store.verify, self.settings, store.model_files(model.spec, model.path))
        if digests == model.sha256:
            return task
        changed = f"the model changed since it was verified: sha256 {shown_sha256s(digests)}, was "
        self._console.line("WARNING", "pascaline", f"{changed}{shown_sha256s(model.sha256)}; it is read again")
        return await self._prepare()

    async def _run_once(self, task: Task) -> tuple[float, Failure]:
        """Run the engine once; return for how long it was ready, and why it ended."""
        self._change(State.STARTING, "the engine is loading")
        try:
            if (taken := self._port_taken()) is not None:
                return 0.0, taken
            process = self._process = await self._start(task)
        except OSError as error:
            return 0.0, Failure(FailureKind.HOST, f"failed to start the engine: {error}")
        self.metrics.engine_up.set(1)
        started, ready_since = time.time(), None
        api = self._api = EngineApi(self._engine, task, process.pid)
        # Where this is left because the instance is to stop, the engine still runs: it drains.
        if await self._wait_until_ready(task, process, api):
            ready_since = time.monotonic()
            await self._watch(task, process, api)
        if process.exit_code is not None:
            # Its last words say why.
            await process.wait()
        self.metrics.engine_up.set(0)
        served = time.monotonic() - ready_since if ready_since is not None else 0.0
        return served, await self._failure(process, started)

    def _port_taken(self) -> Failure | None:
        """Return the failure that the next run would end with, minutes later: another program took the port meanwhile.

        Raises PortInUseError where no engine of this instance has served yet.
        """
        try:
            ports.check_free(self.settings.host, self.settings.port, "engine", "port")
        except PascalineError as error:
            if not self.restarts:
                raise
            return Failure(FailureKind.CRASH, str(error))
        return None

    async def _start(self, task: Task) -> EngineProcess:
        """Start the engine; OSError where this machine lacks what that takes, such as processes or room on a disk."""
        task = replace(task, runtime_dir=self._runtime_folder.path())
        on_dropped = partial(self.metrics.count_dropped, "flood")
        return await EngineProcess.start(self._engine.launch(task), self._show_line, on_dropped)

    async def _wait_until_ready(self, task: Task, process: EngineProcess, api: EngineApi) -> bool:
        """Wait for the first generation; False where the engine ended or took too long."""
        started = time.monotonic()
        with self._console.stage("load") as load:
            load.failed = not await self._poll_until(process, started, partial(self._is_loaded, api))
        if load.failed:
            return False
        self._record_stage("load", load.seconds)
        with self._console.stage("warm-up") as warm_up:
            warm_up.failed = not await self._poll_until(process, started, partial(self._warms_up, api))
        if warm_up.failed:
            return False
        self._record_stage("warm-up", warm_up.seconds)
        if self.settings.model_sha256 is not None:
            # What was verified may have been overwritten while the engine read it.
            await self._as_verified(task)
        self._change(State.READY, "a generation succeeded")
        self._notifier.ready()
        await self._ask_version(api)
        await self._note_allocated(api)
        agent = (self.settings.agent_host, self.settings.agent_port)
        self._console.ready(task, agent, load.seconds + warm_up.seconds)
        return True

    async def _ask_version(self, api: EngineApi) -> None:
        """Note which version of the engine serves; one that does not say so serves all the same."""
        with contextlib.suppress(OSError):
            self.versions[self._engine.name] = await self._in_thread(api.version)

    async def _note_allocated(self, api: EngineApi) -> None:
        """Put what the engine allocated beside what was planned."""
        with contextlib.suppress(OSError):
            allocated = await self._in_thread(api.allocated)
            self.metrics.set_allocated(allocated)
            self.plan = (self.plan or {}) | {"allocated": allocated or None}

    async def _poll_until(
        self, process: EngineProcess, started: float, check: Callable[[], Coroutine[Any, Any, bool]]
    ) -> bool:
        while process.exit_code is None and time.monotonic() - started < self.settings.start_timeout:
            if await check():
                return True
            self._console.tick()
            await self._sleep(POLL_SECONDS / 2)
        return False

    async def _watch(self, task: Task, process: EngineProcess, api: EngineApi) -> None:
        """Follow the engine's progress until it ends or is unresponsive, and see to it that it has ended."""
        judge = Judge(self.settings.stall_timeout, time.monotonic(), limits=self._engine.work_limits(task))
        watch = Watch(api, judge, judge.last_sign)
        try:
            while process.exit_code is None:
                await self._look_safely(watch)
                if self.health.state is State.UNRESPONSIVE:
                    break
                await self._sleep(POLL_SECONDS, process)
        finally:
            # Before the engine is killed, so that the kill does not pass for the engine's own failure to answer.
            if watch.probe is not None:
                watch.probe.cancel()
                with contextlib.suppress(asyncio.CancelledError, Stopped):
                    await watch.probe
        await process.kill()

    async def _look_safely(self, watch: Watch) -> None:
        """Look once; a mistake of ours is told and costs this look, and ends the instance where no look succeeds."""
        try:
            await self._look(watch)
        except (Stopped, PascalineError):
            raise
        except Exception as error:
            self._note_mistake("the engine was not judged", error)
            if time.monotonic() - watch.understood > self.settings.stall_timeout:
                raise
        else:
            watch.understood = time.monotonic()

    async def _look(self, watch: Watch) -> None:
        judge, now = watch.judge, watch.look(in_vain=self._asked_in_vain())
        judge.observe(now, await self._progress(watch.api))
        if watch.probe is not None and watch.probe.done():
            done, watch.probe = watch.probe, None
            probe = done.result()
            if probe.ok:
                judge.probed(time.monotonic())
            else:
                judge.probe_failed(with_error=probe.is_error)
        if watch.probe is None and judge.wants_probe(now, self.settings.probe_interval):
            judge.probe_sent()
            watch.probe = asyncio.create_task(self._generate(watch.api, self.settings.stall_timeout))
        # Again: this process may have been stopped while it asked.
        self._change(*judge.verdict(watch.look(in_vain=self._asked_in_vain())))
        if not watch.settled and now - watch.began > STABLE_SECONDS:
            self._count_start(self._starts.settle)
            watch.settled = True
        if judge.last_sign >= now and self.health.state is not State.UNRESPONSIVE:
            self.metrics.last_generation.set(time.time())

    async def _progress(self, api: EngineApi) -> Progress | None:
        progress: Progress | None = None
        try:
            progress = await self._in_thread(api.progress)
        except OSError as error:
            self._note_own_failure(error)
        self.requests = progress
        return progress

    def _asked_in_vain(self) -> bool:
        """Whether a question since the last look failed in this process, and not in the engine."""
        failed, self._failed_to_ask = self._failed_to_ask, False
        return failed

    def _note_own_failure(self, error: OSError) -> None:
        """Where this process lacks descriptors, memory or ports, its question says nothing about the engine."""
        if is_own_failure(error):
            self._failed_to_ask = True
            self._console.line("WARNING", "pascaline", f"failed to ask the engine for a reason of our own: {error}")

    async def _is_loaded(self, api: EngineApi) -> bool:
        with contextlib.suppress(OSError):
            return bool(await self._in_thread(api.is_loaded))
        return False

    async def _warms_up(self, api: EngineApi) -> bool:
        return (await self._generate(api, FIRST_GENERATION_SECONDS)).ok

    async def _generate(self, api: EngineApi, timeout: float) -> Probe:
        """Let the model generate one token, and note how that went."""
        start = time.monotonic()
        try:
            probe: Probe = await self._in_thread(api.generate, timeout)
        except OSError as error:
            # There is no thread to ask in.
            probe = Probe(time.time(), ok=False, seconds=time.monotonic() - start, reason=str(error), error=error)
        if probe.error is not None:
            self._note_own_failure(probe.error)
        self.last_probe = probe
        if probe.ok:
            self.metrics.probe_seconds.observe(probe.seconds)
            self.metrics.last_generation.set(time.time())
        else:
            self.metrics.probe_failures.inc()
        return probe

    def _note_mistake(self, what: str, error: Exception) -> None:
        """Log an exception that nothing foresaw whole, and count it."""
        self.metrics.internal_errors.inc()
        for line in traceback.format_exception(error):
            for part in line.rstrip().split("\n"):
                self._console.line("ERROR", "pascaline", f"{what}: {part}")

    async def _failure(self, process: EngineProcess, started: float) -> Failure:
        """Put into words why the engine, started at that Unix time, is not running any more."""
        ending = self._ending(process, started)
        foreign = self._api.foreign if self._api is not None else None
        gpus = self._placement.gpus if self._placement is not None else ()
        failure = judge(ending, await self._in_thread(loss.examine, gpus, started))
        return replace(failure, text=f"{failure.text}; {foreign}") if foreign else failure

    def _ending(self, process: EngineProcess, started: float) -> Ending:
        lines = list(process.last_lines)
        silence = self.health.reason if self.health.state is State.UNRESPONSIVE else None
        stuck = _stuck(process) if process.exit_code is None and silence is not None else None
        not_ready = None
        if process.exit_code is None:
            not_ready = f"the engine was not ready within start_timeout ({self.settings.start_timeout:g} s)"
            if self.last_probe is not None and self.last_probe.at > started and not self.last_probe.ok:
                not_ready += f"; the last test generation: {self.last_probe.reason}"
        return Ending(
            exit_code=process.exit_code,
            last_line=self._engine.last_words(lines),
            diagnosis=self._engine.diagnose(lines),
            silence=silence,
            stuck=stuck,
            not_ready=not_ready,
        )

    async def _pause_before_restart(self, in_a_row: int, failure: Failure) -> None:
        if self._process is not None:
            await self._process.kill()
        lost = failure.kind is FailureKind.GPU_LOST
        self._change(State.GPU_LOST if lost else State.RESTARTING, failure.text)
        wait = GPU_LOST_SECONDS if lost else backoff_seconds(in_a_row, BACKOFF_SECONDS, BACKOFF_CAP_SECONDS)
        self.restarts += 1
        self.metrics.restarts.labels(failure.kind).inc()
        sooner = ", sooner if NVML reads the GPU again, later while it is lost" if lost and self._watches_gpu else ""
        self._console.line("ERROR", "pascaline", f"{failure.text}; restart {in_a_row} in {wait:g} s{sooner}")
        await (self._wait_for_gpu(wait) if lost else self._sleep(wait))
        # It still holds the GPU and the port: another one beside it could only fail.
        while self._process is not None and await self._process.kill() is None:
            self._change(State.GPU_LOST, _stuck(self._process))
            await self._sleep(STUCK_SECONDS)

    @property
    def _watches_gpu(self) -> bool:
        return self._placement is not None and bool(self._placement.gpus)

    async def _wait_for_gpu(self, seconds: float) -> None:
        """Wait until NVML reads the GPU again; for `seconds` where that cannot be known."""
        if self._placement is None or not self._placement.gpus:
            return await self._sleep(seconds)
        began, lost_at = time.monotonic(), time.time()
        while True:
            await self._sleep(GPU_LOOK_SECONDS)
            evidence = await self._in_thread(loss.examine, self._placement.gpus, lost_at)
            if evidence.standing is loss.Standing.WELL:
                self._console.line("INFO", "pascaline", f"the GPU is back: {evidence.text}")
                return None
            if evidence.standing is not loss.Standing.LOST and time.monotonic() - began >= seconds:
                return None

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _drain(self) -> ExitCode:
        """Let running requests end within drain_timeout, then end the engine; at once where asked a second time."""
        process, settings = self._process, self.settings
        if process is not None and process.exit_code is None:
            self._console.line("INFO", "pascaline", f"draining for at most {settings.drain_timeout:g} s")
            deadline = time.monotonic() + settings.drain_timeout
            idle = asyncio.create_task(self._until_idle())
            if not self._engine.drains_on_sigterm:
                await self._drain_until(deadline, lambda: idle.done() or process.exit_code is not None)
            process.terminate()
            grace = 0.0 if self._engine.drains_on_sigterm else KILL_GRACE_SECONDS
            await self._drain_until(deadline + grace, lambda: process.exit_code is not None)
            idle.cancel()
            if process.exit_code is None and not self._stop_now.is_set():
                text = (
                    f"the engine had not ended after drain_timeout ({settings.drain_timeout:g} s), killing it and "
                    "what it still computes"
                )
                self._console.line("WARNING", "pascaline", text)
            await process.kill()
        self._count_start(self._starts.settle)
        self._change(State.STOPPED, "stopped")
        return ExitCode.INTERRUPTED if self._stop_now.is_set() else ExitCode.OK

    async def _drain_until(self, deadline: float, done: Callable[[], bool]) -> None:
        while time.monotonic() < deadline and not self._stop_now.is_set() and not done():
            self._show_life()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_now.wait(), timeout=DRAIN_POLL_SECONDS)

    async def _until_idle(self) -> None:
        working = True
        while working:
            # Without a thread to ask from, nothing is known: the deadline ends that.
            with contextlib.suppress(OSError):
                working = await start_in_thread(self._has_work)
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    def _has_work(self) -> bool:
        try:
            self.requests = self._api.progress() if self._api is not None else None
        except TimeoutError:
            # llama-server answers between two batches only: silence means that it computes one.
            return True
        except OSError as error:
            return is_own_failure(error)
        # A page that cannot be read says nothing: the deadline ends that too.
        return self.requests is None or self.requests.has_work

    def _count_start(self, change: Callable[[], int | None]) -> None:
        """Begin or end the count of starts; an instance serves also where the count can not be kept."""
        try:
            self.metrics.starts.set(change() or 0)
        except OSError as error:
            self._console.line("WARNING", "pascaline", f"failed to keep the number of starts: {error}")

    # --- small ones ---------------------------------------------------------------------------------------------------

    def _change(self, state: State, reason: str) -> None:
        """The only writer of the state."""
        if self.health.state is State.DRAINING and state not in {State.STOPPED, State.FAILED}:
            return
        before = self.health.state
        self.health = self.health.to(state, time.time(), reason)
        if self.health.state is not before:
            self.metrics.set_state(state)
            self._notifier.status(f"{state}: {reason}")
            self._console.line("INFO", "pascaline", f"{before} → {state}: {reason}")

    def _show_line(self, line: str) -> None:
        level, text = self._engine.parse_line(line)
        self._console.line(level, "engine", text)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run something that blocks; raises Stopped as soon as the instance is to stop, and leaves the thread alone."""
        working = start_in_thread(function, *arguments)
        stopping = asyncio.create_task(self._stop.wait())
        try:
            while not working.done() and not self._stop.is_set():
                await asyncio.wait({working, stopping}, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                self._show_life()
        finally:
            stopping.cancel()
            working.cancel()
        if self._stop.is_set():
            raise Stopped
        return working.result()

    def _show_life(self) -> None:
        """Tell the service manager that the main loop turns, and that a start or stop still goes on."""
        self._console.settle()
        self._notifier.watchdog()
        if self.health.state in {State.PLANNED, State.STARTING, State.DRAINING}:
            self._notifier.extend_timeout(EXTEND_SECONDS)

    async def _sleep(self, seconds: float, process: EngineProcess | None = None) -> None:
        """Wait, but not beyond the wish to stop or the end of the process; keep the watchdog quiet meanwhile."""
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0 and not (process and process.exit_code is not None):
            self._show_life()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), timeout=min(remaining, POLL_SECONDS))
            if self._stop.is_set():
                break
        if self._stop.is_set():
            raise Stopped


def _stuck(process: EngineProcess) -> str:
    return f"its process {process.pid} does not end when it is killed, as where a driver call does not return"
