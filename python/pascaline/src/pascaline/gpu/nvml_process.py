"""The process that calls NVML, and may be killed for it: `python -m pascaline.gpu.nvml_process PROGRESS_FD`.

It reads requests from standard input and writes answers, and Xid events as they come, to standard output (frames.py).
Three threads: the main one waits for requests, so that the end of its parent ends it even while a driver call hangs;
one reads; one waits for events. Before each call its name is written to the shared memory PROGRESS_FD, for the parent
to read after a hang.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pynvml

from pascaline.gpu.calls import DEVICE_GONE, LIBRARY_CALLS, LIBRARY_GONE, NOT_SUPPORTED, Call, Raw
from pascaline.gpu.frames import read_frame, write_frame
from pascaline.gpu.metrics import DEVICE_CALLS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PROGRESS_BYTES = 128
_EVENT_WAIT_MS = 1000
_FIELD_MEMBERS = {1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}
"""nvmlValueType_t -> the member of nvmlValue_t that holds it; no field read here is a double."""


def main() -> None:
    """Serve requests until standard input ends."""
    progress = mmap.mmap(int(sys.argv[1]), PROGRESS_BYTES)
    output, lock = sys.stdout.buffer, threading.Lock()

    def send(content: dict[str, Any]) -> None:
        with lock:
            write_frame(output, content)

    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_serve, args=(requests, send, progress), daemon=True).start()
    while (request := read_frame(sys.stdin.buffer)) is not None:
        requests.put(request)
    os._exit(0)


def _serve(
    requests: queue.SimpleQueue[dict[str, Any]], send: Callable[[dict[str, Any]], None], progress: mmap.mmap
) -> None:
    listening = False
    while requests.get() is not None:
        try:
            if not listening:
                _note(progress, "nvmlInit")
                pynvml.nvmlInit()
                _start_listening(send, progress)
                listening = True
            answer = read_all(progress)
        except pynvml.NVMLError as error:
            # This copy of the library cannot be used any more; the parent starts another process.
            send({"failure": error.value, "call": _noted(progress)})
            os._exit(0)
        send(answer)


def read_all(progress: mmap.mmap) -> dict[str, Any]:
    """Make every call; raises NVMLError if the library itself fails."""
    _note(progress, "nvmlDeviceGetCount")
    count = pynvml.nvmlDeviceGetCount()
    library, _ = _make(LIBRARY_CALLS, (), "", progress)
    return {"library": library, "devices": [_read_device(index, progress) for index in range(count)]}


def _read_device(index: int, progress: mmap.mmap) -> dict[str, Any]:
    found: dict[str, Any] = {"index": index, "uuid": ""}
    try:
        _note(progress, f"{index} nvmlDeviceGetHandleByIndex")
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        found["uuid"] = pynvml.nvmlDeviceGetUUID(handle)
    except pynvml.NVMLError as error:
        if error.value in LIBRARY_GONE:
            raise
        return found | {"failure": error.value, "call": _noted(progress)}
    found["values"], found["errors"] = _make(DEVICE_CALLS, (handle,), f"{index} ", progress)
    return found


def _make(
    calls: Iterable[Call], handle: tuple[Any, ...], prefix: str, progress: mmap.mmap
) -> tuple[dict[str, Raw], dict[str, int]]:
    """Make calls; the second result has those that failed. A call that reports that the GPU is gone is the last."""
    values: dict[str, Raw] = {}
    errors: dict[str, int] = {}
    for call in calls:
        _note(progress, prefix + call.key)
        try:
            values[call.key] = _flatten(call, _call(call, handle))
        except pynvml.NVMLError as error:
            if error.value in LIBRARY_GONE:
                raise
            errors[call.key] = error.value
            if error.value in DEVICE_GONE:
                break
    return values, errors


def _call(call: Call, handle: tuple[Any, ...]) -> Any:
    function = getattr(pynvml, call.function)
    if call.function == "nvmlDeviceGetFieldValues":
        return _field_value(function(*handle, list(call.args))[0])
    if call.version is not None:
        return function(*handle, *call.args, version=call.version)
    return function(*handle, *call.args)


def _field_value(field: Any) -> int:
    if field.nvmlReturn:
        raise pynvml.NVMLError(field.nvmlReturn)
    member = _FIELD_MEMBERS.get(field.valueType)
    if member is None:
        raise pynvml.NVMLError(NOT_SUPPORTED)
    return int(getattr(field.value, member))


def _flatten(call: Call, answer: Any) -> Raw:
    if isinstance(answer, bytes):
        return answer.decode(errors="replace")
    if isinstance(answer, (int, str)):
        return answer
    if isinstance(answer, (list, tuple)):
        return [_item(call, item) for item in answer]
    return [_member(answer, name) for name in call.fields]


def _item(call: Call, item: Any) -> Any:
    return [getattr(item, name) for name in call.fields] if call.fields else int(item)


def _member(answer: Any, name: str) -> Any:
    value = getattr(answer, name)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _note(progress: mmap.mmap, call: str) -> None:
    progress[:] = call.encode()[:PROGRESS_BYTES].ljust(PROGRESS_BYTES, b"\0")


def _noted(progress: mmap.mmap) -> str:
    return progress[:].rstrip(b"\0").decode()


def _start_listening(send: Callable[[dict[str, Any]], None], progress: mmap.mmap) -> None:
    """Send every Xid event from now on; nothing if the driver has no events (a vGPU, an old card)."""
    try:
        events = pynvml.nvmlEventSetCreate()
        registered = [_register(index, events, progress) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return
    devices = dict(filter(None, registered))
    if devices:
        threading.Thread(target=_listen, args=(events, devices, send), daemon=True).start()


def _register(index: int, events: Any, progress: mmap.mmap) -> tuple[int, tuple[int, str]] | None:
    _note(progress, f"{index} nvmlDeviceRegisterEvents")
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
        return _address(handle), (index, pynvml.nvmlDeviceGetUUID(handle))
    except pynvml.NVMLError:
        return None


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _listen(events: Any, devices: dict[int, tuple[int, str]], send: Callable[[dict[str, Any]], None]) -> None:
    while True:
        try:
            event = pynvml.nvmlEventSetWait_v2(events, _EVENT_WAIT_MS)
        except pynvml.NVMLError_Timeout:
            continue
        except pynvml.NVMLError:
            # One lost GPU fails the wait for all: readings show which one, and events of the others still arrive.
            time.sleep(_EVENT_WAIT_MS / 1000)
            continue
        index, uuid = _identify(event.device, devices)
        send({"xid": event.eventData, "index": index, "uuid": uuid, "timestamp": time.time()})


def _identify(handle: Any, devices: dict[int, tuple[int, str]]) -> tuple[int, str]:
    """Return index and UUID, by the handle because a lost GPU no longer reports them; -1 and "" if all calls fail."""
    known = devices.get(_address(handle))
    if known is not None:
        return known
    try:
        return pynvml.nvmlDeviceGetIndex(handle), pynvml.nvmlDeviceGetUUID(handle)
    except pynvml.NVMLError:
        return -1, ""


if __name__ == "__main__":
    main()
