"""Which addresses an allowed name may have."""

from __future__ import annotations

import ipaddress

import pytest

from cgpu_agent.egress.addresses import is_host, may_answer

GLOBAL = ["1.1.1.1", "8.8.8.8", "172.32.0.1", "172.15.255.255", "100.63.255.255", "192.167.1.1", "2606:4700::1111"]
GLOBAL += ["::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2a00::1"]
PRIVATE = ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "100.127.255.255", "fd12::1"]
PRIVATE += ["::ffff:10.0.0.1", "64:ff9b::10.0.0.1", "fc00::1"]
NEVER = ["127.0.0.1", "127.255.255.255", "169.254.169.254", "169.254.0.1", "0.0.0.0", "0.1.2.3", "224.0.0.1"]
NEVER += ["239.255.255.255", "240.0.0.1", "255.255.255.255", "192.0.0.192", "192.0.2.1", "198.18.0.1", "203.0.113.9"]
NEVER += ["168.63.129.16", "100.100.100.200", "::", "::1", "fe80::1", "ff02::1", "fec0::1", "::7f00:1", "100::1"]
NEVER += [
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0.0.0.0",
    "64:ff9b::7f00:1",
    "64:ff9b::169.254.169.254",
]
NEVER += [
    "2002:7f00:1::1",
    "2001:0:7f00:1::1",
    "2001:db8::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "64:ff9b:1::1",
    "4000::1",
]
NEVER += ["198.51.100.1", "192.88.99.1", "3fff::1"]
address = ipaddress.ip_address


@pytest.mark.parametrize("text", GLOBAL)
def test_names_may_have_global_addresses(text: str) -> None:
    assert may_answer(address(text), private=False)
    assert may_answer(address(text), private=True)


@pytest.mark.parametrize("text", PRIVATE)
def test_private_ones_only_where_the_entry_says_so(text: str) -> None:
    assert not may_answer(address(text), private=False)
    assert may_answer(address(text), private=True)


@pytest.mark.parametrize("text", NEVER)
def test_what_is_near_the_machine_never(text: str) -> None:
    assert not may_answer(address(text), private=False)
    assert not may_answer(address(text), private=True)


def test_an_address_with_a_zone_is_near() -> None:
    assert not may_answer(address("fe80::1%eth0"), private=True)


@pytest.mark.parametrize("text", ["127.0.0.1", "::1", "169.254.169.254", "10.0.0.1", "192.0.2.1", "8.8.8.8"])
def test_an_operator_may_list_any_host(text: str) -> None:
    assert is_host(address(text))


@pytest.mark.parametrize(
    "text", ["0.0.0.0", "255.255.255.255", "224.0.0.1", "::", "ff02::1", "::ffff:0.0.0.0", "64:ff9b::e000:1"]
)
def test_an_operator_may_not_list_what_is_no_host(text: str) -> None:
    assert not is_host(address(text))
