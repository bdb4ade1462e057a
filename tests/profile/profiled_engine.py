#!/usr/bin/env python3
"""The fake engine with what SGLang offers to profilers: streamed /generate, /start_profile and /stop_profile."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRACE = HERE / "records" / "sglang-0.5.23-cpu.trace.json.gz"


def _load_fake_engine():
    spec = importlib.util.spec_from_file_location("fake_engine", HERE.parent / "fake_engine" / "fake_engine.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_engine"] = module
    spec.loader.exec_module(module)
    return module


fake_engine = _load_fake_engine()


class ProfiledHandler(fake_engine.Handler):
    """Answers three more paths."""

    def do_POST(self) -> None:  # noqa: N802 - the name that http.server calls
        if self.path not in ("/generate", "/start_profile", "/stop_profile"):
            super().do_POST()
            return
        if not self._may_answer():
            return
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null") or {}
        if not body.get("stream"):
            if "GPU" in body.get("activities", []):
                shutil.copy(TRACE, Path(body["output_dir"]) / "1-TP-0.trace.json.gz")
            self._send(200, {})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(body["sampling_params"]["max_new_tokens"]):
            try:
                self.wfile.write(b'data: {"text": "a"}\n\n')
            except OSError:
                return
            time.sleep(0.01)


fake_engine.Handler = ProfiledHandler

if __name__ == "__main__":
    sys.exit(fake_engine.main(sys.argv[1:]))
