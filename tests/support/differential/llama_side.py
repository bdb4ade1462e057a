"""Serves models by llama-server, each by a process of its own, which starts in tenths of a second."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

PROGRAM: Final = "llama-server"
FLAGS: Final = (
    "-c",
    "256",
    "-np",
    "1",
    "-t",
    "1",
    "-fa",
    "off",
    "-ctk",
    "f32",
    "-ctv",
    "f32",
    "-ngl",
    "0",
)
FLAGS_OF_SPEED: Final = (
    "-lv",
    "4",
    "--no-warmup",
    "--no-webui",
    "-fit",
    "off",
    "-cram",
    "0",
)
READY_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.02
_END: Final = re.compile(r"EOG token\s+= (\d+) ")


@dataclass
class Served:
    """What llama-server made of a file."""

    error: str = ""
    """Last lines of its log if it refused the file."""
    ids: list[list[int]] = field(default_factory=list)
    """Tokens of each text."""
    end_ids: list[int] = field(default_factory=list)
    """Tokens that end a generation, by its log."""
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    """Number of leading ids -> log-probability of every token after them."""


def is_installed() -> bool:
    """Whether there is a llama-server."""
    return shutil.which(PROGRAM) is not None


def serve(
    model: Path,
    texts: Sequence[str],
    ids: Sequence[int],
    lengths: Sequence[int],
    tokens: Sequence[str],
) -> Served:
    """Start it, ask everything, stop it. tokens: the vocabulary, with an "a" in it."""
    log = model.with_suffix(".log")
    with _running(model, log) as (process, url):
        if not _wait_until_ready(process, url):
            return Served(error=_last_words(log))
        served = Served(ids=[_tokens(url, text) for text in texts])
        served.logprobs = _logprobs(url, ids, lengths, tokens)
    # A thread of its own writes the log, which is whole when the program has ended.
    served.end_ids = _end_ids(log)
    return served


@contextmanager
def _running(model: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    command = [
        PROGRAM,
        "-m",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *FLAGS,
        *FLAGS_OF_SPEED,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(READY_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=READY_SECONDS):
                return True
        except (urllib.error.URLError, ConnectionError):
            time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"llama-server is neither ready nor gone after {READY_SECONDS:g} s")


def _ask(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=READY_SECONDS) as answer:
        return json.load(answer)


def _tokens(url: str, text: str) -> list[int]:
    """Return the tokens; [-1] if the server fails at this text."""
    body = {"content": text, "add_special": True, "parse_special": True}
    try:
        tokens: list[int] = _ask(f"{url}/tokenize", body)["tokens"]
    except urllib.error.HTTPError:
        return [-1]
    return tokens


def _logprobs(url: str, ids: Sequence[int], lengths: Sequence[int], tokens: Sequence[str]) -> dict[int, list[float]]:
    prompts = [list(ids[:length]) for length in lengths]
    body = {
        "prompt": prompts,
        "n_predict": 1,
        "n_probs": len(tokens),
        "temperature": 0,
        "cache_prompt": False,
    }
    # The probabilities are those without the bias. It makes every answer a whole character: others are held back.
    answers = _ask(f"{url}/completion", body | {"logit_bias": [[tokens.index("a"), 1000]]})
    return {length: _row(answer, len(tokens)) for length, answer in zip(lengths, answers, strict=True)}


def _row(answer: dict[str, Any], vocabulary: int) -> list[float]:
    row = [math.nan] * vocabulary
    for each in answer["completion_probabilities"][0]["top_logprobs"]:
        row[each["id"]] = each["logprob"]
    return row


def _end_ids(log: Path) -> list[int]:
    return sorted(map(int, _END.findall(log.read_text(errors="replace"))))


def _last_words(log: Path) -> str:
    """The lines that say why, without the rest of the log."""
    lines = log.read_text(errors="replace").splitlines()
    told = [line for line in lines if "rror" in line or "ASSERT" in line or "terminate" in line or "what()" in line]
    return "\n".join(told[:4] or lines[-4:])
