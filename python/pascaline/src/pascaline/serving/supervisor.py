"""Supervises one engine: the only code that starts and ends it, and that changes the instance's state.

One asyncio task runs for the life of an instance. It resolves and verifies the model, starts the engine, watches it,
and restarts it when it dies or stops answering. Signals and POST /drain only set a flag; this task acts on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import time
import traceback
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from gguf_acceptance import combined_sha256

from pascaline import __version__
from pascaline.control_groups import memory_limit, oom_kills
from pascaline.digests import shown_sha256s
from pascaline.engines import ENGINES, Task
from pascaline.engines.served import read_served
from pascaline.errors import EngineError, ExitCode, GaveUpError, PascalineError, StorageError
from pascaline.gpu import loss
from pascaline.models import resolve
from pascaline.models.chat_template import chat_templates
from pascaline.redaction import read_api_key
from pascaline.serving import ports, shrink, strays
from pascaline.serving.agent import create_server, serve
from pascaline.serving.awake_clock import AwakeClock
from pascaline.serving.engine_api import FIRST_GENERATION_SECONDS, EngineApi, Probe
from pascaline.serving.failure import Ending, Failure, FailureKind, judge, lacks_memory
from pascaline.serving.health import ANSWERING, Health, Judge, State, backoff_seconds
from pascaline.serving.history import History
from pascaline.serving.memory_use import MemoryUse, resident_bytes
from pascaline.serving.metrics import Metrics
from pascaline.serving.own_folders import RUNTIME, STATE, OwnFolders
from pascaline.serving.process import STRAY_SECONDS, EngineProcess
from pascaline.serving.runtime_folder import RuntimeFolder
from pascaline.serving.starts import Starts
from pascaline.serving.task import make_task, place_instance, plan_instance
from pascaline.serving.threads import BEGIN_SECONDS, is_own_failure, start_in_thread
from pascaline.units import format_bytes

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from pascaline.configuration import Configuration
    from pascaline.engines import Progress
    from pascaline.engines.base import Parsers
    from pascaline.gpu.devices import GpuIdentity
    from pascaline.models.resolve import ResolvedModel
    from pascaline.models.spec import ModelSpec
    from pascaline.planning import Plan
    from pascaline.planning.placement import Placement
    from pascaline.serving.console import Console
    from pascaline.serving.notify import Notifier
    from pascaline.settings import Settings

SOCKET_NAME = "agent.sock"
"""The agent's socket in $RUNTIME_DIRECTORY; everyone who may open it needs no key."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Sent by the service manager, by Ctrl-C, and by a terminal that closes."""
POLL_SECONDS = 1.0
"""Interval at which counters are read; a scrape of SGLang takes some milliseconds."""
DRAIN_POLL_SECONDS = 0.2
"""The interval while the instance drains: somebody waits for its end."""
LOAD_POLL_SECONDS = (0.05, POLL_SECONDS / 2)
"""The shortest and the longest interval while the engine loads; between them a tenth of the time that it loads."""
EXTEND_SECONDS = 30.0
"""Extra start or stop time to ask the service manager for, repeatedly while there is progress."""
BACKOFF_SECONDS = 1.0
BACKOFF_CAP_SECONDS = 60.0
GPU_LOST_SECONDS = 300.0
"""Wait after the GPU is lost: restarts do not bring it back, only a reset by a person does."""
GPU_LOOK_SECONDS = 15.0
"""Interval at which NVML is asked whether a lost GPU is back."""
STUCK_SECONDS = 30.0
"""Interval at which to check whether a process that could not be killed has ended."""
STABLE_SECONDS = 600.0
"""An engine that served this long has recovered: its next crash counts as the first again."""
NO_CHAT_TEMPLATE = (
    "the model has no chat template: /v1/completions works, /v1/chat/completions needs a model file that has one"
)
KEPT_CHANGES = 30
"""Changes of the state that the agent's page can show."""
IDLE_ANSWERS = 2
"""A request that the engine has accepted is not counted yet for a moment, and SIGTERM then would cut it."""
KILL_GRACE_SECONDS = 20.0
"""From SIGTERM after draining to SIGKILL; SGLang takes up to 5 s to notice SIGTERM and 3 s to end."""


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Raised within the main task when the instance should stop."""


class Lack(NamedTuple):
    """What this process or host lacked for a request to the engine."""

    what: str
    since: float
    """Time of the request."""


@dataclass(slots=True)
class Watch:
    """What is known while one run of an engine is watched. Times are seconds of the supervisor's AwakeClock."""

    api: EngineApi
    judge: Judge
    began: float
    """Time at which watching began."""
    page: asyncio.Task[Progress | None] | None = None
    """The running request for the engine's counters."""
    probe: asyncio.Task[None] | None = None
    """The running test generation."""
    settled: bool = False
    """Whether it has served long enough for its start to count as a success."""
    asked: float = field(init=False)
    """Time at which the engine was last asked for its counters."""
    looked: float = field(init=False)
    """Time of the last observation."""
    understood: float = field(init=False)
    """Time of the last observation without an internal error."""
    excused: float = field(init=False)
    """Time up to which a lack on our side does not count as silence."""

    def __post_init__(self) -> None:
        """The start counts as the first observation."""
        self.asked = self.looked = self.understood = self.excused = self.began

    def look(self, now: float, *, lack: Lack | None) -> None:
        """Record an observation. lack: what we lacked for a request to the engine since the last one; None: nothing.

        Such time does not count as the engine's silence.
        """
        if lack is not None:
            self.judge.missed(now - max(self.excused, min(self.looked, lack.since)), lack.what)
            self.excused = now
        self.looked = now


@dataclass(slots=True)
class Patience:
    """How long a start may take. Seconds in which nothing could be asked, for lack of something here, are added."""

    ends: float
    """Time of the supervisor's AwakeClock."""


class Supervisor:
    """One instance, from start to exit."""

    def __init__(self, configuration: Configuration, console: Console, notifier: Notifier) -> None:
        """Store the arguments; `run` starts the instance."""
        self.settings: Settings = configuration.settings
        self.health = Health(State.PLANNED, time.time(), "starting up")
        self.metrics = Metrics()
        self.model: ResolvedModel | None = None
        self.plan: dict[str, Any] | None = None
        self.last_probe: Probe | None = None
        self.restarts = 0
        self.requests: Progress | None = None
        """The engine's last report on its requests; None if its last answer had none."""
        self.parsers: Parsers | None = None
        """The parsers of tool calls and reasoning; None until the model is resolved, and with llama.cpp."""
        self.versions = {"pascaline": __version__}
        """Version of pascaline, and of the engine once it is ready."""
        self.stages: dict[str, float] = {}
        """Seconds of each stage of the last start, in order."""
        self.changes: deque[Health] = deque([self.health], maxlen=KEPT_CHANGES)
        """The last changes of the state, oldest first, except between ready and busy."""
        self.history = History()
        self._configuration = configuration
        self._console = console
        self._notifier = notifier
        self._engine = ENGINES[self.settings.engine]
        self._runtime_folder = RuntimeFolder()
        self._process: EngineProcess | None = None
        self._placement: Placement | None = None
        self._api: EngineApi | None = None
        """API of the engine that was started last."""
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._clock = AwakeClock(POLL_SECONDS)
        self._lack: Lack | None = None
        """What this process or host lacked for a request to the engine since the last look began; None: nothing."""
        self._made_plan: Plan | None = None
        """The plan that the task was made from."""
        self._memory = MemoryUse()
        """Of the engine that was started last."""
        self._oom_kills: int | None = None
        """Processes that the kernel had killed for lack of memory when that engine was started; None: unknown."""
        self._is_warming_up = False
        """Whether that engine has loaded its model and has not generated yet."""
        self._was_ready = False
        """Whether any run of the engine has become ready."""
        self._smaller_helps = False
        """Whether the last run ended because memory ran out that a smaller plan uses less of."""
        self._starts = Starts.from_environment()
        self._signalled = False

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine; None while it does not run."""
        return self._process.pid if self._process and self._process.exit_code is None else None

    @property
    def api(self) -> EngineApi | None:
        """The API of the running engine; None while none runs."""
        return self._api if self.engine_pid is not None else None

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The GPUs that the engine uses; empty on the CPU, and before the placement is decided."""
        return self._placement.gpus if self._placement is not None else ()

    @property
    def running_stage(self) -> tuple[str, float, str] | None:
        """Name, seconds so far and progress of the stage of a start that runs now; None: none does."""
        return self._console.running_stage

    def stop(self, reason: str) -> None:
        """Request an orderly end. Does nothing if that was already requested, or if the instance has ended."""
        if self._stop.is_set() or self.health.state in {State.FAILED, State.STOPPED}:
            return
        self._change(State.DRAINING, reason)
        self._notifier.stopping()
        self._stop.set()

    def _on_signal(self, name: str) -> None:
        """Stop in order at the first signal, at once at the second. POST /drain does not count as a signal."""
        if self._signalled:
            self._stop_now.set()
        self._signalled = True
        self.stop(name)

    async def run(self) -> ExitCode:
        """Serve until asked to stop. Raises PascalineError if the instance cannot serve."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            # Under nohup SIGHUP is ignored, and must stay so.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._on_signal, number.name)
        listener = ports.bind(self.settings.agent_host, self.settings.agent_port, "agent", "agent_port")
        ports.check_free(self.settings.host, self.settings.port, "engine", "port")
        with OwnFolders() as folders:
            unix_listeners = self._unix_listeners(folders)
            self._hold_state(folders)
            server = create_server(self)
            serving = asyncio.create_task(serve(server, listener, *unix_listeners))
            try:
                self._end_orphans()
                self._count_start(self._starts.begin)
                with self._runtime_folder:
                    return await self._live()
            finally:
                server.should_exit = True
                await serving

    def read_api_key(self) -> str | None:
        """Return the key that requests must carry; None if none is set. Raises OSError, ValueError."""
        path = self.settings.api_key_file
        return read_api_key(path) if path is not None else None

    def _unix_listeners(self, folders: OwnFolders) -> list[socket.socket]:
        """Open the agent's socket in the folder that the service manager made for this unit, if there is one.

        Raises PortInUseError if another instance has that folder.
        """
        try:
            folder = folders.hold(RUNTIME)
            return [ports.bind_unix(folder / SOCKET_NAME)] if folder is not None else []
        except OSError as error:
            text = f"failed to listen on {SOCKET_NAME} in ${RUNTIME}: {error}"
            self._console.line("WARNING", "pascaline", text)
            return []

    def _end_orphans(self) -> None:
        """End what engines left whose pascaline was killed: it may hold a GPU's memory."""
        for each in strays.end_orphans(STRAY_SECONDS):
            text = f"ended {each.name} (pid {each.pid}), which an engine left whose pascaline is gone"
            self._console.line("WARNING", "pascaline", text)

    def _hold_state(self, folders: OwnFolders) -> None:
        """Keep other instances from this one's state. Raises PortInUseError if one has it."""
        try:
            folders.hold(STATE)
        except OSError as error:
            self._console.line("WARNING", "pascaline", f"failed to lock ${STATE}: {error}")

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
            raise self._last_resort(error) from error
        finally:
            if self._process is not None and await self._process.kill() is None:
                self._console.line("ERROR", "pascaline", f"left behind: {_stuck(self._process)}")
            self.metrics.engine_up.set(0)
        raise AssertionError("an instance ends by Stopped or an error")

    def _last_resort(self, error: Exception) -> PascalineError:
        """Fail in order, whatever happened; return the error to report."""
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and is_own_failure(error)):
            failure: PascalineError = EngineError(f"this host lacks what a start needs: {error or 'memory'}")
        else:
            self._note_mistake("an internal error of pascaline", error)
            text = f"an internal error of pascaline ({error!r}); please report it with the traceback in the log"
            failure = PascalineError(text)
        self._change(State.FAILED, str(failure))
        return failure

    # --- before the engine runs ---------------------------------------------------------------------------------------

    async def _prepare(self) -> Task:
        settings = self.settings
        with self._console.stage("resolve") as stage:
            path, name = await self._in_thread(resolve.locate, settings)
            spec = await self._in_thread(read_served, settings, path)
            files = resolve.model_files(spec, path)
            path = files[0]
            stage.note = f": {path} ({spec.architecture}, {spec.n_parameters / 1e6:.0f} M parameters)"
        self._record_stage("resolve", stage.seconds)
        plan = await self._plan(spec)
        with self._console.stage("verify") as stage:
            digests = await self._in_thread(resolve.verify, settings, files, stage.progress)
            prepared = None
            if spec.format == "gguf":
                prepared = await self._in_thread(self._engine.prepare, settings, path, combined_sha256(digests))
            drafts = await self._in_thread(self._engine.prepare_draft, settings, plan.request.speculation)
            plan = replace(plan, request=replace(plan.request, speculation=drafts))
            stage.note = f": sha256 {shown_sha256s(digests)}" if digests else ""
        self._record_stage("verify", stage.seconds)
        templates = chat_templates(spec, path)
        if not templates and settings.role == "generate":
            self._console.line("WARNING", "pascaline", NO_CHAT_TEMPLATE)
        self._choose_parsers(templates, spec)
        self.model = resolve.ResolvedModel(
            "gguf" if spec.format == "gguf" else "huggingface",
            path,
            spec,
            name,
            digests,
            prepared,
            bool(templates),
            templates,
        )
        task = make_task(self._configuration, self.model, plan, self._private_folder(), self._placement)
        self.metrics.set_task(task, self._configuration.card)
        return task

    def _private_folder(self) -> Path:
        """Return the folder for this instance's temporary files. Raises StorageError if none can be made."""
        try:
            return self._runtime_folder.path()
        except OSError as error:
            text = f"failed to make a folder for temporary files: {error}; set TMPDIR to a folder that can be written"
            raise StorageError(text) from error

    async def _plan(self, spec: ModelSpec) -> Plan:
        """Plan the memory. Raises DoesNotFitError if the model does not fit and allow_overcommit is not set."""
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
        self._made_plan = plan
        self.plan = plan.to_json() | {"placement": self._placement.to_json(), "allocated": None}
        self.metrics.set_plan(plan)
        return plan

    def _choose_parsers(self, templates: str, spec: ModelSpec) -> None:
        self.parsers = self._engine.parsers(self.settings, templates, spec.architecture)
        if self.parsers is not None and self.plan is not None:
            self._console.line("INFO", "pascaline", f"plan: {self.parsers.sentence}")
            self.plan["parsers"] = self.parsers._asdict()

    def _record_stage(self, name: str, seconds: float) -> None:
        self.stages[name] = seconds
        self.metrics.stage_seconds.labels(name).set(seconds)

    # --- while the engine runs ----------------------------------------------------------------------------------------

    async def _keep_running(self, task: Task) -> None:
        """Start the engine, watch it, and restart it, until a stop is requested or restarts no longer help."""
        in_a_row = 0
        while True:
            try:
                task = await self._as_verified(task)
                served, failure = await self._run_once(task)
            except (OSError, StorageError) as error:
                if not (is_own_failure(error) if isinstance(error, OSError) else self._was_ready):
                    raise
                served, failure = 0.0, Failure(FailureKind.HOST, f"this host lacks what a start needs: {error}")
            if self._stop.is_set():
                raise Stopped
            self._was_ready = self._was_ready or served > 0
            smaller = await self._smaller_task() if self._smaller_helps else None
            if not self._was_ready and smaller is None:
                raise EngineError(failure.text)
            task = smaller or task
            if failure.kind is FailureKind.HOST:
                # Not the engine's fault, so it does not count towards max_restarts.
                await self._pause_before_restart(in_a_row + 1, failure)
                continue
            in_a_row = 1 if served > STABLE_SECONDS else in_a_row + 1
            if in_a_row > self.settings.max_restarts:
                raise GaveUpError(
                    f"the engine failed {in_a_row} times in a row, max_restarts is {self.settings.max_restarts}; "
                    f"last: {failure.text}"
                )
            await self._pause_before_restart(in_a_row, failure)

    async def _smaller_task(self) -> Task | None:
        """Plan the model with the next smaller settings; None if on_oom forbids that, or no smaller ones serve it."""
        model, placement, plan = self.model, self._placement, self._made_plan
        if self.settings.on_oom != "shrink" or model is None or placement is None or plan is None:
            return None
        found = await self._in_thread(shrink.shrunk, self._configuration, model.spec, placement, plan)
        if found is None:
            self._console.line("WARNING", "pascaline", "on_oom: the plan knows no smaller settings for this model")
            return None
        self._configuration, change = found
        self.settings = self._configuration.settings
        self._console.line("WARNING", "pascaline", f"on_oom: the next start uses {change}")
        return await self._prepare()

    async def _as_verified(self, task: Task) -> Task:
        """Verify the model's files and their converted copy once more; if they changed, read and plan the model again.

        Raises ModelError if they do not match model_sha256. Cheap if nothing changed.
        """
        model = task.model
        digests = await self._in_thread(resolve.verify, self.settings, resolve.model_files(model.spec, model.path))
        if digests == model.sha256:
            if model.prepared_dir is not None:
                await self._in_thread(self._engine.prepare, self.settings, model.path, combined_sha256(digests))
            drafts = await self._in_thread(self._engine.prepare_draft, self.settings, task.speculation)
            return replace(task, speculation=drafts)
        changed = f"the model changed since it was verified: sha256 {shown_sha256s(digests)}, was "
        self._console.line("WARNING", "pascaline", f"{changed}{shown_sha256s(model.sha256)}; it is read again")
        return await self._prepare()

    async def _run_once(self, task: Task) -> tuple[float, Failure]:
        """Run the engine once; return how many seconds it was ready, and why it ended."""
        self._change(State.STARTING, "the engine is loading")
        for name in ("load", "warm-up"):
            self.stages.pop(name, None)
        self._memory, self._oom_kills, self._smaller_helps = MemoryUse(), oom_kills(), False
        self._is_warming_up = False
        try:
            if (taken := self._port_taken()) is not None:
                return 0.0, taken
            process = self._process = await self._start(task)
        except OSError as error:
            return 0.0, Failure(FailureKind.HOST, f"failed to start the engine: {error}")
        self.metrics.engine_up.set(1)
        started, ready_since = time.time(), None
        api = self._api = EngineApi(self._engine, task, process.pid)
        # If a stop request ends this (Stopped), the engine still runs, so that it can drain.
        if await self._wait_until_ready(task, process, api):
            ready_since = time.monotonic()
            await self._watch(task, process, api)
        if process.exit_code is not None:
            # Its last output says why it ended.
            await process.wait()
        self.metrics.engine_up.set(0)
        self.history.forget_counters()
        served = time.monotonic() - ready_since if ready_since is not None else 0.0
        return served, await self._failure(task, process, started, served)

    def _port_taken(self) -> Failure | None:
        """Return a failure if another program has taken the port: the engine would fail with it minutes later.

        Raises PortInUseError if there was no restart yet.
        """
        try:
            ports.check_free(self.settings.host, self.settings.port, "engine", "port")
        except PascalineError as error:
            if not self.restarts:
                raise
            return Failure(FailureKind.CRASH, str(error))
        return None

    async def _start(self, task: Task) -> EngineProcess:
        """Start the engine. Raises OSError if the machine lacks what that needs, such as processes or disk space."""
        task = replace(task, runtime_dir=self._runtime_folder.path())
        on_dropped = partial(self.metrics.count_dropped, "flood")
        # llama-server is asked what it has, which takes a second or more.
        launch = await self._in_thread(self._engine.launch, task)
        return await EngineProcess.start(launch, self._show_line, on_dropped, task.cpus)

    async def _wait_until_ready(self, task: Task, process: EngineProcess, api: EngineApi) -> bool:
        """Wait for the first generation; return False if the engine ended or took too long."""
        patience = Patience(self._clock.time() + self.settings.start_timeout)
        with self._console.stage("load") as load:
            load.failed = not await self._poll_until(process, patience, partial(self._is_loaded, api), load_pause)
        if load.failed:
            return False
        self._record_stage("load", load.seconds)
        self._is_warming_up = True
        with self._console.stage("warm-up") as warm_up:
            warm_up.failed = not await self._poll_until(process, patience, partial(self._warms_up, api))
        if warm_up.failed:
            return False
        self._record_stage("warm-up", warm_up.seconds)
        if self.settings.model_sha256 is not None:
            # The files may have been overwritten after they were verified and before the engine read them.
            await self._as_verified(task)
        self._change(State.READY, "a generation succeeded")
        self._was_ready = True
        self._notifier.ready()
        await self._ask_version(api)
        await self._note_allocated(api)
        agent = (self.settings.agent_host, self.settings.agent_port)
        self._console.ready(task, agent, load.seconds + warm_up.seconds)
        return True

    async def _ask_version(self, api: EngineApi) -> None:
        """Store the engine's version; an engine that does not report it may serve as well."""
        with contextlib.suppress(OSError):
            self.versions[self._engine.name] = await self._in_thread(api.version)

    async def _note_allocated(self, api: EngineApi) -> None:
        """Add what the engine allocated to the plan and the metrics."""
        with contextlib.suppress(OSError):
            allocated = await self._in_thread(api.allocated)
            self.metrics.set_allocated(allocated)
            self.plan = (self.plan or {}) | {"allocated": allocated or None}

    async def _poll_until(
        self,
        process: EngineProcess,
        patience: Patience,
        check: Callable[[], Coroutine[Any, Any, bool]],
        pause: Callable[[float], float] = lambda _: POLL_SECONDS / 2,
    ) -> bool:
        """Check until it is true; return False if the engine ended or patience did.

        pause: seconds until the next check, by the seconds since the first.
        """
        began = self._clock.time()
        while process.exit_code is None and (asked := self._clock.time()) < patience.ends:
            if await check():
                return True
            self._console.tick()
            await self._sleep(pause(asked - began), process)
            if self._taken_lack() is not None:
                patience.ends += self._clock.time() - asked
        return False

    async def _watch(self, task: Task, process: EngineProcess, api: EngineApi) -> None:
        """Observe the engine's progress until it ends or is unresponsive, then kill its remaining processes."""
        judge = Judge(self.settings.stall_timeout, self._clock.time(), limits=self._engine.work_limits(task))
        watch = Watch(api, judge, judge.last_sign)
        try:
            while process.exit_code is None:
                await self._look_safely(watch)
                if self.health.state is State.UNRESPONSIVE:
                    break
                await self._sleep(POLL_SECONDS, process)
        finally:
            # Cancelled before the engine is killed, so that the kill does not count as a failed test generation.
            requests = [request for request in (watch.page, watch.probe) if request is not None]
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
        await process.kill()

    async def _look_safely(self, watch: Watch) -> None:
        """Observe once. An internal error is logged and costs one look; if all fail for stall_timeout, it is raised."""
        try:
            await self._look(watch)
        except (Stopped, PascalineError):
            raise
        except MemoryError:
            # Says nothing about the engine: the time up to the next look does not count.
            self._lack = Lack(os.strerror(errno.ENOMEM), watch.looked)
            watch.understood = self._clock.time()
        except Exception as error:
            self._note_mistake("the engine was not judged", error)
            if self._clock.time() - watch.understood > self.settings.stall_timeout:
                raise
        else:
            watch.understood = self._clock.time()

    async def _look(self, watch: Watch) -> None:
        now, before = self._observed(watch), watch.judge.last_sign
        # Held until the engine is asked again: a request that fails at once says nothing about the time up to the next.
        self._taken_lack()
        await self._sample_memory(now)
        await self._read_counters(watch, now)
        self._follow_probe(watch, now)
        if watch.judge.last_sign > before:
            self.metrics.last_generation.set(time.time())
        # Read again, since this process may have been stopped while it waited for the answer.
        self._change(*watch.judge.verdict(self._observed(watch)))
        if not watch.settled and now - watch.began > STABLE_SECONDS:
            self._count_start(self._starts.settle)
            watch.settled = True

    def _observed(self, watch: Watch) -> float:
        now = self._clock.time()
        watch.look(now, lack=self._lack)
        return now

    async def _read_counters(self, watch: Watch, now: float) -> None:
        """Ask the engine for its counters, and wait a moment for them: silence is judged every second all the same."""
        if watch.page is None:
            watch.asked, watch.page = now, asyncio.create_task(self._progress(watch.api))
        await asyncio.wait({watch.page}, timeout=POLL_SECONDS)
        if watch.page.done():
            done, watch.page = watch.page, None
            watch.judge.observe(watch.asked, done.result())
            self.history.add(time.time(), watch.api.vitals)

    def _follow_probe(self, watch: Watch, now: float) -> None:
        """Start a test generation if one is due and none runs."""
        if watch.probe is not None and watch.probe.done():
            done, watch.probe = watch.probe, None
            done.result()
        if watch.probe is None and watch.judge.wants_probe(now, self.settings.probe_interval):
            watch.judge.probe_sent()
            watch.probe = asyncio.create_task(self._probe(watch))

    async def _probe(self, watch: Watch) -> None:
        probe = await self._generate(watch.api, self.settings.stall_timeout)
        if probe.ok:
            watch.judge.probed(self._clock.time())
        elif probe.lack is not None:
            watch.judge.probe_not_sent()
        else:
            watch.judge.probe_failed(with_error=probe.is_error)

    async def _sample_memory(self, now: float) -> None:
        if self._memory.is_due(now) and self._process is not None:
            try:
                n_bytes = await self._in_thread(resident_bytes, self._process.pid)
                self._memory.sampled(now, n_bytes)
                self.metrics.engine_memory.set(n_bytes)
            except OSError as error:
                self._note_own_failure(error, now)

    async def _progress(self, api: EngineApi) -> Progress | None:
        progress: Progress | None = None
        asked = self._clock.time()
        try:
            progress = await self._in_thread(api.progress)
        except OSError as error:
            self._note_own_failure(error, asked)
        self.requests = progress
        return progress

    def _note_own_failure(self, error: OSError, asked: float) -> None:
        """Note if a request failed for lack of descriptors, memory or ports here: it says nothing about the engine.

        asked: time of the request. What runs for long before it lacks something was no lack from its beginning on.
        """
        if is_own_failure(error):
            self._lack = Lack(str(error), max(asked, self._clock.time() - BEGIN_SECONDS))
            text = f"failed to ask the engine, because this process or host lacks something: {error}"
            self._console.line("WARNING", "pascaline", text)

    def _taken_lack(self) -> Lack | None:
        """Return and forget what was lacking for a request."""
        lack, self._lack = self._lack, None
        return lack

    async def _is_loaded(self, api: EngineApi) -> bool:
        asked = self._clock.time()
        try:
            return bool(await self._in_thread(api.is_loaded))
        except OSError as error:
            self._note_own_failure(error, asked)
        return False

    async def _warms_up(self, api: EngineApi) -> bool:
        return (await self._generate(api, FIRST_GENERATION_SECONDS)).ok

    async def _generate(self, api: EngineApi, timeout: float) -> Probe:
        """Let the model generate one token, and record the outcome if the engine was asked. timeout: seconds."""
        start = time.monotonic()
        try:
            probe: Probe = await self._in_thread(api.generate, timeout)
        except OSError as error:
            # No thread could be started for the request.
            probe = Probe(time.time(), ok=False, seconds=time.monotonic() - start, reason=str(error), error=error)
        if probe.lack is not None:
            self._note_own_failure(probe.lack, self._clock.time() - probe.seconds)
            return probe
        self.last_probe = probe
        if probe.ok:
            self.metrics.probe_seconds.observe(probe.seconds)
            self.metrics.last_generation.set(time.time())
        else:
            self.metrics.probe_failures.inc()
        return probe

    def _note_mistake(self, what: str, error: Exception) -> None:
        """Log an unexpected exception with its traceback, and count it."""
        self.metrics.internal_errors.inc()
        for line in traceback.format_exception(error):
            for part in line.rstrip().split("\n"):
                self._console.line("ERROR", "pascaline", f"{what}: {part}")

    async def _failure(self, task: Task, process: EngineProcess, started: float, served: float) -> Failure:
        """Return why the engine no longer runs. started: Unix time of its start; served: seconds that it was ready."""
        ending = self._with_memory(self._ending(process, started), served)
        self._smaller_helps = lacks_memory(ending) and shrink.helps(ending, task.device)
        foreign = self._api.foreign if self._api is not None else None
        gpus = self._placement.gpus if self._placement is not None else ()
        failure = judge(ending, await self._evidence(gpus, started))
        return replace(failure, text=f"{failure.text}; {foreign}") if foreign else failure

    async def _evidence(self, gpus: tuple[GpuIdentity, ...], since: float) -> loss.Evidence:
        """Return what is known about the GPUs. since: Unix time."""
        try:
            evidence: loss.Evidence = await self._in_thread(loss.examine, gpus, since)
        except OSError as error:
            self._console.line("WARNING", "pascaline", f"failed to look at the GPUs: {error}")
            return loss.NOTHING_KNOWN
        return evidence

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

    def _with_memory(self, ending: Ending, served: float) -> Ending:
        """Add what explains an end for lack of memory. served: seconds that the engine was ready."""
        now, limit = oom_kills(), memory_limit()
        kills = now - self._oom_kills if now is not None and self._oom_kills is not None else 0
        stage = "while it loaded the model" if not served else ""
        if served:
            stage = f"after it had served for {served:.0f} s"
        elif self._is_warming_up:
            stage = "at the first test generation"
        plan = self._made_plan
        planned = f"the plan: {format_bytes(plan.total_bytes)} of {format_bytes(plan.card_bytes)}" if plan else ""
        return replace(
            ending,
            stage=stage,
            oom_kills=kills,
            memory_limit=format_bytes(limit) if limit is not None else "",
            planned=planned,
            leak=self._memory.leak if served else None,
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
        # A stuck process still holds the GPU and the port, so another engine could only fail.
        while self._process is not None and await self._process.kill() is None:
            self._change(State.GPU_LOST, _stuck(self._process))
            await self._sleep(STUCK_SECONDS)

    @property
    def _watches_gpu(self) -> bool:
        return self._placement is not None and bool(self._placement.gpus)

    async def _wait_for_gpu(self, seconds: float) -> None:
        """Wait until NVML reads the GPU again; if NVML cannot show that, wait for `seconds`."""
        if self._placement is None or not self._placement.gpus:
            return await self._sleep(seconds)
        began, lost_at = time.monotonic(), time.time()
        while True:
            await self._sleep(GPU_LOOK_SECONDS)
            evidence = await self._evidence(self._placement.gpus, lost_at)
            if evidence.standing is loss.Standing.WELL:
                self._console.line("INFO", "pascaline", f"the GPU is back: {evidence.text}")
                return None
            if evidence.standing is not loss.Standing.LOST and time.monotonic() - began >= seconds:
                return None

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _drain(self) -> ExitCode:
        """Let running requests finish within drain_timeout, then end the engine; a second signal ends it at once."""
        process, settings = self._process, self.settings
        if process is not None and process.exit_code is None:
            self._console.line("INFO", "pascaline", f"draining for at most {settings.drain_timeout:g} s")
            deadline, limit = time.monotonic() + settings.drain_timeout, f"drain_timeout ({settings.drain_timeout:g} s)"
            idle, ended = asyncio.create_task(self._until_idle()), asyncio.create_task(process.ended())
            if not self._engine.drains_on_sigterm:
                await self._drain_until(deadline, idle, ended)
                # It drops what it still has, and may never end with a request that came at the last moment.
                deadline = min(deadline, time.monotonic()) + KILL_GRACE_SECONDS
                limit = f"SIGTERM ({KILL_GRACE_SECONDS:g} s)" if idle.done() else limit
            process.terminate()
            await self._drain_until(deadline, ended)
            for task in (idle, ended):
                task.cancel()
            if process.exit_code is None and not self._stop_now.is_set():
                text = f"the engine had not ended after {limit}; killing it with its running requests"
                self._console.line("WARNING", "pascaline", text)
            await process.kill()
        self._count_start(self._starts.settle)
        self._change(State.STOPPED, "stopped")
        return ExitCode.INTERRUPTED if self._stop_now.is_set() else ExitCode.OK

    async def _drain_until(self, deadline: float, *ends: asyncio.Task[None]) -> None:
        """Wait until one of these is done, for the deadline, or for a second signal."""
        stop = asyncio.create_task(self._stop_now.wait())
        while time.monotonic() < deadline and not any(task.done() for task in (stop, *ends)):
            self._show_life()
            await asyncio.wait({stop, *ends}, timeout=DRAIN_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()

    async def _until_idle(self) -> None:
        """Wait until IDLE_ANSWERS in a row say that nothing runs."""
        idle = 0
        while idle < IDLE_ANSWERS:
            # If no thread can be started, try again until the deadline.
            with contextlib.suppress(OSError):
                idle = 0 if await start_in_thread(self._has_work) else idle + 1
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    def _has_work(self) -> bool:
        try:
            self.requests = self._api.progress() if self._api is not None else None
        except TimeoutError:
            # llama-server answers only between two batches: a timeout means that it computes one.
            return True
        except OSError as error:
            return is_own_failure(error)
        # A malformed page counts as work: the deadline ends that too.
        return self.requests is None or self.requests.has_work

    def _count_start(self, change: Callable[[], int | None]) -> None:
        """Increase or reset the count of starts; the instance serves even if the count cannot be written."""
        try:
            self.metrics.starts.set(change() or 0)
        except OSError as error:
            self._console.line("WARNING", "pascaline", f"failed to write the number of starts: {error}")

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _change(self, state: State, reason: str) -> None:
        """Change the state; nothing else writes it."""
        if self.health.state is State.DRAINING and state not in {State.STOPPED, State.FAILED}:
            return
        before = self.health.state
        self.health = self.health.to(state, time.time(), reason)
        if self.health.state is not before:
            if not {before, self.health.state} <= ANSWERING:
                self.changes.append(self.health)
            self.metrics.set_state(state)
            self._notifier.status(f"{state}: {reason}")
            self._console.line("INFO", "pascaline", f"{before} → {state}: {reason}")

    def _show_line(self, line: str) -> None:
        level, text = self._engine.parse_line(line)
        self._console.line(level, "engine", text)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a blocking function in a thread. Raises Stopped once a stop is requested, and abandons the thread."""
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
        """Report to the service manager that the main loop runs, and that a start or stop is still in progress."""
        self._clock.time()
        self._console.settle()
        self._notifier.watchdog()
        if self.health.state in {State.PLANNED, State.STARTING, State.DRAINING}:
            self._notifier.extend_timeout(EXTEND_SECONDS)

    async def _sleep(self, seconds: float, process: EngineProcess | None = None) -> None:
        """Wait, keeping the watchdog satisfied. Return early if the process ends; raise Stopped at a stop request."""
        deadline = time.monotonic() + seconds
        ends = [asyncio.create_task(self._stop.wait()), *([asyncio.create_task(process.ended())] if process else [])]
        try:
            while (remaining := deadline - time.monotonic()) > 0 and not any(task.done() for task in ends):
                self._show_life()
                timeout = min(remaining, POLL_SECONDS)
                await asyncio.wait(ends, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ends:
                task.cancel()
        if self._stop.is_set():
            raise Stopped


def load_pause(seconds: float) -> float:
    """Return the seconds until the next look at an engine that has loaded for `seconds`."""
    shortest, longest = LOAD_POLL_SECONDS
    return min(longest, max(shortest, seconds / 10))


def _stuck(process: EngineProcess) -> str:
    return f"its process {process.stuck_pid} does not end when it is killed; perhaps a driver call does not return"
