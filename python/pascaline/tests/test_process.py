"""The engine's process: real programs that behave badly, and whether anything of them is left."""

from __future__ import annotations

import _thread
import asyncio
import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest
from pascaline.child import with_parent
from pascaline.engines import Launch
from pascaline.serving import process as process_module
from pascaline.serving import threads
from pascaline.serving.output import BYTES_PER_SECOND, LINES_PER_SECOND, MAX_LINE_BYTES, Throttle
from pascaline.serving.process import KEPT_CHARACTERS, KEPT_LINES, EngineProcess
from pascaline.serving.threads import is_own_failure, start_in_thread
from support.stuck import unkillable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PATIENCE = 30.0


def program(code: str, **environment: str) -> Launch:
    return Launch((sys.executable, "-I", "-S", "-c", code), environment)


def wait_until(probe: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run(code: str, **environment: str) -> tuple[int, list[str]]:
    """Run a program to its end; return the exit code and the lines that were passed on."""
    lines: list[str] = []

    async def whole() -> int:
        process = await EngineProcess.start(program(code, **environment), lines.append)
        return await asyncio.wait_for(process.wait(), PATIENCE)

    return asyncio.run(whole()), lines


class TestOutput:
    def test_both_streams_come_line_by_line(self) -> None:
        code = "import sys; print('one', flush=True); print('two', file=sys.stderr); print('three', end='')"
        assert run(code) == (0, ["one", "two", "three"])

    def test_of_a_long_line_the_beginning_is_kept(self) -> None:
        """An error of 60 KB of control characters is 240 KB as escapes, and would be the state's reason everywhere."""

        async def whole() -> list[str]:
            process = await EngineProcess.start(program(r"print('ValueError: ' + '\0' * 60_000)"), lambda _: None)
            await process.wait()
            return list(process.last_lines)

        [line] = asyncio.run(whole())
        assert line.startswith(r"ValueError: \x00\x00")
        assert len(line) == KEPT_CHARACTERS

    def test_a_note_about_a_cut_line_is_no_word_of_the_engine(self) -> None:
        async def whole() -> list[str]:
            code = f"print('ValueError: x' + 'y' * {MAX_LINE_BYTES})"
            process = await EngineProcess.start(program(code), lines.append)
            await process.wait()
            return list(process.last_lines)

        lines: list[str] = []
        [line] = asyncio.run(whole())
        assert line.startswith("ValueError: xyy")
        assert lines[1].startswith("WARNING: of a line of ")

    def test_the_last_lines_are_kept(self) -> None:
        async def whole() -> list[str]:
            process = await EngineProcess.start(program("for i in range(300): print(i)"), lambda _: None)
            await process.wait()
            return list(process.last_lines)

        assert asyncio.run(whole()) == [str(i) for i in range(300 - KEPT_LINES, 300)]

    def test_bytes_that_are_no_text_are_shown_as_such(self) -> None:
        assert run("import os; os.write(1, b'a\\xffb\\n')") == (0, ["a\N{REPLACEMENT CHARACTER}b"])

    @pytest.mark.parametrize("end", ["", "\\nend"])
    def test_of_a_line_that_does_not_end_the_beginning_is_shown(self, end: str) -> None:
        size = 300 * MAX_LINE_BYTES + 1
        code, (first, note, *rest) = run(f"import sys; sys.stdout.write('x' * {size} + '{end}')")
        assert (code, first, rest) == (0, "x" * MAX_LINE_BYTES, ["end"] if end else [])
        size += bool(end)
        assert note == f"WARNING: of a line of {size} bytes the first {MAX_LINE_BYTES} were shown"

    @pytest.mark.parametrize("size", [MAX_LINE_BYTES - 2, MAX_LINE_BYTES - 1])
    def test_a_line_of_just_that_length_is_whole(self, size: int) -> None:
        assert run(f"print('x' * {size}); print('end')") == (0, ["x" * size, "end"])

    def test_control_characters_are_made_visible(self) -> None:
        assert run("print('a\\x1b[31mb\\rc')") == (0, ["a\\x1b[31mb\\rc"])

    def test_a_flood_is_read_and_counted_and_not_shown(self) -> None:
        # The second half comes in a later window, which mentions the first.
        code = (
            "import time\nfor i in range(2):\n    print('x\\n' * 5000, flush=True)\n    time.sleep(1.2)\nprint('end')"
        )
        ended, lines = run(code)
        assert ended == 0
        notes = [line for line in lines if line.startswith("WARNING: ")]
        assert notes[0].endswith(" lines of output in one second were not shown")
        assert len(lines) <= 3 * LINES_PER_SECOND + len(notes)

    def test_a_flood_of_long_lines_is_bounded_in_bytes(self) -> None:
        code, lines = run("for i in range(200): print(str(i) * 20_000)")
        assert code == 0
        shown = [line for line in lines if not line.startswith("WARNING: ")]
        seconds = 1 + len(lines) - len(shown)
        assert 0 < sum(map(len, shown)) <= seconds * BYTES_PER_SECOND

    def test_what_a_flood_was_cut_by_is_told_at_its_end_too(self) -> None:
        dropped: list[int] = []

        async def whole() -> list[str]:
            lines: list[str] = []
            process = await EngineProcess.start(program("print('x\\n' * 5000)"), lines.append, dropped.append)
            await process.wait()
            return lines

        lines = asyncio.run(whole())
        notes = [line for line in lines if line.startswith("WARNING: ")]
        assert notes == [f"WARNING: {count} lines of output in one second were not shown" for count in dropped]
        assert sum(dropped) + len(lines) - len(notes) == 5001

    def test_the_limits_are_for_each_second(self) -> None:
        now = [0.0]
        throttle = Throttle(lambda: now[0])
        assert [throttle.admits(1) for _ in range(LINES_PER_SECOND + 2)] == [True] * LINES_PER_SECOND + [False] * 2
        assert throttle.dropped() == 0
        now[0] = 1.0
        assert throttle.dropped() == 2
        assert throttle.admits(BYTES_PER_SECOND)
        assert not throttle.admits(1)
        assert throttle.dropped(at_end=True) == 1

    def test_it_reads_nothing(self) -> None:
        assert run("import sys; print(repr(sys.stdin.read()))") == (0, ["''"])


class TestEnvironment:
    def test_variables_are_added(self) -> None:
        assert run("import os; print(os.environ['EXTRA'])", EXTRA="1") == (0, ["1"])

    def test_the_service_managers_are_not_passed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            monkeypatch.setenv(name, "1")
        monkeypatch.setenv("LC_KEPT", "1")
        code = "import os; print(sorted(os.environ.keys() & {'NOTIFY_SOCKET', 'WATCHDOG_USEC', 'WATCHDOG_PID', 'LC_KEPT'}))"
        assert run(code) == (0, ["['LC_KEPT']"])


class TestCpus:
    CODE = "import os; print(sorted(os.sched_getaffinity(0)))"

    def of_a_run(self, cpus: frozenset[int]) -> list[str]:
        lines: list[str] = []

        async def whole() -> int:
            process = await EngineProcess.start(program(self.CODE), lines.append, cpus=cpus)
            return await asyncio.wait_for(process.wait(), PATIENCE)

        assert asyncio.run(whole()) == 0
        return lines

    def test_it_is_bound_to_the_cpus_beside_its_gpu(self) -> None:
        usable = os.sched_getaffinity(0)
        assert self.of_a_run(frozenset({min(usable)})) == [str([min(usable)])]
        assert self.of_a_run(frozenset()) == [str(sorted(usable))]

    def test_a_cpu_that_is_gone_does_not_keep_it_from_starting(self) -> None:
        *words, cpus = self.of_a_run(frozenset({4095}))
        assert words == ["failed to bind to the CPUs 4095: Invalid argument; it runs on all"]
        assert cpus == str(sorted(os.sched_getaffinity(0)))


class TestEnd:
    @pytest.mark.parametrize(
        ("code", "expected"),
        [("pass", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL)],
    )
    def test_exit_codes(self, code: str, expected: int) -> None:
        assert run(code)[0] == expected

    def test_a_program_that_does_not_exist(self) -> None:
        async def whole() -> tuple[int, list[str]]:
            process = await EngineProcess.start(Launch(("/none/such",), {}), lambda _: None)
            return await process.wait(), list(process.last_lines)

        assert asyncio.run(whole()) == (127, ["failed to run /none/such: No such file or directory"])

    def test_killing_ends_the_whole_group(self, tmp_path: Path) -> None:
        pids = tmp_path / "pids"
        code = (
            "import os, signal, time\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "os.fork(); os.fork()\n"
            f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
            "time.sleep(600)"
        )

        async def whole() -> int:
            process = await EngineProcess.start(program(code), lambda _: None)
            await asyncio.to_thread(wait_until, lambda: pids.exists() and len(pids.read_text().splitlines()) == 4)
            process.terminate()
            await asyncio.sleep(0.2)
            assert process.exit_code is None
            return await asyncio.wait_for(process.kill(), PATIENCE)

        assert asyncio.run(whole()) == -signal.SIGKILL
        wait_until(lambda: not any(is_alive(int(pid)) for pid in pids.read_text().split()))

    def test_killing_also_ends_those_whose_leader_is_gone(self, tmp_path: Path) -> None:
        pid = tmp_path / "pid"
        code = (
            "import os, time\n"
            "if os.fork() == 0:\n"
            f"    open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
            "    time.sleep(600)\n"
            "time.sleep(0.2)\n"
            "os._exit(1)"
        )

        async def whole() -> int:
            process = await EngineProcess.start(program(code), lambda _: None)
            # The grandchild holds the pipe open, which must not hold the end up.
            await asyncio.wait_for(process.wait(), PATIENCE)
            assert is_alive(int(pid.read_text()))
            return await asyncio.wait_for(process.kill(), PATIENCE)

        assert asyncio.run(whole()) == 1
        wait_until(lambda: not is_alive(int(pid.read_text())))

    DAEMON = (
        "import os, signal, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "        signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "        open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "        time.sleep(600)\n"
        "    os._exit(0)\n"
    )
    """A program that makes a daemon: in a session of its own, and a child of nobody's."""

    def test_killing_also_ends_a_daemon(self, tmp_path: Path) -> None:
        """And not that of another run."""
        pids = [tmp_path / name for name in ("own", "other")]
        launches = [Launch((sys.executable, "-c", self.DAEMON + "time.sleep(600)", str(pid)), {}) for pid in pids]

        async def whole() -> int | None:
            process, other = [await EngineProcess.start(launch, lambda _: None) for launch in launches]
            await asyncio.to_thread(wait_until, lambda: all(pid.exists() and pid.read_text() for pid in pids))
            assert all(os.getsid(int(pid.read_text())) != each.pid for pid in pids for each in (process, other))
            code = await asyncio.wait_for(process.kill(), PATIENCE)
            assert [is_alive(int(pid.read_text())) for pid in pids] == [False, True]
            await other.kill()
            return code

        assert asyncio.run(whole()) == -signal.SIGKILL
        assert not is_alive(int(pids[1].read_text()))

    def test_killing_also_ends_a_daemon_whose_engine_is_gone(self, tmp_path: Path) -> None:
        pid = tmp_path / "pid"

        async def whole() -> int | None:
            launch = Launch((sys.executable, "-c", self.DAEMON, str(pid)), {})
            process = await EngineProcess.start(launch, lambda _: None)
            await asyncio.wait_for(process.wait(), PATIENCE)
            await asyncio.to_thread(wait_until, lambda: pid.exists() and pid.read_text() != "")
            return await asyncio.wait_for(process.kill(), PATIENCE)

        assert asyncio.run(whole()) == 0
        assert not is_alive(int(pid.read_text()))

    def test_one_that_cannot_be_killed_holds_nothing_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(process_module, "KILL_SECONDS", 0.5)

        async def whole() -> list[int | None]:
            process = await EngineProcess.start(program("import time; time.sleep(600)"), lambda _: None)
            with unkillable(process.pid):
                codes = [await process.kill(), await process.kill()]
            return [*codes, await asyncio.wait_for(process.kill(), PATIENCE)]

        assert asyncio.run(whole()) == [None, None, -signal.SIGKILL]

    def test_it_dies_with_its_parent(self) -> None:
        code = (
            "import asyncio, sys, time\n"
            "from pascaline.engines import Launch\n"
            "from pascaline.serving.process import EngineProcess\n"
            "async def main():\n"
            "    launch = Launch((sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(600)'), {})\n"
            "    started = asyncio.Event()\n"
            "    process = await EngineProcess.start(launch, lambda line: started.set())\n"
            "    await started.wait()\n"
            "    print(process.pid, flush=True)\n"
            "    await asyncio.sleep(600)\n"
            "asyncio.run(main())"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout
            pid = int(parent.stdout.readline())
            assert is_alive(pid)
            parent.kill()
        wait_until(lambda: not is_alive(pid))

    def test_a_parent_that_is_gone_before_it_was_asked_for(self) -> None:
        *head, _pid, cpus, program_name = with_parent("true")
        # No process of this number is the parent of what is started here.
        assert subprocess.run([*head, str(os.getpid() + 1), cpus, program_name], check=False).returncode == 127


class TestThreads:
    @pytest.mark.parametrize(("call", "heaps"), [("share_one_heap()", "one"), ("", "several")])
    def test_they_share_one_heap(self, call: str, heaps: str) -> None:
        if not hasattr(ctypes.CDLL(None), "malloc_info"):
            pytest.skip("the C library does not report its heaps")
        code = (
            "import ctypes, threading\n"
            "from pascaline.serving.threads import share_one_heap\n"
            f"{call}\n"
            "libc = ctypes.CDLL(None)\n"
            "libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p\n"
            "at_once = threading.Barrier(4)\n"
            "def work():\n"
            "    at_once.wait()\n"
            "    libc.malloc(1000)\n"
            "    at_once.wait()\n"
            "threads = [threading.Thread(target=work) for _ in range(4)]\n"
            "for thread in threads: thread.start()\n"
            "for thread in threads: thread.join()\n"
            "file = ctypes.c_void_p(libc.fdopen(1, b'w'))\n"
            "libc.malloc_info(0, file)\n"
            "libc.fflush(file)\n"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
        found = ended.stdout.count("<heap nr=")
        assert (found > 0, "one" if found == 1 else "several") == (True, heaps), ended.stdout

    def test_a_result_and_an_error_come_back(self) -> None:
        async def whole() -> None:
            assert await start_in_thread(int, "7") == 7
            with pytest.raises(ValueError, match="invalid literal"):
                await start_in_thread(int, "seven")

        asyncio.run(whole())

    def test_one_that_still_works_does_not_hold_up_the_end(self) -> None:
        code = (
            "import asyncio, time\n"
            "from pascaline.serving.threads import start_in_thread\n"
            "async def main():\n"
            "    future = start_in_thread(time.sleep, 600)\n"
            "    await asyncio.sleep(0.1)\n"
            "    future.cancel()\n"
            "asyncio.run(main())"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
        assert (ended.returncode, ended.stderr) == (0, "")

    def test_an_error_that_nobody_asks_for_is_no_news(self) -> None:
        code = (
            "import asyncio, gc\n"
            "from pascaline.serving.threads import start_in_thread\n"
            "async def main():\n"
            "    start_in_thread(int, 'seven')\n"
            "    await asyncio.sleep(0.2)\n"
            "    gc.collect()\n"
            "asyncio.run(main())"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
        assert (ended.returncode, ended.stderr) == (0, "")

    def test_a_lack_of_ours_is_told_from_what_the_other_side_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def hungry() -> None:
            raise MemoryError

        async def failure() -> OSError:
            with pytest.raises(OSError, match=r".") as caught:
                await start_in_thread(hungry)
            return caught.value

        assert is_own_failure(asyncio.run(failure()))
        monkeypatch.setattr(_thread, "start_new_thread", _no_more_threads)
        assert is_own_failure(asyncio.run(failure()))
        assert is_own_failure(OSError(errno.EMFILE, "too many open files"))
        assert not is_own_failure(ConnectionRefusedError(errno.ECONNREFUSED, "refused"))
        assert not is_own_failure(TimeoutError("timed out"))

    def test_one_that_gets_no_memory_and_never_begins_is_a_lack_of_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The start of threading's threads would wait for ever, and with it the whole supervisor."""
        monkeypatch.setattr(_thread, "start_new_thread", lambda *_: None)
        monkeypatch.setattr(threads, "BEGIN_SECONDS", 0.05)

        async def failure() -> OSError:
            with pytest.raises(OSError, match="a thread did not begin") as caught:
                await start_in_thread(int, "7")
            return caught.value

        assert is_own_failure(asyncio.run(failure()))

    def test_one_that_begins_may_take_longer_than_that(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "BEGIN_SECONDS", 0.05)

        async def whole() -> None:
            await start_in_thread(time.sleep, 0.3)

        asyncio.run(whole())


def _no_more_threads(*_: object) -> None:
    raise RuntimeError("can't start new thread")
