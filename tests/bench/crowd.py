"""A thousand connected callers, two hundred of them busy, and one that wishes everybody ill: does anybody notice?

Each sixteenth of the callers is another uid, as is the hostile one, and the daemon has the limits that it is shipped
with. The hostile one does all at once, for as long as it may: connects and sends garbage, connects and says nothing,
asks for much and reads nothing, sends metadata of a megabyte, calls as often as it can, and the same at the lease
socket. It takes the machine's time, too: how much of what is noticed comes from that shows when it attacks another
agent on the same machine instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
from ratios import Pair
from world import HEALTH, Daemon, Helper, RawTpm, proportional_memory, swtpm_with_boot

UIDS: Final = 16
CONNECTED: Final = 1000
BUSY: Final = 200
PAUSE: Final = 2.0
"""Seconds between two calls of a busy caller."""
_FIRST_UID: Final = 20_000
_SETTLE_SECONDS: Final = 30.0
_CALLS: Final = (HEALTH, "/cgpu.agent.v1.MeasuredBoot/ReadPcrs")
_EVENT_LOG: Final = ("/cgpu.agent.v1.MeasuredBoot/GetEventLog", b"\x08\x01")
_FLOOD_STREAMS: Final = 128


def crowd(folder: Path, *, rounds: int, seconds: float) -> tuple[list[Pair], str]:
    """p99 of the busy callers with the hostile one and without, and what is left of the daemon's means after; or why
    that cannot be measured."""
    if os.geteuid() != 0:
        return [], "needs root, to be many users"
    folder.mkdir()
    folder.chmod(0o755)
    folder.parent.chmod(0o755)
    with contextlib.ExitStack() as stack:
        daemon, other = (_daemon(stack, folder / name) for name in ("a", "b"))
        helpers = [Helper("crowd.py", "callers", daemon.api, str(_FIRST_UID + number)) for number in range(UIDS)]
        for helper in helpers:
            stack.callback(helper.stop)
        with ThreadPoolExecutor(UIDS) as pool:
            return _measure(daemon, other, helpers, pool, rounds, seconds), ""


def _daemon(stack: contextlib.ExitStack, home: Path) -> Daemon:
    home.mkdir(mode=0o755)
    tpm = swtpm_with_boot(home / "t")
    stack.callback(tpm.kill)
    RawTpm(tpm.data_socket).provision("ecc")
    daemon = Daemon(home, tpm.data_socket, connections_per_uid=64)
    stack.callback(daemon.stop)
    daemon.start()
    return daemon


def _measure(
    daemon: Daemon, other: Daemon, helpers: list[Helper], pool: ThreadPoolExecutor, rounds: int, seconds: float
) -> list[Pair]:
    def p99() -> float:
        shares = range(UIDS)
        tasks = [
            {
                "connected": CONNECTED // UIDS + (number < CONNECTED % UIDS),
                "busy": BUSY // UIDS + (number < BUSY % UIDS),
                "seconds": seconds,
            }
            for number in shares
        ]
        found = pool.map(lambda pair: pair[0].ask(pair[1]), zip(helpers, tasks, strict=True))
        times = sorted(value for part in found for value in part["times"])  # type: ignore[attr-defined]
        return float(times[int(len(times) * 0.99)])

    p99()  # connects
    _hostile(daemon, p99)  # what only the first time costs
    before = _means(daemon)
    alone, beside, elsewhere = [], [], []
    for _ in range(rounds):
        alone.append(p99())
        beside.append(_hostile(daemon, p99))
        elsewhere.append(_hostile(other, p99))
    end = time.monotonic() + _SETTLE_SECONDS
    while _means(daemon)[0] > before[0] and time.monotonic() < end:
        time.sleep(0.2)
    after = _means(daemon)
    title = f"{BUSY} busy of {CONNECTED} callers, p99"
    return [
        Pair.of(f"{title}, beside a hostile one", "without it", "s", beside, alone, "<= 2"),
        Pair.of("  the same, hostile to another agent", "without it", "s", elsewhere, alone),
        Pair.of("  descriptors afterwards", "before", "", [float(after[0])], [float(before[0])], "<= 1"),
        Pair.of("  memory afterwards (PSS)", "before", "B", [float(after[1])], [float(before[1])], "<= 1.1"),
    ]


def _means(daemon: Daemon) -> tuple[int, int]:
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir())), proportional_memory(daemon.pid)


def _hostile(daemon: Daemon, measure: Any) -> float:
    command = [sys.executable, __file__, "hostile", daemon.api, str(_FIRST_UID + UIDS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"at it\n"
        return float(measure())
    finally:
        process.kill()
        with process:
            process.wait()


# -- the callers' process


async def _callers(address: str) -> None:

    options = (("grpc.use_local_subchannel_pool", 1),)
    channels: list[grpc.aio.Channel] = []
    loop = asyncio.get_running_loop()

    async def busy(number: int, channel: grpc.aio.Channel, until: float) -> list[float]:
        calls = [channel.unary_unary(method) for method in _CALLS]
        found = []
        await asyncio.sleep(PAUSE * number / BUSY * UIDS)
        while time.monotonic() < until:
            begun = time.perf_counter()
            await calls[len(found) % len(calls)](b"", timeout=60)
            found.append(time.perf_counter() - begun)
            await asyncio.sleep(PAUSE)
        return found

    while line := await loop.run_in_executor(None, sys.stdin.readline):
        task = json.loads(line)
        while len(channels) < task["connected"]:
            channel = grpc.aio.insecure_channel(f"unix:{address}", options=options)
            await asyncio.wait_for(channel.channel_ready(), 60)
            channels.append(channel)
        until = time.monotonic() + task["seconds"]
        found = await asyncio.gather(*(busy(n, channels[n], until) for n in range(task["busy"])))
        print(json.dumps({"times": [value for part in found for value in part]}), flush=True)


# -- the hostile process


def _for_ever(work: Any) -> None:
    def run() -> None:
        while True:
            with contextlib.suppress(OSError, grpc.RpcError):
                work()

    threading.Thread(target=run, daemon=True).start()


def _raw(address: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(5)
    sock.connect(address)
    return sock


def _garbage(address: str) -> None:
    with _raw(address) as sock:
        sock.sendall(os.urandom(1 << 16))
        sock.recv(1 << 16)


def _half_frame(address: str) -> None:
    """A good beginning, and then a frame that never ends."""
    with _raw(address) as sock:
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000 00ffff01040000000155"))
        time.sleep(2.0)


def _silent(address: str) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(_raw(address))
        time.sleep(2.0)


def _slow_reader(address: str) -> None:
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 1))
    with grpc.insecure_channel(f"unix:{address}", options=options) as channel:
        calls = [channel.unary_unary(_EVENT_LOG[0]).future(_EVENT_LOG[1], timeout=3) for _ in range(32)]
        time.sleep(2.0)
        for call in calls:
            call.cancel()


def _metadata(address: str) -> None:
    with grpc.insecure_channel(f"unix:{address}", options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        channel.unary_unary(HEALTH)(b"", timeout=5, metadata=(("x", "y" * (1 << 20)),))


def _flood(address: str) -> None:
    slots = threading.Semaphore(_FLOOD_STREAMS)
    with grpc.insecure_channel(f"unix:{address}", options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        calls = [channel.unary_unary(method) for method in _CALLS]
        for number in range(10_000):
            slots.acquire()
            calls[number % len(calls)].future(b"", timeout=60).add_done_callback(lambda _: slots.release())


def _lease_garbage(address: str) -> None:
    with _raw(str(Path(address).with_name("lease.sock")), socket.SOCK_SEQPACKET) as sock:
        sock.send(os.urandom(100))
        sock.recv(512)


def _attack(address: str) -> None:
    for work in (_garbage, _half_frame, _silent, _slow_reader, _metadata, _flood, _flood, _lease_garbage):
        _for_ever(lambda work=work: work(address))
    time.sleep(0.5)
    print("at it", flush=True)
    threading.Event().wait()


def main(role: str, address: str, uid: str) -> None:
    os.setgroups([])
    os.setgid(int(uid))
    os.setuid(int(uid))
    if role == "hostile":
        _attack(address)

    asyncio.run(_callers(address))


if __name__ == "__main__":
    main(*sys.argv[1:])
