"""The life of an instance on the fake engine: from start to ready, and every orderly and disorderly end."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import pytest
from pascaline.errors import ExitCode
from pascaline.gpu.fake_nvml import fake_nvml_environment, write_scenario
from pascaline.serving.output import MAX_LINE_BYTES
from pascaline.serving.supervisor import POLL_SECONDS, STOP_SIGNALS
from support.instance import PATIENCE, wait_until
from support.stuck import unkillable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.instance import Answer, Instance

    Serve = Callable[..., Instance]

PAUSE_SECONDS = 6.0
"""Twice the stall_timeout of these tests."""
OWN_PROCESS = ("env",)
"""A wrapper with which an instance is `python -m pascaline serve` from its first line on, and no fork of one."""
UNREAD = 'pascaline_log_lines_dropped_total{cause="unread"}'
ONE_P4 = """
[library]
nvmlSystemGetDriverVersion = 580.105.08
[gpu 0]
nvmlDeviceGetUUID = GPU-aaaa
nvmlDeviceGetName = Tesla P4
nvmlDeviceGetPciInfo = 00000000:01:00.0 0x1BB310DE 0x11D810DE
nvmlDeviceGetMemoryInfo_v2 = 8053063680 76546048 7976517632 0
"""


def on_one_p4(scenario: Path) -> dict[str, str]:
    """Variables of an instance whose NVML answers from a scenario, and which sees its first GPU."""
    return fake_nvml_environment(scenario, base={}) | {"CUDA_VISIBLE_DEVICES": "0"}


class TestReady:
    def test_stages_addresses_and_a_command_that_works(self, serve: Serve, model: Path) -> None:
        instance = serve(wrapper=OWN_PROCESS)
        instance.wait_for_state("ready")
        instance.wait_for_line("try    curl")
        done = [line.partition(" done in ")[0] for line in instance.lines if " done in " in line]
        assert done == [f"INFO    pascaline: {stage}" for stage in ("resolve", "plan", "verify", "load", "warm-up")]
        assert instance.states == ["starting", "ready"]
        assert f"  API    {instance.api_url}/v1" in instance.lines
        assert f"{model.stem} is ready after" in instance.text
        assert instance.stop() == ExitCode.OK
        assert instance.states == ["starting", "ready", "draining", "stopped"]

    def test_readiness_comes_with_the_first_generation_and_not_with_the_port(self, serve: Serve) -> None:
        instance = serve(faults="warmup_seconds=2")
        wait_until("the engine listens", lambda: _answers(instance))
        assert instance.agent("/readyz").status == 503
        assert instance.health()["state"] == "starting"
        instance.wait_for_state("ready")
        assert instance.agent("/readyz").status == 200
        assert instance.metric('pascaline_time_to_ready_seconds{stage="warm-up"}') > 1

    def test_a_slow_start_is_waited_for(self, serve: Serve) -> None:
        instance = serve(faults="start_seconds=3")
        report = instance.wait_for_state("ready")
        assert report["restarts"] == 0
        assert instance.metric('pascaline_time_to_ready_seconds{stage="load"}') > 2.5

    def test_output_of_the_engine_comes_through_with_its_level(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        instance.stop()
        assert "INFO    engine: Load weight begin. avail mem=7.31 GB" in instance.lines
        assert "WARNING engine: SIGTERM received. Draining requests and shutting down..." in instance.lines

    def test_the_journal_gets_syslog_levels(self, serve: Serve) -> None:
        instance = serve(environment={"JOURNAL_STREAM": "8:1234"})
        instance.wait_for_state("ready")
        instance.stop()
        assert "<6>engine: Load weight begin. avail mem=7.31 GB" in instance.lines
        assert "<4>engine: SIGTERM received. Draining requests and shutting down..." in instance.lines

    def test_a_second_start_finds_its_cache(self, serve: Serve) -> None:
        for faults in ("prepare_seconds=0", "prepare_error=3"):
            instance = serve(faults=faults)
            instance.wait_for_state("ready")
            assert instance.stop() == ExitCode.OK


class TestEnds:
    @pytest.mark.parametrize("number", STOP_SIGNALS)
    def test_a_request_in_flight_completes(self, serve: Serve, number: signal.Signals) -> None:
        instance = serve(faults="decode_tokens_per_second=20")
        instance.wait_for_state("ready")
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(instance.complete, max_tokens=50)
            instance.wait_for_state("busy")
            instance.process.send_signal(number)
            instance.wait_for_state("draining")
            verdict = instance.agent("/readyz")
            assert (verdict.status, verdict.json["state"]) == (503, "draining")
            assert instance.metric("pascaline_engine_up") == 1
            assert answer.result().json["usage"]["completion_tokens"] == 50
        assert instance.wait() == ExitCode.OK
        assert instance.states[-2:] == ["draining", "stopped"]
        assert f"draining: {number.name}" in instance.text

    def test_nohup_lets_it_outlive_its_terminal(self, serve: Serve) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as from nohup
        try:
            instance = serve(wrapper=OWN_PROCESS)
        finally:
            signal.signal(signal.SIGHUP, before)
        instance.wait_for_state("ready")
        instance.process.send_signal(signal.SIGHUP)
        instance.fault(crash_now=1)
        instance.wait_for_state("restarting")
        assert instance.wait_for_state("ready")["restarts"] == 1
        assert instance.stop() == ExitCode.OK

    def test_drain_timeout_ends_what_does_not_end(self, serve: Serve) -> None:
        instance = serve(drain_timeout=1, faults="decode_tokens_per_second=1")
        instance.wait_for_state("ready")
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(_status_or_none, instance, 600)
            instance.wait_for_state("busy")
            assert instance.stop() == ExitCode.OK
            assert answer.result() is None
        expected = "the engine had not ended after drain_timeout (1 s); killing it with its running requests"
        assert f"WARNING pascaline: {expected}" in instance.lines

    def test_a_second_signal_ends_at_once(self, serve: Serve) -> None:
        instance = serve(drain_timeout=600, faults="decode_tokens_per_second=1")
        instance.wait_for_state("ready")
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(_status_or_none, instance, 600)
            instance.wait_for_state("busy")
            instance.process.send_signal(signal.SIGINT)
            instance.wait_for_state("draining")
            assert instance.stop(signal.SIGINT, seconds=10) == ExitCode.INTERRUPTED
            assert answer.result() is None

    def test_an_engine_that_ignores_sigterm_is_killed(self, serve: Serve) -> None:
        instance = serve(drain_timeout=1, faults="ignore_sigterm=1")
        instance.wait_for_state("ready")
        assert instance.stop() == ExitCode.OK

    @pytest.mark.parametrize("faults", ["start_seconds=600", "warmup_seconds=600", "prepare_seconds=600"])
    def test_a_signal_before_it_is_ready(self, serve: Serve, faults: str) -> None:
        instance = serve(faults=faults, drain_timeout=2)
        instance.wait_for_line({"prepare_seconds=600": "verify …"}.get(faults, "Load weight begin"))
        assert instance.stop(seconds=10) == ExitCode.OK
        assert "Traceback" not in instance.text

    def test_a_signal_during_the_wait_for_a_restart(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        instance.fault(crash_now=1)
        instance.wait_for_state("restarting")
        assert instance.stop(seconds=10) == ExitCode.OK
        assert instance.states[-3:] == ["restarting", "draining", "stopped"]

    def test_processes_of_the_engine_that_ignore_everything_are_killed(self, serve: Serve) -> None:
        instance = serve(faults="stray=2")
        instance.wait_for_state("ready")
        assert len(instance.descendants()) == 4
        assert instance.stop() == ExitCode.OK
        assert instance.descendants() == []

    def test_an_engine_dies_with_its_supervisor(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        assert len(instance.descendants()) == 2
        instance.process.kill()
        instance.wait()
        wait_until("no process is left", lambda: not instance.descendants())

    def test_the_end_leaves_no_file(self, serve: Serve, tmp_path: Path) -> None:
        runtime = tmp_path / "runtime"
        runtime.mkdir()
        instance = serve(environment={"TMPDIR": str(runtime)})
        instance.wait_for_state("ready")
        assert len(list(runtime.iterdir())) == 1
        instance.stop()
        assert list(runtime.iterdir()) == []

    def test_what_a_killed_instance_left_is_removed_by_the_next(self, serve: Serve, tmp_path: Path) -> None:
        runtime = tmp_path / "runtime"
        runtime.mkdir()
        killed = serve(environment={"TMPDIR": str(runtime)})
        killed.wait_for_state("ready")
        killed.process.kill()
        killed.wait()
        [left] = runtime.iterdir()
        instance = serve(environment={"TMPDIR": str(runtime)})
        instance.wait_for_state("ready")
        assert left not in list(runtime.iterdir())
        instance.stop()
        assert list(runtime.iterdir()) == []

    def test_a_removed_folder_is_made_anew_for_the_next_engine(self, serve: Serve, tmp_path: Path) -> None:
        runtime, key = tmp_path / "runtime", tmp_path / "key"
        runtime.mkdir()
        key.write_text("sesame-open")
        instance = serve(api_key_file=key, environment={"TMPDIR": str(runtime)})
        instance.wait_for_state("ready")
        shutil.rmtree(runtime)
        instance.fault(crash_now=1)
        instance.wait_for_state("restarting")
        assert instance.wait_for_state("ready")["restarts"] == 1
        assert instance.complete(headers={"Authorization": "Bearer sesame-open"}).status == 200

    def test_starts_are_counted_until_one_is_well(self, serve: Serve, tmp_path: Path) -> None:
        environment = {"STATE_DIRECTORY": str(tmp_path)}
        for _ in range(2):
            instance = serve(faults="load_error=unknown", environment=environment)
            assert instance.wait() == ExitCode.ENGINE_FAILED
        instance = serve(environment=environment)
        instance.wait_for_state("ready")
        assert instance.metric("pascaline_starts_since_stable") == 3
        assert instance.stop() == ExitCode.OK
        assert (tmp_path / "starts.json").read_text() == '{"starts": 0}'


class TestRestarts:
    def test_a_crash_is_followed_by_a_restart(self, serve: Serve) -> None:
        instance = serve(wrapper=OWN_PROCESS)
        before = instance.wait_for_state("ready")["engine_pid"]
        instance.fault(crash_now=1)
        instance.wait_for_state("restarting")
        assert instance.agent("/readyz").status == 503
        report = instance.wait_for_state("ready")
        assert report["engine_pid"] != before
        assert report["restarts"] == 1
        assert instance.metric('pascaline_engine_restarts_total{reason="crash"}') == 1
        assert instance.states == ["starting", "ready", "restarting", "starting", "ready"]
        assert instance.complete().status == 200

    def test_the_reason_is_the_last_word_of_the_engine(self, serve: Serve) -> None:
        instance = serve(faults="crash_error=unknown")
        instance.wait_for_state("ready")
        instance.fault(crash_now=1)
        report = instance.wait_for_state("restarting")
        assert report["reason"] == "the engine ended with exit code 3: something that nobody has seen before"

    def test_it_gives_up_after_max_restarts(self, serve: Serve) -> None:
        instance = serve(max_restarts=2, faults="crash_after_seconds=1")
        assert instance.wait() == ExitCode.GAVE_UP
        assert instance.error == (
            "the engine failed 3 times in a row, max_restarts is 2; last: the engine ended with signal SIGKILL: "
            "RuntimeError: the fake engine was told to crash"
        )
        waits = [line.rpartition("restart ")[2] for line in instance.lines if "; restart " in line]
        assert waits == ["1 in 1 s", "2 in 2 s"]
        assert instance.states[-1] == "failed"

    def test_a_failed_restart_counts_like_a_crash(self, serve: Serve, tmp_path: Path) -> None:
        faults = tmp_path / "faults"
        faults.write_text("")
        instance = serve(max_restarts=1, environment={"FAKE_ENGINE_FILE": str(faults)})
        instance.wait_for_state("ready")
        faults.write_text("load_error=out-of-memory")
        instance.fault(crash_now=1)
        assert instance.wait() == ExitCode.GAVE_UP
        assert instance.error.startswith(
            "the engine failed 2 times in a row, max_restarts is 1; last: the engine ended with signal SIGKILL: "
            "not enough memory on the device; lower mem_fraction_static, context_length or max_running_requests "
            "(while it loaded the model); it said: torch.OutOfMemoryError: CUDA out of memory. "
        )

    def test_the_worker_of_the_engine_dies(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        [worker] = wait_until(
            "the worker", lambda: [each for each in instance.descendants() if each.name() == "sglang::schedul"]
        )
        worker.kill()
        instance.wait_for_state("restarting")
        assert instance.wait_for_state("ready")["restarts"] == 1

    def test_processes_that_outlive_a_crash_are_killed_before_the_next_start(self, serve: Serve) -> None:
        instance = serve(faults="stray=1")
        instance.wait_for_state("ready")
        [stray] = [each for each in instance.descendants() if "time.sleep" in " ".join(each.cmdline())]
        instance.fault(crash_now=1)
        instance.wait_for_state("restarting")
        instance.wait_for_state("ready")
        assert stray not in instance.descendants()
        assert len(instance.descendants()) == 3
        assert instance.stop() == ExitCode.OK


def assert_nobody_is_blamed(instance: Instance) -> None:
    before = instance.agent("/health").json["last_probe"]["at"]
    wait_until("another look", lambda: instance.agent("/health").json["last_probe"]["at"] > before)
    assert instance.agent("/health").json["restarts"] == 0


class TestProgress:
    def test_an_engine_that_hangs_with_a_request_is_killed_and_recovers(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        instance.fault(hang=1)
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(_status_or_none, instance)
            report = instance.wait_for_state("restarting")
            assert answer.result() is None
        assert report["reason"].startswith("the engine was unresponsive (no token for ")
        assert "requests wait) and was killed" in report["reason"]
        assert instance.wait_for_state("ready")["restarts"] == 1
        assert instance.metric('pascaline_engine_restarts_total{reason="unresponsive"}') == 1
        assert instance.states[:5] == ["starting", "ready", "busy", "unresponsive", "restarting"]

    def test_an_idle_engine_that_hangs_is_found_by_the_test_generation(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        instance.fault(hang=1)
        instance.wait_for_state("restarting")
        instance.wait_for_state("ready")

    def test_a_supervisor_that_was_stopped_itself_blames_nobody(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        instance.process.send_signal(signal.SIGSTOP)
        time.sleep(PAUSE_SECONDS)
        instance.process.send_signal(signal.SIGCONT)
        assert_nobody_is_blamed(instance)
        assert set(instance.states) == {"starting", "ready"}

    @pytest.mark.slow("repeats what a stop between two questions shows")
    def test_a_supervisor_that_was_stopped_while_it_asked_blames_nobody(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        instance.fault(mute=1)
        time.sleep(POLL_SECONDS + 0.3)  # it waits for a page of metrics now
        instance.process.send_signal(signal.SIGSTOP)
        time.sleep(PAUSE_SECONDS)
        instance.fault(mute=0)
        instance.process.send_signal(signal.SIGCONT)
        assert_nobody_is_blamed(instance)

    @pytest.mark.parametrize(
        "every", [0.0, pytest.param(0.2, marks=pytest.mark.slow("repeats it with requests of another pace")), 1.0]
    )
    def test_an_engine_whose_answers_never_leave(self, serve: Serve, every: float) -> None:
        """SGLang's detokenizer stands still: its scheduler goes on and counts, with and without requests."""
        instance = serve()
        instance.wait_for_state("ready")
        with asking(instance, every):
            instance.fault(lose_answers=1)
            start = time.monotonic()
            report = instance.wait_for_state("restarting", seconds=30)
            assert time.monotonic() - start < 20
        assert report["reason"].startswith("the engine was unresponsive (no token for ")
        instance.wait_for_state("ready")

    @pytest.mark.slow("repeats what an engine that hangs shows, by timeouts")
    def test_an_engine_that_answers_nothing_at_all(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        instance.fault(mute=1)
        instance.wait_for_state("restarting")
        instance.wait_for_state("ready")

    def test_an_engine_that_stands_still_as_a_process(self, serve: Serve) -> None:
        instance = serve()
        pid = instance.wait_for_state("ready")["engine_pid"]
        psutil.Process(pid).suspend()
        instance.wait_for_state("restarting")
        instance.wait_for_state("ready")

    def test_an_engine_that_only_fails(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        instance.fault(error_status=500)
        report = instance.wait_for_state("restarting")
        assert report["last_probe"]["ok"] is False
        assert report["last_probe"]["reason"] == (
            'status 500: {"object": "error", "message": "the fake engine was told to fail", "code": 500}'
        )
        assert instance.wait_for_state("ready")["last_probe"]["ok"] is True
        assert instance.metric("pascaline_probe_failures_total") >= 1

    def test_a_long_prefill_is_busy_and_not_hung(self, serve: Serve) -> None:
        instance = serve(faults="prefill_tokens_per_second=150", chunked_prefill_tokens=128)
        instance.wait_for_state("ready")
        start = time.monotonic()
        assert instance.complete("word " * 1000, timeout=60).status == 200
        # Twice the stall_timeout without an answer, and the engine was left alone.
        assert time.monotonic() - start > 6
        assert instance.health()["restarts"] == 0
        assert set(instance.states) == {"starting", "ready", "busy"}

    def test_busy_and_ready_again(self, serve: Serve) -> None:
        instance = serve(faults="decode_tokens_per_second=20")
        instance.wait_for_state("ready")
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(instance.complete, max_tokens=50)
            assert instance.wait_for_state("busy")["reason"] == "requests are running"
            assert instance.agent("/readyz").status == 200
            assert answer.result().status == 200
        instance.wait_for_state("ready")

    def test_a_flood_of_output_stops_nothing(self, serve: Serve) -> None:
        instance = serve(faults="flood_lines_per_second=20000")
        instance.wait_for_state("ready")
        instance.wait_for_line("lines of output in one second were not shown")
        assert instance.metric('pascaline_log_lines_dropped_total{cause="flood"}') > 1000
        assert instance.complete().status == 200
        assert instance.health()["state"] in {"ready", "busy"}
        assert instance.stop() == ExitCode.OK

    def test_a_line_without_end_stops_nothing(self, serve: Serve) -> None:
        instance = serve(faults="flood_lines_per_second=10 flood_line_bytes=1000000")
        instance.wait_for_state("ready")
        time.sleep(2)
        assert instance.complete().status == 200
        assert instance.stop() == ExitCode.OK
        assert max(map(len, instance.lines)) < MAX_LINE_BYTES + 100

    @pytest.mark.slow("fills the pipe of a log twice")
    def test_a_log_that_nobody_reads_stops_nothing(self, serve: Serve) -> None:
        instance = serve(faults="flood_lines_per_second=400 flood_line_bytes=500")
        instance.wait_for_state("ready")
        with instance.unread():
            wait_until("lines are dropped", lambda: instance.metric(UNREAD) > 100)
            assert instance.complete().status == 200
            assert instance.health()["restarts"] == 0
        instance.wait_for_line("lines were not written here: nobody read them in time")
        with instance.unread():
            dropped = instance.metric(UNREAD)
            wait_until("lines are dropped", lambda: instance.metric(UNREAD) > dropped + 100)
            instance.process.terminate()
            assert instance.process.wait(PATIENCE) == ExitCode.OK

    def test_an_error_that_nobody_reads_ends_it_all_the_same(self, serve: Serve) -> None:
        instance = serve(max_restarts=0, faults="flood_lines_per_second=400 flood_line_bytes=500")
        instance.wait_for_state("ready")
        with instance.unread():
            wait_until("lines are dropped", lambda: instance.metric(UNREAD) > 100)
            instance.fault(crash_now=1)
            assert instance.process.wait(PATIENCE) == ExitCode.GAVE_UP


class TestGpuLost:
    def test_restarts_are_not_the_cure(self, serve: Serve) -> None:
        instance = serve(faults="crash_error=gpu-lost")
        instance.wait_for_state("ready")
        instance.fault(crash_now=1)
        report = instance.wait_for_state("gpu-lost")
        assert report["reason"] == "the engine ended with signal SIGKILL: the GPU is lost"
        assert instance.agent("/readyz").status == 503
        assert instance.metric('pascaline_instance_state{state="gpu-lost"}') == 1
        instance.wait_for_line("the GPU is lost; restart 1 in 300 s")
        assert instance.stop(seconds=10) == ExitCode.OK

    @pytest.mark.parametrize(
        "words", ["cuda-unknown", pytest.param("silent", marks=pytest.mark.slow("repeats what CUDA's words show"))]
    )
    def test_nvml_is_asked_when_the_engine_ends(self, serve: Serve, tmp_path: Path, words: str) -> None:
        """CUDA never says that a GPU is lost. When NVML reads the card again, so does the engine start again."""
        host = tmp_path / "host.nvml"
        write_scenario(host, ONE_P4)
        instance = serve(device="cuda", faults=f"crash_error={words}", environment=on_one_p4(host))
        instance.wait_for_state("ready")
        write_scenario(host, ONE_P4 + "[gpu 0]\nall = error GPU_IS_LOST\n")
        instance.fault(crash_now=1)
        reason = instance.wait_for_state("gpu-lost")["reason"]
        assert reason.endswith(
            "the GPU is lost: NVML finds GPU 0 (GPU-aaaa, 0000:01:00) lost: nvmlDeviceGetHandleByIndex said GPU_IS_LOST"
        )
        assert instance.metric('pascaline_engine_restarts_total{reason="gpu-lost"}') == 1
        write_scenario(host, ONE_P4)
        instance.wait_for_line("the GPU is back: NVML reads GPU 0 (GPU-aaaa, 0000:01:00)")
        instance.wait_for_state("ready")

    def test_cudas_words_alone_are_a_crash(self, serve: Serve, tmp_path: Path) -> None:
        """The other card of the host is lost, and this one is well."""
        host = tmp_path / "host.nvml"
        other = "[gpu 1]\nnvmlDeviceGetUUID = GPU-bbbb\n"
        write_scenario(host, ONE_P4 + other)
        faults = "crash_error=cuda-launch-failure"
        instance = serve(device="cuda", faults=faults, environment=on_one_p4(host))
        instance.wait_for_state("ready")
        write_scenario(host, ONE_P4 + other + "all = error GPU_IS_LOST\n")
        instance.fault(crash_now=1)
        instance.wait_for_line(
            "the engine ended with signal SIGKILL: CUDA says: unspecified launch failure (cudaErrorLaunchFailure, 719); "
            "NVML reads GPU 0 (GPU-aaaa, 0000:01:00); restart 1 in 1 s"
        )
        instance.wait_for_state("ready")
        assert "gpu-lost" not in instance.states

    @pytest.mark.slow("waits a minute for a process that does not end")
    def test_a_process_that_cannot_be_killed(self, serve: Serve) -> None:
        """As one in a driver call that does not return: nothing is started beside it, and the instance says so."""
        instance = serve()
        pid = instance.wait_for_state("ready")["engine_pid"]
        with unkillable(pid):
            instance.fault(hang=1)
            report = instance.wait_for_state("gpu-lost")
            assert report["reason"].startswith("the engine was unresponsive (no token for ")
            assert report["reason"].endswith(
                f"; its process {pid} does not end when it is killed; perhaps a driver call does not return"
            )
            assert report["engine_pid"] == pid
            assert instance.agent("/readyz").status == 503
            assert instance.stop() == ExitCode.OK
        wait_until("end of the engine, which was killed before", lambda: not instance.descendants(), seconds=10)
        assert f"left behind: its process {pid} does not end when it is killed" in instance.text


@contextlib.contextmanager
def asking(instance: Instance, every: float) -> Iterator[None]:
    """Send a short request at an interval in seconds, answered or not; 0: none."""
    over = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError):
            instance.complete("a b", timeout=60)

    def go_on() -> None:
        while every and not over.wait(every):
            threading.Thread(target=ask, daemon=True).start()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _status_or_none(instance: Instance, max_tokens: int = 4) -> int | None:
    """The status of a completion; None where the connection broke."""
    try:
        answer: Answer = instance.complete(max_tokens=max_tokens)
    except OSError:
        return None
    return answer.status


def _answers(instance: Instance) -> bool:
    try:
        return instance.api("/v1/models").status == 200
    except OSError:
        return False
