"""Checks of the cards: power, temperature, link, memory errors, and other users."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.doctor.kernel_log import CRITICAL_XIDS, xids
from pascaline.doctor.verdicts import Checks, Remedy, Result, Verdict, failure, info, ok, skipped, warning
from pascaline.engines.load import load_of
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from pascaline.doctor.host import Gpu, GpuProcess, Host

CHECKS = Checks("GPU")
check = CHECKS.check

# nvml.h, nvmlClocksEventReasons.
POWER_CAP = 0x4
HARDWARE_SLOWDOWN = 0x8
SOFTWARE_THERMAL = 0x20
HARDWARE_THERMAL = 0x40
POWER_BRAKE = 0x80
SLOWDOWN_REASONS = {
    SOFTWARE_THERMAL: "the driver lowers clocks because of heat",
    HARDWARE_THERMAL: "the card halves its clocks because of heat",
    HARDWARE_SLOWDOWN: "the card halves its clocks",
    POWER_BRAKE: "the power supply asks for lower clocks",
}
NEAR_CELSIUS = 3
"""Distance to a threshold at which the next minutes may reach it."""
HOT_CELSIUS = 85
"""The guide's limit, and the limit of the alert HighGPUTemp."""
WARM_PASSIVE_CELSIUS = 75
"""A passive card that gets this warm at little load has no air flow; peers report 85 °C within five minutes."""
IDLE_RATIO = 0.3
"""A GPU that runs kernels for a smaller share of the time counts as little used."""
ECC_SHARE = 1 / 16
"""Share of memory and bandwidth: GDDR5 has no extra room for ECC, so it takes one byte of sixteen."""
NATIVE_ECC = "P100"
"""HBM2 holds its ECC bits in extra memory, at no cost (NVIDIA, Tesla P100 white paper)."""
FEW_REPLAYS = 100
MEBI = 2**20


def _each(host: Host, judge: Callable[[Gpu], Result | None], unknown: str) -> Result:
    """Judge every GPU that answers: the worst verdict, with each GPU's evidence; skipped if none can be judged."""
    results = [(gpu, result) for gpu in host.gpus if (result := judge(gpu)) is not None]
    if not results:
        return skipped(unknown if host.gpus else "no GPU answers")
    worst = max((result for _, result in results), key=lambda result: result.verdict.severity)
    told = [(gpu, result) for gpu, result in results if result.verdict is worst.verdict]
    return Result(worst.verdict, "; ".join(f"{gpu.label}: {result.evidence}" for gpu, result in told), worst.remedy)


@check(
    "capability",
    "The card is one that this project serves",
    "use the engine's own platform for cards newer than Pascal (upstream SGLang); replace cards that are older",
    command="nvidia-smi --query-gpu=name,compute_cap --format=csv",
)
def _capability(host: Host) -> Result:
    """Reads the compute capability. The plugin's kernels are for 6.0 and 6.1; upstream SGLang serves newer cards."""

    def judge(gpu: Gpu) -> Result | None:
        if not gpu.compute_capability:
            return None
        words = f"compute capability {gpu.compute_capability}"
        if gpu.is_pascal:
            return ok(words)
        if int(gpu.compute_capability.partition(".")[0]) < 6:
            return failure(f"{words} is older than Pascal")
        return info(f"{words}: upstream SGLang serves it with its own kernels")

    return _each(host, judge, "no GPU reports its compute capability")


@check(
    "card-profile",
    "The card has a profile, so that plans are exact",
    "choose the nearest profile, and add this card to cards.toml",
    command="pascaline config show --card tesla-p4",
    option='services.pascaline.instances.<name>.settings.card = "tesla-p4";',
)
def _card_profile(host: Host) -> Result:
    """Looks up the card's name in the profiles, which hold memory, bandwidth and measured constants."""

    def judge(gpu: Gpu) -> Result | None:
        if not gpu.reading.values:
            return None
        return ok(gpu.card.name) if gpu.card else info(f"no profile has the name {gpu.name!r}")

    return _each(host, judge, "no GPU reports its name")


@check(
    "power-limit",
    "The power limit is the card's own",
    "raise the limit, if cooling and supply allow it",
    command="nvidia-smi -pl WATTS",
    option="hardware.pascaline.driver.powerLimitWatts = null;",
)
def _power_limit(host: Host) -> Result:
    """Compares the current limit with the card's default. A lower limit costs speed, and may be intended."""

    def judge(gpu: Gpu) -> Result | None:
        now, default = (
            gpu.number("nvmlDeviceGetEnforcedPowerLimit"),
            gpu.number("nvmlDeviceGetPowerManagementDefaultLimit"),
        )
        if now is None or default is None:
            return None
        words = f"{now / 1000:.0f} W of {default / 1000:.0f} W"
        return warning(words) if now < default else ok(words)

    return _each(host, judge, "no GPU reports a power limit")


@check(
    "throttling",
    "Clocks are not lowered because of heat or lack of power",
    "raise the air flow; if the power supply is the reason, check its cables and the board's power budget",
    command="nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER",
    option="hardware.pascaline.driver.powerLimitWatts = 60;",
)
def _throttling(host: Host) -> Result:
    """Reads why clocks are lowered now. A P4 under load normally is at its power cap (75 W); the rest is not normal."""

    def judge(gpu: Gpu) -> Result | None:
        reasons = gpu.number("nvmlDeviceGetCurrentClocksThrottleReasons")
        if reasons is None:
            return None
        found = [words for mask, words in SLOWDOWN_REASONS.items() if reasons & mask]
        if found:
            return failure(", ".join(found))
        return ok("at its power cap" if reasons & POWER_CAP else "clocks are not lowered")

    return _each(host, judge, "no GPU reports why clocks are lowered")


@check(
    "temperature",
    "The GPU is cool enough to keep its clocks",
    "raise the chassis fans, or clean the card; a lower power limit trades a little speed for a cooler card",
    command="ipmitool sdr type fan; nvidia-smi -pl 60",
    option="hardware.pascaline.driver.powerLimitWatts = 60;",
)
def _temperature(host: Host) -> Result:
    """Compares the core's temperature with 85 °C (the guide's limit), and with the thresholds of slowdown and shutdown
    if they are reported. At the shutdown threshold the card switches itself off, and is lost.
    """

    def judge(gpu: Gpu) -> Result | None:
        now, slowdown = gpu.number("nvmlDeviceGetTemperature 0"), gpu.number("nvmlDeviceGetTemperatureThreshold 1")
        shutdown = gpu.number("nvmlDeviceGetTemperatureThreshold 0")
        if now is None:
            return None
        if shutdown and now >= shutdown - NEAR_CELSIUS:
            return failure(f"{now} °C, the card switches itself off at {shutdown} °C")
        words = f"{now} °C" + (f", slows down at {slowdown} °C" if slowdown else "")
        return warning(words) if now > HOT_CELSIUS or (slowdown and now >= slowdown - NEAR_CELSIUS) else ok(words)

    return _each(host, judge, "no GPU reports its temperature")


@check(
    "cooling",
    "A card without a fan gets air from the chassis",
    "mount a fan or a duct that blows through the card, and let the chassis fans follow its temperature",
    command="ipmitool sdr type fan",
)
def _cooling(host: Host) -> Result:
    """P4, P40 and P100 have no fan. If one is warm at low use, no air moves: under load it soon throttles."""

    def judge(gpu: Gpu) -> Result | None:
        if gpu.number("nvmlDeviceGetFanSpeed") is not None:
            return ok("it has its own fan")
        now, utilization = gpu.number("nvmlDeviceGetTemperature 0"), gpu.number("nvmlDeviceGetUtilizationRates")
        if now is None or utilization is None:
            return None
        words = f"passive, {now} °C at {utilization} % utilisation"
        return warning(words) if now >= WARM_PASSIVE_CELSIUS and utilization < IDLE_RATIO * 100 else ok(words)

    return _each(host, judge, "no GPU reports fan, temperature and utilisation")


@check(
    "application-clocks",
    "Application clocks are the highest that the card has",
    "raise them; the power cap still applies, so a cool card gets faster and a hot one does not",
    command="nvidia-smi -ac MEMORY_MHZ,GRAPHICS_MHZ  # of nvidia-smi -q -d SUPPORTED_CLOCKS",
    option="hardware.pascaline.driver.applicationClocks = { memory = 3003; graphics = 1531; };",
)
def _application_clocks(host: Host) -> Result:
    """Compares the application clock with the maximum. A P4 starts at 1113 of 1531 MHz, which slows prefill."""

    def judge(gpu: Gpu) -> Result | None:
        now, most = gpu.number("nvmlDeviceGetApplicationsClock 0"), gpu.number("nvmlDeviceGetMaxClockInfo 0")
        if now is None or most is None:
            return None
        words = f"{now} MHz of {most} MHz"
        return info(words) if now < most else ok(words)

    return _each(host, judge, "no GPU has application clocks")


@check(
    "pcie-width",
    "The PCIe link has all its lanes",
    "reseat the card and riser, or use a slot with all lanes; a narrow link makes loading slow, not decoding",
    command="nvidia-smi --query-gpu=pcie.link.gen.current,pcie.link.width.current,pcie.link.width.max --format=csv",
)
def _pcie_width(host: Host) -> Result:
    """Compares the lanes in use with those of card and slot. The generation shows nothing: it drops when idle."""

    def judge(gpu: Gpu) -> Result | None:
        now, most = gpu.number("nvmlDeviceGetCurrPcieLinkWidth"), gpu.number("nvmlDeviceGetMaxPcieLinkWidth")
        if now is None or most is None:
            return None
        return warning(f"x{now} of x{most}") if now < most else ok(f"x{now}")

    return _each(host, judge, "no GPU reports its link width")


@check(
    "pcie-replays",
    "The PCIe link resends no packets",
    "reseat card and riser, clean the contacts, try another slot: replays often come before a card is lost",
    command="journalctl -k -g AER -n 20",
)
def _pcie_replays(host: Host) -> Result:
    """Reads how often the link resent a packet since the driver was loaded. A healthy link hardly ever does."""

    def judge(gpu: Gpu) -> Result | None:
        count = gpu.number("nvmlDeviceGetPcieReplayCounter")
        if count is None:
            return None
        return warning(f"{count} replays") if count > FEW_REPLAYS else ok(f"{count} replays")

    return _each(host, judge, "no GPU counts replays")


@check(
    "ecc-cost",
    "The cost of ECC is known and wanted",
    "switch ECC off only if a rare wrong token does no harm; it needs a reboot",
    command="nvidia-smi -e 0 && reboot",
)
def _ecc_cost(host: Host) -> Result:
    """With ECC on, GDDR5 (P4, P40) gives up a sixteenth of memory and bandwidth; the HBM2 of a P100 gives up none."""

    def judge(gpu: Gpu) -> Result | None:
        mode, memory = gpu.numbers("nvmlDeviceGetEccMode"), gpu.memory
        if not mode:
            return None
        if not mode[0]:
            return ok("ECC is off")
        if NATIVE_ECC in gpu.name:
            return ok("ECC is on and free (HBM2)")
        lost = f", about {format_bytes(memory[0] * ECC_SHARE / (1 - ECC_SHARE))}" if memory else ""
        return info(f"ECC is on: it takes 6 % of memory{lost}, and of bandwidth")

    return _each(host, judge, "no GPU has ECC")


@check(
    "ecc-errors",
    "No memory error stayed uncorrected",
    "drain the instance, then reset the GPU or reboot: this retires the page; replace a card that repeats the error",
    command="nvidia-smi -q -d ECC,PAGE_RETIREMENT",
)
def _ecc_errors(host: Host) -> Result:
    """Reads how many errors ECC could not correct since the driver was loaded. Answers after one may be wrong."""

    def judge(gpu: Gpu) -> Result | None:
        count = gpu.number("nvmlDeviceGetTotalEccErrors 1 0")
        if count is None:
            return None
        return failure(f"{count} uncorrected") if count else ok("none")

    return _each(host, judge, "no GPU counts memory errors")


@check(
    "retired-pages",
    "No bad page of memory waits to be retired",
    "drain the instance, then reset the GPU or reboot: until then the page is still in use",
    command="nvidia-smi -q -d PAGE_RETIREMENT",
)
def _retired_pages(host: Host) -> Result:
    """Reads whether a page is marked bad and still in use."""

    def judge(gpu: Gpu) -> Result | None:
        pending = gpu.number("nvmlDeviceGetRetiredPagesPendingStatus")
        if pending is None:
            return None
        count = sum(len(gpu.numbers(f"nvmlDeviceGetRetiredPages {cause}")) for cause in (0, 1))
        return warning(f"one is pending, {count} are retired") if pending else ok(f"{count} are retired")

    return _each(host, judge, "no GPU retires pages")


@check(
    "gpu-processes",
    "No other program holds memory of the GPU",
    "stop the other process, or give the instance its own card: the plan counts on the whole card",
    command="nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv",
    option="services.pascaline.instances.<name>.gpus = [ 1 ];",
)
def _gpu_processes(host: Host) -> Result:
    """Lists processes on the GPUs that are neither in a pascaline unit nor this instance's engine."""

    def judge(gpu: Gpu) -> Result | None:
        foreign = [process for process in gpu.processes if not _is_ours(process, host)]
        if foreign:
            pids = " ".join(str(process.pid) for process in foreign)
            remedy = Remedy("stop them, or give the instance its own card", f"ps -o pid,user,args -p {pids}")
            return warning(", ".join(map(_shown, foreign)), remedy)
        return ok(f"{len(gpu.processes)} process(es), all ours")

    return _each(host, judge, "no GPU lists its processes")


def _is_ours(process: GpuProcess, host: Host) -> bool:
    engine = host.instance.health.get("engine_pid") if host.instance.health else None
    return process.unit.startswith("pascaline-") or process.pid == engine


def _shown(process: GpuProcess) -> str:
    size = format_bytes(process.bytes) if process.bytes is not None else "unknown size"
    return f"{process.name or 'process'} {process.pid} ({size})"


@check(
    "display",
    "No desktop uses memory of the card",
    "run the display on another adapter, or boot without one",
    command="systemctl set-default multi-user.target && reboot",
)
def _display(host: Host) -> Result:
    """Looks for processes that draw on the card. A desktop holds hundreds of megabytes that a model could use."""

    def judge(gpu: Gpu) -> Result | None:
        value = gpu.reading.values.get("nvmlDeviceGetGraphicsRunningProcesses")
        if not isinstance(value, list):
            return None
        return info(f"{len(value)} graphics process(es)") if value else ok("none")

    return _each(host, judge, "no GPU lists graphics processes")


@check(
    "gpu-utilization",
    "Under load the GPU is busy",
    "raise the batch: on Pascal, eight or sixteen concurrent requests give several times the tokens for little delay",
    command="pascaline plan --max-running-requests 16",
    option="services.pascaline.instances.<name>.settings.max_running_requests = 16;",
)
def _gpu_utilization(host: Host) -> Result:
    """Compares utilisation with the engine's running and waiting requests. If requests wait while the GPU idles, then
    max_running_requests is too small, or something else slows the engine (CPU, throttling, debug variables)."""
    load = load_of(host.instance.engine_metrics)
    if load is None:
        return skipped("no running engine reports its requests")
    if not load.running + load.queued:
        return skipped("the engine is idle")

    def judge(gpu: Gpu) -> Result | None:
        utilization = gpu.number("nvmlDeviceGetUtilizationRates")
        if utilization is None:
            return None
        words = f"{utilization} % with {load.running:.0f} running and {load.queued:.0f} waiting requests"
        if utilization < IDLE_RATIO * 100:
            return warning(words)
        return info(words) if load.queued else ok(words)

    return _each(host, judge, "no GPU reports its utilisation")


@check(
    "xid-history",
    "The driver has logged no Xid that means broken hardware",
    "look up the Xid in docs/operations.md (GpuXidCritical, GpuXidWarning); replace a card that repeats one",
    command="journalctl -k -g Xid -n 20",
)
def _xid_history(host: Host) -> Result:
    """Searches this boot's kernel log for Xid events: critical ones (48, 62, 64, 74, 79, 95, 119, 120), and others,
    which are mostly one program's mistake."""
    if host.logs.kernel is None:
        return skipped("this user may not read the kernel's log; add it to the group systemd-journal")
    found = xids(host.logs.kernel)
    if not found:
        return ok("none since the boot")
    words = ", ".join(f"Xid {number} ({count} in all)" for number, count in sorted(found.items()))
    return Result(Verdict.FAILURE if found.keys() & CRITICAL_XIDS else Verdict.WARNING, words)
