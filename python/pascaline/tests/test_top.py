"""`pascaline top`: what it reads from metrics pages, and that its picture fits a terminal of 80 x 24."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from fcntl import ioctl
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import httpx
import pytest
from pascaline.cli import main
from pascaline.errors import ConfigurationError, ExitCode
from pascaline.top.history import LENGTH, History, sparkline
from pascaline.top.pages import HostPages, Target, fetch_hosts, parse_page, parse_target
from pascaline.top.readings import GpuReading, HostReading, InstanceReading, Observed, read_host
from pascaline.top.view import render
from rich.cells import cell_len

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 60.0

EXPORTER = """
nvidia_gpu_lost{gpu="0",uuid="GPU-a"} 0
nvidia_gpu_lost{gpu="1",uuid="GPU-b"} 1
nvidia_gpu_info{gpu="0",uuid="GPU-a",name="Tesla P4"} 1
nvidia_gpu_memory_used_bytes{gpu="0",uuid="GPU-a"} 6100000000
nvidia_gpu_memory_total_bytes{gpu="0",uuid="GPU-a"} 8053063680
nvidia_gpu_utilization_gpu{gpu="0",uuid="GPU-a"} 87
nvidia_gpu_temperature_gpu{gpu="0",uuid="GPU-a"} 71
nvidia_gpu_power_draw{gpu="0",uuid="GPU-a"} 62.5
nvidia_gpu_power_limit_watts{gpu="0",uuid="GPU-a",limit="enforced"} 75
nvidia_gpu_power_limit_watts{gpu="0",uuid="GPU-a",limit="max"} 80
nvidia_gpu_throttle_reason{gpu="0",uuid="GPU-a",reason="gpu_idle"} 1
nvidia_gpu_throttle_reason{gpu="0",uuid="GPU-a",reason="sw_power_cap"} 1
nvidia_gpu_throttle_reason{gpu="0",uuid="GPU-a",reason="hw_slowdown"} 0
nvidia_gpu_process_memory_used_bytes{gpu="0",uuid="GPU-a",pid="7",unit="pascaline-emily.service"} 5900000000
nvidia_gpu_process_memory_used_bytes{gpu="0",uuid="GPU-a",pid="8",unit="user@0.service"} 200000000
"""
AGENT = """
pascaline_instance_state{state="ready"} 0
pascaline_instance_state{state="busy"} 1
pascaline_engine_restarts_total{reason="crash"} 2
pascaline_engine_restarts_total{reason="unresponsive"} 1
pascaline_settings_info{model="m.gguf",served_model_name="emily-7b",unit="pascaline-emily.service"} 1
pascaline_plan_total_bytes 6e9
"""
ENGINE = """
sglang:realtime_tokens_total{mode="decode"} 1000
sglang:realtime_tokens_total{mode="prefill_compute"} 9000
sglang:gen_throughput 21.5
sglang:num_running_reqs 3
sglang:num_queue_reqs 1
sglang:token_usage 0.41
sglang:time_to_first_token_seconds_sum{is_streaming="true"} 6.0
sglang:time_to_first_token_seconds_count{is_streaming="true"} 20
sglang:inter_token_latency_seconds_sum 50
sglang:inter_token_latency_seconds_count 1000
"""
LLAMA = """
llamacpp:tokens_predicted_total 50
llamacpp:predicted_tokens_seconds 12.5
llamacpp:requests_processing 1
llamacpp:requests_deferred 0
"""


def pages(agent: str | None = AGENT, engine: str | None = ENGINE, exporter: str | None = EXPORTER) -> HostPages:
    agent_page, engine_page, exporter_page = (
        None if text is None else parse_page(text) for text in (agent, engine, exporter)
    )
    return HostPages("gpu-1", exporter_page, {30001: (agent_page, engine_page)})


class TestTarget:
    @pytest.mark.parametrize(
        ("text", "host", "port"),
        [
            ("gpu-1", "gpu-1", None),
            ("gpu-1:1", "gpu-1", 1),
            ("10.0.0.1:65535", "10.0.0.1", 65535),
            ("::1", "::1", None),
            ("[::1]", "::1", None),
            ("[::1]:30011", "::1", 30011),
        ],
    )
    def test_a_host_may_carry_the_port_of_one_agent(self, text: str, host: str, port: int | None) -> None:
        assert parse_target(text, 9836) == Target(host, port, 9836)

    @pytest.mark.parametrize("text", ["", ":30001", "gpu-1:0", "gpu-1:65536", "gpu-1:x", "gpu-1:-1", "[]:1"])
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            parse_target(text, 9836)
        message = f"--host: must be HOST, HOST:PORT or [IPV6]:PORT with a port of 1 to 65535, got {text!r}"
        assert str(caught.value) == message


class TestReading:
    def test_a_gpu_is_what_the_exporter_says_and_unknown_where_it_is_silent(self) -> None:
        first, second = read_host(pages(), 0.0).gpus
        assert first == GpuReading(
            *("0", "GPU-a", "Tesla P4", False, 87, 6100000000, 8053063680, 71, 62.5, 75),
            throttle_reasons=("sw_power_cap",),
        )
        assert second == GpuReading("1", "GPU-b", "", True, None, None, None, None, None, None)

    def test_an_instance_joins_agent_engine_and_the_memory_of_its_unit(self) -> None:
        assert read_host(pages(), 0.0).instances == (
            InstanceReading(
                *("emily", 30001, "m.gguf", "busy", 3, 3, 1, 1000, 21.5, 0.41, 6e9, 5900000000),
                *(Observed(6.0, 20), Observed(50.0, 1000), 0.3, 0.05),
            ),
        )

    def test_llama_cpp_fills_the_same_fields_and_leaves_out_what_it_does_not_say(self) -> None:
        (instance,) = read_host(pages(engine=LLAMA), 0.0).instances
        assert (instance.running_requests, instance.queued_requests, instance.tokens_per_second) == (1, 0, 12.5)
        assert (instance.kv_cache_ratio, instance.ttft_seconds, instance.itl_seconds) == (None, None, None)

    def test_tokens_per_second_come_from_two_readings(self) -> None:
        before = read_host(pages(), 100.0)
        after = read_host(pages(engine=ENGINE.replace("} 1000", "} 1050")), 102.0, before)
        assert after.instances[0].tokens_per_second == 25.0

    def test_latencies_are_those_of_the_tokens_between_two_readings(self) -> None:
        before = read_host(pages(), 100.0)
        engine = ENGINE.replace("} 6.0", "} 14.0").replace("} 20", "} 22")
        after = read_host(pages(engine=engine), 102.0, before).instances[0]
        assert (after.ttft_seconds, after.itl_seconds) == (4.0, None)

    def test_latencies_of_an_engine_that_restarted_are_those_since_then(self) -> None:
        before = read_host(pages(), 100.0)
        engine = ENGINE.replace("} 6.0", "} 1.0").replace("} 20", "} 2")
        assert read_host(pages(engine=engine), 102.0, before).instances[0].ttft_seconds == 0.5

    def test_an_engine_that_restarted_between_two_readings_has_no_negative_speed(self) -> None:
        before = read_host(pages(), 100.0)
        after = read_host(pages(engine=ENGINE.replace("} 1000", "} 10")), 102.0, before)
        assert after.instances[0].tokens_per_second == 21.5

    @pytest.mark.parametrize("unit", ["", "session-3.scope", "user@0.service"])
    def test_an_instance_that_was_started_by_hand_is_named_by_its_model(self, unit: str) -> None:
        agent = AGENT.replace("pascaline-emily.service", unit)
        assert read_host(pages(agent=agent), 0.0).instances[0].name == "emily-7b"

    def test_an_engine_without_agent_is_shown_as_such(self) -> None:
        (instance,) = read_host(pages(agent=None), 0.0).instances
        assert (instance.name, instance.state, instance.planned_bytes) == (":30001", "no agent", None)

    def test_an_instance_alone_on_a_host_without_units_has_all_memory(self) -> None:
        exporter = 'nvidia_gpu_process_memory_used_bytes{gpu="0",uuid="a",pid="7",unit="session-1.scope"} 5e9\n'
        assert read_host(pages(exporter=exporter), 0.0).instances[0].actual_bytes == 5e9
        assert read_host(pages(exporter=None), 0.0).instances[0].actual_bytes is None


class TestSparkline:
    def test_bars_follow_the_values_and_gaps_stay_gaps(self) -> None:
        assert sparkline([0, 50, None, 100], 6, top=100) == "  ▁▅ █"

    def test_without_a_top_the_highest_value_is_the_full_bar(self) -> None:
        assert sparkline([1, 2, 4], 3) == "▃▅█"

    @pytest.mark.parametrize("values", [[], [None], [0.0]])
    def test_nothing_known_or_nothing_but_zero_is_drawn_without_failing(self, values: list[float | None]) -> None:
        assert len(sparkline(values, 4)) == 4

    def test_only_the_newest_values_are_kept_and_drawn(self) -> None:
        history = History()
        for number in range(LENGTH + 5):
            history.add(HostReading("h", 0.0, None, (gpu(utilization=float(number)),)))
        kept = history.of("h", "utilization", "GPU-a")
        assert (len(kept), kept[0], kept[-1]) == (LENGTH, 5.0, LENGTH + 4.0)
        assert len(sparkline(kept, 8)) == 8


def gpu(utilization: float | None = 100.0, name: str = "Tesla P4", lost: bool = False) -> GpuReading:
    return GpuReading(
        *("0", "GPU-a", name, lost, utilization, 22.9e9, 24.0e9, 104.0, 250.0, 250.0, ("hw_thermal_slowdown",))
    )


def instance(name: str = "emily", state: str = "unresponsive") -> InstanceReading:
    return InstanceReading(
        name, 30001, "m", state, 0, 4, 1024, 10, 1234.5, 1.0, 23.5e9, 22.9e9, None, None, 123.4, 0.0994
    )


def drawn(readings: list[HostReading], width: int = 80, height: int | None = 24) -> list[str]:
    history = History()
    for reading in readings:
        history.add(reading)
    return [line.plain for line in render(readings, history, "21:15:00", width, height)]


class TestPicture:
    def test_the_widest_values_fit_80_columns_uncut(self) -> None:
        lines = drawn([HostReading("cloud-gpu-01", 0.0, None, (gpu(),), (instance(),))])
        assert max(map(cell_len, lines)) <= 80
        text = "\n".join(lines)
        for essential in (
            *("cloud-gpu-01", "Tesla P4", "100%", "21.3/22.4 GiB", "104°C", "250/250W"),
            *("emily", "unresponsive", "4/1024", "1234.5", "100%", "21.9/21.3 GiB", "21:15:00"),
        ):
            assert essential in text, essential

    def test_a_wide_terminal_shows_latencies_and_what_slows_a_gpu_down(self) -> None:
        reading = HostReading("h", 0.0, None, (gpu(),), (instance(),))
        for essential in ("TTFT", "ITL", "123.4s", "99ms", "SLOWED BY", "hw_thermal_slowdown"):
            assert any(essential in line for line in drawn([reading], 100)), essential
            assert not any(essential in line for line in drawn([reading], 99)), essential

    def test_a_wider_one_shows_how_many_drafts_were_right(self) -> None:
        reading = HostReading("h", 0.0, None, (), (replace(instance(), accepted_ratio=0.62),))
        assert any("62%" in line for line in drawn([reading], 108))
        assert not any("62%" in line for line in drawn([reading], 107))

    def test_a_still_wider_one_shows_what_a_check_gives_and_what_was_won(self) -> None:
        reading = HostReading("h", 0.0, None, (), (replace(instance(), accept_length=3.456, won_seconds=-12.3),))
        for essential in ("ACCEPT", "3.46", "WON", "-12s"):
            assert any(essential in line for line in drawn([reading], 123)), essential
            assert not any(essential in line for line in drawn([reading], 122)), essential

    @pytest.mark.parametrize("width", [80, 81, 99, 100, 107, 108, 120, 122, 123, 200])
    def test_no_line_is_wider_than_the_terminal(self, width: int) -> None:
        reading = HostReading(
            "a-host-with-a-very-long-name.example.org", 0.0, None, (gpu(name="G" * 60),), (instance("n" * 60),)
        )
        dead = HostReading("b", 0.0, "x" * 300)
        assert max(map(cell_len, drawn([reading, dead], width))) <= width

    def test_a_long_name_ends_in_an_ellipsis(self) -> None:
        lines = drawn([HostReading("h", 0.0, None, (), (instance("a-very-long-name"),))])
        assert "a-very-lo… " in lines[-1]

    def test_what_does_not_fit_the_height_is_counted(self) -> None:
        readings = [HostReading(f"h{number}", 0.0, None, (gpu(),)) for number in range(40)]
        lines = drawn(readings)
        # Title, empty line, heading and 40 rows, of which 20 and the notice are left.
        assert len(lines) == 24
        assert lines[-1] == "… 20 more lines: enlarge the window, or name fewer hosts"

    def test_exactly_the_height_is_not_cut(self) -> None:
        readings = [HostReading(f"h{number}", 0.0, None, (gpu(),)) for number in range(21)]
        assert len(drawn(readings)) == 24
        assert "more lines" not in drawn(readings)[-1]

    def test_an_unreachable_host_and_a_lost_gpu_are_said(self) -> None:
        lines = drawn([HostReading("up", 0.0, None, (gpu(lost=True),)), HostReading("down", 0.0, "nothing listens")])
        assert "down: unreachable, nothing listens" in lines
        assert any("LOST" in line for line in lines)

    def test_a_host_that_answers_with_nothing_is_said(self) -> None:
        assert drawn([HostReading("h", 0.0, None)])[-1] == "no GPU and no instance found"


class Server:
    """Metrics pages on free ports, one just above the other as engine and agent listen."""

    def __init__(self) -> None:
        self.pages: dict[int, str] = {}
        self._servers: list[ThreadingHTTPServer] = []

    def serve(self, text: str, port: int = 0) -> int:
        pages = self.pages

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = pages[self.server.server_address[1]].encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._servers.append(server)
        pages[server.server_port] = text
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_port

    def serve_pair(self, engine: str, agent: str) -> int:
        while True:
            port = self.serve(engine)
            try:
                return self.serve(agent, port + 1)
            except OSError:
                continue

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@contextmanager
def silent_port() -> Iterator[int]:
    """A port that accepts and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def fetch(*targets: Target, deadline: float = PATIENCE) -> list[HostPages]:
    async def fetched() -> list[HostPages]:
        async with httpx.AsyncClient(trust_env=False, timeout=deadline) as client:
            return await fetch_hosts(client, list(targets), deadline)

    return asyncio.run(fetched())


class TestFetch:
    def test_exporter_agent_and_engine_of_a_host_are_found(self, server: Server) -> None:
        agent_port = server.serve_pair(ENGINE, AGENT)
        (found,) = fetch(Target("127.0.0.1", agent_port, server.serve(EXPORTER)))
        reading = read_host(found, 0.0)
        assert (len(reading.gpus), reading.instances[0].name, reading.error) == (2, "emily", None)

    def test_a_stopped_instance_hides_none_of_those_after_it(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the steps of ports here one of several: the usual ones may be taken on this machine."""
        agent_port = server.serve_pair(ENGINE, AGENT)
        monkeypatch.setattr("pascaline.top.pages.AGENT_PORT", agent_port - 20)
        (found,) = fetch(Target("127.0.0.1", exporter_port=closed_port()))
        assert found.instances[agent_port] == (parse_page(AGENT), parse_page(ENGINE))

    def test_an_engine_is_found_at_the_port_that_its_agent_tells(self, server: Server) -> None:
        engine_port = server.serve(ENGINE)
        agent_port = server.serve(AGENT.replace('unit="', f'port="{engine_port}",unit="'))
        (found,) = fetch(Target("127.0.0.1", agent_port, closed_port()))
        assert read_host(found, 0.0).instances[0].generated_tokens == 1000

    def test_an_engine_without_agent_is_found_one_port_below(self, server: Server) -> None:
        agent_port = server.serve_pair(ENGINE, "")
        server.pages[agent_port] = "<html>"
        (found,) = fetch(Target("127.0.0.1", agent_port, closed_port()))
        assert read_host(found, 0.0).instances[0].state == "no agent"

    def test_a_silent_host_is_given_up_at_the_deadline_and_delays_no_other(self, server: Server) -> None:
        with silent_port() as silent:
            dead, alive = fetch(
                Target("127.0.0.1", closed_port(), silent),
                Target("127.0.0.1", closed_port(), server.serve(EXPORTER)),
                deadline=1.0,
            )
        assert dead.error == "no answer in 1 s"
        assert alive.error is None

    def test_nothing_listening_is_said(self) -> None:
        (found,) = fetch(Target("127.0.0.1", closed_port(), closed_port()))
        assert found.error == "nothing listens"

    def test_a_page_that_is_no_metrics_page_is_said(self, server: Server) -> None:
        (found,) = fetch(Target("127.0.0.1", closed_port(), server.serve("<html>hello</html>")))
        assert str(found.error).startswith("not a metrics page: ")


class TestCommand:
    def test_a_hundred_silent_hosts_do_not_hide_one_that_answers(
        self, server: Server, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Regression: their connections were all that the client would open, and the last host's pages waited in vain."""
        alive = server.serve_pair(ENGINE, AGENT)
        with silent_port() as silent:
            hosts = [f"--host=127.0.0.1:{port}" for port in (*[silent] * 100, alive)]
            assert main(["top", "--json", f"--exporter-port={silent}", "--timeout=5", *hosts]) == ExitCode.OK
        assert json.loads(capsys.readouterr().out)[-1]["instances"][0]["state"] == "busy"

    def arguments(self, server: Server) -> list[str]:
        agent_port = server.serve_pair(ENGINE, AGENT)
        return ["top", "--host", f"127.0.0.1:{agent_port}", "--exporter-port", str(server.serve(EXPORTER))]

    def test_json_holds_every_field_and_nothing_else(self, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*self.arguments(server), "--json"]) == ExitCode.OK
        (host,) = json.loads(capsys.readouterr().out)
        assert host["host"] == "127.0.0.1"
        assert set(host) == {field.name for field in dataclasses.fields(HostReading)}
        assert set(host["gpus"][0]) == {field.name for field in dataclasses.fields(GpuReading)}
        assert set(host["instances"][0]) == {field.name for field in dataclasses.fields(InstanceReading)}
        assert host["gpus"][0]["power_watts"] == 62.5
        assert host["instances"][0]["planned_bytes"] == 6e9

    def test_once_prints_one_picture_without_escape_codes_when_piped(
        self, server: Server, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*self.arguments(server), "--once"]) == ExitCode.OK
        printed = capsys.readouterr().out
        assert "emily" in printed
        assert "\x1b" not in printed
        assert "q quits" not in printed

    def test_no_host_that_answers_is_a_failure(self, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["top", "--once", "--host", f"127.0.0.1:{closed_port()}", "--exporter-port", str(closed_port())]
        assert main(command) == ExitCode.FAILED
        assert "127.0.0.1: unreachable, nothing listens" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--interval", "0"], "--interval: must be between 0.1 and 3600 seconds, got 0"),
            (["--timeout", "3601"], "--timeout: must be between 0.1 and 3600 seconds, got 3601"),
            (["--exporter-port", "65536"], "--exporter-port: must be between 1 and 65535, got 65536"),
        ],
    )
    def test_bad_flags_are_refused(self, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["top", *flags]) == ExitCode.CONFIGURATION
        assert capsys.readouterr().err == f"pascaline top: {message}\n"


class Terminal:
    """`pascaline top` in a terminal of 80 x 24."""

    def __init__(self, arguments: list[str]) -> None:
        self.master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        command = [sys.executable, "-m", "pascaline", *arguments, "--interval", "0.1"]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        self.output = b""

    def read_until(self, pattern: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern.encode(), self.output):
            assert time.monotonic() < deadline, self.output
            if select.select([self.master], [], [], 0.1)[0]:
                self.output += os.read(self.master, 65536)

    def wait(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self.master], [], [], 0.05)[0]:
                self.output += os.read(self.master, 65536)
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


class TestLive:
    @pytest.fixture
    def terminal(self, server: Server) -> Iterator[Terminal]:
        terminal = Terminal(TestCommand().arguments(server))
        yield terminal
        terminal.close()

    @pytest.mark.parametrize("key", ["q", "Q"])
    def test_q_ends_it_and_gives_the_terminal_back(self, terminal: Terminal, key: str) -> None:
        terminal.read_until("emily")
        os.write(terminal.master, b"xyz" + key.encode())
        assert terminal.wait() == ExitCode.OK
        assert termios.tcgetattr(terminal.slave) == terminal.before
        # The alternate screen was left and the cursor shown again.
        assert terminal.output.rstrip().endswith((b"\x1b[?25h", b"\x1b[?1049l"))

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_it_cleanly(self, terminal: Terminal, number: signal.Signals) -> None:
        terminal.read_until("emily")
        terminal.process.send_signal(number)
        assert terminal.wait() == ExitCode.OK
        assert b"Traceback" not in terminal.output
        assert termios.tcgetattr(terminal.slave) == terminal.before

    def test_numbers_follow_the_pages_and_a_host_that_goes_away_is_said(self, server: Server) -> None:
        arguments = TestCommand().arguments(server)
        terminal = Terminal(arguments)
        try:
            terminal.read_until("87%")
            server.pages[int(arguments[-1])] = EXPORTER.replace("} 87", "} 13")
            terminal.read_until("13%")
            server.close()
            terminal.read_until("unreachable")
        finally:
            terminal.close()
