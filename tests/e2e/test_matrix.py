"""Every public method by every kind of caller in every state of the GPUs: which doors open, and no other does.

The software GPU is vouched for by a root of its own, so a real daemon never sees genuine ones: that state, and real
facts of callers without cgroups, are asked of the authorizer and the domain directly, at the end.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest

from cgpu_agent.api.v1 import gpus_pb2
from cgpu_agent.client.connect import LEASE_ENVIRONMENT
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import Action, Facts, Key
from cgpu_agent.objects.stream import Sealer
from cgpu_agent.rpc import peer
from cgpu_agent.rpc.environment import self_check_environment
from cgpu_agent.rpc.identify import Identifier
from cgpu_agent.rpc.methods import ACTIONS, BY_KEY, public_authorizer
from cgpu_agent.wire.audit import EMPTY, AuditRecord, follow
from cgpu_agent.wire.sealed import SEGMENT_SIZES, ObjectName
from fixtures.caller import GONE, OBJECT, PLAIN, ROWS, caller
from fixtures.cgroups import cgroup, within
from fixtures.daemon import PATIENCE, Daemon, booted_daemon
from fixtures.policies import granting, permit
from fixtures.softwaregpu import GpuProcess, running_gpus, using

pytestmark = pytest.mark.swtpm

ROOT: Final = os.geteuid() == 0
UID: Final = 4242 if ROOT else os.geteuid()
STRANGER: Final = 4243
BOX, OTHER_BOX = (f"docker-{letter * 64}.scope" for letter in "ab")
KEYS: Final = ("any", "ready", "genuine", "boxed")

STATES: Final = ("ready", "rejected", "expired")
"""Of the GPUs, as a real daemon sees them. Ready ones are simulated; genuine ones only the direct test knows."""
ALWAYS: Final = frozenset({*STATES, "genuine", "none", "not-asked"})
READY, GENUINE, NEVER = frozenset({"ready", "genuine"}), frozenset({"genuine"}), frozenset[str]()
EVERYBODY: Final = "everybody"

DOORS: Final[dict[str, tuple[str, frozenset[str]]]] = {
    "identity": (EVERYBODY, ALWAYS),
    "platform": (EVERYBODY, ALWAYS),
    "quote": (EVERYBODY, ALWAYS),
    "raw-quote": ("allowed", ALWAYS),
    "pcrs": (EVERYBODY, ALWAYS),
    "event-log": (EVERYBODY, ALWAYS),
    "measure": ("allowed", ALWAYS),
    "activate": ("allowed", ALWAYS),
    "evidence": (EVERYBODY, ALWAYS),
    "gpus": (EVERYBODY, ALWAYS),
    "watch": (EVERYBODY, ALWAYS),
    "report": (EVERYBODY, ALWAYS),
    "raw-report": ("allowed", READY),
    "attest": ("allowed", ALWAYS),
    "keys": (EVERYBODY, ALWAYS),
    "any": ("allowed", ALWAYS),
    "any in plain": ("allowed", NEVER),
    "ready": ("allowed", READY),
    "ready in plain": ("allowed", READY),
    "genuine": ("allowed", GENUINE),
    "genuine in plain": ("allowed", GENUINE),
    "boxed": ("boxed", READY),
    "boxed in plain": ("boxed", NEVER),
    "no such key": ("allowed", NEVER),
    "open": ("allowed", READY),
    "channel": ("allowed", READY),
    "put": ("allowed", READY),
    "load": ("allowed", READY),
    "allocate": ("allowed", READY),
    "free": ("allowed", READY),
    "wait": ("allowed", READY),
    "close": ("allowed", READY),
    "stats": ("allowed", READY),
    "progress": ("allowed", READY),
}
"""Whom each row lets in, and while the GPUs are what: what the policy below is meant to say, said apart from it."""
BEHIND: Final = {
    "platform": {"NO_REPORT", "NO_PLATFORM"},
    "activate": {"TPM_ERROR"},
    "attest": {"GPU_ATTEST_LIMIT", "DEADLINE"},
    **{row: {"NO_CHANNEL"} for row in ("allocate", "free", "wait", "close", "stats", "progress")},
}
"""How a call may fail whose door did open: this machine has no such thing, or the request is nonsense."""

CALLERS: Final = {
    "allowed": "allowed",
    "other uid": "stranger",
    "other unit": "stranger",
    "container": "boxed",
    "other container": "stranger",
    "passed on to another uid": "allowed",  # U-1: who connected is who asks, for as long as it lives
    "taken over from another uid": "stranger",
    "passed on by a dead process": "nobody",
}
"""Each caller, and whose doors open to it."""


def policy(unit: str | None) -> tuple[str, ...]:
    """One workload by name, one container by name; the unit matters where there are any."""
    named = f"principal.uid == {UID} && !principal.has_container"
    if unit is not None:
        named += f' && principal.has_unit && principal.unit == "{unit}"'
    boxed = f'principal.uid == {UID} && principal.has_container && principal.container == "{"a" * 64}"'
    ready = 'context.gpus == "ready"'
    genuine = f"{ready} && !context.gpus_simulated"

    def key(name: str) -> str:
        return f'resource == CGpu::Key::"{name}"'

    both = f"{key('ready')} && {ready} || {key('genuine')} && {genuine}"
    return (
        *(permit(action, named) for action in ("boot.raw_quote", "boot.measure", "boot.activate_credential")),
        permit("gpu.attest", named),
        permit("gpu.raw_report", f"{named} && {ready}"),
        permit("key.get", f"{named} && ({key('any')} || {both}) || {boxed} && {key('boxed')} && {ready}"),
        permit("key.get_plain", f"{named} && ({both})"),
        permit("key.open", f"{named} && {key('ready')} && {ready}"),
        permit("gpu.transfer", f"{named} && {ready}"),
        permit("key.load", f"{named} && {key('ready')} && {ready}"),
    )


def test_every_method_has_a_row_and_every_row_its_doors() -> None:
    assert ROWS.keys() == ACTIONS.keys() | BY_KEY
    assert {row for calls in ROWS.values() for row in calls} == DOORS.keys()


@dataclass(frozen=True)
class Places:
    """Where callers live.

    Attributes:
        unit: of those that are allowed; ``None`` where no cgroups can be made, and then there is one place.
        wraps: a command that starts a program in a place.
        why_not: what stands in the way of the others.
    """

    unit: str | None
    wraps: dict[str, tuple[str, ...]]
    why_not: str = ""


@contextmanager
def places() -> Iterator[Places]:
    with ExitStack() as stack:
        try:
            unit, other = (stack.enter_context(cgroup(scope)) for scope in (BOX, OTHER_BOX))
        except pytest.skip.Exception as reason:
            yield Places(None, {"unit": ()}, f"{reason.msg}: see the direct test")
        else:
            folders = {"unit": unit, "other": other, BOX: unit / BOX, OTHER_BOX: other / OTHER_BOX}
            yield Places(unit.name, {name: within(folder) for name, folder in folders.items()})


@dataclass
class Site:
    """A daemon, its two GPUs, and those who call it."""

    daemon: Daemon
    gpus: GpuProcess
    places: Places

    def start(self) -> None:
        folder = self.gpus.socket.parent / "export"
        folder.mkdir()
        for name, data in using(self.gpus, lambda client: client.collateral(timeout=PATIENCE)).items():
            (folder / name).write_bytes(data)
        daemon = self.daemon
        credentials = daemon.folder / "credentials"
        credentials.mkdir(mode=0o700)
        secret = os.urandom(32)
        (credentials / "one.key").write_bytes(secret)
        daemon.environment["CREDENTIALS_DIRECTORY"] = str(credentials)
        with self.object.open("wb") as file:
            sealer = Sealer(file, secret, ObjectName("ready", "model", 1), SEGMENT_SIZES["1MiB"])
            sealer.write(PLAIN)
            sealer.finish()
        daemon.tables["gpu"] = (
            f'backend = "software:{self.gpus.socket}"\nallow_simulated = true\ncollateral = "{folder}"\n'
            f'device_roots = ["{folder}/device-root.pem"]\nrim_roots = ["{folder}/rim-root.pem"]\n'
            "reattest_seconds = 60\nreport_seconds = 200"
        )
        daemon.tables["limits"] = "keys_per_minute = 10000"
        daemon.grants = "".join(policy(self.places.unit))
        daemon.configure()
        keys = "".join(f'[[key]]\nid = "{name}"\nbroker = "credential"\npath = "one.key"\n' for name in KEYS)
        daemon.config.write_text(daemon.config.read_text() + keys)
        daemon.start()
        self.until(lambda found: found.state == gpus_pb2.GPU_SET_STATE_READY)

    @property
    def object(self) -> Path:
        return self.daemon.folder / "object"

    def until(self, condition: Callable[[gpus_pb2.GpuSet], bool]) -> gpus_pb2.GpuSet:
        end = time.monotonic() + 2 * PATIENCE
        with self.daemon.client() as agent:
            while not condition(found := agent.list_gpus()):
                assert time.monotonic() < end, found
                time.sleep(0.1)
        return found

    def misbehave(self, name: str) -> None:
        """Of the first GPU; the second, which callers ask about, stays good."""
        using(self.gpus, lambda client: client.misbehave(name, gpu=1, timeout=PATIENCE))

    def ask(self) -> dict[str, dict[str, str]]:
        """What became of every row, by caller; all of them ask at once."""
        with self.daemon.client() as agent:
            uuid = max(agent.list_gpus().gpus, key=lambda gpu: gpu.bdf).uuid
        how = {"socket": self.daemon.socket, "uuid": uuid}
        wraps = self.places.wraps
        env = {OBJECT: str(self.object), LEASE_ENVIRONMENT: self.daemon.lease_socket}
        with ExitStack() as stack:

            def run(place: str, uid: int, **more: Any) -> subprocess.Popen[str]:
                process = stack.enter_context(caller(wraps[place], env, **how, uid=uid if ROOT else None, **more))
                stack.callback(process.kill)
                return process

            def connection(uid: int, *, dies: bool = False) -> dict[str, Any]:
                """A connection of one process that another is to use."""
                ours, theirs = socket.socketpair()
                with ours, theirs:
                    maker = run("unit", uid, via=theirs.fileno(), pass_fds=(theirs.fileno(),))
                    _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
                stack.callback(os.close, fd)
                if dies:
                    maker.kill()
                    maker.wait()
                return {"fd": fd, "pass_fds": (fd,)}

            running = {"allowed": run("unit", UID)}
            running["passed on by a dead process"] = run("unit", UID, **connection(UID, dies=True))
            if ROOT:
                running["other uid"] = run("unit", STRANGER)
                running["passed on to another uid"] = run("unit", STRANGER, **connection(UID))
                running["taken over from another uid"] = run("unit", UID, **connection(STRANGER))
            if self.places.unit is not None:
                running["other unit"] = run("other", UID)
                running["container"], running["other container"] = run(BOX, UID), run(OTHER_BOX, UID)
            return {name: json.loads(process.communicate()[0]) for name, process in running.items()}

    def releases(self) -> list[AuditRecord]:
        log = follow((self.daemon.folder / "state" / "audit.jsonl").read_bytes(), EMPTY)[0]
        return [record for record in log if record.event == "key"]


@dataclass
class World:
    """``found``: what became of every row, by state of the GPUs and caller; ``releases``: all that is on record."""

    places: Places
    found: dict[str, dict[str, dict[str, str]]]
    releases: list[AuditRecord]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with ExitStack() as stack:
        where = stack.enter_context(places())
        one, other = (
            Site(stack.enter_context(booted_daemon()), stack.enter_context(running_gpus("--count", "2")), where)
            for _ in range(2)
        )
        other.start()
        other.misbehave("hang")  # so that its verdict is not renewed, and expires in a minute
        one.start()
        found = {"ready": one.ask()}
        one.misbehave("dev-tools")
        one.until(lambda gpus: gpus_pb2.GPU_PHASE_REJECTED in {gpu.phase for gpu in gpus.gpus})
        found["rejected"] = one.ask()
        other.until(lambda gpus: gpus.reason == "GPU_VERDICT_EXPIRED")
        found["expired"] = other.ask()
        for site in (one, other):
            assert site.daemon.stop() == 0
        yield World(where, found, one.releases() + other.releases())


def expected(name: str, row: str, state: str) -> set[str]:
    who, states = DOORS[row]
    if row in ("open", "put", "load") and name.startswith(("passed on", "taken over")):
        return {"NOT_ALLOWED", "NO_LEASE", *GONE}  # a lease is its own process's, whoever made the connection
    if CALLERS[name] == "nobody":
        return set(GONE)
    if who in (EVERYBODY, CALLERS[name]) and state in states:
        return {"OK", *BEHIND.get(row, ())}
    return {"NOT_ALLOWED"}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", CALLERS)
def test_the_expected_doors_open_and_no_other(world: World, name: str, state: str) -> None:
    outcomes = world.found[state].get(name)
    if outcomes is None:
        pytest.skip("needs root, to be somebody else" if "uid" in name else world.places.why_not)
    wrong = {row: outcome for row, outcome in outcomes.items() if outcome not in expected(name, row, state)}
    assert wrong == {}
    assert outcomes.keys() == DOORS.keys()


def test_no_key_was_had_without_a_record(world: World) -> None:
    had = [row for callers in world.found.values() for each in callers.values() for row in each if each[row] == "OK"]
    keys = [row for row in had if row in ROWS["/cgpu.agent.v1.Keys/Get"]]
    assert len(world.releases) >= len(keys) > 0  # more where a GPU was doubted between record and delivery
    assert {record.data["caller"]["uid"] for record in world.releases} == {UID}


@pytest.fixture(scope="module")
def myself() -> Caller:
    """This very process, as the front door would know it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        identified = Identifier(self_check_environment()).identify(ours, peer.credentials(ours))
    identified.close()
    return identified.caller


FACTS: Final = {
    "genuine": Facts("serving", gpus="ready"),
    "ready": Facts("serving", gpus="ready", gpus_simulated=True),
    "rejected": Facts("serving", gpus="not-ready"),
    "expired": Facts("serving", gpus="not-ready", gpus_simulated=True),
    "none": Facts("serving", gpus="none"),
    "not-asked": Facts(),
}


@pytest.mark.parametrize("state", FACTS)
def test_the_same_of_genuine_gpus_and_of_callers_that_this_machine_cannot_start(myself: Caller, state: str) -> None:
    """The authorizer and the policy, asked about a real process, and about what else it could have been."""
    rules, facts = granting(*policy("named.service")), FACTS[state]
    authorize = public_authorizer(lambda: rules, lambda: facts)
    allowed = replace(myself, uid=UID, unit="named.service", container=None)
    callers = {
        "allowed": allowed,
        "other uid": replace(allowed, uid=STRANGER),
        "other unit": replace(allowed, unit="other.service"),
        "no unit": replace(allowed, unit=None),
        "by pid alone": replace(allowed, unit=None, cgroup=None, identity_strength="pid"),
        "root": replace(allowed, uid=0, unit=None),
        "container": replace(allowed, unit=BOX, container="a" * 64),
        "other container": replace(allowed, unit=BOX, container="b" * 64),
        "container in the unit": replace(allowed, container="c" * 64),
    }
    for name, caller_ in callers.items():
        for method, rows in ROWS.items():
            for row in rows:
                if row == "load":
                    decision = authorize(caller_, method)
                    if decision.allowed:
                        decision = rules.decide(caller_, Action.KEY_LOAD, facts, Key("ready", "credential"))
                elif method in BY_KEY:
                    plain = Action.KEY_PLAIN if row.endswith(" in plain") else Action.KEY_GET
                    action = Action.KEY_OPEN if row == "open" else plain
                    key = Key("ready" if row == "open" else row.removesuffix(" in plain"), "credential")
                    decision = rules.decide(caller_, action, facts, key)
                else:
                    decision = authorize(caller_, method)
                who, states = DOORS[row]
                mine = who in (EVERYBODY, CALLERS.get(name, "stranger"))
                assert decision.allowed is (mine and state in states), (name, row)
