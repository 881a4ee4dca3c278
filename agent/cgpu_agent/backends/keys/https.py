"""What a broker's client needs of HTTP, and no more; who gives it the network is decided elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Https(Protocol):
    """HTTPS to a server that the CAs pinned for it certify. Knows no redirects, cookies, proxies or credentials.

    A broker's answer may be worth no more than this: nothing else says from whom a secret comes.
    """

    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes, timeout: float, limit: int
    ) -> tuple[int, Mapping[str, str], bytes]:
        """The answer, of any status: status, headers (names in lower case, of several the last), body.

        Args:
            url: whole, ``https`` only.
            timeout: seconds for all of it.
            limit: bytes of the answer's body, at most.

        Raises:
            HostileInput: an answer that is no HTTP, or larger than ``limit``.
            AgentError: no answer came.
        """
