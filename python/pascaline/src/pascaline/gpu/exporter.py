"""The exporter: one thread reads NVML at an interval, and scrapes are answered from its last reading.

Any number of concurrent scrapes costs one reading, and a scrape never waits for the driver longer than its own timeout.
A reading older than `max_age` is not shown: the scrape waits for the next one, and reports stale data if none comes.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import threading
import time
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from pascaline.defaults import PORTS
from pascaline.descriptors import MOST_CONNECTIONS, QUIET_SECONDS, connection_limit, raise_descriptor_limit
from pascaline.errors import ConfigurationError, PortInUseError
from pascaline.gpu.reading import DeviceStatus, DriverStatus, Reading
from pascaline.gpu.render import CONTENT_TYPE, render

if TYPE_CHECKING:
    from collections.abc import Callable

    from pascaline.gpu.reader import Reader

DEFAULT_PORT = PORTS.exporter
DEFAULT_INTERVAL = 1.0
"""Seconds from one reading to the next."""
DEFAULT_MAX_AGE = 5.0
"""Seconds for which a reading may be shown; with a long interval, twice the interval."""
TIMEOUT_HEADER = "X-Prometheus-Scrape-Timeout-Seconds"
_DEFAULT_TIMEOUT = 10.0  # Prometheus' own default
_LONGEST_TIMEOUT = 60.0
"""Longest wait for a reading, even if a scraper allows more: Prometheus' longest sensible scrape."""
_ACCEPT_SECONDS = 0.1
"""Pause after a connection could not be accepted: it waits in the kernel, and an immediate retry would spin."""
_MOST_SAID = 100
"""Most distinct request failures that are logged."""
_TIMEOUT_MARGIN = 0.5
"""Seconds of a scrape's timeout that are reserved for sending the answer."""
_SWITCH_SECONDS = 0.0005
"""Interpreter's time slice (its default is 5 ms): how long a scrape may wait for the thread that renders a reading."""
_STOP_SECONDS = 5.0
"""Time for the reading thread to end."""
_INDEX_PAGE = b"""<!doctype html><title>pascaline exporter</title><h1>pascaline exporter</h1>
<p>Metrics of the NVIDIA GPUs of this host.</p>
<ul><li><a href="/metrics">/metrics</a></li><li><a href="/livez">/livez</a></li></ul>
"""


class Readings:
    """The last reading and its page, shared by the thread that reads and those that answer scrapes."""

    def __init__(self, max_age: float) -> None:
        """max_age: seconds for which a reading is shown, from its end."""
        self._max_age = max_age
        self._changed = threading.Condition()
        self._last = Reading(DriverStatus.STARTING, "no reading has ended yet")
        self._page = b""
        self._received = -max_age

    def publish(self, reading: Reading) -> None:
        """Store a reading as the last one."""
        page = render(reading).encode()
        with self._changed:
            self._last, self._page, self._received = reading, page, time.monotonic()
            self._changed.notify_all()

    def page(self, timeout: float) -> bytes:
        """Return the page of a recent reading, or after `timeout` seconds a page that reports that there is none."""
        with self._changed:
            if self._changed.wait_for(self._is_fresh, max(timeout, 0.0)):
                return self._page
            return render(self._outdated()).encode()

    def _is_fresh(self) -> bool:
        return bool(self._page) and time.monotonic() - self._received <= self._max_age

    def _outdated(self) -> Reading:
        """The last reading without its data; lost GPUs and events stay."""
        if self._last.status is DriverStatus.STARTING:
            return self._last
        lost = tuple(device for device in self._last.devices if device.status.is_lost)
        return replace(self._last, status=DriverStatus.STALE, message="", devices=lost, library={})


class ChangeLog:
    """Reports each change of the driver's or a GPU's state once, and does not repeat it for each reading."""

    def __init__(self, write: Callable[[str], None]) -> None:
        """write: takes one line."""
        self._write = write
        self._said: dict[str, str] = {}
        self._xids: dict[tuple[str, int], int] = {}

    def note(self, reading: Reading) -> None:
        """Compare a reading with the state that was reported last."""
        self._say("NVML", reading.status.value, reading.message)
        for device in reading.devices:
            self._say(f"GPU {device.index} ({device.uuid or 'unknown UUID'})", device.status.value, device.message)
        for xid in reading.xids:
            key = (xid.uuid, xid.xid)
            if xid.count != self._xids.get(key, 0):
                self._write(f"GPU {xid.index} ({xid.uuid}): Xid {xid.xid}, {xid.count} so far")
                self._xids[key] = xid.count

    def _say(self, who: str, status: str, message: str) -> None:
        # A failure's message may name another call each time; a working GPU's message describes its configuration.
        state = f"{status}: {message}" if status == DeviceStatus.OK else status
        if self._said.get(who) != state:
            self._said[who] = state
            self._write(f"{who}: {status}" + (f": {message}" if message else ""))


class Exporter:
    """The reading thread and the HTTP server."""

    def __init__(
        self,
        reader: Reader,
        *,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        interval: float = DEFAULT_INTERVAL,
        max_age: float = DEFAULT_MAX_AGE,
        log: Callable[[str], None],
    ) -> None:
        """Listen at once, so that a port in use is an error before anything else starts; port 0 takes a free one."""
        self._reader = reader
        self._interval = interval
        self._readings = Readings(max_age)
        self._log = ChangeLog(log)
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._server = _listen(host, port, self._readings, log)
        self._thread = threading.Thread(target=self._read_forever, name="nvml", daemon=True)

    @property
    def url(self) -> str:
        """Address of the page."""
        host, port = self._server.server_address[:2]
        name = host.decode() if isinstance(host, bytes | bytearray) else host
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/metrics"

    def run(self) -> None:
        """Read and answer until `stop` is called from another thread or a signal handler's.

        Raises the exception that ended the reading thread; otherwise only pages that stay stale would show it.
        """
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._thread.start()
        try:
            self._server.serve_forever(poll_interval=0.1)
        finally:
            self._stop.set()
            self._server.server_close()
            # Ends a reading in progress, even if it hangs.
            self._reader.close()
            self._thread.join(_STOP_SECONDS)
        if self._error:
            raise self._error

    def stop(self) -> None:
        """Let `run` return."""
        threading.Thread(target=self._server.shutdown, daemon=True).start()

    def _read_forever(self) -> None:
        try:
            self._read_until_stopped()
        except Exception as error:
            self._error = error
            self.stop()

    def _read_until_stopped(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            reading = self._reader.read()
            if self._stop.is_set():
                return
            self._readings.publish(reading)
            self._log.note(reading)
            # After a reading that took longer than the interval, the next ones do not follow at once.
            due = max(due + self._interval, time.monotonic())
            self._stop.wait(due - time.monotonic())


class Quiet:
    """The open connections, the longest idle first. One without a whole request for a while, or one too many, is ended.

    Safe to use from any thread. A connection is shut down, not closed: the thread that serves it closes it.
    """

    def __init__(self, most: int, seconds: float = QUIET_SECONDS) -> None:
        """most: connections at once. seconds: from opening or the last answer to the end."""
        self._most = most
        self._seconds = seconds
        self._deadlines: dict[socket.socket, float] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of open connections."""
        return len(self._deadlines)

    def heard(self, connection: socket.socket, patience: float = 0.0) -> None:
        """Note a new connection, a request whose answer may take `seconds`, or the end of an answer."""
        with self._lock:
            known = self._deadlines.pop(connection, None) is not None
            if not known and len(self._deadlines) >= self._most:
                self._cut(next(iter(self._deadlines)))
            self._deadlines[connection] = time.monotonic() + self._seconds + patience

    def gone(self, connection: socket.socket) -> None:
        """Forget a connection."""
        with self._lock:
            self._deadlines.pop(connection, None)

    def cut_overdue(self) -> None:
        """End the connections that have been idle for too long."""
        now = time.monotonic()
        with self._lock:
            for connection in [each for each, deadline in self._deadlines.items() if deadline < now]:
                self._cut(connection)

    def cut_oldest(self) -> None:
        """Close a connection if the process has no descriptor left."""
        with self._lock:
            if self._deadlines:
                self._cut(next(iter(self._deadlines)))

    def _cut(self, connection: socket.socket) -> None:
        del self._deadlines[connection]
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], readings: Readings, log: Callable[[str], None]) -> None:
        self.readings = readings
        self.connections = Quiet(connection_limit(raise_descriptor_limit()))
        self._log = log
        self._said: set[str] = set()
        self.request_queue_size = MOST_CONNECTIONS
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; without a descriptor for it, the oldest makes room for the next try."""
        try:
            return super().get_request()
        except OSError as error:
            self._say_once(f"failed to accept a connection: {error.strerror or error}")
            self.connections.cut_oldest()
            time.sleep(_ACCEPT_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread."""
        self.connections.heard(request)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Check the connections, ten times a second."""
        self.connections.cut_overdue()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self.connections.gone(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore scrapers that went away, and report each failure once."""
        del request, client_address
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self._say_once(f"failed to answer a request: {error!r}")

    def _say_once(self, text: str) -> None:
        if text not in self._said and len(self._said) < _MOST_SAID:
            self._said.add(text)
            self._log(text)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "pascaline"
    sys_version = ""
    server: _Server
    timeout = 30
    # Head and body of an answer are two writes: without this the second waits for the first one's acknowledgement.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer the three pages."""
        self.server.connections.heard(self.connection, self._patience())
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(HTTPStatus.OK, CONTENT_TYPE, self.server.readings.page(self._patience()))
        elif path == "/livez":
            self._answer(HTTPStatus.OK, "text/plain; charset=utf-8", b"ok\n")
        elif path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", _INDEX_PAGE)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"not found; see /metrics\n")

    do_HEAD = do_GET  # noqa: N815  # http.server finds methods by this name

    def _patience(self) -> float:
        try:
            timeout = float(self.headers.get(TIMEOUT_HEADER, _DEFAULT_TIMEOUT))
        except ValueError:
            timeout = _DEFAULT_TIMEOUT
        if not 0 < timeout < float("inf"):
            timeout = _DEFAULT_TIMEOUT
        timeout = min(timeout, _LONGEST_TIMEOUT)
        return timeout - min(_TIMEOUT_MARGIN, timeout / 2)

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.server.connections.heard(self.connection)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class names it
        """Log nothing: one line per scrape would be noise."""


def _listen(host: str, port: int, readings: Readings, log: Callable[[str], None]) -> _Server:
    try:
        return _Server((host, port), readings, log)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"port {port} of {host} is in use; stop the program that listens there, or choose another with --port"
            ) from error
        raise ConfigurationError(
            f"failed to listen on {host}:{port}: {error.strerror or error}; see --host and --port"
        ) from error
