"""The table of faults: what goes wrong, and what must follow. Data; `scene.run` runs a row."""

from __future__ import annotations

import random
import resource
import signal

from faults import injectors as i
from faults.scene import STALL_DETECT_SECONDS, Fault
from pascaline.errors import ExitCode
from support.ledger import Outcome

NOTHING_LOST: frozenset[Outcome] = frozenset()
RESTART = "restarting starting ready"
STALL = f"unresponsive {RESTART}"
SEED = 20261129
PAIRS = 8


GPU_BACK = i.both(i.until(" → gpu-lost: "), i.nvml(i.ONE_P4))


def crash(name: str, inject: i.Inject, says: str = "", **options: object) -> Fault:
    """A row of an engine that ends."""
    given = {"states": RESTART, "outcome": "recovers", "group": "engine ends"} | options
    return Fault(name=name, inject=inject, says=says, **given)  # type: ignore[arg-type]


def stall(name: str, inject: i.Inject, says: str = "", **options: object) -> Fault:
    """A row of an engine from which no answers leave."""
    given = {"group": "engine stalls", "states": STALL, "detect": STALL_DETECT_SECONDS, "stalls": True} | options
    return Fault(name=name, inject=inject, says=says, outcome="recovers", **given)  # type: ignore[arg-type]


def healthy(name: str, inject: i.Inject, **options: object) -> Fault:
    """A row of a situation in which nothing may happen."""
    given = {"group": "healthy", "loses": NOTHING_LOST, "outcome": "stays"} | options
    return Fault(name=name, inject=inject, **given)  # type: ignore[arg-type]


def gpu(name: str, inject: i.Inject, says: str, *, lost: bool = True, **options: object) -> Fault:
    """A row of an instance on a GPU; it must not be restarted while the GPU is lost, and serve once it is back."""
    states = "gpu-lost starting ready" if lost else RESTART
    given = {"states": states, "recover": 45.0, "detect": 15.0, "heal": GPU_BACK if lost else None} | options
    return Fault(
        name=name,
        group="GPU",
        outcome="recovers",
        prepare=i.one_p4,
        inject=inject,
        says=says,
        **given,  # type: ignore[arg-type]
    )


def refused(name: str, code: ExitCode, says: str, **options: object) -> Fault:
    """A row of an instance that cannot start."""
    given = {"group": "start", "inject": i.nothing} | options
    return Fault(name=name, outcome="refused", code=code, says=says, **given)  # type: ignore[arg-type]


def ends(name: str, inject: i.Inject, code: int, states: str, **options: object) -> Fault:
    """A row of an instance that ends by itself, and serves again when its unit is started again."""
    given = {"group": "instance ends", "heal": i.nothing} | options
    return Fault(name=name, inject=inject, outcome="ends", code=code, states=states, **given)  # type: ignore[arg-type]


ENGINE_ENDS = [
    crash("engine: SIGKILL", i.signal_engine("SIGKILL"), "signal SIGKILL", quick=True),
    crash("engine: SIGSEGV", i.signal_engine("SIGSEGV"), "signal SIGSEGV"),
    crash("engine: SIGABRT", i.signal_engine("SIGABRT"), "signal SIGABRT"),
    crash("engine: a real-time signal without a name", lambda scene: scene.engine().send_signal(signal.SIGRTMIN + 1),
          "the engine ended with signal 35"),
    crash("engine: SIGTERM by somebody else", i.signal_engine("SIGTERM"), "the engine ended with exit code 0"),
    crash("engine: ends with exit code 0", i.tell(crash_now=1, exit_code=0), "exit code 0"),
    crash("engine: ends without a word", i.tell(crash_error="silent", crash_now=1), "the engine ended with exit code 1: "),
    crash("engine: ends with unknown words", i.tell(crash_error="unknown", crash_now=1), "nobody has seen before"),
    crash("engine: its last words are 68 KB of control characters",
          i.tell(crash_error="unknown", words="\x1b]8;;http://evil\x07" * 4000, crash_now=1), r"\\x1b\]8;;http://evil\\x07"),
    crash("engine: crashes at a request", i.tell(crash_after_requests=1), "told to crash"),
    crash("engine: its restart fails twice", i.crash_into_next, states=f"(restarting starting )*{RESTART}",
          prepare=i.next_start("load_error=unknown"), heal=i.both(i.until("nobody has seen before; restart"), i.write_next("")), recover=30.0),
    crash("engine: its restart hangs", i.crash_into_next, "not ready within start_timeout",
          states=f"(restarting starting )+{RESTART}", settings={"start_timeout": 8},
          prepare=i.next_start("start_seconds=600"), heal=i.both(i.until("not ready within start_timeout"), i.write_next("")), recover=30.0),
    crash("scheduler: SIGKILL", i.signal_worker("SIGKILL"), "Subprocess scheduler_0 .* crashed"),
    crash("engine: processes that ignore SIGTERM outlive it", i.tell(crash_now=1), faults="stray=2"),
    crash("engine: 200 zombies", i.tell(crash_now=1), faults="zombies=200"),
    crash("engine: floods its log and crashes", i.both(i.tell(flood_lines_per_second=20_000), i.wait(1),
                                                       i.tell(crash_now=1))),
    crash("out of memory: device, at a request", i.tell(crash_error="out-of-memory", crash_now=1),
          "not enough memory on the device.*the plan: ", group="memory"),
    crash("out of memory: host, at a request", i.tell(crash_error="host-memory", crash_now=1),
          "the host has too little memory", group="memory"),
    crash("out of memory: the kernel kills the engine", i.both(i.limit_memory, i.tell(leak_bytes_per_second=200_000_000)),
          "the kernel killed the engine for lack of memory", group="memory", prepare=i.memory_group(60),
          needs=i.no_memory_groups),
    crash("out of memory: a slow leak", i.both(i.limit_memory, i.tell(leak_bytes_per_second=20_000_000)),
          "its memory grew from", group="memory", prepare=i.memory_group(250), needs=i.no_memory_groups, detect=30.0,
          states=f"(unresponsive )?{RESTART}", settings={"stall_timeout": 30, "probe_interval": 10}),
    crash("out of memory with on_oom = shrink", i.tell(crash_error="out-of-memory", crash_now=1),
          "on_oom: the next start uses", group="memory", settings={"on_oom": "shrink"}),
]  # fmt: skip

ENGINE_STALLS = [
    stall("engine: SIGSTOP", i.signal_engine("SIGSTOP"), "no token for", quick=True),
    stall("scheduler: SIGSTOP", i.signal_worker("SIGSTOP"), "no token for"),
    stall("scheduler hangs in a step", i.tell(hang=1), "no token for"),
    stall("detokenizer stops: answers are lost", i.tell(lose_answers=1), "no token for", quick=True),
    stall("engine accepts and answers nothing", i.tell(mute=1)),
    stall("every request gets status 500", i.tell(error_status=500), "no token for"),
    stall("every request gets status 404", i.tell(error_status=404), "no token for"),
    stall("every request gets status 503", i.tell(error_status=503)),
    stall("answers without a token", i.tell(empty_answers=1), clients=1),
    stall("wrong content: a page of HTML", i.answer("/v1/completions", i.ok("<html>login</html>"))),
    stall("wrong content: a list for a map", i.answer("/v1/completions", i.ok("[]"))),
    stall("wrong content: another protocol", i.answer("/v1/completions", "SSH-2.0-OpenSSH_9.2\r\n")),
    stall("200,000 brackets", i.answer("/v1/completions", "HTTP/1.1 200 OK\r\n\r\n" + "[" * 200_000)),
    stall("truncated answer", i.answer("/v1/completions", "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"usage\"")),
    stall("a length of 4,000 digits", i.answer("/v1/completions", f"HTTP/1.1 200 OK\r\nContent-Length: {'9' * 4000}\r\n\r\nx")),
    stall("half-closed: the answer ends in its middle, the connection stays",
          i.answer("/v1/completions", "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", raw_end="open")),
    stall("answers drip, one byte in a second",
          i.answer("/v1/completions", "H", raw_repeat=100_000, raw_pause_seconds=1.0)),
    stall("endless answer", i.answer("/v1/completions", "HTTP/1.1 200 OK\r\n\r\n" + "x" * 2**16, raw_repeat=100_000,
                                     raw_pause_seconds=0.05)),
    stall("endless headers", i.answer("/v1/completions", "HTTP/1.1 200 OK\r\n" + "X: y\r\n" * 500, raw_repeat=100_000,
                                      raw_pause_seconds=0.05)),
    stall("connections are reset", i.answer("/v1/completions", "", raw_end="reset")),
    stall("connections are closed at once", i.answer("/v1/completions", "")),
    stall("hangs while /metrics drips", i.both(i.answer("/metrics", "H", raw_repeat=9999, raw_pause_seconds=1.0),
                                               i.tell(hang=1))),
    stall("hangs while /metrics is endless",
          i.both(i.answer("/metrics", "x" * 2**16, raw_repeat=10**5, raw_pause_seconds=0.05), i.tell(hang=1))),
]  # fmt: skip

METRICS_PAGES = {
    "+Inf": i.ok('sglang:num_running_reqs{model_name="m"} +Inf\n'),
    "1e999": i.ok('sglang:num_running_reqs{model_name="m"} 1e999\n'),
    "half a line": i.ok('sglang:num_running_reqs{model_name="m"} '),
    "no text": i.ok("\xff\xfe\x00"),
    "status 404": "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "nothing at all": "",
}
ODD_METRICS = [
    healthy(f"/metrics: {name}", i.answer("/metrics", page), group="odd answers") for name, page in METRICS_PAGES.items()
] + [
    healthy("/metrics: an endless page", i.answer("/metrics", "x" * 2**16, raw_repeat=10**5, raw_pause_seconds=0.05),
            group="odd answers"),
    healthy("/metrics: interim answers without an end", i.answer("/metrics", "HTTP/1.1 100 Continue\r\n\r\n" * 1000,
            raw_repeat=10**5, raw_pause_seconds=0.05), group="odd answers"),
    # Each look waits five seconds for the page.
    healthy("/metrics: drips", i.answer("/metrics", "H", raw_repeat=9999, raw_pause_seconds=1.0), group="odd answers",
            settings={"stall_timeout": 30}),
    healthy("counters fall back to zero", i.tell(forget_counters=1), group="odd answers"),
    healthy("streams are cut off", i.tell(cut_stream_after=2), group="odd answers", loses=frozenset({Outcome.CUT})),
]  # fmt: skip

HEALTHY = [
    healthy("a long prefill", i.both(i.tell(prefill_tokens_per_second=300), i.long_prompt(1500)), quick=True),
    healthy("slow answers: 2 tokens a second", i.tell(decode_tokens_per_second=2)),
    healthy("slow start", i.nothing, faults="start_seconds=4", hold=1.0),
    healthy("slow first token", i.nothing, faults="warmup_seconds=4", hold=1.0),
    healthy("idle", i.nothing, clients=0),
    healthy("64 requests at once", i.burst(64)),
    healthy("a full queue", i.burst(24, 50), settings={"max_queued_requests": 2, "max_running_requests": 2},
            loses=frozenset({Outcome.REFUSED})),
    healthy("engine paused for 1.5 s", i.pause(1.5, "engine", "worker")),
    healthy("supervisor paused for 5 s", i.pause(5, "supervisor"), agent_may_be_silent=True),
    healthy("host suspended and resumed", i.pause(11, "supervisor", "engine", "worker"),
            prepare=i.own_clock, agent_may_be_silent=True),
    healthy("host paused for 6 s", i.pause(6, "supervisor", "engine", "worker"), agent_may_be_silent=True),
    healthy("clock jumps a year forward", i.set_clock(3.2e7), prepare=i.own_clock),
    healthy("clock jumps ten years back", i.set_clock(-3.2e8), prepare=i.own_clock),
    healthy("DNS gone", i.no_names, prepare=i.own_clock),
    healthy("flood of lines: 100,000 a second", i.tell(flood_lines_per_second=100_000)),
    healthy("lines without an end: 50 MB", i.tell(flood_lines_per_second=10, flood_line_bytes=5_000_000)),
    healthy("log that nobody reads", i.unread),
    healthy("1,000 zombies", i.nothing, faults="zombies=1000"),
    healthy("runtime folder removed", lambda scene: i.shutil.rmtree(scene.folder / "tmp"), prepare=i.own_tmp),
    healthy("state folder gone", i.nothing, prepare=i.state_folder_gone),
    healthy("files limited to zero bytes", i.limit(resource.RLIMIT_FSIZE, 0)),
    healthy("model removed while it is served", i.remove_model),
]  # fmt: skip

# A flood displaces other connections of the agent too, so one may fail; it must answer again, and the engine is not blamed.
CLIENTS = [
    healthy("agent: 10,000 idle connections", i.connections(10_000), group="clients", agent_may_be_silent=True),
    healthy("agent: 1,100 half requests", i.connections(1_100, b"GET /health HTTP/1.1\r\nHost: x\r\n"), group="clients", agent_may_be_silent=True),
    healthy("agent: 300 half-closed connections", i.connections(300, b"GET /health HTTP/1.1\r\n", shut=True),
            group="clients", agent_may_be_silent=True),
    healthy("agent: slow-loris", i.drip(6), group="clients", agent_may_be_silent=True, hold=1.0),
    healthy("agent: 2,000 requests of noise", i.garbage(2_000), group="clients", agent_may_be_silent=True, hold=1.0),
    healthy("agent: drain from a foreign web page", i.foreign_drain, group="clients", agent_may_be_silent=True, hold=2.0),
    healthy("engine: 300 half requests", i.connections(300, b"POST /v1/completions HTTP/1.1\r\n", port="port"),
            group="clients", agent_may_be_silent=True),
]  # fmt: skip

HOST = [
    healthy("descriptors used up", i.limit(resource.RLIMIT_NOFILE, 12), group="host", agent_may_be_silent=True),
    # Not ready, since nobody can see whether it is well; not killed, since nothing says that it is ill.
    stall("no descriptor at all for a while", i.limit(resource.RLIMIT_NOFILE, 3), "lacks something: .*Too many open files",
          states="blind( ready)?", group="host", loses=NOTHING_LOST, heal=i.both(i.until(" → blind: "), i.unlimit)),
    crash("no memory for a while", i.limit(resource.RLIMIT_DATA, 1), "lacks something: .*a thread did not begin",
          states="blind( ready)?", group="host", settings={"stall_timeout": 20}, detect=45.0, recover=30.0,
          loses=NOTHING_LOST, heal=i.both(i.until(" → blind: "), i.unlimit)),
    crash("descriptors used up, then a crash", i.both(i.tell(crash_after_seconds=0.1), i.limit(resource.RLIMIT_NOFILE, 12)),
          states=f"(restarting starting )*{RESTART}", group="host", heal=i.both(i.wait(3), i.unlimit), recover=40.0),
    crash("disk full, then a crash", i.fill_disk, group="host", key=True, prepare=i.own_mount("size=48M"), needs=i.no_mounts),
    crash("disk full, runtime folder removed, then a crash", i.both(i.remove_folder_on_disk, i.fill_disk),
          "failed to start the engine: .*No space left", group="host", key=True, prepare=i.own_mount("size=48M"),
          heal=i.both(i.until("No space left on device"), i.empty_disk), states=f"(restarting starting )*{RESTART}",
          needs=i.no_mounts, recover=30.0),
    crash("disk full, model changed, then a crash", i.both(i.overwrite_model, i.fill_disk),
          "this host lacks what a start needs: no space in", group="host", prepare=i.own_mount("size=48M"),
          heal=i.both(i.until("this host lacks what a start needs"), i.empty_disk),
          states=f"(restarting )*{RESTART}", needs=i.no_mounts, recover=30.0),
    crash("engine's port stolen", i.steal_port, "is in use by", group="host", key=True, quick=True,
          states=f"(restarting starting )+{RESTART}", heal=i.both(i.until("is in use by"), i.give_port_back), recover=30.0),
    crash("runtime folder removed, then a crash", i.remove_runtime_folder, group="host", prepare=i.own_tmp, key=True),
    crash("runtime folder replaced by a link, then a crash", i.replace_runtime_folder, group="host", prepare=i.own_tmp,
          key=True),
    crash("DNS gone, then a crash", i.both(i.no_names, i.tell(crash_now=1)), group="host", prepare=i.own_clock),
    crash("clock jumps back, then a crash", i.both(i.set_clock(-3.2e8), i.tell(crash_now=1)), group="host",
          prepare=i.own_clock),
]  # fmt: skip

MODEL = [
    crash("converted copy: manifest truncated", i.damage_prepared(lambda folder: i.os.truncate(folder / "pascal.json", 3)),
          group="model"),
    crash("converted copy: a file truncated", i.damage_prepared(lambda folder: i.os.truncate(folder / "config.json", 0)),
          group="model"),
    crash("converted copy: a file is gone", i.damage_prepared(lambda folder: (folder / "config.json").unlink()),
          group="model"),
    crash("converted copy: gone", i.damage_prepared(i.shutil.rmtree), group="model"),
    crash("model changed in place, no checksum set", i.both(i.overwrite_model, i.tell(crash_now=1)), "it is read again",
          group="model"),
    ends("model truncated, then a crash", i.both(i.truncate_model, i.tell(crash_now=1)), ExitCode.MODEL,
         "restarting failed", group="model", heal=None),
    ends("model removed, then a crash", i.both(i.remove_model, i.tell(crash_now=1)), ExitCode.MODEL,
         "restarting failed", group="model", heal=i.bring_model_back),
]  # fmt: skip

ENDS = [
    ends("supervisor: SIGKILL", i.signal_supervisor("SIGKILL"), -signal.SIGKILL, "", quick=True),
    ends("supervisor: SIGTERM under load", i.signal_supervisor("SIGTERM"), ExitCode.OK, "draining stopped",
         loses=frozenset({Outcome.REFUSED}), quick=True, group="drain"),
    ends("supervisor: SIGHUP under load", i.signal_supervisor("SIGHUP"), ExitCode.OK, "draining stopped",
         loses=frozenset({Outcome.REFUSED}), group="drain"),
    ends("POST /drain under load", lambda scene: scene.instance.agent("/drain", {}) and None, ExitCode.OK,
         "draining stopped", loses=frozenset({Outcome.REFUSED}), group="drain"),
    ends("drain while the engine hangs", i.both(i.tell(hang=1), i.wait(0.5), i.signal_supervisor("SIGTERM")),
         ExitCode.OK, "draining stopped", settings={"drain_timeout": 2}, group="drain"),
    ends("drain of an engine that ignores SIGTERM", i.signal_supervisor("SIGTERM"), ExitCode.OK, "draining stopped",
         faults="ignore_sigterm=1", settings={"drain_timeout": 2}, group="drain"),
    ends("engine crashes while it drains", i.both(i.tell(decode_tokens_per_second=1), i.wait(0.5),
                                                  i.signal_supervisor("SIGTERM"), i.wait(0.3),
                                                  i.signal_engine("SIGKILL")), ExitCode.OK, "draining stopped",
         group="drain"),
    ends("two signals", i.both(i.tell(decode_tokens_per_second=1), i.wait(0.5), i.signal_supervisor("SIGTERM"),
                               i.wait(0.3), i.signal_supervisor("SIGTERM")), ExitCode.INTERRUPTED, "draining stopped",
         group="drain"),
    ends("more crashes than max_restarts", i.crash_into_next, ExitCode.GAVE_UP, "(restarting starting )+failed",
         settings={"max_restarts": 2}, prepare=i.next_start("load_error=unknown"), heal=i.write_next("")),
]  # fmt: skip

START = [
    refused("first load: unknown error", ExitCode.ENGINE_FAILED, "nobody has seen before", faults="load_error=unknown"),
    refused("first load: out of device memory", ExitCode.ENGINE_FAILED, "not enough memory on the device",
            faults="load_error=out-of-memory", group="memory"),
    refused("first load: out of host memory", ExitCode.ENGINE_FAILED, "the host has too little memory",
            faults="load_error=host-memory", group="memory"),
    refused("first load: hangs", ExitCode.ENGINE_FAILED, "not ready within start_timeout", faults="start_seconds=600",
            settings={"start_timeout": 2}),
    refused("first load: no token ever", ExitCode.ENGINE_FAILED, "the last test generation: status 500",
            faults="error_status=500", settings={"start_timeout": 3}),
    refused("first load: driver too old", ExitCode.ENGINE_FAILED, "driver is too old", faults="load_error=driver"),
    refused("engine's port in use", ExitCode.PORT_IN_USE, "is in use by", prepare=i.take_ports("port")),
    refused("agent's port in use", ExitCode.PORT_IN_USE, "is in use by", prepare=i.take_ports("agent_port")),
    refused("cache on a full disk", ExitCode.STORAGE, "no space in", prepare=i.own_mount("size=1M"), needs=i.no_mounts),
    refused("cache on a read-only disk", ExitCode.STORAGE, "Read-only file system", prepare=i.read_only_cache,
            needs=i.no_mounts),
    refused("model truncated", ExitCode.MODEL, "", prepare=i.truncate_model, group="model"),
    refused("model absent", ExitCode.MODEL, "there is no such file", prepare=i.remove_model, heal=i.bring_model_back,
            group="model"),
    refused("model with another checksum", ExitCode.MODEL, "must be a{64}", settings={"model_sha256": "a" * 64},
            group="model"),
    refused("conversion fails", ExitCode.MODEL, "told to fail", faults="prepare_error=3", group="model"),
]  # fmt: skip

GPU = [
    gpu("GPU lost, said by NVML to the engine", i.both(i.nvml(i.LOST_P4), i.tell(crash_error="gpu-lost", crash_now=1)),
        "the GPU is lost"),
    gpu("GPU lost, CUDA says unknown error", i.both(i.nvml(i.LOST_P4), i.tell(crash_error="cuda-unknown", crash_now=1)),
        "GPU_IS_LOST"),
    gpu("GPU lost while the engine hangs", i.both(i.nvml(i.LOST_P4), i.tell(hang=1)), "GPU_IS_LOST", stalls=True,
        states="unresponsive gpu-lost starting ready", detect=STALL_DETECT_SECONDS),
    gpu("GPU gone from NVML's list", i.both(i.nvml("[library]\nnvmlDeviceGetCount = 0\nnvmlSystemGetDriverVersion = 5\n"),
                                            i.tell(crash_error="cuda-unknown", crash_now=1)), "no longer lists"),
    gpu("driver unloaded", i.both(i.nvml("[library]\nnvmlInit = error DRIVER_NOT_LOADED\n"),
                                  i.tell(crash_error="cuda-unknown", crash_now=1)), "no longer loaded"),
    gpu("NVML hangs, CUDA fails", i.both(i.nvml(ONE := i.ONE_P4 + "[library]\nnvmlDeviceGetCount = hang\n"),
                                         i.tell(crash_error="cuda-unknown", crash_now=1)), "NVML hangs", detect=40.0),
    gpu("NVML hangs, the engine crashes for another reason", i.both(i.nvml(ONE), i.tell(crash_now=1)), "told to crash",
        lost=False, detect=40.0),
    gpu("Xid 79: fell off the bus", i.both(i.xid(79), i.nvml("[library]\nnvmlInit = error UNKNOWN\n"),
                                           i.tell(crash_error="cuda-unknown", crash_now=1)), "Xid .*: 79"),
    gpu("Xid 62: controller stopped", i.both(i.xid(62), i.nvml("[library]\nnvmlInit = error UNKNOWN\n"),
                                             i.tell(crash_error="cuda-unknown", crash_now=1)), "Xid .*: 62"),
    gpu("Xid 31: a kernel's bad address", i.both(i.xid(31), i.tell(crash_error="cuda-launch-failure", crash_now=1)),
        "Xid .*: 31", lost=False),
    gpu("Xid 48: uncorrectable ECC error", i.both(i.xid(48, "DBE (double bit error)"), i.tell(crash_error="ecc", crash_now=1)),
        "uncorrectable ECC error.*Xid .*: 48", lost=False),
    gpu("thermal shutdown: the card leaves the bus",
        i.both(i.xid(79, "GPU has fallen off the bus."), i.nvml(i.LOST_P4), i.tell(hang=1)),
        "NVML finds GPU 0 .* lost", stalls=True, states="unresponsive gpu-lost starting ready", detect=STALL_DETECT_SECONDS),
    gpu("Xid 13: a kernel's exception", i.both(i.xid(13), i.tell(crash_error="cuda-launch-failure", crash_now=1)),
        "Xid .*: 13", lost=False),
]  # fmt: skip

PAIRABLE = {
    "scheduler hangs": i.tell(hang=1),
    "answers are lost": i.tell(lose_answers=1),
    "status 500": i.tell(error_status=500),
    "/metrics is +Inf": i.answer("/metrics", METRICS_PAGES["+Inf"]),
    "streams are cut off": i.tell(cut_stream_after=1),
    "flood of lines": i.tell(flood_lines_per_second=20_000),
    "engine: SIGSTOP": i.signal_engine("SIGSTOP"),
    "scheduler: SIGKILL": i.signal_worker("SIGKILL"),
    "half requests to the agent": i.connections(200, b"GET / HTTP/1.1\r\n"),
    "supervisor paused": i.pause(2, "supervisor"),
    "files limited to zero bytes": i.limit(resource.RLIMIT_FSIZE, 0),
    "model touched": lambda scene: scene.model.touch(),
}
STOPS_ANSWERS = ("scheduler hangs", "answers are lost", "status 500", "engine: SIGSTOP", "scheduler: SIGKILL")


def pairs(seed: int = SEED, count: int = PAIRS) -> list[Fault]:
    """Return rows of two faults at once, drawn at random; one of the two at least stops the answers."""
    rng = random.Random(seed)
    drawn: list[tuple[str, str]] = []
    while len(drawn) < count:
        pair = rng.choice(STOPS_ANSWERS), rng.choice(sorted(PAIRABLE))
        if pair[0] != pair[1] and not {pair, pair[::-1]} & set(drawn):
            drawn.append(pair)
    return [
        stall(
            f"{one} + {other}",
            # The one that may leave the engine without an answer to `tell` comes last.
            i.both(PAIRABLE[other], PAIRABLE[one]) if other not in STOPS_ANSWERS else _together(one, other),
            group=f"two at once (seed {seed})",
            states=f"(unresponsive )?(restarting starting )*{RESTART}",
        )
        for one, other in drawn
    ]


def _together(one: str, other: str) -> i.Inject:
    told = [name for name in (one, other) if ":" not in name]
    return i.both(*(PAIRABLE[name] for name in told), *(PAIRABLE[name] for name in (one, other) if name not in told))


FAULTS: tuple[Fault, ...] = (
    *ENGINE_ENDS,
    *ENGINE_STALLS,
    *ODD_METRICS,
    *HEALTHY,
    *CLIENTS,
    *HOST,
    *MODEL,
    *ENDS,
    *START,
    *GPU,
    *pairs(),
)
