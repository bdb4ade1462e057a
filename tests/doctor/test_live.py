"""The doctor beside a living instance: `pascaline serve` on the fake engine, asked in each way that --instance has."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pascaline.doctor import examine
from pascaline.doctor.collect import Question, collect
from pascaline.doctor.machine import Machine
from pascaline.doctor.verdicts import Finding, Verdict
from support.instance import FAKE_ENGINE, Instance, free_port, running, wait_until
from support.models import tiny, write_gguf


def settings_file(instance: Instance, folder: Path) -> Path:
    path = folder / "emily.toml"
    lines = [
        f'{key} = "{value}"' if isinstance(value, (str, Path)) else f"{key} = {value}"
        for key, value in instance.settings.items()
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def findings(instance: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(collect(Machine(), Question(instance=instance)))}


def test_instance_that_serves_and_then_crashes(tmp_path: Path) -> None:
    """Its TOML file and its agent's URL lead to its state; its ports are its own; a crash is counted."""
    model = write_gguf(tmp_path / "tiny.gguf", tiny("llama"), "Q8_0")
    settings = {
        "engine_executable": FAKE_ENGINE,
        "device": "cpu",
        "probe_interval": 0.5,
        "stall_timeout": 3,
    }
    with running(tmp_path, model=model, **settings) as instance:
        wait_until("ready", lambda: any(" is ready after " in line for line in instance.lines))
        file = settings_file(instance, tmp_path)
        port, agent_port = instance.settings["port"], instance.settings["agent_port"]
        found = findings(str(file))
        assert found["instance-state"].verdict is Verdict.OK
        assert found["ports"].evidence == f"{port} and {agent_port} are this instance's"
        assert found["plan-memory"].verdict is Verdict.OK
        assert found["queue"].evidence == "0 running, 0 waiting, KV pool 0% used"
        found = findings(f"http://127.0.0.1:{agent_port}")
        assert found["instance-state"].verdict is Verdict.OK
        assert found["configuration"].evidence == "only the agent's URL is known"
        with contextlib.suppress(ConnectionError):  # it may end before it has answered
            instance.api("/fake/faults", {"crash_now": 1})
        wait_until("a restart", lambda: instance.agent("/health").json["restarts"] == 1)
        assert findings(str(file))["instance-restarts"].evidence == "1 of the engine, 0 of the unit"


def test_an_agent_that_was_named_and_does_not_answer_is_a_failure() -> None:
    """Whoever gives a URL says that an instance is there; without one there may be none."""
    url = f"http://127.0.0.1:{free_port()}"
    found = findings(url)["instance-state"]
    assert (found.verdict, found.evidence) == (Verdict.FAILURE, f"no agent answers at {url}")


def test_settings_that_nothing_runs_yet(tmp_path: Path) -> None:
    """A TOML file alone is examined too: what would go wrong at its start."""
    path = tmp_path / "emily.toml"
    path.write_text('model = "/no/such/model.gguf"\ndevice = "cpu"\nhost = "0.0.0.0"\nallow_unauthenticated = true\n')
    found = findings(str(path))
    assert found["model-format"].evidence == (
        "failed to read /no/such/model.gguf: there is no such file; name a GGUF file or a Hugging Face folder"
    )
    assert found["api-exposure"].evidence == "the API listens on 0.0.0.0 without a key"
    assert found["instance-state"].verdict is Verdict.SKIPPED


def test_llama_cpp_that_is_missing(tmp_path: Path) -> None:
    """For the engine llama.cpp the program is looked for, and SGLang is not asked."""
    path = tmp_path / "emily.toml"
    path.write_text('engine = "llama.cpp"\nengine_executable = "/no/such/llama-server"\ndevice = "cpu"\n')
    found = findings(str(path))
    assert found["engine"].evidence == "failed to run /no/such/llama-server: there is no such program"
    assert found["sglang-version"].evidence == "the engine is llama.cpp"
