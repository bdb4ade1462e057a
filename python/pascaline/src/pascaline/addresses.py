"""Addresses that only this host can reach."""

from __future__ import annotations

import ipaddress

OWN_NAMES = frozenset({"localhost", "ip6-localhost"})


def is_loopback(host: str) -> bool:
    """Whether only this host can reach an address, or the address of a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() in OWN_NAMES
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
