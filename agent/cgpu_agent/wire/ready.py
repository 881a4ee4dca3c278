"""What the agent and ``cgpu-ready``, the root helper for the GPUs' ready state, say to each other.

A connection (SOCK_SEQPACKET) carries one request and one answer, each a message of its own. After ``set`` it stays
open and silent: it is the lease, and the ready state ends with it.
"""

from __future__ import annotations

import re
from typing import Final

from cgpu_agent.errors import HostileInput

SOCKET: Final = "/run/cgpu-agent/ready.sock"
SET: Final = b"set"
CLEAR: Final = b"clear"
REFUSED: Final = b"refused"
MAX_MESSAGE: Final = 16
"""Longer than every good message, so that one that was cut to this size is none."""

_DONE = re.compile(rb"nvml (0|[1-9][0-9]{0,2})")


def encode_answer(code: int) -> bytes:
    """The answer to a request that was carried out; ``code`` is NVML's, 0-999."""
    return b"nvml %d" % code


def parse_answer(data: bytes) -> int | None:
    """NVML's code, or ``None``: the helper refused. Raises ``HostileInput`` (``BAD_READY_ANSWER``)."""
    if data == REFUSED:
        return None
    match = _DONE.fullmatch(data)
    if match is None:
        raise HostileInput("BAD_READY_ANSWER", "not an answer of the helper for the GPUs' ready state")
    return int(match[1])
