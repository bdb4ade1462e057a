"""A function that asks the server is called once the server listens."""

from __future__ import annotations

import socket
import threading
import time
from types import SimpleNamespace

from sglang_pascal import listening


def test_it_is_called_once_the_server_listens():
    """The port is bound, so that nobody else can have it, and listens later."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        threading.Timer(0.3, server.listen).start()
        called = listening.when_listening(lambda args: args.url(), SimpleNamespace(url=lambda: url))
    assert called == url
    assert time.monotonic() - began >= 0.3


def test_it_is_called_in_the_end_if_nobody_listens(monkeypatch):
    monkeypatch.setattr(listening, "SECONDS", 0.1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert listening.when_listening(lambda _: "called", SimpleNamespace(url=lambda: url)) == "called"
        assert not listening.wait(url, 0.1)
