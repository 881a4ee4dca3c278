"""Memory on lease, attacked: by whoever holds one, by whoever would like to, and through the file that is opened."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cgpu_agent.domain import opening
from cgpu_agent.domain.leases import LeaseLimits
from cgpu_agent.domain.policy import Policy
from cgpu_agent.errors import AgentError, Denied, Exhausted, Misuse, Unavailable
from cgpu_agent.rpc.identify import Identified, Identifier
from cgpu_agent.rpc.leasedoor import LeaseKinds
from cgpu_agent.wire.lease import LeaseRequest, parse_answer
from cgpu_agent.wire.sealed import Layout, ObjectName
from fixtures.leases import CUT, NAME, Lending, Taken, refusal, running, until
from fixtures.sealed import seal
from fixtures.stuckfs import can_mount, stuck
from frontdoor_kit import descriptors, needs_root

PLAIN = os.urandom(9 * CUT)
SEALED = seal(PLAIN, NAME, segment_size=CUT)
GOOD = LeaseRequest(CUT, source=True).encode()
BARE = LeaseRequest(CUT, source=False).encode()


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "STEP", CUT)


async def opened(lending: Lending, taken: Taken, name: ObjectName = NAME) -> list[tuple[int, int, bool]]:
    return [(step.done, step.total, step.whole) async for step in lending.open(taken, name)]


# -- the exchange


def _pipe(_folder: Path) -> list[int]:
    return list(os.pipe())


def _fifo(folder: Path) -> list[int]:
    os.mkfifo(folder / "fifo")
    return [os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)]


def _file(flags: int, count: int = 1) -> Callable[[Path], list[int]]:
    def make(folder: Path) -> list[int]:
        (folder / "some").touch()
        return [os.open(folder / "some", flags) for _ in range(count)]

    return make


NONE: Callable[[Path], list[int]] = lambda _folder: []  # noqa: E731
READ = _file(os.O_RDONLY)
HOSTILE: dict[str, tuple[bytes, Callable[[Path], list[int]], str]] = {
    "empty": (b"", READ, "TRUNCATED"),
    "one byte": (GOOD[:1], READ, "TRUNCATED"),
    "cut": (GOOD[:-1], READ, "TRUNCATED"),
    "prolonged": (GOOD + b"\0", READ, "TRAILING_BYTES"),
    "very long": (GOOD + bytes(4096), READ, "BAD_LEASE_MESSAGE"),
    "another magic": (b"cgpu/lease/2" + GOOD[12:], READ, "BAD_LEASE_MESSAGE"),
    "two sources": (GOOD[:13] + b"\2" + GOOD[14:], _file(os.O_RDONLY, 2), "BAD_LEASE_MESSAGE"),
    "nothing to lease": (LeaseRequest(0, source=True).encode(), READ, "LEASE_SIZE"),
    "more than there may be": (LeaseRequest((1 << 24) + 1, source=True).encode(), READ, "LEASE_SIZE"),
    "more than there is": (LeaseRequest((1 << 64) - 1, source=True).encode(), READ, "LEASE_SIZE"),
    "no descriptor": (GOOD, NONE, "BAD_LEASE_MESSAGE"),
    "a descriptor nobody spoke of": (BARE, READ, "BAD_LEASE_MESSAGE"),
    "two descriptors": (GOOD, _file(os.O_RDONLY, 2), "BAD_LEASE_MESSAGE"),
    "many descriptors": (GOOD, _file(os.O_RDONLY, 200), "BAD_LEASE_MESSAGE"),
    "a directory": (GOOD, lambda folder: [os.open(folder, os.O_RDONLY)], "BAD_SOURCE"),
    "a device": (GOOD, lambda _folder: [os.open("/dev/zero", os.O_RDONLY)], "BAD_SOURCE"),
    "a FIFO": (GOOD, _fifo, "BAD_SOURCE"),
    "pipes": (GOOD, _pipe, "BAD_LEASE_MESSAGE"),
    "a socket": (GOOD, lambda _folder: [socket.socket().detach()], "BAD_SOURCE"),
    "for writing": (GOOD, _file(os.O_WRONLY), "BAD_SOURCE"),
    "for both": (GOOD, _file(os.O_RDWR), "BAD_SOURCE"),
    "a mere name": (GOOD, _file(os.O_PATH), "BAD_SOURCE"),
}


@pytest.mark.parametrize(("message", "make", "slug"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_request_is_refused_and_leaves_nothing(
    tmp_path: Path, message: bytes, make: Callable[[Path], list[int]], slug: str
) -> None:
    async def scenario(lending: Lending) -> None:
        (await lending.take(CUT)).close()
        await lending.idle()
        before = descriptors()
        fds = make(tmp_path)
        error = await refusal(lending.say(message, fds))
        for fd in fds:
            os.close(fd)
        assert error.slug == slug
        await lending.idle()
        assert descriptors() == before
        (await lending.take(CUT)).close()

    running(scenario)


def test_who_says_nothing_is_sent_away(tmp_path: Path) -> None:
    async def scenario(lending: Lending) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(lending.path)
            sock.settimeout(60)
            assert b"LEASE_TIMEOUT" in await asyncio.to_thread(sock.recv, 512)
            assert await asyncio.to_thread(sock.recv, 512) == b""
        await lending.idle()

    running(scenario, patience=0.05)


def test_no_word_can_be_said_on_a_lease() -> None:
    """Nothing waits there, for systemd to close, when the agent dies."""

    async def scenario(lending: Lending) -> None:
        taken = await lending.take(CUT)
        for fds in ([], [taken.memory]):
            with pytest.raises(BrokenPipeError):
                socket.send_fds(taken.sock, [BARE], fds)
        taken.close()
        await lending.idle()

    running(scenario)


@pytest.mark.parametrize("second", [BARE, b""], ids=["a request", "nothing"])
def test_two_requests_at_once_are_refused(second: bytes) -> None:
    async def scenario(lending: Lending) -> None:
        permit, gate = lending.door._permit, asyncio.Event()

        async def late(who: Identified) -> LeaseKinds:
            await gate.wait()
            return await permit(who)

        lending.door._permit = late
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(lending.path)
            for message in (BARE, second):
                sock.send(message)
            gate.set()
            sock.settimeout(60)
            answer = parse_answer(await asyncio.to_thread(sock.recv, 512))
        assert isinstance(answer, Misuse)
        assert answer.slug == "BAD_LEASE_MESSAGE"
        await lending.idle()

    running(scenario)


@pytest.mark.parametrize("limit", [{"leases": 2}, {"per_uid": 2}], ids=["in all", "per uid"])
def test_connections_are_counted(limit: dict[str, int]) -> None:
    async def scenario(lending: Lending) -> None:
        held = [await lending.take(CUT) for _ in range(2)]
        error = await refusal(lending.take(CUT))
        assert (type(error), error.slug) == (Exhausted, "LEASE_LIMIT")
        held.pop().close()
        await until(lambda: lending.connections == 1)
        held.append(await lending.take(CUT))
        for taken in held:
            taken.close()

    running(scenario, **limit)


@pytest.mark.parametrize("limits", [(4 * CUT, 6 * CUT, 99 * CUT), (4 * CUT, 99 * CUT, 6 * CUT)])
def test_bytes_are_counted(limits: tuple[int, int, int]) -> None:
    async def scenario(lending: Lending) -> None:
        first, second = await lending.take(4 * CUT), await lending.take(2 * CUT)
        error = await refusal(lending.take(1))
        assert (type(error), error.slug) == (Exhausted, "LEASE_LIMIT")
        second.close()
        await until(lambda: len(lending.leases) == 1)
        third = await lending.take(2 * CUT)
        first.close()
        third.close()

    running(scenario, limits=LeaseLimits(*limits))


def test_a_permit_for_one_kind_of_memory_is_none_for_the_other() -> None:
    async def scenario(lending: Lending) -> None:
        wanted = {
            "write": LeaseRequest(CUT, source=False, writable=True),
            "read": LeaseRequest(CUT, source=False),
        }

        async def lent() -> set[str]:
            found = set()
            for kind, request in wanted.items():
                with contextlib.suppress(Denied):
                    (await lending.say(request.encode())).close()
                    found.add(kind)
            return found

        assert await lent() == {"write", "read"}
        lending.transfers = False
        assert await lent() == {"read"}
        lending.policy = Policy.default()
        assert await lent() == set()
        lending.transfers = True
        assert await lent() == {"write"}
        await lending.idle()

    running(scenario)


def test_memory_to_write_to_comes_without_a_source() -> None:
    async def scenario(lending: Lending) -> None:
        source = os.open(lending.file(SEALED), os.O_RDONLY)
        error = await refusal(lending.say(LeaseRequest(CUT, source=False, writable=True).encode(), [source]))
        assert error.slug == "BAD_LEASE_MESSAGE"
        os.close(source)
        await lending.idle()

    running(scenario)


def test_nobody_is_lent_to_without_a_permit() -> None:
    async def scenario(lending: Lending) -> None:
        lending.policy = Policy.load('@id("no") forbid(principal, action, resource);', "test")
        assert (await refusal(lending.take(CUT))).slug == "NOT_ALLOWED"

    running(scenario)


def test_a_thousand_leases_leave_nothing_behind() -> None:
    async def scenario(lending: Lending) -> None:
        source = lending.file(SEALED)
        (await lending.take(CUT, source)).close()
        await lending.idle()
        before = descriptors()
        for _ in range(1000):
            (await lending.take(CUT, source)).close()
            await lending.idle()
        assert descriptors() == before
        await until(lambda: not any(thread.name == "lease" for thread in threading.enumerate()))

    running(scenario)


# -- the memory


def test_the_memory_can_be_neither_written_nor_cut_nor_sealed_by_its_holder() -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(2 * CUT)
        fd = taken.memory
        for attempt in (
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 0),
            lambda: os.posix_fallocate(fd, 0, 4 * CUT),
            lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
            lambda: mmap.mmap(fd, CUT),
        ):
            with pytest.raises(OSError):
                attempt()
        if os.geteuid() == 0:  # root opens it anew for writing, and cuts no more than anybody
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            for size in (0, 4 * CUT):
                with pytest.raises(PermissionError):
                    os.ftruncate(again, size)
            with pytest.raises(PermissionError):
                fcntl.fcntl(again, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            os.close(again)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        assert taken.seals() & seals == seals
        assert os.fstat(fd).st_mode & 0o777 == 0o400
        assert os.fstat(fd).st_blocks * 512 == 2 * CUT  # all there from the start
        taken.close()

    running(scenario)


def test_no_two_leases_share_memory() -> None:
    async def scenario(lending: Lending) -> None:
        source = lending.file(SEALED)
        first = await lending.take(len(PLAIN), source)
        await opened(lending, first)
        second = await lending.take(len(PLAIN))
        assert os.fstat(first.memory).st_ino != os.fstat(second.memory).st_ino
        assert second.content() == bytes(len(PLAIN))
        assert first.id != second.id
        first.close()
        third = await lending.take(len(PLAIN))
        assert third.content() == bytes(len(PLAIN))
        second.close()
        third.close()

    running(scenario)


def test_who_keeps_the_descriptor_keeps_neither_plaintext_nor_memory() -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(len(PLAIN), lending.file(SEALED))
        await opened(lending, taken)
        assert taken.content() == PLAIN
        taken.close(keep=True)
        await lending.idle()
        assert os.fstat(taken.memory).st_blocks == 0
        assert taken.content() == bytes(len(PLAIN))
        os.close(taken.memory)

    running(scenario)


@pytest.mark.parametrize("how", ["", "fork"])
def test_the_death_of_its_holder_ends_a_lease_whoever_holds_its_socket(how: str) -> None:
    async def scenario(lending: Lending) -> None:
        with contextlib.ExitStack() as stack:
            process, name, memory = await asyncio.to_thread(stack.enter_context, lending.holder(how))
            lease = lending.leases._table[name]
            lease.memory.write(lease.memory.begin(), 0, b"plaintext")
            assert os.pread(memory, 9, 0) == b"plaintext"
            process.kill()
            await lending.idle()
            assert os.fstat(memory).st_blocks == 0
            assert os.pread(memory, 9, 0) == bytes(9)

    running(scenario)


# -- whose lease it is


def test_another_process_that_knows_the_id_has_no_lease() -> None:
    async def scenario(lending: Lending) -> None:
        with contextlib.ExitStack() as stack:
            _process, name, memory = await asyncio.to_thread(stack.enter_context, lending.holder())
            me = stack.enter_context(lending.caller())
            stranger = stack.enter_context(lending.caller(other=True))
            told = set()
            for process, lease in ((me, name), (stranger, name), (me, bytes(16)), (me, b""), (me, name + b"\0")):
                error = await refusal(
                    lending.opening.open(process.caller, process, lease, NAME, CUT, lending.begin).__anext__()
                )
                assert isinstance(error, Denied)
                told.add((error.slug, error.message))
            assert len(told) == 1
            assert lending.records == []
            assert os.pread(memory, 16, 0) == bytes(16)

    running(scenario)


@needs_root
def test_another_uid_with_the_same_pid_is_another_process() -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(CUT)
        with lending.caller() as me:
            assert me.is_same_process(lending.leases._table[taken.id].holder)
            me.caller = type(me.caller)(**{**me.caller.claims(), "uid": 12345, "groups": ()})  # type: ignore[arg-type]
            error = await refusal(lending.opening.open(me.caller, me, taken.id, NAME, CUT, lending.begin).__anext__())
            assert error.slug == "NO_LEASE"
        taken.close()

    running(scenario)


def test_a_holder_that_is_not_what_it_was_has_no_use_of_its_lease() -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(len(PLAIN), lending.file(SEALED))
        holder = lending.leases._table[taken.id].holder
        assert isinstance(holder, Identified)
        holder.facts = dataclasses.replace(holder.facts, executable=None)
        assert (await refusal(opened(lending, taken))).slug == "CALLER_CHANGED"
        assert lending.records == []
        taken.close()

    running(scenario)


def test_without_pidfds_nothing_is_lent() -> None:
    async def scenario(lending: Lending) -> None:
        old = dataclasses.replace(lending.identifier.capabilities, peer_pidfd=False, pidfd_info=False)
        lending.door._identifier = Identifier(old)
        error = await refusal(lending.take(CUT))
        assert (type(error), error.slug) == (Denied, "LEASE_IDENTITY")

    running(scenario)


def test_a_lease_serves_one_opening_at_a_time_and_a_uid_two() -> None:
    async def scenario(lending: Lending) -> None:
        source = lending.file(SEALED)
        held = [await lending.take(len(PLAIN), source) for _ in range(3)]
        running_now = [lending.open(taken) for taken in held[:2]]
        for steps in running_now:
            await steps.__anext__()
        assert (await refusal(lending.open(held[2]).__anext__())).slug == "TOO_MANY_CALLS"
        await running_now.pop().aclose()  # type: ignore[attr-defined]
        await until(lambda: lending.opening._slots.running == 1)
        assert (await refusal(lending.open(held[0]).__anext__())).slug == "LEASE_BUSY"
        await running_now.pop().aclose()  # type: ignore[attr-defined]
        await until(lambda: lending.opening._slots.running == 0)
        assert (await opened(lending, held[0]))[-1] == (len(PLAIN), len(PLAIN), True)
        for taken in held:
            taken.close()

    running(scenario)


# -- the object


def test_an_object_comes_whole_and_is_said_to_be() -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(len(PLAIN), lending.file(SEALED))
        before = descriptors()
        steps = await opened(lending, taken)
        assert steps[:-1] == [(done, len(PLAIN), False) for done in range(CUT, len(PLAIN) + 1, CUT)]
        assert steps[-1] == (len(PLAIN), len(PLAIN), True)
        assert taken.content() == PLAIN
        assert lending.opening._slots.running == 0
        assert descriptors() <= before
        call, record = lending.records
        assert call.event == "call"
        assert (record.event, record.data["how"], record.data["object"]) == ("key", "open", "models/tiny")
        taken.close()

    running(scenario)


def test_what_was_opened_before_is_gone_when_another_is_opened() -> None:
    async def scenario(lending: Lending) -> None:
        path = lending.file(SEALED)
        taken = await lending.take(len(PLAIN), path)
        await opened(lending, taken)
        path.write_bytes(seal(b"short", NAME, segment_size=CUT))
        await opened(lending, taken)
        assert taken.content() == b"short" + bytes(len(PLAIN) - 5)
        taken.close()

    running(scenario)


def test_an_object_that_does_not_fit_is_refused_untouched() -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(len(PLAIN) - 1, lending.file(SEALED))
        error = await refusal(opened(lending, taken))
        assert (type(error), error.slug) == (Misuse, "OBJECT_TOO_LARGE_FOR_LEASE")
        assert taken.content() == bytes(len(PLAIN) - 1)
        taken.close()

    running(scenario)


def test_a_lease_without_an_object_opens_nothing() -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(CUT)
        assert (await refusal(opened(lending, taken))).slug == "NO_SOURCE"
        taken.close()

    running(scenario)


@pytest.mark.parametrize(
    "name",
    [
        ObjectName("kek-2", "models/tiny", 7),
        ObjectName("kek-1", "models/huge", 7),
        ObjectName("kek-1", "models/tiny", 6),
        ObjectName("kek-1", "models/tiny", 8),
    ],
    ids=["key", "object", "earlier version", "later version"],
)
def test_another_object_than_the_one_expected_does_not_open(name: ObjectName) -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(len(PLAIN), lending.file(SEALED))
        error = await refusal(opened(lending, taken, name))
        assert (type(error), error.slug) == (Misuse, "NOT_AUTHENTIC")
        assert taken.content() == bytes(len(PLAIN))
        taken.close()

    running(scenario)


def altered(place: int) -> bytes:
    return SEALED[:place] + bytes([SEALED[place] ^ 1]) + SEALED[place + 1 :]


SEGMENT = Layout.of_sealed(CUT, len(SEALED)).segment(5)
BAD_FILES = {
    "altered": (altered(SEGMENT.offset + 9), "NOT_AUTHENTIC"),
    "altered tag": (altered(SEGMENT.offset + SEGMENT.size - 1), "NOT_AUTHENTIC"),
    "altered end": (altered(len(SEALED) - 1), "NOT_AUTHENTIC"),
    "altered header": (altered(3), "NOT_AUTHENTIC"),
    "another format": (altered(0), "BAD_FORMAT"),
    "cut at a segment": (SEALED[: 5 * CUT], "NOT_AUTHENTIC"),
    "cut within one": (SEALED[:-7], "NOT_AUTHENTIC"),
    "prolonged": (SEALED + SEALED[-CUT:], "NOT_AUTHENTIC"),
    "empty": (b"", "TRUNCATED"),
    "a header only": (SEALED[:40], "TRUNCATED"),
}


@pytest.mark.parametrize(("data", "slug"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_ends_in_failure_and_leaves_no_plaintext(data: bytes, slug: str) -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(len(SEALED) + CUT, lending.file(data))
        error = await refusal(opened(lending, taken))
        assert (type(error), error.slug) == (Misuse, slug)
        assert taken.content() == bytes(len(SEALED) + CUT)
        taken.close()

    running(scenario)


def test_unverified_bytes_never_reach_the_lease() -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(len(PLAIN), lending.file(altered(SEGMENT.offset)))
        good = 0

        async def meanwhile() -> None:
            nonlocal good
            async for step in lending.open(taken):
                good = step.done
                assert taken.content() == PLAIN[:good] + bytes(len(PLAIN) - good)

        await refusal(meanwhile())
        assert 0 < good < SEGMENT.plain_offset + CUT
        assert taken.content() == bytes(len(PLAIN))
        taken.close()

    running(scenario)


def _shorten(path: Path) -> None:
    os.truncate(path, SEGMENT.offset + 1)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _overwrite(path: Path) -> None:
    path.write_bytes(os.urandom(len(SEALED)))


def _replace_by_another(path: Path) -> None:
    path.write_bytes(seal(bytes(len(PLAIN)), NAME, segment_size=CUT))


@pytest.mark.parametrize("change", [_shorten, _empty, _overwrite, _replace_by_another])
def test_a_file_that_changes_while_it_is_opened_ends_in_failure(change: Callable[[Path], None]) -> None:
    async def scenario(lending: Lending) -> None:
        path = lending.file(SEALED)
        taken = await lending.take(len(PLAIN), path)

        async def meanwhile() -> None:
            async for step in lending.open(taken):
                assert not step.whole
                if step.done == 2 * CUT:
                    change(path)

        error = await refusal(meanwhile())
        assert error.slug in ("TRUNCATED", "NOT_AUTHENTIC")
        assert taken.content() == bytes(len(PLAIN))
        taken.close()

    running(scenario)


def test_a_file_that_grows_while_it_is_opened_is_the_object_it_was() -> None:
    async def scenario(lending: Lending) -> None:
        path = lending.file(SEALED)
        taken = await lending.take(len(PLAIN), path)
        async for step in lending.open(taken):
            if step.done == CUT:
                path.write_bytes(SEALED + bytes(CUT))
        assert taken.content() == PLAIN
        taken.close()

    running(scenario)


def test_a_name_that_is_given_to_another_file_changes_nothing() -> None:
    async def scenario(lending: Lending) -> None:
        path = lending.file(SEALED)
        taken = await lending.take(len(PLAIN), path)
        path.unlink()
        path.symlink_to("/etc/passwd")
        await opened(lending, taken)
        assert taken.content() == PLAIN
        taken.close()

    running(scenario)


# -- what changes meanwhile


def _epoch(lending: Lending) -> None:
    lending.epoch = 2


def _policy(lending: Lending) -> None:
    lending.policy = Policy.load('@id("no") forbid(principal, action, resource);', "test")


CHANGES = [(_epoch, Unavailable, "TRUST_CHANGED"), (_policy, Denied, "NOT_ALLOWED")]


@pytest.mark.parametrize(("change", "kind", "slug"), CHANGES, ids=["epoch", "policy"])
@pytest.mark.parametrize("after", [CUT, len(PLAIN)], ids=["the first step", "the last step"])
def test_what_changes_while_an_object_is_opened_ends_it_and_wipes(
    change: Callable[[Lending], None], kind: type[AgentError], slug: str, after: int
) -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(len(PLAIN), lending.file(SEALED))
        last = 0

        async def meanwhile() -> None:
            nonlocal last
            async for step in lending.open(taken):
                assert not step.whole
                last = step.done
                if last == after:
                    change(lending)

        error = await refusal(meanwhile())
        assert (type(error), error.slug, last) == (kind, slug, after)
        assert taken.content() == bytes(len(PLAIN))
        taken.close()

    running(scenario)


@pytest.mark.parametrize("whole", [False, True], ids=["in its middle", "at its last word"])
def test_a_stream_that_is_given_up_wipes(whole: bool) -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(len(PLAIN), lending.file(SEALED))
        steps = lending.open(taken)
        async for step in steps:
            if step.whole == whole:
                break
        assert taken.content() != bytes(len(PLAIN))
        await steps.aclose()  # type: ignore[attr-defined]
        assert taken.content() == bytes(len(PLAIN))
        await until(lambda: lending.opening._slots.running == 0)
        taken.close()

    running(scenario)


def test_a_lease_that_ends_while_it_is_filled_ends_the_opening() -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(len(PLAIN), lending.file(SEALED))

        async def meanwhile() -> None:
            async for step in lending.open(taken):
                assert not step.whole
                taken.sock.close()
                await lending.idle()

        assert (await refusal(meanwhile())).slug == "LEASE_GONE"
        assert taken.content() == bytes(len(PLAIN))
        os.close(taken.memory)

    running(scenario)


def test_a_call_that_takes_too_long_ends_and_wipes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(lending: Lending) -> None:
        taken = await lending.take(len(PLAIN), lending.file(SEALED))
        monkeypatch.setattr(opening, "OPEN_SECONDS", 0.0)
        assert (await refusal(opened(lending, taken))).slug == "CALL_TIMEOUT"
        assert taken.content() == bytes(len(PLAIN))
        taken.close()

    running(scenario)


def test_who_takes_no_messages_is_cut_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "OPEN_SECONDS", 1.0)
    monkeypatch.setattr(opening, "STEP_SECONDS", 1.0)

    async def scenario(lending: Lending) -> None:
        taken = await lending.take(len(PLAIN), lending.file(SEALED))

        async def lazily() -> None:
            with lending.caller() as process:
                steps = lending.opening.open(process.caller, process, taken.id, NAME, CUT, lending.begin)
                async with contextlib.aclosing(steps):
                    await steps.__anext__()
                    await asyncio.Event().wait()

        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(lazily())
        assert taken.content() == bytes(len(PLAIN))
        assert lending.opening._slots.running == 0
        taken.close()

    running(scenario)


def test_the_end_of_the_door_wipes_every_lease() -> None:
    async def scenario(lending: Lending) -> None:
        held = [await lending.take(len(PLAIN), lending.file(SEALED)) for _ in range(3)]
        await opened(lending, held[0])
        await asyncio.to_thread(lending.door.close)
        assert not len(lending.leases)
        for taken in held:
            assert os.fstat(taken.memory).st_blocks == 0
            taken.close()
        with pytest.raises(OSError):
            await lending.take(CUT)

    running(scenario)


# -- a file system of the caller's own that does not answer

needs_fuse = pytest.mark.skipif(not can_mount(), reason="needs root and /dev/fuse")

# Sends a lease request with descriptors of one file, and stays.
_SENDER = """
import os, socket, sys, time
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
fds = [os.open(sys.argv[2], os.O_RDONLY) for _ in range(int(sys.argv[3]))]
socket.send_fds(sock, [bytes.fromhex(sys.argv[4])], fds)
print(flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def sender(lending: Lending, path: Path, count: int, program: str = _SENDER) -> Iterator[None]:
    command = [sys.executable, "-c", program, lending.path, str(path), str(count), GOOD.hex()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        with process:
            process.wait()


@needs_fuse
@pytest.mark.parametrize(("operation", "count"), [("getattr", 1), ("flush", 2)], ids=["looked at", "closed"])
def test_a_descriptor_that_hangs_when_it_is_touched_holds_up_its_sender_alone(operation: str, count: int) -> None:
    async def scenario(lending: Lending) -> None:
        with contextlib.ExitStack() as stack:
            with contextlib.ExitStack() as fuse:
                path = fuse.enter_context(stuck(lending.folder / "fs", operation, SEALED))
                await asyncio.to_thread(stack.enter_context, sender(lending, path, count))
                for _ in range(20):
                    (await lending.take(CUT)).close()
                    await until(lambda: not len(lending.leases))
                    await until(lambda: lending.connections == 1)
                    assert lending.door.heartbeat_age(time.monotonic()) < 5
            await lending.idle()

    running(scenario)


# Has the receiver close, as the last, a file with a write that is still to come. It is there before the door is.
_LEAVER = """
import os, socket, sys, time
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
fds = [os.open(sys.argv[2], os.O_RDWR) for _ in range(2)]
socket.send_fds(sock, [b"x"], fds[:1])
os.close(fds[0])
os.pwrite(fds[1], b"x", 0)
print(flush=True)
time.sleep(600)
"""


@needs_fuse
def test_a_descriptor_that_nobody_takes_does_not_hold_up_the_door() -> None:
    async def scenario() -> None:
        lending = Lending(per_uid=0)
        with contextlib.ExitStack() as stack:
            stack.callback(lending.close)
            with contextlib.ExitStack() as fuse:
                path = fuse.enter_context(stuck(lending.folder / "fs", "write", bytes(4096)))
                await asyncio.to_thread(stack.enter_context, sender(lending, path, 1, _LEAVER))
                lending.door.start()
                await until(lambda: lending.door._refusing == 1)
                for _ in range(20):
                    assert (await refusal(lending.take(CUT))).slug == "LEASE_LIMIT"
                await until(lambda: lending.door._refusing == 1)
            await until(lambda: lending.door._refusing == 0)

    asyncio.run(scenario())


@needs_fuse
def test_a_read_that_hangs_holds_its_callers_slot_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "STEP_SECONDS", 0.3)

    async def scenario(lending: Lending) -> None:
        with stuck(lending.folder / "fs", "read", SEALED) as path:
            taken = await lending.take(len(PLAIN), path)
            error = await refusal(opened(lending, taken))
            assert (type(error), error.slug) == (Unavailable, "SOURCE_STALLED")
            assert (await refusal(opened(lending, taken))).slug == "LEASE_BUSY"
            assert lending.opening._slots.running == 1
            other = await lending.take(len(PLAIN), lending.file(SEALED))
            assert (await opened(lending, other))[-1][2]
            taken.close()
            other.close()
            await until(lambda: not len(lending.leases))
        await until(lambda: lending.opening._slots.running == 0)

    running(scenario)
