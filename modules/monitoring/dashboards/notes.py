"""What each panel shows, and which section of docs/operations.md says what to do about it."""

from __future__ import annotations

from typing import NamedTuple

RUNBOOK = "https://github.com/pascaline/pascaline/blob/main/docs/operations.md"


class Note(NamedTuple):
    """About one panel."""

    text: str
    section: str
    """Heading of docs/operations.md, as its anchor."""


NOTES: dict[str, dict[str, Note]] = {
    "fleet": {
        "Hosts that answer": Note("Hosts with at least one scrape job that answers.", "fleethostmissing"),
        "GPUs": Note("GPUs that the driver reaches; a lost one does not count.", "gpulost"),
        "Instances ready": Note("Instances whose last test generation succeeded, busy ones too.", "enginenotready"),
        "Alerts firing": Note("Alerts that fire now, of every severity.", "look-first"),
        "Generated tokens": Note("Tokens generated a second, mean of five minutes, by host.", "slowdecode"),
        "Requests": Note("Requests that run, and those that wait in the engines, by host.", "queuegrowing"),
        "GPU memory in use": Note("Share of the memory of a host's GPUs that processes hold.", "highvramusage"),
        "Hottest GPU": Note("Temperature of each host's hottest core; an alert fires from 85 °C on.", "highgputemp"),
        "Power": Note("Power of all GPUs of a host, mean of five minutes.", "gputhrottled"),
        "Tokens per joule": Note("Generated tokens by the energy that the GPUs used.", "gputhrottled"),
        "Cost of a million tokens": Note(
            "GPU hours by generated tokens, at the price in recording.yaml, in its currency.", "scrape-jobs"
        ),
        "Instances and their state": Note("Each instance and the state that its agent reports now.", "enginenotready"),
        "Alerts": Note("Each alert that fires now, with its labels.", "look-first"),
    },
    "host": {
        "GPUs": Note("Each GPU: name, driver, bus address, VBIOS and compute capability.", "gpumissing"),
        "Utilisation": Note(
            "Share of the last sample period in which any kernel ran; it does not say how full the GPU was.",
            "silentcpufallback",
        ),
        "Memory bus": Note("Share of the last sample period in which memory was read or written.", "slowdecode"),
        "Memory against its budget": Note(
            "Memory in use, what the plans of the instances allow, and what the card has.", "highvramusage"
        ),
        "Memory by process": Note("Memory that each process holds, stacked, with its systemd unit.", "highvramusage"),
        "Temperature": Note("Temperature of the core, and where the card lowers its clocks.", "gputempnearslowdown"),
        "Power": Note("Power that the card draws, and its enforced limit.", "gputhrottled"),
        "Clocks": Note("Clocks of the multiprocessors and of the memory now.", "gputhrottled"),
        "Throttling": Note("What lowers the clocks, except idleness: blue while it does.", "gputhrottled"),
        "PCIe traffic": Note("Bytes a second over the link, by direction.", "pciereplays"),
        "PCIe replays a minute": Note("Packets sent again; a healthy link has none.", "pciereplays"),
        "Uncorrected memory errors and retired pages": Note(
            "Errors that ECC could not correct, and pages of memory taken out of use, by cause.", "eccuncorrectable"
        ),
        "Xid errors": Note("Errors that the driver logged, by number.", "gpuxidcritical"),
        "Alerts": Note("Each alert of the chosen hosts that fires now.", "look-first"),
    },
    "instance": {
        "Ready": Note("How many of the chosen instances take requests.", "enginenotready"),
        "Tokens/s": Note("Tokens generated a second, mean of five minutes.", "slowdecode"),
        "Queued": Note("Requests that wait in the engine. Red from 10 on.", "queuegrowing"),
        "Restarts": Note("Restarts of the engine since the instance was started.", "enginerestarting"),
        "State": Note("The state that the agent reports: blue while it holds.", "enginenotready"),
        "Time to first token": Note(
            "How many requests waited how long for their first token. Test generations count too.", "slowfirsttoken"
        ),
        "Inter-token latency": Note("How many gaps between two tokens of a request were how long.", "slowdecode"),
        "Tokens": Note("Generated tokens and prompt tokens a second, mean of five minutes.", "slowdecode"),
        "Requests": Note(
            "Requests that run, those that wait, and those that the engine took back for lack of KV cache.",
            "queuegrowing",
        ),
        "KV cache": Note(
            "Share of the KV cache in use, and of prompt tokens that were found in it.", "kvcachesaturated"
        ),
        "Plan against actual": Note(
            "Memory that the instance holds, what its plan gives, and where the alert begins.", "planexceeded"
        ),
        "Weights, planned and allocated": Note(
            "Memory of the weights: the plan's figure, and the engine's own.", "planexceeded"
        ),
        "KV cache size, planned and allocated": Note(
            "Tokens of the KV cache: the plan's figure, and the engine's own.", "planexceeded"
        ),
        "GPU utilisation": Note("Utilisation of the GPUs on which the instance holds memory.", "silentcpufallback"),
        "GPU power": Note("Power of the GPUs on which the instance holds memory.", "gputhrottled"),
        "Latency against its own week": Note(
            "Latency of the last ten minutes beside the usual one of the last week.", "slowfirsttoken"
        ),
        "Alerts": Note("Each alert of the chosen instances that fires now.", "look-first"),
    },
}
"""Dashboard -> title of a panel -> its note."""
