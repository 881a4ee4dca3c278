"""Sealed keys: what the TPM itself refuses to whoever has its blobs, and what the agent refuses besides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from cgpu_agent.backends.base import BootApproval
from cgpu_agent.backends.tpm import keys as templates
from cgpu_agent.backends.tpm import raw
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.faults import TpmFault
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.backends.tpm.transport import UnixPerCommand, response_code
from cgpu_agent.domain import sealedkeys as sealed
from cgpu_agent.domain.agentlog import AgentLog
from cgpu_agent.domain.latch import Latch
from cgpu_agent.domain.sealedkeys import SealedKeys
from cgpu_agent.domain.store import Store
from cgpu_agent.errors import DeviceFault, Misuse, Unavailable
from cgpu_agent.verifier.approval import _load_key, _sign, sign_approval
from cgpu_agent.wire import approval as approvals
from cgpu_agent.wire import tpmpolicy
from cgpu_agent.wire.approval import EPOCH, Approval
from cgpu_agent.wire.keyring import CLOSED, LATCH_HANDLE, OPEN
from cgpu_agent.wire.tpmpolicy import AUTH_READ, NvIndex
from fixtures.owner import FLEET, GROUP, Owner
from fixtures.sealedkeys import KEY, Thief, Vault, left_behind, set_owner_auth

pytestmark = pytest.mark.swtpm

SECRET = b"what the disk of the database is encrypted with"
CLEAR, STATE = b"\0\0", b"\0\1"
NV_UNINITIALIZED, POLICY, PCR_CHANGED, POLICY_FAIL, WRONG_DIGEST = 0x14A, 0x126, 0x128, 0x99D, 0x1C4
BAD_HMAC, AUTH_UNAVAILABLE = 0x9A2, 0x12F
ALL_STEPS = "pcr epoch authorize latch"


@pytest.fixture
def vault(swtpm: Swtpm, tmp_path: Path) -> Iterator[Vault]:
    vault = Vault(swtpm, tmp_path / "keys")
    vault.add(SECRET)
    yield vault
    assert left_behind(vault.tpm) == []
    vault.tpm.close()


@pytest.fixture
def thief(vault: Vault) -> Iterator[Thief]:
    thief = Thief(vault)
    yield thief
    thief.close()


def refused(action: Callable[[], object]) -> str:
    with pytest.raises((Unavailable, Misuse, DeviceFault)) as caught:
        action()
    return caught.value.slug


def log_of(vault: Vault, folder: Path) -> AgentLog:
    log = AgentLog(Store(folder), 13)
    log.open(vault.tpm)
    return log


# The gate and the approval, as the TPM sees them


def test_opens_in_an_approved_boot_with_the_latch_open(vault: Vault) -> None:
    vault.open_latch()
    assert vault.unseal() == SECRET


def test_latch_never_written_since_reset_is_closed(vault: Vault, thief: Thief) -> None:
    assert refused(vault.unseal) == "KEY_LATCH_CLOSED"
    assert thief.steal(ALL_STEPS) == NV_UNINITIALIZED


def test_latch_written_back_is_closed(vault: Vault, thief: Thief) -> None:
    vault.open_latch()
    assert vault.keys.close_latch(vault.tpm, [vault.approval])
    assert refused(vault.unseal) == "KEY_LATCH_CLOSED"
    assert thief.steal(ALL_STEPS) == POLICY


@pytest.mark.parametrize(
    ("steps", "code"),
    [
        ("pcr epoch authorize", POLICY_FAIL),
        ("latch", POLICY_FAIL),
        ("", POLICY_FAIL),
        ("pcr epoch", POLICY_FAIL),
        ("pcr epoch latch", POLICY_FAIL),
        ("pcr epoch authorize latch latch", POLICY_FAIL),
        ("authorize latch", WRONG_DIGEST),
        ("pcr authorize latch", WRONG_DIGEST),
        ("epoch authorize latch", WRONG_DIGEST),
        ("epoch pcr authorize latch", WRONG_DIGEST),
        ("pcr epoch latch authorize", WRONG_DIGEST),
        ("latch pcr epoch authorize", WRONG_DIGEST),
    ],
)
def test_tpm_refuses_every_omission_and_every_other_order(vault: Vault, thief: Thief, steps: str, code: int) -> None:
    vault.open_latch()
    assert thief.steal(steps) == code
    assert thief.steal(ALL_STEPS) == SECRET


def test_no_password_stands_in_for_a_policy(vault: Vault, thief: Thief) -> None:
    vault.open_latch()
    sealing, ring = thief.tpm.sealing, vault.ring
    no_ticket = bytes.fromhex("8024 40000007 0000")
    to_sign = raw.sized(bytes(32)) + bytes.fromhex("0010") + no_ticket
    for blob, command, parameters in ((ring.keys[0][1], 0x15E, b""), (ring.setter, 0x15D, to_sign)):
        with sealing._loaded(sealing._storage(ring.parent), blob):
            (handle,) = left_behind(thief.tpm)
            with pytest.raises(TpmFault) as caught:
                vault.swtpm.execute(raw._authorised(command, [handle], parameters))
            assert caught.value.code == AUTH_UNAVAILABLE


@pytest.mark.parametrize("policy", ["nothing", "latch"])
def test_no_signature_of_the_owner_can_leave_the_latch_out(vault: Vault, thief: Thief, policy: str) -> None:
    """Even where the owner approves the empty policy, or one that has looked at the latch already."""
    approved = {
        "nothing": tpmpolicy.START,
        "latch": tpmpolicy.policy_nv(tpmpolicy.START, vault.ring.latch.name(), OPEN, tpmpolicy.EQUAL),
    }[policy]
    bare = signed_by(vault.owner, thief.approval(), approved)
    vault.open_latch()
    before = "" if policy == "nothing" else "latch "
    assert thief.steal(f"{before}authorize", bare) == POLICY_FAIL
    assert thief.steal(f"{before}authorize latch", bare) == SECRET
    vault.keys.close_latch(vault.tpm, [vault.approval])
    assert thief.steal(f"{before}authorize latch", bare) == POLICY


def signed_by(owner: Owner, like: BootApproval, approved: bytes) -> BootApproval:
    signature = _sign(_load_key(owner.pem), approved + like.ref)
    r, s = signature[:32], signature[32:]
    return dataclasses.replace(like, approved=approved, signature=like.signature[:4] + raw.sized(r) + raw.sized(s))


@pytest.mark.parametrize("shutdown", [None, CLEAR, STATE])
def test_reset_and_restart_close_the_latch(vault: Vault, shutdown: bytes | None) -> None:
    vault.open_latch()
    vault.power_cycle(shutdown=shutdown, startup=CLEAR)
    assert Thief(vault).steal(ALL_STEPS) == NV_UNINITIALIZED
    assert refused(vault.unseal) == "KEY_LATCH_CLOSED"
    vault.open_latch()
    assert vault.unseal() == SECRET


def test_killed_tpm_comes_back_closed(vault: Vault) -> None:
    vault.open_latch()
    vault.swtpm.kill()
    vault.swtpm.start()
    vault.reconnect()
    assert refused(vault.unseal) == "KEY_LATCH_CLOSED"
    vault.open_latch()
    assert vault.unseal() == SECRET


def test_resume_leaves_the_latch_open_until_the_start_closes_it(vault: Vault, tmp_path: Path) -> None:
    vault.open_latch()
    vault.power_cycle(shutdown=STATE, startup=STATE)
    assert vault.unseal() == SECRET
    Latch(vault.keys, log_of(vault, tmp_path / "log")).close(vault.tpm, [vault.approval])
    assert refused(vault.unseal) == "KEY_LATCH_CLOSED"


# Approvals


def test_boot_that_nobody_approved(vault: Vault, thief: Thief) -> None:
    vault.open_latch()
    vault.tpm.pcr_extend(7, b"\1" * 32)
    assert refused(vault.unseal) == "KEY_NOT_APPROVED"
    assert thief.steal(ALL_STEPS) == WRONG_DIGEST


def test_new_boot_opens_by_a_new_approval_without_resealing(vault: Vault) -> None:
    vault.tpm.pcr_extend(7, b"\1" * 32)
    new = vault.owner.approve(vault.tpm)
    vault.keys.open_latch(vault.tpm, [vault.approval, new])
    assert vault.unseal(vault.approval, new) == SECRET


def test_approval_of_another_authority(vault: Vault, thief: Thief) -> None:
    vault.open_latch()
    stranger = Owner().approve(vault.tpm)
    assert refused(lambda: vault.unseal(stranger)) == "KEY_NOT_APPROVED"
    assert thief.steal(ALL_STEPS, sealed._for_the_tpm(stranger, GROUP)) == POLICY_FAIL


def test_signature_of_another_authority(vault: Vault) -> None:
    vault.open_latch()
    forged = dataclasses.replace(Owner().approve(vault.tpm), authority=vault.owner.spki)
    assert refused(lambda: vault.unseal(forged)) == "KEY_NOT_APPROVED"
    assert vault.unseal(forged, vault.approval) == SECRET


def test_approval_of_another_fleet_or_group(vault: Vault, thief: Thief) -> None:
    vault.open_latch()
    theirs = sign_approval(vault.owner.pem, fleet="fleet-b", groups=[GROUP], pcrs=vault.approval.pcrs, epoch=1)
    for changed in (
        theirs,
        dataclasses.replace(theirs, fleet=FLEET),
        dataclasses.replace(vault.approval, signatures={"latch": vault.approval.signatures["latch"]}),
        dataclasses.replace(vault.approval, signatures={GROUP: vault.approval.signatures["latch"]}),
    ):
        assert refused(lambda each=changed: vault.unseal(each)) == "KEY_NOT_APPROVED"  # type: ignore[misc]
    for each, group in ((theirs, GROUP), (vault.approval, "latch")):
        assert thief.steal(ALL_STEPS, sealed._for_the_tpm(each, group)) == POLICY_FAIL
    assert vault.unseal(theirs, vault.approval) == SECRET


def test_approval_of_an_epoch_that_is_over(vault: Vault, thief: Thief) -> None:
    """An old, vulnerable kernel boots, and brings its approval along."""
    vault.open_latch()
    new = vault.owner.approve(vault.tpm, epoch=2)
    assert vault.keys.raise_epoch(vault.tpm, 2) == 2
    assert refused(vault.unseal) == "KEY_APPROVAL_OLD"
    assert thief.steal(ALL_STEPS) == POLICY
    assert vault.unseal(vault.approval, new) == SECRET


def test_epoch_cannot_be_lied_about(vault: Vault) -> None:
    vault.open_latch()
    vault.keys.raise_epoch(vault.tpm, 2)
    assert refused(lambda: vault.unseal(dataclasses.replace(vault.approval, epoch=2))) == "KEY_NOT_APPROVED"


def test_epoch_counter_defined_anew_does_not_start_again(vault: Vault, thief: Thief) -> None:
    vault.open_latch()
    vault.keys.raise_epoch(vault.tpm, 3)
    sealing = thief.tpm.sealing
    sealing.nv_define(EPOCH)
    assert refused(vault.unseal) == "KEY_INDEX_LOST"
    sealing.nv_increment(EPOCH)
    assert vault.keys.epoch(vault.tpm) >= 3
    assert refused(vault.unseal) == "KEY_APPROVAL_OLD"
    sealing.nv_undefine(EPOCH.index)
    ordinary = NvIndex(EPOCH.index, tpmpolicy.AUTH_WRITE | AUTH_READ | tpmpolicy.NO_DA, b"", 8)
    sealing.nv_define(ordinary)
    assert refused(vault.unseal) == "KEY_INDEX_LOST"


# The latch, and who may write it


def raw_nv_write(auth_handle: int, data: bytes) -> bytes:
    return raw._authorised(0x137, [auth_handle, LATCH_HANDLE], raw.sized(data) + b"\0\0")


@pytest.mark.parametrize(("auth_handle", "code"), [(raw.OWNER, 0x149), (LATCH_HANDLE, 0x12F)])
def test_neither_owner_nor_index_auth_opens_the_latch(vault: Vault, auth_handle: int, code: int) -> None:
    with pytest.raises(TpmFault) as caught:
        vault.swtpm.execute(raw_nv_write(auth_handle, OPEN))
    assert caught.value.code == code


def test_setter_of_another_opens_nothing(vault: Vault, thief: Thief) -> None:
    ring = vault.ring
    own = thief.tpm.sealing.create_setter(ring.parent, tpmpolicy.START)
    with pytest.raises((TpmFault, Unavailable)):
        thief.tpm.sealing.nv_write(
            ring.latch, OPEN, parent=ring.parent, setter=own, approval=sealed._for_the_tpm(vault.approval, "latch")
        )
    assert not vault.keys.latch_is_open(vault.tpm)


def test_setter_signs_only_in_an_approved_boot(vault: Vault, thief: Thief) -> None:
    """Its blob and an approval are not enough: the TPM signs with it only where the approval holds."""
    ring = vault.ring
    vault.tpm.pcr_extend(7, b"\1" * 32)
    assert refused(vault.open_latch) == "KEY_NOT_APPROVED"
    storage = thief.tpm.sealing._storage(ring.parent)
    with thief.tpm.sealing._loaded(storage, ring.setter) as setter, thief.tpm.sealing._session(storage) as session:
        with pytest.raises(TpmFault) as caught:
            thief.esapi.sign(setter, bytes(32), session)
        assert caught.value.code == POLICY_FAIL


def test_signature_of_the_setter_is_good_for_one_session_and_one_write(vault: Vault, thief: Thief) -> None:
    ring, esapi, sealing = vault.ring, thief.esapi, thief.tpm.sealing
    storage = sealing._storage(ring.parent)
    closing = tpmpolicy.nv_write_hash(ring.latch.name(written=False), CLOSED)
    with sealing._session(storage) as session, sealing._loaded(storage, ring.setter) as setter:
        nonce = esapi.session_nonce(session)
        approved = sealed._for_the_tpm(vault.approval, "latch")
        with sealing._approved(storage, approved) as authorised:
            signature = esapi.sign(setter, tpmpolicy.signed_hash(nonce, closing), authorised)
        esapi.policy_signed(session, setter, nonce, closing, signature)
        latch = sealing._present(ring.latch)[0]
        with pytest.raises(TpmFault):
            esapi.nv_write(latch, OPEN, session)
        with sealing._session(storage) as second, pytest.raises(TpmFault):
            esapi.policy_signed(second, setter, nonce, closing, signature)
        esapi.nv_write(latch, CLOSED, session)
    assert not vault.keys.latch_is_open(vault.tpm)


@pytest.mark.parametrize("attributes", [tpmpolicy.AUTH_WRITE | AUTH_READ, tpmpolicy.POLICY_WRITE | AUTH_READ])
def test_latch_defined_anew_under_another_policy_is_another(vault: Vault, thief: Thief, attributes: int) -> None:
    """Its Name differs, so a value in it opens nothing; and the agent says so instead of believing it."""
    vault.open_latch()
    fake = NvIndex(LATCH_HANDLE, attributes | tpmpolicy.NO_DA | tpmpolicy.CLEAR_STCLEAR, b"", 8)
    thief.tpm.sealing.nv_define(fake)
    if attributes & tpmpolicy.AUTH_WRITE:
        vault.swtpm.execute(raw_nv_write(LATCH_HANDLE, OPEN))
        assert thief.steal(ALL_STEPS) == POLICY_FAIL
    assert refused(vault.unseal) == "KEY_INDEX_LOST"
    assert refused(vault.open_latch) == "KEY_INDEX_LOST"


def test_latch_defined_anew_alike_comes_up_closed(vault: Vault, thief: Thief) -> None:
    vault.open_latch()
    thief.tpm.sealing.nv_define(vault.ring.latch)
    assert thief.steal(ALL_STEPS) == NV_UNINITIALIZED
    vault.open_latch()
    assert vault.unseal() == SECRET


def test_undefined_latch_is_closed_and_can_be_opened_again(vault: Vault, thief: Thief) -> None:
    vault.open_latch()
    thief.tpm.sealing.nv_undefine(LATCH_HANDLE)
    assert refused(vault.unseal) == "KEY_LATCH_CLOSED"
    vault.open_latch()
    assert vault.unseal() == SECRET


def test_start_closes_the_latch_where_nothing_approves_writing_it(vault: Vault) -> None:
    """Another kernel was started without a reset of the TPM (kexec): it finds the latch open."""
    vault.open_latch()
    vault.tpm.pcr_extend(7, b"\1" * 32)
    assert vault.keys.close_latch(vault.tpm, [vault.approval])
    assert vault.tpm.sealing.nv_public(LATCH_HANDLE) is None


@pytest.mark.parametrize("damage", [None, b"{}"])
def test_start_closes_the_latch_where_the_files_are_gone(vault: Vault, damage: bytes | None) -> None:
    vault.open_latch()
    file = vault.folder / "keys"
    file.unlink() if damage is None else file.write_bytes(damage)
    assert vault.keys.close_latch(vault.tpm, [vault.approval])
    assert vault.tpm.sealing.nv_public(LATCH_HANDLE) is None


def test_start_leaves_an_index_of_others_alone(swtpm: Swtpm, tmp_path: Path) -> None:
    tpm = Commands(swtpm.transport())
    theirs = NvIndex(LATCH_HANDLE, tpmpolicy.AUTH_WRITE | AUTH_READ, b"", 8)
    tpm.sealing.nv_define(theirs)
    swtpm.execute(raw_nv_write(LATCH_HANDLE, OPEN))
    assert not SealedKeys(Store(tmp_path / "keys")).close_latch(tpm, [])
    assert tpm.sealing.nv_content(theirs) == OPEN
    tpm.close()


def test_stuck_latch_is_not_said_to_be_closed(vault: Vault) -> None:
    vault.open_latch()
    set_owner_auth(vault.swtpm, b"somebody's")
    vault.tpm.pcr_extend(7, b"\1" * 32)
    assert refused(lambda: vault.keys.close_latch(vault.tpm, [vault.approval])) == "KEY_LATCH_STUCK"


# Sessions


def test_revocation_ends_sessions_that_saw_the_latch_open(vault: Vault, thief: Thief, tmp_path: Path) -> None:
    latch = Latch(vault.keys, log_of(vault, tmp_path / "log"))
    latch.settle(vault.tpm)
    latch.open(vault.tpm, [vault.approval])
    with thief.session(ALL_STEPS) as primed, thief.item() as item:
        latch.close(vault.tpm, [vault.approval])
        # The TPM looks at an index once: this is what the record on top of the closing is for.
        assert thief.esapi.unseal(item, primed) == SECRET
    latch.settle(vault.tpm)
    latch.open(vault.tpm, [vault.approval])
    with thief.session(ALL_STEPS) as primed, thief.item() as item:
        latch.revoke(vault.tpm, [vault.approval])
        with pytest.raises(TpmFault) as caught:
            thief.esapi.unseal(item, primed)
        assert caught.value.code == PCR_CHANGED


def test_latch_stays_closed_until_its_closing_is_on_record(vault: Vault, tmp_path: Path) -> None:
    log = log_of(vault, tmp_path / "log")
    latch = Latch(vault.keys, log)
    assert refused(lambda: latch.open(vault.tpm, [vault.approval])) == "KEY_LATCH_CLOSED"
    latch.close(vault.tpm, [vault.approval])
    latch.settle(vault.tpm)
    latch.settle(vault.tpm)
    assert [record.content for record in log.records] == [b'{"event":"latch-closed"}']
    latch.open(vault.tpm, [vault.approval])
    assert latch.is_open(vault.tpm)


def test_secret_is_not_handed_on_when_the_latch_was_closed_meanwhile(vault: Vault) -> None:
    vault.open_latch()
    sealing = vault.tpm.sealing
    unseal = sealing._esapi.unseal

    def closing(item: object, session: object) -> bytes:
        secret = unseal(item, session)  # type: ignore[arg-type]
        vault.keys.close_latch(vault.tpm, [vault.approval])
        return secret

    sealing._esapi.unseal = closing  # type: ignore[method-assign,assignment]
    assert refused(vault.unseal) == "KEY_LATCH_CLOSED"


@pytest.mark.parametrize("salted", [True, False])
def test_nobody_else_can_use_a_salted_session(vault: Vault, thief: Thief, salted: bool) -> None:
    """Without a resource manager a second client can name our session: only its salt keeps it ours."""
    vault.open_latch()
    with thief.session(ALL_STEPS, salted=salted), thief.item():
        objects = [handle for handle in left_behind(thief.tpm) if handle >> 24 == 0x80]
        sessions = [handle for handle in left_behind(thief.tpm) if handle >> 24 == 0x03]
        auth = sessions[-1].to_bytes(4, "big") + bytes.fromhex("0000 01 0000")
        body = objects[-1].to_bytes(4, "big") + len(auth).to_bytes(4, "big") + auth
        hijack = raw._command(0x15E, body, raw._SESSIONS)
        if salted:
            with pytest.raises(TpmFault) as caught:
                vault.swtpm.execute(hijack)
            assert caught.value.code == BAD_HMAC
        else:
            assert SECRET in vault.swtpm.execute(hijack)


class Interloper:
    """Between agent and TPM: before each use of a policy session it tries to use that session without its key.

    It sends the agent's own command with the authorisation that an unsalted session would take.
    """

    exclusive = True
    HANDLES: ClassVar = {0x15E: 1, 0x15D: 1, 0x137: 2}
    """Of Unseal, Sign and NV_Write."""

    def __init__(self, inner: UnixPerCommand) -> None:
        self.inner = inner
        self.refused: list[tuple[int, int]] = []
        self.signed: list[bytes] = []

    def transact(self, command: bytes, deadline: float) -> bytes:
        code = int.from_bytes(command[6:10], "big")
        if code in self.HANDLES:
            area = 10 + 4 * self.HANDLES[code]
            size = int.from_bytes(command[area : area + 4], "big")
            auth = command[area + 4 : area + 8] + bytes.fromhex("0000 01 0000")
            rest = command[area + 4 + size :]
            hijack = raw._command(code, command[10:area] + len(auth).to_bytes(4, "big") + auth + rest, raw._SESSIONS)
            self.refused.append((code, response_code(self.inner.transact(hijack, deadline))))
        if code == 0x160:
            self.signed.append(command[18:])
        return self.inner.transact(command, deadline)

    def close(self) -> None:
        self.inner.close()


def test_every_session_that_the_agent_primes_is_the_agents_alone(vault: Vault) -> None:
    interloper = Interloper(vault.swtpm.transport())
    vault.tpm = Commands(interloper)
    vault.open_latch()
    assert vault.unseal() == SECRET
    assert interloper.refused == [(0x15D, BAD_HMAC), (0x137, BAD_HMAC), (0x15E, BAD_HMAC)]


def test_what_the_setter_signs_names_the_session_and_the_write(vault: Vault) -> None:
    interloper = Interloper(vault.swtpm.transport())
    vault.tpm = Commands(interloper)
    vault.open_latch()
    (sent,) = interloper.signed
    nonce_size = int.from_bytes(sent[:2], "big")
    cp_hash = sent[2 + nonce_size + 2 :][:32]
    assert nonce_size == 32
    assert cp_hash == tpmpolicy.nv_write_hash(vault.ring.latch.name(written=False), OPEN)


def test_extend_while_a_key_is_opened_only_costs_another_try(vault: Vault) -> None:
    vault.open_latch()
    extends = iter(range(3))
    esapi = vault.tpm._esapi
    load = esapi.load

    def disturbed(*args: object) -> object:
        if next(extends, None) is not None:
            vault.tpm.pcr_extend(10, b"\1" * 32)
        return load(*args)  # type: ignore[arg-type]

    esapi.load = disturbed  # type: ignore[method-assign,assignment]
    assert vault.unseal() == SECRET
    extends = iter(range(100))
    assert refused(vault.unseal) == "TPM_BUSY"


# The TPM and the disk


def test_cleared_tpm_has_lost_the_keys(vault: Vault) -> None:
    vault.clear()
    assert refused(vault.unseal) == "KEY_LOST"
    assert refused(vault.open_latch) == "KEY_LOST"


def test_evicted_storage_key_is_made_again(vault: Vault) -> None:
    vault.open_latch()
    evict_storage_key(vault.swtpm)
    assert vault.unseal() == SECRET


def test_storage_key_swapped_under_the_agent_is_noticed(vault: Vault, thief: Thief) -> None:
    """A like key of the same hierarchy, but another one: no session may be salted to it."""
    vault.open_latch()
    evict_storage_key(vault.swtpm)
    like = templates.storage_parent()[:-1] + b"\1"
    handle, _ = thief.esapi.create_primary(like, "owner")
    thief.esapi.evict_control(handle, templates.STORAGE_HANDLE)
    thief.esapi.flush(handle)
    # ESYS compares it with the one that it saw before; the context is of no use then, and a new one tells.
    assert refused(vault.unseal) == "TPM_IO"
    assert vault.tpm.stale
    vault.reconnect()
    assert refused(vault.unseal) == "KEY_LOST"
    evict_storage_key(vault.swtpm)
    vault.reconnect()
    assert vault.unseal() == SECRET


def test_what_was_undefined_is_mended_by_an_operators_word(vault: Vault, thief: Thief) -> None:
    sealing, ring = thief.tpm.sealing, vault.ring
    evict_storage_key(vault.swtpm)
    for index in (EPOCH.index, LATCH_HANDLE, ring.head.index):
        sealing.nv_undefine(index)
    assert refused(lambda: vault.keys.list(vault.tpm)) == "KEYS_MISMATCH"
    assert refused(lambda: adopt(vault, vault.approval)) == "KEY_APPROVAL_OLD"
    new = vault.owner.approve(vault.tpm, epoch=vault.keys.epoch(vault.tpm))
    assert adopt(vault, new) == ring.generation
    vault.keys.open_latch(vault.tpm, [new])
    assert vault.unseal(new) == SECRET


def define_with_auth(vault: Vault, index: NvIndex) -> None:
    """Define an index of the same Name with an auth value, which is no part of it."""
    body = raw.sized(b"the thief's") + raw.sized(index.public())
    vault.swtpm.execute(raw._authorised(0x12A, [raw.OWNER], body))


@pytest.mark.parametrize("which", ["latch", "head", "epoch"])
def test_index_with_somebodys_auth_opens_nothing_and_is_mended(vault: Vault, thief: Thief, which: str) -> None:
    index = {"latch": vault.ring.latch, "head": vault.ring.head, "epoch": EPOCH}[which]
    vault.open_latch()
    thief.tpm.sealing.nv_undefine(index.index)
    define_with_auth(vault, index)
    if which == "epoch":
        by_auth = bytes.fromhex("40000009 0000 00") + raw.sized(b"the thief's")
        body = 2 * index.index.to_bytes(4, "big") + len(by_auth).to_bytes(4, "big") + by_auth
        vault.swtpm.execute(raw._command(0x134, body, raw._SESSIONS))
    assert refused(vault.unseal) == {"latch": "KEY_LATCH_CLOSED", "head": "KEYS_MISMATCH", "epoch": "TPM_AUTH"}[which]
    new = vault.owner.approve(vault.tpm, epoch=9)
    adopt(vault, new)
    vault.keys.open_latch(vault.tpm, [new])
    assert vault.unseal(new) == SECRET


def test_latch_that_cannot_be_read_is_undefined_at_start(vault: Vault, thief: Thief) -> None:
    thief.tpm.sealing.nv_undefine(LATCH_HANDLE)
    define_with_auth(vault, vault.ring.latch)
    vault.open_latch()
    assert refused(vault.unseal) == "TPM_AUTH"
    assert vault.keys.close_latch(vault.tpm, [vault.approval])
    assert vault.tpm.sealing.nv_public(LATCH_HANDLE) is None


def test_nothing_is_adopted_in_a_boot_that_nobody_approved(vault: Vault) -> None:
    vault.tpm.pcr_extend(7, b"\1" * 32)
    assert refused(lambda: adopt(vault, vault.approval)) == "KEY_NOT_APPROVED"


def test_only_the_keys_of_the_named_owner_are_adopted(vault: Vault) -> None:
    other = Owner().approve(vault.tpm)
    assert refused(lambda: adopt(vault, vault.approval, authority=other.authority)) == "KEYS_MISMATCH"


def adopt(vault: Vault, *approvals: Approval, authority: bytes | None = None) -> int:
    return vault.keys.adopt(vault.tpm, authority=authority or vault.owner.spki, approvals=approvals)


def test_keys_whose_file_is_gone_are_not_given_up_unasked(vault: Vault) -> None:
    """Somebody mounts the wrong disk: making new keys would undefine what the old ones need."""
    file = vault.folder / "keys"
    kept = file.read_bytes()
    file.unlink()
    create = {"authority": vault.owner.spki, "fleet": FLEET, "approvals": [vault.approval]}
    assert refused(lambda: vault.keys.create(vault.tpm, **create)) == "KEYS_EXIST"  # type: ignore[arg-type]
    file.write_bytes(kept)
    vault.open_latch()
    assert vault.unseal() == SECRET
    file.unlink()
    vault.keys.create(vault.tpm, **create, replace_lost=True)  # type: ignore[arg-type]
    assert vault.keys.list(vault.tpm) == ()
    file.write_bytes(kept)
    assert refused(vault.unseal) == "KEY_INDEX_LOST"


def evict_storage_key(swtpm: Swtpm) -> None:
    tpm = Commands(swtpm.transport())
    tpm._esapi.evict_control(tpm._esapi.object_at(templates.STORAGE_HANDLE), templates.STORAGE_HANDLE)
    tpm.close()


def test_key_planted_in_the_place_of_the_storage_key_is_refused(swtpm: Swtpm, tmp_path: Path) -> None:
    tpm = Commands(swtpm.transport())
    tpm.create_platform_ak(templates.STORAGE_HANDLE, "ecc")
    approval = Owner().approve(tpm)
    keys = SealedKeys(Store(tmp_path / "keys"))
    create = {"authority": approval.authority, "fleet": FLEET, "approvals": [approval]}
    assert refused(lambda: keys.create(tpm, **create)) == "KEY_INDEX_LOST"  # type: ignore[arg-type]
    tpm.close()


def test_blob_of_another_tpm_does_not_load(vault: Vault, thief: Thief) -> None:
    ring = vault.ring
    private = bytearray(ring.keys[0][1].private)
    private[-1] ^= 1
    broken = dataclasses.replace(ring.keys[0][1], private=bytes(private))
    vault.open_latch()
    boot = sealed._for_the_tpm(vault.approval, GROUP)
    sealing = vault.tpm.sealing
    assert refused(lambda: sealing.unseal(ring.parent, broken, boot, ring.latch, OPEN)) == "KEY_LOST"


def test_old_disk_is_refused(vault: Vault) -> None:
    """Yesterday's disk still has the key that was removed today."""
    vault.open_latch()
    file = vault.folder / "keys"
    yesterday = file.read_bytes()
    vault.keys.remove(vault.tpm, KEY, [vault.approval])
    today = file.read_bytes()
    for name in ("keys", "keys-next"):
        (vault.folder / name).write_bytes(yesterday)
        if name == "keys":
            assert refused(vault.unseal) == "KEYS_MISMATCH"
            assert refused(lambda: vault.keys.list(vault.tpm)) == "KEYS_MISMATCH"
            assert refused(vault.add) == "KEYS_MISMATCH"
    file.write_bytes(today)
    assert vault.keys.list(vault.tpm) == ()


def test_change_that_crashed_cannot_be_brought_back_after_another(vault: Vault) -> None:
    """The host keeps the half-made change of a crash, and puts it beside the files again later."""
    old = (vault.folder / "keys").read_bytes()
    writes = SealedKeys(DyingStore(vault.folder, after="keys-next"))
    with pytest.raises(KeyboardInterrupt):
        writes.add(vault.tpm, "planted", GROUP, [vault.approval], created=1)
    kept = (vault.folder / "keys-next").read_bytes()
    vault.keys.remove(vault.tpm, KEY, [vault.approval])
    assert vault.keys.list(vault.tpm) == ()
    (vault.folder / "keys").write_bytes(old)
    (vault.folder / "keys-next").write_bytes(kept)
    assert refused(lambda: vault.keys.list(vault.tpm)) == "KEYS_MISMATCH"


class DyingStore(Store):
    """A store of a process that dies right after it wrote one file."""

    def __init__(self, folder: Path, *, after: str) -> None:
        super().__init__(folder)
        self._after = after

    def write(self, name: str, data: bytes) -> None:
        super().write(name, data)
        if name == self._after:
            raise KeyboardInterrupt


def test_head_undefined_or_forged_is_a_mismatch(vault: Vault, thief: Thief) -> None:
    head = vault.ring.head
    thief.tpm.sealing.nv_define(head)
    assert refused(lambda: vault.keys.list(vault.tpm)) == "KEYS_MISMATCH"
    forged = NvIndex(head.index, tpmpolicy.AUTH_WRITE | AUTH_READ | tpmpolicy.NO_DA, b"", 32)
    thief.tpm.sealing.nv_define(forged)
    digest = vault.ring.digest
    vault.swtpm.execute(raw._authorised(0x137, [head.index, head.index], raw.sized(digest) + b"\0\0"))
    assert refused(lambda: vault.keys.list(vault.tpm)) == "KEY_INDEX_LOST"


def test_keys_change_only_in_an_approved_boot(vault: Vault) -> None:
    vault.tpm.pcr_extend(7, b"\1" * 32)
    assert refused(lambda: vault.keys.remove(vault.tpm, KEY, [vault.approval])) == "KEY_NOT_APPROVED"
    assert [info.id for info in vault.keys.list(vault.tpm)] == [KEY]


def test_owner_password_is_needed_once_only_and_keeps_others_from_undefining(swtpm: Swtpm, tmp_path: Path) -> None:
    set_owner_auth(swtpm, b"the operator's")
    with pytest.raises(TpmFault):
        Vault(swtpm, tmp_path / "none")
    vault = Vault(swtpm, tmp_path / "keys", owner_auth=b"the operator's")
    vault.reconnect()
    vault.add(SECRET)
    vault.open_latch()
    assert vault.unseal() == SECRET
    with pytest.raises(TpmFault) as caught:
        vault.tpm.sealing.nv_undefine(LATCH_HANDLE)
    assert caught.value.slug == "TPM_AUTH"
    assert vault.keys.close_latch(vault.tpm, [vault.approval])
    assert refused(vault.unseal) == "KEY_LATCH_CLOSED"
    assert left_behind(vault.tpm) == []
    vault.tpm.close()


def test_policy_ref_is_never_empty_and_never_anothers() -> None:
    refs = {approvals.policy_ref(*each) for each in [("", ""), ("a", "b"), ("ab", ""), ("", "ab"), ("b", "a")]}
    assert len(refs) == 5
    assert all(len(ref) == 32 for ref in refs)
