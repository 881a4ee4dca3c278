"""Which addresses a name may have. Whoever answers for a name must not lead the agent to what is near this machine.

The tables are our own, by the IANA special-purpose registries (RFC 6890), because those of ``ipaddress`` differ
between versions of Python. To them come the addresses at which clouds serve a VM's credentials.
"""

from __future__ import annotations

import ipaddress
from typing import Final

from cgpu_agent.wire.egress import Address

_NO_HOST: Final = tuple(map(ipaddress.ip_network, ("0.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4", "::/128", "ff00::/8")))
"""Unspecified, multicast, reserved and broadcast: never one host elsewhere."""

_NEAR: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            "127.0.0.0/8",
            "169.254.0.0/16",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "100.100.100.200/32",  # Alibaba Cloud's metadata
            "168.63.129.16/32",  # Azure's host agent
            "2001::/23",
            "2001:db8::/32",
            "2002::/16",
            "3fff::/20",
            "fd00:ec2::/32",  # metadata of EC2
            "fd20:ce::/32",  # metadata of Google Cloud
        ),
    )
)
_PRIVATE: Final = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"))
)
_GLOBAL_IPV6: Final = ipaddress.ip_network("2000::/3")
_WITH_IPV4: Final = tuple(map(ipaddress.ip_network, ("::ffff:0:0/96", "64:ff9b::/96")))
"""IPv4 in the last four bytes: mapped (RFC 4291), and behind a NAT64 (RFC 6052)."""


def is_host(address: Address) -> bool:
    """Whether this can be the address of one host, so that an operator may list it as it is."""
    return not _in(address, _NO_HOST) and not _in(_plain(address), _NO_HOST)


def may_answer(address: Address, *, private: bool) -> bool:
    """Whether a name may have this address. ``private``: its entry allows private networks."""
    address = _plain(address)
    if _in(address, _NO_HOST + _NEAR):
        return False
    if _in(address, _PRIVATE):
        return private
    return address.version == 4 or address in _GLOBAL_IPV6


def _plain(address: Address) -> Address:
    if _in(address, _WITH_IPV4):
        return ipaddress.IPv4Address(address.packed[-4:])
    return address


def _in(address: Address, networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]) -> bool:
    return any(address in network for network in networks)
