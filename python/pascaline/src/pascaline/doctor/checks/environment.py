"""Checks of the engine's variables: those that slow it down, hide the GPU, or have no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.doctor.checks.engine import SGLANG
from pascaline.doctor.verdicts import Checks, Remedy, Result, failure, info, ok, skipped, warning
from pascaline.gpu.devices import BUS_ORDER, DEVICE_ORDER

if TYPE_CHECKING:
    from pascaline.doctor.host import Host

CHECKS = Checks("Environment")
check = CHECKS.check

_TRUE = frozenset({"1", "true", "TRUE", "yes"})
VOLATILE = frozenset({"tmpfs", "ramfs", "overlay"})
"""File systems that a restart of the host or container empties."""


def _where(host: Host) -> str:
    return f"in the environment of {host.instance.environment_source or 'this process'}"


def _unset(name: str) -> Remedy:
    return Remedy(
        f"remove {name}",
        f"unset {name}; systemctl edit pascaline-<name>.service",
        f"services.pascaline.instances.<name>.environment = {{ }};  # without {name}",
    )


@check(
    "env-launch-blocking",
    "Kernel launches are not serialised",
    "remove CUDA_LAUNCH_BLOCKING; the setting `debug` switches it on while you look for an error",
    command="unset CUDA_LAUNCH_BLOCKING",
    option="hardware.pascaline.cuda.debug = false;",
)
def _launch_blocking(host: Host) -> Result:
    """CUDA_LAUNCH_BLOCKING=1 makes each launch wait for its end: the GPU idles between kernels. The guide sets it."""
    if host.instance.environment.get("CUDA_LAUNCH_BLOCKING") in _TRUE:
        return warning(f"CUDA_LAUNCH_BLOCKING=1 {_where(host)}")
    if host.settings and host.settings.debug:
        return warning(
            "the instance's setting debug is on, which sets CUDA_LAUNCH_BLOCKING=1",
            Remedy(
                "switch debug off",
                "pascaline config show --no-debug",
                "services.pascaline.instances.<name>.settings.debug = false;",
            ),
        )
    return ok("not set")


@check(
    "env-cache-disable",
    "Compiled kernels are kept",
    "remove CUDA_CACHE_DISABLE: without the cache every start compiles all kernels again",
    command="unset CUDA_CACHE_DISABLE",
    option="services.pascaline.instances.<name>.environment = { };  # without CUDA_CACHE_DISABLE",
)
def _cache_disable(host: Host) -> Result:
    """CUDA_CACHE_DISABLE=1 throws away what the driver compiled from PTX: 40 s a start on a P4. The guide sets it."""
    if host.instance.environment.get("CUDA_CACHE_DISABLE") in _TRUE:
        return warning(f"CUDA_CACHE_DISABLE=1 {_where(host)}")
    return ok("not set")


@check(
    "ptx-cache",
    "The driver's cache of kernels outlives a restart and can be written",
    "give the instance a folder on a disk, and let its user write there",
    command="export CUDA_CACHE_PATH=/var/cache/pascaline/cuda",
    option='hardware.pascaline.cuda.cacheDir = "/var/cache/pascaline-cuda";',
)
def _ptx_cache(host: Host) -> Result:
    """Checks where CUDA_CACHE_PATH (default: ~/.nv/ComputeCache) lies, and whether this user may write there."""
    folder, mount = host.system.cuda_cache_folder, host.system.cuda_cache
    if not host.driver.version:
        return skipped("no driver is loaded")
    if not folder:
        return warning("neither CUDA_CACHE_PATH nor HOME is set, so compiled kernels are not kept")
    if not host.system.cuda_cache_writable:
        return warning(f"this user cannot write to {folder}")
    if mount and mount.kind in VOLATILE:
        return warning(f"{folder} is on {mount.kind}, which a restart empties")
    return ok(f"{folder} on {mount.kind}" if mount else folder)


@check(
    "env-tf32",
    "No variable is set for TF32, which Pascal does not have",
    "remove NVIDIA_TF32_OVERRIDE",
    command="unset NVIDIA_TF32_OVERRIDE",
    option="services.pascaline.instances.<name>.environment = { };  # without NVIDIA_TF32_OVERRIDE",
)
def _tf32(host: Host) -> Result:
    """NVIDIA_TF32_OVERRIDE changes tensor cores of Ampere and newer. On Pascal it does nothing; the guide sets it."""
    value = host.instance.environment.get("NVIDIA_TF32_OVERRIDE")
    return ok("not set") if value is None else info(f"NVIDIA_TF32_OVERRIDE={value} {_where(host)} has no effect")


@check(
    "env-unknown-sglang",
    "SGLang knows every SGLANG_ variable that is set",
    "remove them: SGLang does not read these variables; choose attention with the setting attention_backend",
    option='services.pascaline.instances.<name>.settings.attention_backend = "pascal";',
)
def _unknown_sglang(host: Host) -> Result:
    """Searches the installed SGLang for each SGLANG_ variable that is set. The guide's SGLANG_DISABLE_FLASH_ATTENTION
    and SGLANG_DISABLE_NORM_TENSOR exist in no version."""
    engine = host.engine_kind
    if SGLANG not in engine.packages:
        return skipped(f"the engine is {engine.name}")
    names = sorted(name for name in host.instance.environment if name.startswith(engine.variable_prefixes))
    if not names:
        return ok("none is set")
    if SGLANG not in host.engine.versions:
        return skipped(f"SGLang could not be searched for {', '.join(names)}; see engine")
    unknown = host.engine.unknown_variables
    if unknown:
        remedy = _unset(" and ".join(unknown))
        return warning(f"{', '.join(unknown)} {_where(host)}: SGLang does not read them", remedy)
    return ok(", ".join(names))


@check(
    "env-visible-devices",
    "CUDA_VISIBLE_DEVICES shows the GPU that the instance needs",
    "name GPUs that exist, by their index or UUID",
    command="nvidia-smi -L",
    option="services.pascaline.instances.<name>.gpus = [ 0 ];",
)
def _visible_devices(host: Host) -> Result:
    """Compares CUDA_VISIBLE_DEVICES with the host's GPUs. An index that does not exist hides all entries from it on."""
    value = host.instance.environment.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return ok("not set: all GPUs are visible")
    if not host.wants_gpu:
        return ok(f"{value!r}; the model runs on the CPU")
    if not value.strip():
        return failure(f"empty {_where(host)}: every GPU is hidden from an instance that needs one")
    if not host.gpus:
        return skipped("no GPU answers")
    known = {str(gpu.reading.index) for gpu in host.gpus} | {gpu.reading.uuid for gpu in host.gpus}
    unknown = [item.strip() for item in value.split(",") if not any(name.startswith(item.strip()) for name in known)]
    if unknown:
        return failure(f"CUDA_VISIBLE_DEVICES={value}, and there is no GPU {', '.join(unknown)}")
    return ok(f"CUDA_VISIBLE_DEVICES={value}")


@check(
    "env-device-order",
    "All programs number the GPUs alike",
    "set CUDA_DEVICE_ORDER=PCI_BUS_ID, the order of nvidia-smi",
    command="export CUDA_DEVICE_ORDER=PCI_BUS_ID",
    option='services.pascaline.instances.<name>.environment.CUDA_DEVICE_ORDER = "PCI_BUS_ID";',
)
def _device_order(host: Host) -> Result:
    """If the cards differ, CUDA's own order is the fastest first. `serve` sets PCI_BUS_ID and refuses another order."""
    if len({gpu.name for gpu in host.gpus}) < 2:
        return skipped("all GPUs are of the same model")
    value = host.instance.environment.get(DEVICE_ORDER)
    if value is None:
        return ok(f"not set: serve sets {BUS_ORDER}")
    return ok(value) if value == BUS_ORDER else warning(f"{DEVICE_ORDER}={value}, and cards differ")


@check(
    "env-library-path",
    "No stub of libcuda comes before the driver's library",
    "remove the toolkit's stubs folder from LD_LIBRARY_PATH: it is for linking only",
    command="echo $LD_LIBRARY_PATH",
)
def _library_path(host: Host) -> Result:
    """Looks for a toolkit's `stubs` folder in LD_LIBRARY_PATH. Its libcuda answers every call with an error."""
    folders = host.instance.environment.get("LD_LIBRARY_PATH", "").split(":")
    stubs = [folder for folder in folders if folder.rstrip("/").endswith("/stubs")]
    return failure(f"LD_LIBRARY_PATH holds {', '.join(stubs)}") if stubs else ok("no stubs folder")
