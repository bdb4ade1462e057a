"""Real SGLang on the CPU in the sandbox of the rendered unit: what the fake engine cannot show, that nothing it needs is shut."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from support.container import wait_until

if TYPE_CHECKING:
    from support.container import Container

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.engine,
    pytest.mark.slow("starts a real engine of its own"),
    pytest.mark.timeout(900),
]

UNIT = "pascaline-main.service"
KEY = "a-key-that-nobody-guesses"
LOAD_SECONDS = 300


def test_sglang_serves_and_drains_under_systemd(engine_machine: Container) -> None:
    machine = engine_machine
    wait_until(
        lambda: machine.request("http://127.0.0.1:30001/readyz")[0] == 200,
        LOAD_SECONDS,
        lambda: machine.journal(UNIT)[-3000:],
    )
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": "main", "messages": [question], "max_tokens": 16, "temperature": 0}
    status, answer = machine.request("http://127.0.0.1:30000/v1/chat/completions", body, KEY)
    assert status == 200, answer
    assert "Paris" in json.loads(answer)["choices"][0]["message"]["content"]

    journal = machine.journal(UNIT)
    for refusal in ("Permission denied", "Read-only file system", "Operation not permitted"):
        assert refusal not in journal
    # What it prepared is where the next boot looks for it.
    assert "tokenizer.json" in machine.run("find", "/var/cache/pascaline-main/prepared", "-type", "f")

    machine.run("systemctl", "stop", UNIT)
    assert machine.show(UNIT, "Result") == "success"
    assert machine.show(UNIT, "NRestarts") == "0"
