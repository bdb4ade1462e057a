"""Open files of a server: how many it may have, and how many of them connections may take."""

from __future__ import annotations

import resource

MOST_CONNECTIONS = 64
"""More than probes, scrapers and people need at once."""
LEAST_CONNECTIONS = 4
RESERVED_DESCRIPTORS = 64
"""For the engine's pipes, the questions that it is asked, files and libraries."""
WANTED_DESCRIPTORS = 4096
QUIET_SECONDS = 10.0
"""From its opening or last answer to the end of a connection, whatever trickles in meanwhile."""


def raise_descriptor_limit(wanted: int = WANTED_DESCRIPTORS) -> int:
    """Raise the soft limit of open files as far as allowed and wanted; return what holds. The engine inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if raised > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return max(soft, raised)


def connection_limit(descriptors: int) -> int:
    """Return how many connections may be open of so many descriptors.

    Half of what is not reserved: as many again may be accepted in one go, before the first of them is counted.
    """
    return max(LEAST_CONNECTIONS, min(MOST_CONNECTIONS, (descriptors - RESERVED_DESCRIPTORS) // 2))
