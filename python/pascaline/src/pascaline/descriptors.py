"""Limits of a server: how many files it may open, and how many of those may be connections."""

from __future__ import annotations

import resource

MOST_CONNECTIONS = 64
"""More than probes, scrapers and people need at once."""
LEAST_CONNECTIONS = 4
RESERVED_DESCRIPTORS = 64
"""Kept for the engine's pipes, requests to the engine, files and libraries."""
WANTED_DESCRIPTORS = 4096
QUIET_SECONDS = 10.0
"""Time after which a connection is closed, from its opening or last answer. Bytes that arrive do not extend it."""


def raise_descriptor_limit(wanted: int = WANTED_DESCRIPTORS) -> int:
    """Raise the soft limit of open files to `wanted`, as far as allowed. Return it; the engine inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if raised > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return max(soft, raised)


def connection_limit(descriptors: int) -> int:
    """Return how many connections may be open if the process may have this number of file descriptors.

    Half of the unreserved ones: the server may accept the same number again before it counts the first of them.
    """
    return max(LEAST_CONNECTIONS, min(MOST_CONNECTIONS, (descriptors - RESERVED_DESCRIPTORS) // 2))
