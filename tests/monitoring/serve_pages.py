"""A process that serves recorded metrics pages as if their program were alive: counters and histograms grow with time.

    python serve_pages.py PAGE...     prints one port a page, in order, and serves until it is ended

@NOW@ in a page is replaced by the time.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_TYPE = re.compile(r"# TYPE (\S+) (\w+)")
_SAMPLE = re.compile(r"([^\s{#]+)(\{.*\})? (\S+)")
_START = time.time()
# A counter doubles its recorded value in this time.
_DOUBLING_SECONDS = 10.0


def alive(page: str, elapsed: float) -> str:
    """Return the page as it would read some seconds later: gauges as recorded, all that counts grown."""
    kinds = dict(_TYPE.findall(page))
    factor = 1 + elapsed / _DOUBLING_SECONDS
    return (
        "\n".join(_grown(line, kinds, factor) for line in page.replace("@NOW@", str(time.time())).splitlines()) + "\n"
    )


def _grown(line: str, kinds: dict[str, str], factor: float) -> str:
    found = _SAMPLE.fullmatch(line)
    if not found:
        return line
    name, labels, value = found[1], found[2] or "", float(found[3])
    family = re.sub(r"_(bucket|count|sum|total)$", "", name)
    counts = kinds.get(name) == "counter" or kinds.get(family) in ("counter", "histogram")
    return f"{name}{labels} {value * factor if counts else value}"


def _serve(path: Path) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = alive(path.read_text(), time.time() - _START).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


if __name__ == "__main__":
    servers = [_serve(Path(page)) for page in sys.argv[1:]]
    for server in servers:
        threading.Thread(target=server.serve_forever).start()
    print(*(server.server_port for server in servers), flush=True)
