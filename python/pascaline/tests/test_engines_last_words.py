"""Of all that an engine wrote before it ended, the line that says why."""

from __future__ import annotations

import pytest
from pascaline.engines import ENGINES
from pascaline.engines.last_words import CLUSTER_LINES, RECENT_LINES

STAMP = "[2026-11-23 20:15:01] "
TRACEBACK = [
    STAMP + "Scheduler hit an exception: Traceback (most recent call last):",
    '  File "scheduler.py", line 4012, in run_scheduler_process',
    "    scheduler.run_event_loop()",
    "RuntimeError: the cause",
]
CHATTER = [STAMP + "Load weight end. elapsed=1.2 s", STAMP + "WARNING something else"]
CHAIN = [
    "Traceback (most recent call last):",
    '  File "a.py", line 1, in f',
    "KeyError: 'rope_type'",
    "",
    "The above exception was the direct cause of the following exception:",
    "",
    "Traceback (most recent call last):",
    '  File "a.py", line 3, in g',
    "ValueError: bad configuration",
]
CONSEQUENCE = ["Traceback (most recent call last):", '  File "m.py", line 1, in <module>', "EOFError"]

SGLANG = {
    "an exception and not what follows": ([*CHATTER, *TRACEBACK, *CHATTER], "RuntimeError: the cause"),
    "of a chain the first": ([*CHAIN, *CHATTER], "KeyError: 'rope_type'"),
    "not what another process says of its end": ([*TRACEBACK, *CHATTER, *CONSEQUENCE], "RuntimeError: the cause"),
    "that, where nothing else is known": ([*CHATTER, *CONSEQUENCE], "EOFError"),
    "not one of long ago": (
        [*TRACEBACK, *[STAMP + "Decode batch"] * (RECENT_LINES + 1)],
        "it wrote no error; its last line: Decode batch",
    ),
    "a runtime's": (
        ["Fatal Python error: Segmentation fault", "", "Thread 1:"],
        "Fatal Python error: Segmentation fault",
    ),
    "C++'s": (
        ["terminate called after throwing an instance of 'c10::Error'", "  what():  CUDA error"],
        "terminate called after throwing an instance of 'c10::Error'",
    ),
    "a line of level ERROR": ([STAMP + "ERROR the port is taken", *CHATTER], "the port is taken"),
    "chatter is no reason": (
        CHATTER[:1],
        "it wrote no error; its last line: Load weight end. elapsed=1.2 s",
    ),
    "a bare line may be one": ([*CHATTER, "something that nobody has seen"], "something that nobody has seen"),
    "nothing": ([], "no output"),
    "a traceback that is cut": (TRACEBACK[:2], 'File "scheduler.py", line 4012, in run_scheduler_process'),
}


@pytest.mark.parametrize(("lines", "expected"), SGLANG.values(), ids=SGLANG)
def test_sglang(lines: list[str], expected: str) -> None:
    assert ENGINES["sglang"].last_words(lines) == expected


LLAMA_CPP = {
    "the first of the last errors": (
        [
            "error: of long ago",
            *["slot: working"] * CLUSTER_LINES,
            "llama_model_load: error loading model: tensor not found",
            "common_init_from_params: done",
            "main: exiting due to model loading error",
            "the end",
        ],
        "llama_model_load: error loading model: tensor not found",
    ),
    "no error": (["slot: working", "done"], "done"),
}


@pytest.mark.parametrize(("lines", "expected"), LLAMA_CPP.values(), ids=LLAMA_CPP)
def test_llama_cpp(lines: list[str], expected: str) -> None:
    assert ENGINES["llama.cpp"].last_words(lines) == expected
