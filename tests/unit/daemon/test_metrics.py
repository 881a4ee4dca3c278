"""What is counted beside the parts that count themselves."""

from __future__ import annotations

import contextlib

from cgpu_agent.daemon.metrics import CountedLeases
from cgpu_agent.domain.leases import LeaseLimits
from fixtures.leases import Lending

MIB = 1 << 20


def test_bytes_on_lease_are_those_of_all_leases_that_have_not_ended() -> None:
    leases = CountedLeases(LeaseLimits(MIB, 2 * MIB, 2 * MIB))
    with contextlib.closing(Lending()) as lending, lending.caller() as me:
        with leases.granted(me, MIB, None):
            with leases.granted(me, 4096, None):
                assert (len(leases), leases.total_bytes) == (2, MIB + 4096)
            assert (len(leases), leases.total_bytes) == (1, MIB)
        assert (len(leases), leases.total_bytes) == (0, 0)
