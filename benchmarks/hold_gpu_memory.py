"""Takes the first GPU's memory but for a number of bytes, by plain cudaMalloc, until its standard input ends.

    python benchmarks/hold_gpu_memory.py BYTES

Prints `free N` once that is done: the bytes that are left, as the driver counts them. Exit code 1 if CUDA fails.
"""

from __future__ import annotations

import ctypes
import sys

GRANULARITY_BYTES = 2 * 2**20
"""Size of the driver's pages, in whole numbers of which it gives memory."""
STEPS = 64
"""Most allocations: the driver may have the memory in several pieces."""


def main() -> int:
    """Hold the memory."""
    wanted = int(sys.argv[1])
    cuda = ctypes.CDLL("libcuda.so.1")
    context, device = ctypes.c_void_p(), ctypes.c_int()
    for call, arguments in (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), device)),
        ("cuCtxSetCurrent", (context,)),
    ):
        if code := getattr(cuda, call)(*arguments):
            print(f"{call}: CUDA error {code}", flush=True)
            return 1
    for _ in range(STEPS):
        room = (free_bytes(cuda) - wanted) // GRANULARITY_BYTES * GRANULARITY_BYTES
        if room <= 0 or not take(cuda, room):
            break
    print(f"free {free_bytes(cuda)}", flush=True)
    sys.stdin.read()
    return 0


def free_bytes(cuda: ctypes.CDLL) -> int:
    """Return the bytes of the GPU that are free."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return free.value


def take(cuda: ctypes.CDLL, size: int) -> bool:
    """Allocate this much, or the half, a quarter, ... of it; return whether anything was allocated."""
    while size >= GRANULARITY_BYTES:
        block = ctypes.c_uint64()
        if cuda.cuMemAlloc_v2(ctypes.byref(block), ctypes.c_size_t(size)) == 0:
            return True
        size = size // 2 // GRANULARITY_BYTES * GRANULARITY_BYTES
    return False


if __name__ == "__main__":
    sys.exit(main())
