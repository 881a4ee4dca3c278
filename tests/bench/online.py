"""What callers see of the running daemon: the price of the front door, of a quote, and of evidence for many."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ratios import Pair, per_second, seconds_each
from world import AK_HANDLE, HEALTH, Daemon, Helper, RawTpm, quote_and_read, swtpm_with_boot

from cgpu_agent.api.v1 import evidence_pb2, measured_boot_pb2
from cgpu_agent.backends.base import AkAlgorithm
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.client import Agent

T = TypeVar("T")

NONCE = bytes(range(32))
AUDIENCE = "bench"
GET_QUOTE = "/cgpu.agent.v1.MeasuredBoot/GetQuote"
GET_EVIDENCE = "/cgpu.agent.v1.Evidence/GetEvidence"
SLOW_QUOTE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Machine:
    """A TPM whose platform AK has one algorithm, the daemon that owns it, and the TPM's socket.

    ``program`` is ``tpm2_quote`` on that TPM, where it can be run.
    """

    socket_path: Path
    daemon: Daemon
    program: Callable[[], object] | None


@dataclass(frozen=True, slots=True)
class World:
    """Everything that runs while callers call."""

    machines: dict[str, Machine]
    caller: Helper
    bare: Helper
    bare_address: str
    door_address: str

    def p50(self, address: str, method: str, request: bytes, callers: int, calls: int) -> float:
        return self.ask(address, method, request, callers, calls)["p50"]

    def rate(self, address: str, method: str, request: bytes, callers: int, calls: int) -> float:
        return self.ask(address, method, request, callers, calls)["rate"]

    def ask(self, address: str, method: str, request: bytes, callers: int, calls: int) -> dict[str, float]:
        """``p50`` and ``p99`` in seconds, ``rate`` a second."""
        task = {"address": address, "method": method, "request": request.hex(), "callers": callers, "calls": calls}
        return self.caller.ask(task)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[World]:
    """Start everything; ``folder`` must have a short path."""
    with contextlib.ExitStack() as stack:
        machines = {
            "RSA": _machine(stack, folder / "r", "rsa", 0),
            "ECC": _machine(stack, folder / "e", "ecc", 0),
            "slow ECC": _machine(stack, folder / "s", "ecc", SLOW_QUOTE_SECONDS),
        }
        addresses = str(folder / "bare"), str(folder / "door")
        bare = _helper(stack, "bare.py", addresses[0])
        _helper(stack, "bare.py", addresses[1], "door")
        caller = Helper("caller.py")
        stack.callback(caller.stop)
        yield World(machines, caller, bare, *addresses)


def _helper(stack: contextlib.ExitStack, *command: str) -> Helper:
    helper = Helper(*command)
    stack.callback(helper.stop)
    helper.says()
    return helper


def _machine(stack: contextlib.ExitStack, home: Path, algorithm: AkAlgorithm, quote_delay: float) -> Machine:
    home.mkdir(mode=0o700)
    tpm = swtpm_with_boot(home / "t")
    stack.callback(tpm.kill)
    RawTpm(tpm.data_socket).provision(algorithm)
    socket_path, program = tpm.data_socket, _tpm2_quote(tpm)
    if quote_delay:
        socket_path, program = home / "slow", None
        _helper(stack, "slow_tpm.py", str(socket_path), str(tpm.data_socket), str(quote_delay))
    daemon = Daemon(home, socket_path)
    stack.callback(daemon.stop)
    daemon.start()
    return Machine(socket_path, daemon, program)


def in_turns(rounds: int, measures: dict[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Run every measure once a round, each round beginning with another one; the first round warms up."""
    names = list(measures)
    found: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            value = measures[name]()
            if turn:
                found[name].append(value)
    return found


def front_door(world: World, *, rounds: int, calls: int) -> list[Pair]:
    """The same handler (grpc.health) through the whole daemon, behind a door alone, and bare."""
    daemon = world.machines["ECC"].daemon.api
    pairs = []
    for callers in (1, 16, 64):
        each = max(calls // callers, 4)

        def measure(address: str, callers: int = callers, each: int = each) -> Callable[[], float]:
            return lambda: world.p50(address, HEALTH, b"", callers, each)

        found = in_turns(
            rounds,
            {"daemon": measure(daemon), "door": measure(world.door_address), "bare": measure(world.bare_address)},
        )
        title = f"{callers} caller{'s' if callers > 1 else ''}"
        goal = "<= 1.3" if callers == 1 else ""
        bare = "bare grpc.aio server"
        pairs.append(Pair.of(f"door and gate, {title}, p50", bare, "s", found["daemon"], found["bare"], goal))
        pairs.append(Pair.of(f"  of that, the door, {title}, p50", bare, "s", found["door"], found["bare"]))
    return pairs


def quotes(world: World, *, rounds: int, calls: int) -> list[Pair]:
    """GetQuote beside the TPM command that it is made of, and beside the program people use."""
    return [pair for name in world.machines for pair in _quotes_of(world, name, rounds, calls)]


def _quotes_of(world: World, name: str, rounds: int, calls: int) -> list[Pair]:
    machine = world.machines[name]
    request = measured_boot_pb2.GetQuoteRequest(nonce=NONCE).SerializeToString()
    raw = RawTpm(machine.socket_path)
    commands = raw.commands()
    measures: dict[str, Callable[[], float]] = {
        "GetQuote": lambda: world.p50(machine.daemon.api, GET_QUOTE, request, 1, calls),
        "rpc": lambda: world.p50(world.bare_address, HEALTH, b"", 1, 8 * calls),
        "command": lambda: seconds_each(raw.quote, calls),
        "and read": lambda: seconds_each(lambda: quote_and_read(commands), calls),
    }
    program = machine.program
    if program is not None:
        measures["program"] = lambda: seconds_each(program, 1)
    found = in_turns(rounds, measures)
    commands.close()
    without = [quote - rpc for quote, rpc in zip(found["GetQuote"], found["rpc"], strict=True)]
    command, both = "TPM2_Quote, raw command", "TPM2_Quote and PCR_Read, in process"
    goal = "<= 1.3"
    pairs = [
        Pair.of(f"{name}: a bare RPC", command, "s", found["rpc"], found["command"]),
        Pair.of(f"{name}: GetQuote less that RPC, p50", command, "s", without, found["command"], goal),
        Pair.of(f"{name}: GetQuote less that RPC, p50", both, "s", without, found["and read"]),
    ]
    if program is not None:
        pairs.append(
            Pair.of(f"{name}: GetQuote, p50", "tpm2_quote process", "s", found["GetQuote"], found["program"])
        )
    return pairs


def _tpm2_quote(tpm: Swtpm) -> Callable[[], object] | None:
    path = shutil.which("tpm2_quote")
    if path is None:
        return None
    pcrs = "sha256:" + ",".join(map(str, range(16)))
    command = [path, "-Q", "-c", f"{AK_HANDLE:#x}", "-l", pcrs, "-q", NONCE.hex()]
    environment = {**os.environ, "TPM2TOOLS_TCTI": f"swtpm:path={tpm.data_socket}", "TSS2_LOG": "all+NONE"}

    def run() -> None:
        subprocess.run(command, env=environment, check=True, capture_output=True)

    try:
        run()
    except subprocess.CalledProcessError:
        return None  # a TSS before 3.2 cannot reach swtpm by path
    return run


def evidence(world: World, *, rounds: int, seconds: float) -> list[Pair]:
    """Bundles a second with many callers at once, beside a TPM that makes one quote for each of them."""
    return [pair for name in ("ECC", "slow ECC") for pair in _evidence_of(world, name, rounds, seconds)]


def _evidence_of(world: World, name: str, rounds: int, seconds: float) -> list[Pair]:
    machine = world.machines[name]
    request = evidence_pb2.GetEvidenceRequest(nonce=NONCE, audience=AUDIENCE).SerializeToString()
    commands = RawTpm(machine.socket_path).commands()
    alone = world.p50(machine.daemon.api, GET_EVIDENCE, request, 1, 3)
    pairs = []
    for callers in (1, 16, 64, 256):
        # A few batches at least; and where quotes are fast, no more than about a thousand bundles a second.
        each = max(2, min(int(seconds / alone), int(1000 * seconds / callers)))

        def shared(callers: int = callers, each: int = each) -> float:
            return world.rate(machine.daemon.api, GET_EVIDENCE, request, callers, each)

        def one_each() -> float:
            return per_second(lambda: quote_and_read(commands), min(seconds, 0.3))

        found = in_turns(rounds, {"shared": shared, "one each": one_each})
        title, against = f"{name}: GetEvidence, {callers} at once", "one quote each, in process"
        pairs.append(Pair.of(title, against, "/s", found["shared"], found["one each"]))
    commands.close()
    return pairs


def one_bundle(world: World) -> bytes:
    """A bundle to judge."""
    with Agent(world.machines["ECC"].daemon.api) as agent:
        return agent.get_evidence(NONCE, AUDIENCE)
