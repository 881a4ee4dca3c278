"""Keys of a channel: against HKDF and AES-GCM put together here, and their limits."""

from __future__ import annotations

import hmac

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cgpu_agent.errors import Misuse, Unavailable
from cgpu_agent.transfer import keys
from cgpu_agent.transfer.keys import BLOCKS_PER_SLOT, MAX_BLOCKS, SLOTS_PER_KEY, SlotKeys
from cgpu_agent.wire.transfer import MAX_CHANNEL, MAX_COUNTER, Direction

EXPORTER = bytes(range(48))
NONCE = bytes(12)


def expand(secret: bytes, label: bytes, size: int, *, way: int, channel: int, session: int, epoch: int) -> bytes:
    """HKDF-Expand of RFC 5869, one block."""
    context = bytes([way]) + channel.to_bytes(4, "big") + session.to_bytes(8, "big") + epoch.to_bytes(4, "big")
    info = b"cgpu/transfer/1\0" + label + b"\0" + context
    return hmac.digest(secret, info + b"\1", "sha384")[:size]


def made(*, session: int = 7, channel: int = 5, direction: Direction = Direction.TO_HOST, slots: int = 3) -> SlotKeys:
    return SlotKeys(EXPORTER, session=session, channel=channel, direction=direction, slots_per_key=slots)


def test_keys_are_those_of_the_document() -> None:
    context = {"way": 1, "channel": 5, "session": 7}
    secret = expand(EXPORTER, b"secret", 48, **context, epoch=0)
    found = made()
    for counter in range(8):
        epoch = counter // 3
        if counter and counter % 3 == 0:
            secret = expand(secret, b"next", 48, **context, epoch=epoch)
        key = expand(secret, b"key", 32, **context, epoch=epoch)
        cipher, at, place = found.next()
        assert (at, place) == (epoch, counter)
        assert cipher.encrypt(NONCE, b"plain", b"aad") == AESGCM(key).encrypt(NONCE, b"plain", b"aad")


def test_every_part_of_the_context_makes_another_key() -> None:
    others = [
        made(), made(session=8), made(channel=6), made(direction=Direction.TO_DEVICE),
        SlotKeys(bytes(48), session=7, channel=5, direction=Direction.TO_HOST),
    ]  # fmt: skip
    first = {each.next()[0].encrypt(NONCE, bytes(16), None) for each in others}
    assert len(first) == len(others)


def test_a_key_is_replaced_before_its_bound() -> None:
    assert SLOTS_PER_KEY * BLOCKS_PER_SLOT <= MAX_BLOCKS
    with pytest.raises(Misuse, match="BAD_KEY"):
        made(slots=SLOTS_PER_KEY + 1)
    with pytest.raises(Misuse, match="BAD_KEY"):
        made(slots=0)


def test_refused_arguments() -> None:
    with pytest.raises(Misuse, match="BAD_KEY"):
        SlotKeys(bytes(47), session=1, channel=1, direction=Direction.TO_HOST)
    for channel in (-1, MAX_CHANNEL + 1):
        with pytest.raises(Misuse, match="BAD_CHANNEL"):
            made(channel=channel)


def test_a_failure_of_the_cipher_has_spent_its_counter() -> None:
    found = made()
    cipher, _, _ = found.next()
    with pytest.raises(ValueError):
        cipher.encrypt_into(NONCE, b"plain", None, bytearray(3))
    assert found.next()[2] == 1


def test_used_up_keys_are_not_used_again() -> None:
    found = made(slots=1)
    found._counter = MAX_COUNTER + 1
    with pytest.raises(Unavailable, match="TRANSFER_DEAD"):
        found.next()
    found = made(slots=1)
    found.next()
    found._epoch = keys._LAST_EPOCH
    for _ in range(2):
        with pytest.raises(Unavailable, match="TRANSFER_DEAD"):
            found.next()
    assert found._secret == bytes(48)


def test_wiped_keys() -> None:
    found = made()
    assert found._secret != bytes(48)
    found.wipe()
    found.wipe()
    assert found._secret == bytes(48)
    with pytest.raises(Unavailable, match="TRANSFER_DEAD"):
        found.next()


def test_the_secret_of_an_epoch_is_overwritten() -> None:
    found = made(slots=1)
    found.next()
    before = bytes(found._secret)
    found.next()
    assert found._secret != before
