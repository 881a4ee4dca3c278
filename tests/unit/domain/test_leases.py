"""What is charged for a lease is given back, whatever becomes of it, and its source outlives it in use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgpu_agent.domain.leases import LeaseLimits, Leases
from cgpu_agent.errors import AgentError, Denied, Misuse, Unavailable
from fixtures.leases import Lending

MIB = 1 << 20
NEVER = 1 << 50
"""More than a machine has."""


@pytest.fixture
def lending() -> Iterator[Lending]:
    made = Lending()
    yield made
    made.close()


def refused(leases: Leases, lending: Lending, size: int) -> str:
    with lending.caller() as me, pytest.raises(AgentError) as raised, leases.granted(me, size, None):
        pass
    return raised.value.slug


def test_memory_that_cannot_be_had_is_not_charged(lending: Lending) -> None:
    leases = Leases(LeaseLimits(NEVER, NEVER, NEVER))
    assert refused(leases, lending, NEVER) == "NO_MEMORY"
    assert refused(leases, lending, NEVER + 1) == "LEASE_SIZE"
    with lending.caller() as me, leases.granted(me, MIB, None):
        assert refused(leases, lending, NEVER) == "LEASE_LIMIT"
    assert refused(leases, lending, NEVER) == "NO_MEMORY"
    assert not len(leases)


def test_what_goes_wrong_on_a_lease_ends_it(lending: Lending) -> None:
    leases = Leases(LeaseLimits(MIB, MIB, MIB))
    for _ in range(3):
        with lending.caller() as me, pytest.raises(RuntimeError), leases.granted(me, MIB, None):
            raise RuntimeError
    assert not len(leases)


def test_a_source_in_use_outlives_its_lease(lending: Lending, tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(b"sealed")
    given = os.open(tmp_path / "object", os.O_RDONLY)
    with lending.caller() as me, lending.leases.granted(me, MIB, given) as lease:
        mine = lease.source()
    os.close(given)
    again = os.open("/dev/null", os.O_RDONLY)
    assert again == given  # the number is another file's by now
    assert os.pread(mine, 9, 0) == b"sealed"
    for fd in (mine, again):
        os.close(fd)
    with pytest.raises(Misuse) as raised:
        lease.source()
    assert raised.value.slug == "NO_SOURCE"
    with pytest.raises(Unavailable):
        lease.memory.write(lease.memory.begin(), 0, b"late")


def test_each_kind_of_lease_is_used_as_what_it_is(lending: Lending) -> None:
    leases = lending.leases
    with (
        lending.caller() as me,
        leases.granted(me, MIB, None) as read,
        leases.granted(me, MIB, None, writable=True) as work,
    ):
        assert leases.work(work.id, me).size == MIB
        with leases.borrowed(read.id, me) as borrowed:
            assert borrowed.memory.size == MIB
        with pytest.raises(Misuse) as wrong:
            leases.work(read.id, me)
        assert wrong.value.slug == "LEASE_KIND"
        with pytest.raises(Misuse) as other, leases.borrowed(work.id, me):
            pass
        assert other.value.slug == "LEASE_KIND"


def test_memory_to_write_to_is_charged_like_any_other_and_is_its_holders_alone(lending: Lending) -> None:
    leases = Leases(LeaseLimits(MIB, MIB, MIB))
    with lending.caller() as me, lending.caller(other=True) as stranger:
        with leases.granted(me, MIB, None, writable=True) as lease:
            assert refused(leases, lending, 1) == "LEASE_LIMIT"
            with pytest.raises(Denied) as raised:
                leases.work(lease.id, stranger)
            assert raised.value.slug == "NO_LEASE"
            memory = leases.work(lease.id, me)
        with pytest.raises(Unavailable), memory.use(0, 1):
            pass
        with pytest.raises(Denied):
            leases.work(lease.id, me)


def test_bytes_on_lease_are_those_of_all_leases_that_have_not_ended(lending: Lending) -> None:
    leases = Leases(LeaseLimits(MIB, 2 * MIB, 2 * MIB))
    with lending.caller() as me:
        with leases.granted(me, MIB, None):
            with leases.granted(me, 4096, None):
                assert (len(leases), leases.total_bytes) == (2, MIB + 4096)
            assert (len(leases), leases.total_bytes) == (1, MIB)
        assert (len(leases), leases.total_bytes) == (0, 0)
