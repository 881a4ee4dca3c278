"""Policy digests and Names: the expected values are those that a TPM (swtpm 0.7) gave for the same inputs."""

from __future__ import annotations

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import tpmpolicy
from cgpu_agent.wire.approval import EPOCH
from cgpu_agent.wire.tpmpolicy import AT_MOST, AUTH_READ, CLEAR_STCLEAR, NO_DA, POLICY_WRITE, START, NvIndex
from fixtures.owner import Owner

SPKI = Owner(number=1).spki
AUTHORITY = bytes.fromhex("000b19366a7e682a0589dc1096b44aab74b7942f84b386b94eab81013d9970daf605")
ENDORSEMENT = bytes.fromhex("4000000b")
PCRS = {7: bytes.fromhex("5c85955f709283ecce2b74f1b1552918819f390911816e7bb466805a38ab87f3"), 0: bytes(32)}


def test_name_of_an_authority() -> None:
    assert tpmpolicy.name_of(tpmpolicy.authority_public(SPKI)) == AUTHORITY


def test_name_of_an_index_before_and_after_its_first_write() -> None:
    unwritten, written = EPOCH.name(written=False), EPOCH.name()
    assert unwritten.hex() == "000b861bb265fa626156abb93c127c3328f43bd8733628d05ea14ab24361224fbf9e"
    assert written.hex() == "000b5fc9ca6edfea771d6ddb66b1355ed347e64249e7a005b8efd189dec6c2b30c86"


def test_name_of_an_index_says_who_may_write_it() -> None:
    latch = NvIndex(0x018C6701, POLICY_WRITE | AUTH_READ | NO_DA | CLEAR_STCLEAR, bytes(range(32)), 8)
    name = latch.name(written=False)
    assert name.hex() == "000bd2a08f474c5a63410b4bbdceaa0fa3451486fc130286a773f4d1d1d15fd82f20"


@pytest.mark.parametrize(
    ("digest", "expected"),
    [
        (tpmpolicy.policy_pcr(START, PCRS), "523eb002f07df581018c143e878d2b368a5cd7f4a0b01dd923209cb417d548c0"),
        (
            tpmpolicy.policy_nv(START, EPOCH.name(), (5).to_bytes(8, "big"), AT_MOST),
            "36ff1876accffb1470e81ce2782ba2146d6590128cdcd969d3dd3428d0121186",
        ),
        (
            tpmpolicy.policy_signed(START, AUTHORITY, b"ref"),
            "a9ea8675c0e66246e163f1ff89c420aee486795a20b67cf6ae49ca53ca878392",
        ),
        (
            tpmpolicy.policy_secret(START, ENDORSEMENT),
            "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa",
        ),
        (
            tpmpolicy.policy_authorize(AUTHORITY, b"a policyRef"),
            "cb50f3da8a6c3909959ac1ece09642e6ad9e046918bddb51869434de19212d3e",
        ),
    ],
    ids=["pcr", "nv", "signed", "secret", "authorize"],
)
def test_digest_of_a_policy_command(digest: bytes, expected: str) -> None:
    assert digest.hex() == expected


@pytest.mark.parametrize(
    "spki",
    [
        b"",
        SPKI[:-1],
        SPKI + b"\0",
        b"\x31" + SPKI[1:],
        SPKI[:26] + b"\x02" + SPKI[27:],
        SPKI[:22] + b"\x08" + SPKI[23:],
    ],
)
def test_only_an_uncompressed_p256_point_is_an_authority(spki: bytes) -> None:
    with pytest.raises(HostileInput) as caught:
        tpmpolicy.authority_public(spki)
    assert caught.value.slug == "BAD_KEY"
