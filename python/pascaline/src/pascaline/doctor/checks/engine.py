"""Checks of the engine: matching versions, and machine code for this card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.doctor.verdicts import Checks, Result, failure, info, ok, skipped, warning
from pascaline.plugin import PLUGIN

if TYPE_CHECKING:
    from pascaline.doctor.host import Host

CHECKS = Checks("Engine")
check = CHECKS.check

SGLANG = "sglang"
"""Name of the package."""
LEAST_GLIBC = (2, 34)
"""SGLang's wheels are manylinux_2_34."""


def _absent(host: Host, package: str) -> str | None:
    """Return why a package cannot be judged; None if it is installed."""
    engine = host.engine_kind
    if package not in engine.packages:
        return f"the engine is {engine.name}"
    if package not in host.engine.versions:
        return f"{package} is not installed; see engine"
    return None


@check(
    "engine",
    "The engine is installed",
    "install the engine, or name the Python that has it",
    command="./dev sync (in a checkout); pascaline config show --engine-executable PYTHON",
    option="services.pascaline.enginePackage = pkgs.pascaline-engine;",
)
def _engine(host: Host) -> Result:
    """Runs the Python of engine_executable and asks for torch, SGLang and the plugin; for llama.cpp, llama-server."""
    missing = [name for name in host.engine_kind.required if name not in host.engine.versions]
    if missing:
        return failure(host.engine.error or f"not installed: {', '.join(missing)}")
    words = ", ".join(f"{name} {version}" for name, version in host.engine.versions.items())
    return failure(f"{words}; {host.engine.error}") if host.engine.error else ok(words)


@check(
    "sglang-version",
    "SGLang has a version that the plugin was made for",
    "install the SGLang that the plugin names: its internals change with every release",
    command=f"pip install sglang=={PLUGIN.sglang[-1]}",
    option="services.pascaline.enginePackage = pkgs.pascaline-engine;",
)
def _sglang_version(host: Host) -> Result:
    """Compares the installed SGLang with the versions that the plugin's shims were written and tested for."""
    if reason := _absent(host, SGLANG):
        return skipped(reason)
    found, supported = host.engine.versions[SGLANG], host.engine.supported
    if not supported:
        return skipped("the plugin does not report which versions it supports; see engine")
    words = f"sglang {found}, the plugin supports {', '.join(supported)}"
    return ok(words) if found in supported else failure(words)


@check(
    "plugin",
    "The plugin is registered with SGLang",
    "install sglang-pascal into the same environment as SGLang",
    command="pip install --force-reinstall --no-deps ./python/gguf-acceptance ./python/sglang-pascal (in a checkout)",
    option="services.pascaline.enginePackage = pkgs.pascaline-engine;",
)
def _plugin(host: Host) -> Result:
    """Looks for the platform `pascal` among SGLang's entry points. Without it SGLang refuses every Pascal card."""
    if reason := _absent(host, SGLANG):
        return skipped(reason)
    points = host.engine.entry_points
    if PLUGIN.platform not in points:
        return failure(f"platforms registered: {', '.join(points) or 'none'}")
    return ok(f"sglang-pascal {host.engine.versions.get('sglang-pascal', '(unknown version)')}")


@check(
    "bitsandbytes",
    "The package for bitsandbytes quantisation is installed",
    "install bitsandbytes into the engine's Python (it is not a locked package), or serve a GGUF file",
    command=f"pip install --no-deps bitsandbytes=={PLUGIN.bitsandbytes}",
)
def _bitsandbytes(host: Host) -> Result:
    """If the setting `quantization` is bitsandbytes, looks for a version that SGLang accepts: it fails without it."""
    if host.settings is None or host.settings.quantization != "bitsandbytes":
        return ok("the settings do not use it")
    if reason := _absent(host, SGLANG):
        return skipped(reason)
    found = host.engine.versions.get("bitsandbytes")
    if found is None:
        return failure("it is not installed")
    if _numbers(found) >= _numbers(PLUGIN.oldest_bitsandbytes):
        return ok(found)
    return failure(f"{found} is installed, SGLang needs {PLUGIN.oldest_bitsandbytes}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


@check(
    "torch-architectures",
    "torch has machine code for this card",
    "install the locked torch: 2.7.1 is the newest on the package index with code for sm_60",
    command="pip install torch==2.7.1",
    option="services.pascaline.enginePackage = pkgs.pascaline-engine;",
)
def _torch_architectures(host: Host) -> Result:
    """Compares the card with the architectures that torch was built for. Code for sm_60 runs on 6.0 and 6.1; code with
    another first digit does not run. The driver compiles PTX of the same or an older architecture."""
    if reason := _absent(host, "torch"):
        return skipped(reason)
    if not host.engine.torch_cuda:
        words = f"torch {host.engine.versions['torch']} is built without CUDA"
        return failure(words) if host.wants_gpu else ok(f"{words}; the model runs on the CPU")
    if not host.capabilities:
        return skipped("no GPU reports its compute capability")
    built = host.engine.torch_architectures
    missing = [capability for capability in host.capabilities if not _runs_on(built, capability)]
    words = f"torch {host.engine.versions['torch']} for {' '.join(built)}"
    return failure(f"{words}: none runs on {', '.join(missing)}") if missing else ok(words)


@check(
    "library-architectures",
    "The libraries that torch calls have machine code for this card",
    "install the locked packages again: those of CUDA 12 hold code for sm_60, those of CUDA 13 do not",
    command="pip install torch==2.7.1 (which brings its cuBLAS)",
    option="services.pascaline.enginePackage = pkgs.pascaline-engine;",
)
def _library_architectures(host: Host) -> Result:
    """Reads which GPU code the files of torch, cuBLAS and, if it is installed, bitsandbytes really hold, and compares
    it with the card. A file that only has PTX for it works, but the driver compiles it at the first start."""
    if reason := _absent(host, "torch"):
        return skipped(reason)
    libraries = host.engine.library_code
    if not host.capabilities or not libraries:
        return skipped("no GPU reports its compute capability" if libraries else "no library could be read; see engine")
    words = [f"{name} for {' '.join(code)}" for name, code in libraries.items()]
    for capability in host.capabilities:
        lacking = [name for name, code in libraries.items() if not _runs_on(code, capability)]
        if lacking:
            return failure(f"{', '.join(lacking)}: no code for {capability}; {'; '.join(words)}")
        compiled = [name for name, code in libraries.items() if not _runs_on(_machine_code(code), capability)]
        if compiled:
            return warning(f"{', '.join(compiled)}: only PTX for {capability}, which the driver compiles once")
    return ok("; ".join(words))


def _machine_code(built: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in built if name.startswith("sm_"))


def _runs_on(built: tuple[str, ...], capability: str) -> bool:
    """Whether code for one of the architectures runs: sm_XY on X.Z with Z >= Y, PTX on anything not older."""
    major, minor = map(int, capability.split("."))
    for name in built:
        kind, _, number = name.partition("_")
        if not number.isdigit():
            continue  # also sm_90a and its like, which are for one newer card each
        first, second = divmod(int(number), 10)
        if kind == "compute" and (first, second) <= (major, minor):
            return True
        if kind == "sm" and first == major and second <= minor:
            return True
    return False


@check(
    "kernel-architectures",
    "The plugin's kernels are built for this card",
    "build them once: otherwise the first start compiles each kernel",
    command="python -m sglang_pascal.kernels.build --output DIR && export SGLANG_PASCAL_KERNELS=DIR",
    option='hardware.pascaline.driver.computeCapability = "6.1";',
)
def _kernel_architectures(host: Host) -> Result:
    """Looks for prebuilt kernels of the card's architecture beside the plugin, or in SGLANG_PASCAL_KERNELS. PTX
    alone works too: the driver compiles it at the first start."""
    if reason := _absent(host, "sglang-pascal"):
        return skipped(reason)
    if not host.pascal:
        return skipped("no Pascal card answers")
    built = host.engine.kernel_architectures
    if not built:
        return info("no kernel is prebuilt; the first start compiles them and keeps them")
    missing = sorted({gpu.compute_capability for gpu in host.pascal if not _runs_on(built, gpu.compute_capability)})
    words = f"prebuilt for {' '.join(built)}"
    if missing:
        return warning(f"{words}, not for {', '.join(missing)}")
    machine_code = _machine_code(built)
    compiled = sorted(
        {gpu.compute_capability for gpu in host.pascal if not _runs_on(machine_code, gpu.compute_capability)}
    )
    return (
        info(f"{words}: for {', '.join(compiled)} the driver compiles them at the first start")
        if compiled
        else ok(words)
    )


@check(
    "card-runs",
    "The attention, products and widths on this card are known",
    "install the plugin of this release: another one does not say what it runs",
    command="sglang-pascal info",
    option="services.pascaline.enginePackage = pkgs.pascaline-engine;",
)
def _card_runs(host: Host) -> Result:
    """Names which attention and products the plugin runs on a card, and how many bits activations have in them: the
    plugin's default, and what the plan of the settings says."""
    if reason := _absent(host, "sglang-pascal"):
        return skipped(reason)
    capabilities = sorted({gpu.compute_capability for gpu in host.pascal})
    if not capabilities:
        return skipped("no Pascal card answers")
    unknown = [capability for capability in capabilities if capability not in host.engine.runs]
    if unknown:
        return info(f"the plugin does not say it for {', '.join(unknown)}")
    words = [f"{capability}: {'; '.join(host.engine.runs[capability].values())}" for capability in capabilities]
    if host.plan is not None:
        words.append(
            f"the plan: {host.plan.request.prefill_bits}-bit prompts, {host.plan.request.decode_bits}-bit decode"
        )
    return ok("; ".join(words))


@check(
    "glibc",
    "The C library is new enough for the engine",
    "use a distribution of 2022 or newer, or the Nix package, which brings its own",
    command="getconf GNU_LIBC_VERSION",
)
def _glibc(host: Host) -> Result:
    """Compares the system's glibc with 2.34, the oldest that SGLang's wheels support."""
    parts = host.system.glibc.split(".")
    if host.system.is_nixos or not all(part.isdigit() for part in parts[:2]) or len(parts) < 2:
        return skipped("the package brings its own" if host.system.is_nixos else "the version is unknown")
    words = f"glibc {host.system.glibc}"
    return ok(words) if (int(parts[0]), int(parts[1])) >= LEAST_GLIBC else failure(f"{words}, must be 2.34 or newer")
