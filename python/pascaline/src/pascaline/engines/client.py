"""One HTTP request to an engine, blocking and bounded: the supervisor runs it in a thread and never two at a time."""

from __future__ import annotations

import http.client
import json
from typing import Any

MAX_ANSWER_BYTES = 4 * 2**20


def request(
    address: tuple[str, int],
    path: str,
    *,
    body: dict[str, Any] | None = None,
    api_key: str | None = None,
    timeout: float,
) -> tuple[int, bytes]:
    """Return (status, answer) of a GET, or of a POST where there is a body.

    address: host and port. timeout: seconds for connecting and for each read.
    Raises OSError where no whole answer of at most MAX_ANSWER_BYTES came.
    """
    connection = http.client.HTTPConnection(*reachable(address), timeout=timeout)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        if body is None:
            connection.request("GET", path, headers=headers)
        else:
            headers["Content-Type"] = "application/json"
            connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, _whole(answer)
    except http.client.HTTPException as error:
        raise ConnectionError(f"broken answer: {error!r}") from error
    finally:
        connection.close()


def _whole(answer: http.client.HTTPResponse) -> bytes:
    content = answer.read(MAX_ANSWER_BYTES + 1)
    if len(content) > MAX_ANSWER_BYTES:
        raise ConnectionError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    # A read of at most so many bytes does not tell an early end, as of an engine that was killed, from the real one.
    if answer.length:
        raise ConnectionError(f"the answer ended {answer.length} bytes early")
    return content


def reachable(address: tuple[str, int]) -> tuple[str, int]:
    """Return where to connect to for an address that is listened on: a wildcard is reached by loopback."""
    host, port = address
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port  # noqa: S104 - compared, not listened on
