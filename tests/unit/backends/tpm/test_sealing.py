"""Sealing on a TPM: its digests are those that we compute, and nothing is left in it whatever goes wrong."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.backends.tpm import keys as templates
from cgpu_agent.backends.tpm import raw
from cgpu_agent.backends.tpm.answers import parse_sized
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.esapi import Handle
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.domain import sealedkeys as sealed
from cgpu_agent.errors import AgentError, Misuse, Unavailable
from cgpu_agent.wire import tpmpolicy
from cgpu_agent.wire.approval import EPOCH
from cgpu_agent.wire.keyring import OPEN
from cgpu_agent.wire.tpm import PcrSelection
from cgpu_agent.wire.tpmpolicy import START, NvIndex
from fixtures.owner import GROUP, Owner
from fixtures.sealedkeys import Failing, Vault, left_behind

pytestmark = pytest.mark.swtpm

SECRET = b"a secret of 32 bytes or so ....."


@pytest.fixture
def tpm(swtpm: Swtpm) -> Iterator[Commands]:
    commands = Commands(swtpm.transport())
    yield commands
    commands.close()


class Trial:
    """A policy session that only computes."""

    def __init__(self, tpm: Commands) -> None:
        self.esys: Any = tpm._esapi._esys
        self.session = tpm._esapi.start_policy_session(0x000B)

    def digest(self) -> bytes:
        return parse_sized(self.esys.policy_get_digest(self.session).marshal(), "TPM2B_DIGEST")


def nv_name(tpm: Commands, index: NvIndex) -> bytes:
    esapi = tpm._esapi
    _, name = esapi._esys.nv_read_public(esapi.object_at(index.index))
    return parse_sized(name.marshal(), "TPM2B_NAME")


def test_policy_pcr_is_that_of_the_tpm(tpm: Commands) -> None:
    tpm.pcr_extend(7, b"\1" * 32)
    trial = Trial(tpm)
    selection = PcrSelection.of("sha256", [7, 0, 16])
    tpm._esapi.policy_pcr(Handle(trial.session), selection.marshal())
    assert trial.digest() == tpmpolicy.policy_pcr(START, tpm.pcr_read(selection))


def test_name_of_an_index_and_policy_nv_are_those_of_the_tpm(tpm: Commands) -> None:
    tpm.sealing.nv_define(EPOCH)
    assert nv_name(tpm, EPOCH) == EPOCH.name(written=False)
    tpm.sealing.nv_increment(EPOCH)
    assert nv_name(tpm, EPOCH) == EPOCH.name()
    assert EPOCH.name() != EPOCH.name(written=False)
    value = tpm.sealing.nv_content(EPOCH)
    assert value is not None
    trial = Trial(tpm)
    first = tpmpolicy.policy_nv(START, EPOCH.name(), value, tpmpolicy.EQUAL)
    tpm._esapi.policy_nv(trial.session, tpm._esapi.object_at(EPOCH.index), value, tpmpolicy.EQUAL)
    assert trial.digest() == first
    tpm._esapi.policy_nv(trial.session, tpm._esapi.object_at(EPOCH.index), b"\xff" * 8, tpmpolicy.AT_MOST)
    assert trial.digest() == tpmpolicy.policy_nv(first, EPOCH.name(), b"\xff" * 8, tpmpolicy.AT_MOST)


def test_policy_secret_is_that_of_the_tpm(tpm: Commands) -> None:
    trial = Trial(tpm)
    tpm._esapi.policy_secret_endorsement(trial.session)
    endorsement = (0x4000000B).to_bytes(4, "big")
    assert trial.digest() == tpmpolicy.policy_secret(START, endorsement)


def test_policy_signed_is_that_of_the_tpm(tpm: Commands) -> None:
    parent = tpmpolicy.name_of(tpm.sealing.storage_key())
    trial = Trial(tpm)
    blob = tpm.sealing.create_setter(parent, b"")
    esapi = tpm._esapi
    with tpm.sealing._loaded(tpm.sealing._storage(parent), blob) as setter:
        approved = tpm.sealing.create_setter(parent, tpmpolicy.policy_pcr(START, tpm.pcr_read(PCRS)))
        with (
            tpm.sealing._loaded(tpm.sealing._storage(parent), approved) as key,
            tpm.sealing._session(tpm.sealing._storage(parent)) as session,
        ):
            esapi.policy_pcr(session, PCRS.marshal())
            nonce, cp_hash = esapi.session_nonce(trial.session), secrets.token_bytes(32)
            signature = esapi.sign(key, tpmpolicy.signed_hash(nonce, cp_hash), session)
            esapi.policy_signed(trial.session, key, nonce, cp_hash, signature)
        assert trial.digest() == tpmpolicy.policy_signed(START, tpmpolicy.name_of(approved.public))
        assert trial.digest() != tpmpolicy.policy_signed(START, tpmpolicy.name_of(blob.public))
        assert setter


PCRS = PcrSelection.of("sha256", [0, 7])


def test_name_of_an_authority_and_policy_authorize_are_those_of_the_tpm(tpm: Commands) -> None:
    owner = Owner()
    public = tpmpolicy.authority_public(owner.spki)
    esapi = tpm._esapi
    key = esapi.load_external(public)
    assert esapi.read_public(key) == public
    approved = sealed._for_the_tpm(owner.approve(tpm), GROUP)
    digest = hashlib.sha256(approved.approved + approved.ref).digest()
    ticket = esapi.verify_signature(key, digest, approved.signature)
    esapi.flush(key)
    tpm.sealing.nv_define(EPOCH)
    tpm.sealing.nv_increment(EPOCH)
    trial = Trial(tpm)
    esapi.policy_pcr(trial.session, PCRS.marshal())
    esapi.policy_nv(trial.session, esapi.object_at(EPOCH.index), b"\0" * 7 + b"\1", tpmpolicy.AT_MOST)
    assert trial.digest() == approved.approved
    name = tpmpolicy.name_of(public)
    esapi.policy_authorize(trial.session, approved.approved, approved.ref, name, ticket)
    assert trial.digest() == tpmpolicy.policy_authorize(name, approved.ref)


def test_nothing_is_left_behind_whichever_command_fails(swtpm: Swtpm, tmp_path: Path) -> None:
    vault = Vault(swtpm, tmp_path / "keys")
    vault.add(SECRET)
    ring, approval = vault.ring, vault.approval
    failing = Failing(swtpm.transport())
    attempts = succeeded = 0
    for job in ("open", "unseal", "seal", "setter", "close"):
        for fail_at in range(60):
            attempts += 1
            tpm = Commands(failing)
            failing.fail_at, failing.commands = fail_at, []
            with contextlib.suppress(AgentError):
                run(job, tpm, vault)
                succeeded += 1
            failing.fail_at = -1
            finished = len(failing.commands) <= fail_at
            # What the owner does with a context that says so.
            if tpm.stale:
                tpm.close()
                tpm = Commands(failing)
            assert left_behind(tpm) == [], (job, fail_at, [hex(code) for code in failing.commands])
            tpm.close()
            if finished:
                break
        else:
            pytest.fail(f"{job} takes more commands than were failed")
    assert attempts - succeeded > 30
    assert ring == vault.ring
    assert approval == vault.approval


def run(job: str, tpm: Commands, vault: Vault) -> None:
    ring = vault.ring
    if job == "open":
        vault.keys.open_latch(tpm, [vault.approval])
    elif job == "close":
        vault.keys.close_latch(tpm, [vault.approval])
    elif job == "seal":
        tpm.sealing.seal(ring.parent, ring.policy(GROUP), SECRET)
    elif job == "setter":
        tpm.sealing.create_setter(ring.parent, START)
    else:
        approved = sealed._for_the_tpm(vault.approval, GROUP)
        assert tpm.sealing.unseal(ring.parent, ring.keys[0][1], approved, ring.latch, OPEN) == SECRET


def test_secret_does_not_cross_the_wire_in_clear(swtpm: Swtpm, tmp_path: Path) -> None:
    seen: list[bytes] = []

    class Listening(Failing):
        def transact(self, command: bytes, deadline: float) -> bytes:
            frame = super().transact(command, deadline)
            seen.extend((command, frame))
            return frame

    vault = Vault(swtpm, tmp_path / "keys")
    vault.tpm = Commands(Listening(swtpm.transport()))
    vault.add(SECRET)
    vault.open_latch()
    assert vault.unseal() == SECRET
    assert len(seen) > 20
    assert not [frame for frame in seen if SECRET in frame]


@pytest.mark.parametrize("size", [0, 129])
def test_secrets_that_a_tpm_may_not_take_are_refused(tpm: Commands, size: int) -> None:
    parent = tpmpolicy.name_of(tpm.sealing.storage_key())
    with pytest.raises(Misuse) as caught:
        tpm.sealing.seal(parent, START, bytes(size))
    assert caught.value.slug == "TPM_ARGUMENT"


def test_storage_key_is_made_once_and_is_the_same_again_after_eviction(tpm: Commands, swtpm: Swtpm) -> None:
    first = tpm.sealing.storage_key()
    assert tpm.sealing.storage_key() == first
    esapi = Commands(swtpm.transport())._esapi
    esapi.evict_control(esapi.object_at(templates.STORAGE_HANDLE), templates.STORAGE_HANDLE)
    assert tpm.sealing.holds(tpmpolicy.name_of(first))
    assert not tpm.sealing.holds(tpmpolicy.name_of(b"another"))


def test_no_session_is_salted_to_a_storage_key_that_is_not_meant(swtpm: Swtpm, tmp_path: Path) -> None:
    vault = Vault(swtpm, tmp_path / "keys")
    ring, other = vault.ring, tpmpolicy.name_of(b"another")
    approved = sealed._for_the_tpm(vault.approval, "latch")
    sealing = vault.tpm.sealing
    for method in (
        lambda: sealing.seal(other, START, SECRET),
        lambda: sealing.create_setter(other, START),
        lambda: sealing.nv_write(ring.latch, OPEN, parent=other, setter=ring.setter, approval=approved),
        lambda: sealing.unseal(other, ring.setter, approved, ring.latch, OPEN),
    ):
        with pytest.raises(Unavailable) as caught:
            method()
        assert caught.value.slug == "KEY_LOST"


def test_name_of_an_index_is_looked_at_anew_before_each_use(swtpm: Swtpm, tmp_path: Path) -> None:
    """A context that saw the latch unwritten would sign for, and send, a Name that is stale by now."""
    vault = Vault(swtpm, tmp_path / "keys")
    vault.keys.close_latch(vault.tpm, [vault.approval])
    other = Commands(swtpm.transport())
    vault.keys.open_latch(other, [vault.approval])
    vault.keys.close_latch(vault.tpm, [vault.approval])
    assert not vault.keys.latch_is_open(other)
    vault.reset_under_contexts(shutdown=None, startup=b"\0\0")
    vault.keys.open_latch(other, [vault.approval])
    assert vault.keys.latch_is_open(vault.tpm)
    other.close()


def test_index_that_is_not_there_holds_nothing_and_counts_nothing(tpm: Commands) -> None:
    assert tpm.sealing.nv_content(EPOCH) is None
    assert tpm.sealing.nv_public(EPOCH.index) is None
    tpm.sealing.nv_undefine(EPOCH.index)
    with pytest.raises(Unavailable) as caught:
        tpm.sealing.nv_increment(EPOCH)
    assert caught.value.slug == "KEY_INDEX_LOST"
    assert raw.OWNER  # nobody's password was needed
