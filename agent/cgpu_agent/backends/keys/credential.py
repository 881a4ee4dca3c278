"""Keys that systemd hands over with the unit: ``LoadCredentialEncrypted=``, sealed to the vTPM by ``systemd-creds``.

The simplest broker there is: systemd unseals at the agent's start, by the PCRs that the credential was bound to, and
the agent's policy decides from then on. A key can be exchanged by a restart only.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Final

from cgpu_agent.backends.base import MAX_SECRET, Attester, BrokerKind, ReleasedKey
from cgpu_agent.errors import Unavailable

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class CredentialKeys:
    """``KeyBroker`` over ``$CREDENTIALS_DIRECTORY``.

    Args:
        folder: the directory; ``None`` where systemd handed over none.
    """

    kind: BrokerKind = "credential"
    sees_gpus = False

    def __init__(self, folder: Path | None) -> None:
        self._folder: Final = folder

    async def release(self, path: str, attester: Attester, *, timeout: float) -> ReleasedKey:  # noqa: ARG002
        return ReleasedKey(await asyncio.to_thread(self._read, path), 0)

    def _read(self, name: str) -> bytes:
        if self._folder is None or not _NAME.fullmatch(name):
            raise _absent()
        try:
            with (self._folder / name).open("rb") as file:
                secret = file.read(MAX_SECRET + 1)
        except OSError as error:
            raise _absent() from error
        if not 1 <= len(secret) <= MAX_SECRET:
            raise Unavailable("BROKER_ANSWER", f"the credential does not have 1 to {MAX_SECRET} bytes")
        return secret

    def close(self) -> None:
        """Holds nothing."""


def _absent() -> Unavailable:
    return Unavailable("KEY_ABSENT", "systemd handed over no such credential")
