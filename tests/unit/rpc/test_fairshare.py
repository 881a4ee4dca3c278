"""Shares of the front door: nobody is held up by anybody, and nobody is held up for nothing."""

from __future__ import annotations

from cgpu_agent.rpc.fairshare import FairShare


def test_who_is_alone_may_send_anything() -> None:
    shares = FairShare(rate=10.0, burst=100.0)
    for second in range(5):
        assert shares.allowed(1000, float(second)) is None
        shares.took(1000, 1 << 20, float(second))


def test_who_sent_all_its_share_waits_while_another_sends_and_that_one_does_not() -> None:
    shares = FairShare(rate=10.0, burst=100.0)
    shares.took(1000, 1 << 20, 0.0)
    shares.took(2000, 1, 0.5)
    assert shares.allowed(1000, 0.5) == 5
    assert shares.allowed(2000, 0.5) is not None
    assert shares.allowed(3000, 0.5) == 100
    shares.took(1000, 5, 0.5)
    shares.took(2000, 1, 1.0)
    assert shares.allowed(1000, 1.0) == 5


def test_a_share_grows_to_its_bound_and_no_further() -> None:
    shares = FairShare(rate=10.0, burst=100.0)
    shares.took(1000, 70, 0.0)
    for second in range(1, 20):
        shares.took(2000, 1, float(second))
    assert shares.allowed(1000, 3.0) == 60
    assert shares.allowed(1000, 19.0) == 100


def test_who_is_alone_again_may_send_anything_again() -> None:
    shares = FairShare(rate=0.0, burst=100.0)
    shares.took(2000, 1, 0.0)
    shares.took(1000, 100, 0.1)
    assert shares.allowed(1000, 1.0) == 0
    assert shares.allowed(1000, 1.1) is None


def test_the_daemons_own_calls_neither_wait_nor_count() -> None:
    shares = FairShare(rate=0.0, burst=100.0)
    shares.took("own", 1 << 20, 0.0)
    assert shares.allowed(1000, 0.0) is None
    shares.took(1000, 100, 0.0)
    assert shares.allowed("own", 0.0) is None


def test_no_list_of_everybody_who_ever_called_is_kept() -> None:
    shares = FairShare(rate=10.0, burst=100.0)
    for uid in range(1000):
        shares.took(uid, 1, float(uid))
    shares.took(1000, 100, 1000.0)
    assert len(shares._left) <= 257
    assert shares.allowed(1000, 1000.5) is None
    shares.took(1001, 1, 1000.5)
    assert shares.allowed(1000, 1000.5) == 5
