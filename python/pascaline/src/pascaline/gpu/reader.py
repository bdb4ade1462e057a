"""Readings of NVML through a process that can be killed: this process never loads the driver's library.

A child whose reading does not end by its deadline is killed, and the next reading starts another. A child that
even SIGKILL does not end (it waits in the kernel) is abandoned; there are never more than MAX_ABANDONED of them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pascaline.gpu.calls import (
    DEVICE_GONE,
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    LIB_RM_VERSION_MISMATCH,
    LIBRARY_NOT_FOUND,
    NO_PERMISSION,
    RESET_REQUIRED,
    error_name,
)
from pascaline.gpu.frames import read_frame, write_frame
from pascaline.gpu.metrics import MIG_MODE, VIRTUALIZATION, VIRTUALIZATION_VGPU
from pascaline.gpu.reading import DeviceReading, DeviceStatus, DriverStatus, Reading, XidCount
from pascaline.programs import ending

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pascaline.gpu.calls import Raw

MAX_ABANDONED = 3
"""No further child is started once this many cannot be killed."""
_PROGRESS_BYTES = 128
_KILL_SECONDS = 1.0
"""Time after SIGKILL before the child counts as unkillable."""

_LIBRARY_STATUS = {
    LIBRARY_NOT_FOUND: DriverStatus.NO_LIBRARY,
    DRIVER_NOT_LOADED: DriverStatus.NO_DRIVER,
    NO_PERMISSION: DriverStatus.NO_PERMISSION,
    LIB_RM_VERSION_MISMATCH: DriverStatus.VERSION_MISMATCH,
}
_DEVICE_STATUS = {
    GPU_IS_LOST: DeviceStatus.LOST,
    RESET_REQUIRED: DeviceStatus.RESET_REQUIRED,
    NO_PERMISSION: DeviceStatus.NO_PERMISSION,
}
_REMEDIES = {
    DriverStatus.NO_LIBRARY: "install the NVIDIA driver, or put the folder of libnvidia-ml.so.1 into LD_LIBRARY_PATH",
    DriverStatus.NO_DRIVER: "the kernel module nvidia is not loaded; see modprobe nvidia and dmesg",
    DriverStatus.NO_PERMISSION: "this user may not open /dev/nvidiactl; check its mode and the unit's DeviceAllow",
    DriverStatus.VERSION_MISMATCH: "the driver's library and kernel module differ in version; restart the host",
}


class Reader:
    """Reads NVML on demand. Not for several threads at once; `xids` may grow between readings."""

    def __init__(
        self,
        *,
        deadline: float = 5.0,
        start_deadline: float = 20.0,
        recheck: float = 15.0,
        environment: Mapping[str, str] | None = None,
        kill: Callable[[subprocess.Popen[bytes]], None] = subprocess.Popen.kill,
    ) -> None:
        """Times are in seconds.

        deadline: a reading that takes longer has hung.
        start_deadline: the same for the first reading of a child, which loads the driver; at least `deadline`.
        recheck: longest pause between attempts after failures, and between children without a sound GPU.
        environment: of the child (None: this process's). kill: how to end a child.
        """
        self._deadline = deadline
        self._start_deadline = max(start_deadline, deadline)
        self._recheck = recheck
        self._environment = environment
        self._kill = kill
        self._child: _Child | None = None
        self._abandoned: list[_Child] = []
        self._starts = 0
        self._failures = 0
        self._retry_at = 0.0
        self._last = Reading(DriverStatus.STARTING)
        self._known: dict[str, DeviceReading] = {}
        self._uuids: dict[int, str] = {}
        self._xids: dict[tuple[str, int], XidCount] = {}
        self._xid_lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child; the reader may be used again. A reading that another thread waits for ends as a crash."""
        self._end_child()

    def read(self) -> Reading:
        """Take one reading; during the pause after a failure, return that failure again. Driver errors never raise."""
        self._abandoned = [child for child in self._abandoned if child.process.poll() is None]
        began, timer = time.time(), time.monotonic()
        if timer < self._retry_at:
            return self._complete(replace(self._last, timestamp=began))
        found = self._attempt(timer)
        found = replace(found, timestamp=began, duration=time.monotonic() - timer)
        if found.succeeded:
            found = replace(found, last_success_timestamp=began)
            self._failures = 0
        else:
            self._end_child()
            self._retry_at = time.monotonic() + min(2.0**self._failures, self._recheck)
            self._failures += 1
        return self._complete(found)

    def _complete(self, found: Reading) -> Reading:
        """Add the state that outlives a child."""
        with self._xid_lock:
            xids = tuple(self._xids[key] for key in sorted(self._xids))
        last_success = found.last_success_timestamp or self._last.last_success_timestamp
        self._last = replace(
            found,
            xids=xids,
            last_success_timestamp=last_success,
            reader_starts=self._starts,
            readers_abandoned=len(self._abandoned),
        )
        return self._last

    def _attempt(self, now: float) -> Reading:
        # NVML never finds a GPU again in a process that lost it, nor one that was absent when the process started.
        if self._child and self._anything_wrong() and now - self._child.started >= self._recheck:
            self._end_child()
        if self._child is None:
            if len(self._abandoned) >= MAX_ABANDONED:
                return self._failure(
                    DriverStatus.HUNG,
                    f"{MAX_ABANDONED} processes hang in the driver and cannot be killed; restart the host",
                )
            try:
                self._child = _Child(self._environment, self._count_xid)
            except OSError as error:
                return self._failure(
                    DriverStatus.ERROR, f"failed to start the process that calls NVML: {error.strerror or error}"
                )
            self._starts += 1
        child = self._child
        limit = self._deadline if child.answered else self._start_deadline
        try:
            return self._interpret(child.ask(limit))
        except TimeoutError:
            return self._hung(child.progress(), limit)
        except EOFError:
            return self._failure(DriverStatus.CRASHED, f"the process that calls NVML {child.ending()}")

    def _anything_wrong(self) -> bool:
        return not self._known or any(device.status is not DeviceStatus.OK for device in self._known.values())

    def _interpret(self, answer: dict[str, Any]) -> Reading:
        if "failure" in answer:
            code = answer["failure"]
            status = _LIBRARY_STATUS.get(code, DriverStatus.ERROR)
            said = f"{answer['call']} said {error_name(code)}"
            return self._failure(status, f"{said}: {_REMEDIES[status]}" if status in _REMEDIES else said)
        devices = tuple(map(self._device, answer["devices"]))
        self._uuids.update({device.index: device.uuid for device in devices if device.uuid})
        gone = self._no_longer_counted({device.uuid for device in devices})
        self._known = {device.uuid: device for device in (*devices, *gone)}
        status = DriverStatus.OK if devices else DriverStatus.NO_DEVICES
        message = "" if devices else "NVML counts no GPU"
        return Reading(status, message, devices=(*devices, *gone), counted=len(devices), library=answer["library"])

    def _device(self, answer: dict[str, Any]) -> DeviceReading:
        index = answer["index"]
        uuid = answer["uuid"] or self._uuids.get(index, "")
        errors = answer.get("errors", {})
        code = answer.get("failure") or next((code for code in errors.values() if code in DEVICE_GONE), None)
        if code is None:
            values = answer["values"]
            return DeviceReading(index, uuid, DeviceStatus.OK, _restriction(values), values, errors)
        status = _DEVICE_STATUS.get(code, DeviceStatus.ERROR)
        call = answer.get("call") or next(key for key, value in errors.items() if value == code)
        return DeviceReading(
            index, uuid, status, f"{call.removeprefix(f'{index} ')} said {error_name(code)}", errors=errors
        )

    def _no_longer_counted(self, present: set[str]) -> list[DeviceReading]:
        return [
            DeviceReading(device.index, uuid, DeviceStatus.LOST, "NVML no longer counts it")
            for uuid, device in self._known.items()
            if uuid and uuid not in present
        ]

    def _hung(self, call: str, limit: float) -> Reading:
        index, _, function = call.partition(" ")
        if index.isdigit():
            uuid = self._uuids.get(int(index), "")
            message = f"{function} has not returned for {limit:g} s"
            self._known[uuid] = DeviceReading(int(index), uuid, DeviceStatus.HUNG, message)
        where = f"{function} of GPU {index}" if function else call or "the start of the process that calls NVML"
        return self._failure(DriverStatus.HUNG, f"{where} has not returned for {limit:g} s")

    def _failure(self, status: DriverStatus, message: str) -> Reading:
        """Return a failed reading with the lost GPUs only: they stay lost until a reading finds them again."""
        lost = tuple(device for device in self._known.values() if device.status.is_lost)
        return Reading(status, message, devices=lost)

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        self._kill(child.process)
        child.close()
        try:
            child.process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._abandoned.append(child)

    def _count_xid(self, event: dict[str, Any]) -> None:
        key = (event["uuid"], event["xid"])
        with self._xid_lock:
            before = self._xids.get(key)
            count = before.count + 1 if before else 1
            self._xids[key] = XidCount(event["index"], *key, count, event["timestamp"])


def _restriction(values: Mapping[str, Raw]) -> str:
    mig = values.get(MIG_MODE.key)
    if isinstance(mig, list) and mig[0]:
        return "MIG is on: NVML reports no utilization of the whole card"
    if values.get(VIRTUALIZATION.key) == VIRTUALIZATION_VGPU:
        return "this is a vGPU: NVML reports only part of what the card does"
    return ""


class _Child:
    """One process that calls NVML (nvml_process.py) and the thread that receives from it."""

    def __init__(self, environment: Mapping[str, str] | None, on_xid: Callable[[dict[str, Any]], None]) -> None:
        self.started = time.monotonic()
        self.answered = False
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        descriptor = os.memfd_create("pascaline-nvml-progress")
        os.truncate(descriptor, _PROGRESS_BYTES)
        self._progress = mmap.mmap(descriptor, _PROGRESS_BYTES)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pascaline.gpu.nvml_process", str(descriptor)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                pass_fds=[descriptor],
                # The parent handles a Ctrl-C in the terminal.
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
        threading.Thread(target=self._receive, args=(on_xid,), daemon=True).start()

    def ask(self, limit: float) -> dict[str, Any]:
        """Take one reading; TimeoutError after `limit` seconds, EOFError if the process died."""
        assert self.process.stdin is not None
        try:
            write_frame(self.process.stdin, {})
            answer = self._answers.get(timeout=limit)
        except queue.Empty:
            raise TimeoutError from None
        except BrokenPipeError:
            raise EOFError from None
        if answer is None:
            raise EOFError
        self.answered = True
        return answer

    def progress(self) -> str:
        """Return the last call that it made, after the GPU's index if it is about one."""
        return self._progress[:].rstrip(b"\0").decode(errors="replace")

    def ending(self) -> str:
        """Say how the process ended."""
        try:
            code = self.process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        during = f" in {call}" if (call := self.progress()) else ""
        return f"ended with {ending(code)}{during}"

    def close(self) -> None:
        """Close the requests' pipe; the thread that receives ends with the process."""
        assert self.process.stdin is not None
        # Data for a process that has just died is still in the buffer and is lost here.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def _receive(self, on_xid: Callable[[dict[str, Any]], None]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            while (frame := read_frame(self.process.stdout)) is not None:
                if "xid" in frame:
                    on_xid(frame)
                else:
                    self._answers.put(frame)
        self._answers.put(None)
