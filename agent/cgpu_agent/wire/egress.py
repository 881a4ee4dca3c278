"""What the agent and ``cgpu-egress``, its way out, say to each other: one ``CONNECT`` (RFC 9110, 9.3.6), one answer.

The request has one form, that of ``encode_request``, and nothing else is taken for one: no other header, spelling or
line end, so no two readers can disagree about it. A destination has one spelling, too.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from cgpu_agent.errors import HostileInput

SOCKET: Final = "/run/cgpu-agent/egress.sock"
MAX_HEAD: Final = 1024
"""Longer than every good request and answer."""
HEAD_END: Final = b"\r\n\r\n"

CONNECTED: Final = "CONNECTED"
STATUS: Final = {
    CONNECTED: 200,
    "BAD_REQUEST": 400,
    "REQUEST_TOO_SLOW": 400,
    "NOT_THE_AGENT": 403,
    "NOT_ALLOWED": 403,
    "ADDRESS_NOT_ALLOWED": 403,
    "NO_ADDRESS": 502,
    "UNREACHABLE": 502,
    "BUSY": 503,
    "CONNECT_TIMEOUT": 504,
}
"""Every reason that an answer can hold, with its status."""

_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_AUTHORITY: Final = re.compile(r"(?:\[([0-9a-f:]{2,39})\]|([a-z0-9.-]{1,253})):([1-9][0-9]{0,4})")
_REQUEST: Final = re.compile(r"CONNECT (\S{1,300}) HTTP/1\.1\r\n")
_ANSWER: Final = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ([A-Z_]{1,32})\r\n\r\n")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Destination:
    """A place in the world. ``host``: a name in lower case, or an address in its canonical form, without brackets."""

    host: str
    port: int

    @property
    def address(self) -> Address | None:
        """The address, where ``host`` is one."""
        return _address(self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_destination(text: str) -> Destination:
    """``name:port``, ``192.0.2.1:port`` or ``[2001:db8::1]:port``.

    Names that are not plain lower-case host names are refused, as are those of IDNA (``xn--``) and all that
    getaddrinfo(3) would take for an address: "127.1", "0x7f000001".

    Raises ``HostileInput`` (``BAD_DESTINATION``).
    """
    match = _AUTHORITY.fullmatch(text)
    if match is not None and int(match[3]) <= 0xFFFF:
        host = match[1] or match[2]
        address = _address(host)
        if _is_name(host) if address is None else _is_canonical(address, match):
            return Destination(host, int(match[3]))
    raise HostileInput("BAD_DESTINATION", "a destination is a lower-case host name or an address, a colon and a port")


def _is_canonical(address: Address, match: re.Match[str]) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        return match[2] == str(address)
    # An IPv4 address in IPv6's clothes would be a second spelling, and its form depends on the version of Python.
    return match[1] == str(address) and address.ipv4_mapped is None


def _is_name(host: str) -> bool:
    labels = host.split(".")
    if any(_LABEL.fullmatch(label) is None or label.startswith("xn--") for label in labels):
        return False
    return re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]) is None


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def encode_request(destination: Destination) -> bytes:
    return f"CONNECT {destination} HTTP/1.1\r\nHost: {destination}\r\n\r\n".encode("ascii")


def parse_request(head: bytes) -> Destination:
    """The destination of a whole request. Raises ``HostileInput`` (``BAD_REQUEST``)."""
    try:
        match = _REQUEST.match(head.decode("ascii"))
        destination = parse_destination(match[1]) if match else None
    except (UnicodeDecodeError, HostileInput):
        destination = None
    if destination is None or encode_request(destination) != head:
        raise HostileInput("BAD_REQUEST", "not the one form of a request that there is")
    return destination


def encode_answer(reason: str) -> bytes:
    """The answer for one of ``STATUS``; the connection is a tunnel after it, or ends."""
    return f"HTTP/1.1 {STATUS[reason]} {reason}\r\n\r\n".encode("ascii")


def parse_answer(head: bytes) -> str:
    """The reason in a whole answer. Raises ``HostileInput`` (``BAD_EGRESS_ANSWER``)."""
    match = _ANSWER.fullmatch(head)
    reason = match[2].decode("ascii") if match else ""
    if match is None or STATUS.get(reason) != int(match[1]):
        raise HostileInput("BAD_EGRESS_ANSWER", "not an answer of cgpu-egress")
    return reason
