"""The first start of a real server with nothing around it: no network, no compiler, no cache, a home nobody can write.

Needs root, for a network namespace that has only loopback and a home folder that is mounted read-only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SECONDS = 900
ENTER = (
    'ip link set lo up; mount --bind "$HOME" "$HOME"; mount -o remount,bind,ro "$HOME"; exec env PATH="$1" "$2" -c "$3"'
)
"""Arguments: PATH, Python, program."""
PROGRAM = """
import json, os, pathlib, shutil, signal, socket, subprocess, sys, time
import httpx

def free():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

found = {"tools": [name for name in ("cc", "gcc", "c++", "clang", "nvcc", "ld") if shutil.which(name)]}
found["interfaces"] = [name for _, name in socket.if_nameindex()]
try:
    pathlib.Path.home().joinpath("x").touch()
    found["home"] = "can be written"
except OSError as error:
    found["home"] = error.strerror
port, cache = free(), os.environ["TMPDIR"] + "/cache"
command = [sys.executable, "-m", "pascaline", "serve", "--port", str(port), "--agent-port", str(free())]
command += ["--cache-dir", cache, "--context-length", "512", "--max-running-requests", "2"]
log = open(os.environ["TMPDIR"] + "/serve.log", "wb")
server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
try:
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + float(os.environ["SECONDS_LEFT"])
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    body = {"model": "default", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    body |= {"temperature": 0, "max_tokens": 8, "model": httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300, trust_env=False).json()
    found["answer"] = answer["choices"][0]["message"]["content"]
finally:
    server.send_signal(signal.SIGTERM)
    try:
        found["exit"] = server.wait(60)
    finally:
        try:
            os.killpg(server.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
print(json.dumps(found))
"""


@pytest.mark.slow("starts a real engine on the CPU")
@pytest.mark.engine
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
def test_a_first_start_needs_no_network_compiler_cache_or_home(tmp_path: Path) -> None:
    """Under the environment's own Python; PASCALINE_PYTHON chooses between 3.11 and 3.12."""
    # Sockets lie below it, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        start(tmp_path, Path(temporary))


def start(tmp_path: Path, temporary: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "lscpu").symlink_to(str(shutil.which("lscpu")))  # SGLang asks it for the cores
    path = f"{Path(sys.executable).parent}:{tools}"
    environment = {"HOME": str(home), "TMPDIR": str(temporary), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "SECONDS_LEFT": str(SECONDS)}
    environment |= {name: value for name, value in os.environ.items() if name in ("PYTHONPATH", "SGLANG_PLATFORM")}
    command = ["unshare", "--net", "--mount", "sh", "-ec", ENTER, "sh", path, sys.executable, PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    log = temporary / "serve.log"
    assert done.returncode == 0, done.stderr[-2000:] + (log.read_text()[-4000:] if log.exists() else "")
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["tools"], found["interfaces"], found["home"]) == ([], ["lo"], "Read-only file system")
    assert "Paris" in found["answer"]
    assert found["exit"] == 0
    assert list(home.iterdir()) == []
    compiled = [file for suffix in ("so", "cubin", "o") for file in temporary.rglob(f"*.{suffix}")]
    assert compiled == []
