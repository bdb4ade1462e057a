"""Checks of the instance: its settings, its plan, and what it reports."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

from pascaline.doctor.verdicts import Checks, Remedy, Result, failure, info, ok, skipped, warning
from pascaline.engines.load import load_of
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from pascaline.doctor.host import Host

CHECKS = Checks("Instance")
check = CHECKS.check

GOOD_STATES = frozenset({"ready", "busy"})
PASSING_STATES = frozenset({"planned", "starting", "draining"})
MANY_RESTARTS = 3
RECURRENT = re.compile(r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|Not enough memory")
FALLBACK_RATIO = 0.5
"""If less of the planned weights than this is on the GPU, the engine runs on the CPU: the alert's rule."""
_NO_SETTINGS = "the settings could not be read; see configuration"


@check(
    "configuration",
    "The settings are valid",
    "correct each key that the evidence names",
    command="pascaline config check FILE",
    option="services.pascaline.instances.<name>.settings = { };",
)
def _configuration(host: Host) -> Result:
    """Reads the instance's settings from file, variables and flags, as serve does."""
    instance = host.instance
    if instance.configuration_error:
        return failure(instance.configuration_error.replace("\n", "; "))
    if instance.configuration is None:
        return skipped("only the agent's URL is known")
    if instance.others:
        return info(
            f"this host has several instances ({', '.join(instance.others)}); the defaults were checked instead",
            Remedy("name one of them", f"pascaline doctor --instance {instance.others[0]}"),
        )
    return ok(
        f"{instance.configuration.origins.chosen} settings chosen, card profile {instance.configuration.card or 'none'}"
    )


@check(
    "plan-memory",
    "The plan fits the card's free memory",
    "choose settings that fit; the planner names the nearest ones",
    command="pascaline plan --optimize",
    option="services.pascaline.instances.<name>.settings.context_length = 4096;",
)
def _plan_memory(host: Host) -> Result:
    """Plans the instance's model on this card and compares the total with the memory that other processes leave."""
    if host.plan_refusal:
        return failure(host.plan_refusal)
    if host.plan is None:
        return skipped(host.plan_error or "the model cannot be read; see model-format")
    plan = host.plan
    words = (
        f"{format_bytes(plan.total_bytes)} planned of {format_bytes(plan.request.available_bytes)} free "
        f"({plan.card}, {plan.context_length} tokens of context, {plan.kv_tokens} in the KV pool)"
    )
    return ok(words) if plan.fits else failure(f"{words}: {'; '.join(plan.reasons)}")


@check(
    "plan-headroom",
    "The plan leaves the card some room",
    "lower context_length, max_running_requests or kv_cache.max_tokens a little",
    command="pascaline plan --optimize",
    option="services.pascaline.instances.<name>.settings.max_running_requests = 4;",
)
def _plan_headroom(host: Host) -> Result:
    """Compares the plan with measured deviations: with less than 3 % of the card or 150 MiB free, a long prompt can
    fail."""
    if host.plan is None or not host.plan.fits:
        return skipped("no plan fits; see plan-memory")
    least = max(0.03 * host.plan.card_bytes, 150 * 2**20)
    words = f"{format_bytes(host.plan.headroom_bytes)} stay free"
    return info(words) if host.plan.headroom_bytes < least else ok(words)


@check(
    "instance-state",
    "The instance answers requests",
    "follow the reason in the evidence (docs/operations.md, EngineDown)",
    command="systemctl status pascaline-<name>.service; journalctl -u pascaline-<name>.service -n 100",
)
def _instance_state(host: Host) -> Result:
    """Asks the agent for its state, which follows the engine's progress, not its open port."""
    instance = host.instance
    if instance.health is None:
        if instance.unit.get("ActiveState") == "failed":
            return failure(f"the unit of {instance.name} has failed, and its agent does not answer")
        if instance.configuration_error:
            return skipped("its agent's address is not known; see configuration")
        if instance.unit.get("ActiveState") in ("active", "activating"):
            return failure(f"the unit of {instance.name} is {instance.unit['ActiveState']}; its agent does not answer")
        if instance.name.startswith(("http://", "https://")):
            return failure(f"no agent answers at {instance.name}")
        return skipped("no instance runs here")
    words = f"{instance.state}: {instance.health.get('reason', '')}"
    if instance.state in GOOD_STATES:
        return ok(words)
    return info(words) if instance.state in PASSING_STATES else failure(words)


@check(
    "instance-restarts",
    "The engine does not restart again and again",
    "read the lines before each end: they name the cause",
    command="journalctl -u pascaline-<name>.service -g 'restart|error|exit' -n 50",
)
def _instance_restarts(host: Host) -> Result:
    """Counts restarts of the engine by its agent, and of the unit by systemd."""
    if host.instance.health is None and not host.instance.unit:
        return skipped("no instance runs here")
    engine = int((host.instance.health or {}).get("restarts", 0))
    unit = int(host.instance.unit.get("NRestarts", "0") or 0)
    words = f"{engine} of the engine, {unit} of the unit"
    return warning(words) if engine + unit >= MANY_RESTARTS else ok(words)


@check(
    "cpu-fallback",
    "The engine runs on the GPU that it was planned for",
    "repair what hides the GPU (driver, CUDA_VISIBLE_DEVICES, the unit's device rules), then restart the instance",
    command="nvidia-smi; journalctl -u pascaline-<name>.service -g device -n 20",
    option="services.pascaline.instances.<name>.gpus = [ 0 ];",
)
def _cpu_fallback(host: Host) -> Result:
    """Compares the GPU memory that the instance's processes hold with the weights in its plan."""
    plan = host.instance.plan
    if not plan or plan.get("device") != "cuda" or host.instance.state not in GOOD_STATES:
        return skipped("no instance with a plan for a GPU runs here")
    if not any(gpu.reading.values for gpu in host.gpus):
        return skipped("no GPU lists its processes; see nvml and gpu-lost")
    weights = plan.get("weights_bytes", 0)
    unit = f"pascaline-{host.instance.name}.service"
    pid = host.instance.health.get("engine_pid") if host.instance.health else None
    held = sum(p.bytes or 0 for gpu in host.gpus for p in gpu.processes if p.unit == unit or p.pid == pid)
    words = f"{format_bytes(held)} on the GPU, the plan's weights are {format_bytes(weights)}"
    return failure(words) if held < FALLBACK_RATIO * weights else ok(words)


@check(
    "gpu-oom-history",
    "The engine did not run out of GPU memory",
    "lower max_running_requests, context_length or kv_cache.max_tokens",
    command="pascaline plan --optimize",
    option="services.pascaline.instances.<name>.settings.context_length = 4096;",
)
def _gpu_oom_history(host: Host) -> Result:
    """Searches the instance's last thousand lines for the messages of CUDA and SGLang about it."""
    if host.logs.unit is None:
        return skipped("no instance was named, or this user may not read its journal")
    found = [line for line in host.logs.unit if RECURRENT.search(line)]
    return failure(f"{len(found)} line(s), the last: {found[-1].strip()}") if found else ok("no such line")


@check(
    "queue",
    "Requests do not pile up",
    "add an instance behind the router, set max_queued_requests, or raise max_running_requests if the KV pool has room",
    command="pascaline plan --max-running-requests 8",
    option="services.pascaline.instances.<name>.settings.max_running_requests = 8;",
)
def _queue(host: Host) -> Result:
    """Reads the number of waiting requests and the used share of the KV pool."""
    load = load_of(host.instance.engine_metrics)
    if load is None:
        return skipped("no running engine reports its requests")
    words = f"{load.running:.0f} running, {load.queued:.0f} waiting, KV pool {load.kv_usage:.0%} used"
    return warning(words) if load.queued > max(load.running, 1) else ok(words)


@check(
    "api-exposure",
    "An API that other hosts can reach asks for a key",
    "set an API key, or listen on loopback only",
    command="pascaline config show --api-key-file FILE",
    option='services.pascaline.instances.<name>.apiKeyFile = "/run/secrets/api-key";',
)
def _api_exposure(host: Host) -> Result:
    """Checks whether the engine listens beyond loopback without an API key."""
    settings = host.settings
    if settings is None:
        return skipped(_NO_SETTINGS)
    if _is_loopback(settings.host):
        return ok(f"the API listens on {settings.host}")
    if settings.api_key_file is None:
        return warning(f"the API listens on {settings.host} without a key")
    return ok(f"the API listens on {settings.host} and asks for a key")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@check(
    "kv-pool",
    "The KV pool holds at least one whole request",
    "remove the limit: the guide's 64 MiB hold 128 tokens of a 7B model with 32 KV heads",
    command="pascaline plan",
    option="services.pascaline.instances.<name>.settings.kv_cache = { };",
)
def _kv_pool(host: Host) -> Result:
    """Compares the pool's tokens with context_length: a smaller pool accepts requests that then fail midway."""
    if host.plan is None:
        return skipped(host.plan_error or "there is no plan; see plan-memory")
    plan = host.plan
    words = f"{plan.kv_tokens} tokens of {format_bytes(plan.kv_bytes_per_token)}, one request has {plan.context_length}"
    return failure(words) if plan.kv_tokens < plan.context_length else ok(words)
