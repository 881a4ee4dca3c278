"""The store of sealed keys: one file, never half of it, and a kill at any moment costs at most the change it hit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.domain import sealedkeys as sealed
from cgpu_agent.domain.sealedkeys import SealedKeys
from cgpu_agent.domain.store import Store
from cgpu_agent.errors import AgentError
from cgpu_agent.wire.approval import Approval
from cgpu_agent.wire.keyring import MAX_KEYS, KeyInfo, KeyRing
from fixtures.owner import FLEET, GROUP, Owner
from fixtures.sealedkeys import KEY, Failing, Vault, left_behind

pytestmark = pytest.mark.swtpm

ROUNDS = int(os.environ.get("KILL_ROUNDS", "25"))
"""200 and more for a thorough look."""


@pytest.fixture
def vault(swtpm: Swtpm, tmp_path: Path) -> Iterator[Vault]:
    vault = Vault(swtpm, tmp_path / "keys")
    yield vault
    assert left_behind(vault.tpm) == []
    vault.tpm.close()


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(AgentError) as caught:
        action()
    return caught.value.slug


def test_key_is_random_and_stays_the_same(vault: Vault) -> None:
    vault.add()
    vault.keys.add(vault.tpm, "other", GROUP, [vault.approval], created=1)
    vault.open_latch()
    first = vault.unseal()
    assert len(first) == 32
    assert vault.unseal() == first
    vault.reconnect()
    assert SealedKeys(Store(vault.folder)).unseal(vault.tpm, KEY, [vault.approval])[1] == first
    assert vault.keys.unseal(vault.tpm, "other", [vault.approval])[1] != first


@pytest.mark.parametrize("size", [1, 32, 128])
def test_given_secret_is_kept(vault: Vault, size: int) -> None:
    secret = os.urandom(size)
    vault.add(secret)
    vault.open_latch()
    assert vault.unseal() == secret
    assert size < 32 or secret not in (vault.folder / "keys").read_bytes()


def test_list_tells_no_secrets(vault: Vault) -> None:
    vault.add()
    (info,) = vault.keys.list(vault.tpm)
    assert (info.id, info.group, info.created) == (KEY, GROUP, 1_800_000_000)


def test_rotation_keeps_the_old_generation_until_it_is_removed(vault: Vault) -> None:
    approvals = [vault.approval]
    vault.add(b"one")
    (first,) = vault.keys.list(vault.tpm)
    second = vault.keys.rotate(vault.tpm, KEY, approvals, created=2, secret=b"two")
    assert second.generation > first.generation
    vault.open_latch()
    assert vault.unseal() == b"two"
    assert vault.keys.unseal(vault.tpm, KEY, approvals, generation=first.generation) == (first, b"one")
    vault.keys.remove(vault.tpm, KEY, approvals, generation=first.generation)
    gone = first.generation
    assert refused(lambda: vault.keys.unseal(vault.tpm, KEY, approvals, generation=gone)) == "KEY_UNKNOWN"
    assert vault.unseal() == b"two"
    vault.keys.remove(vault.tpm, KEY, approvals)
    assert refused(vault.unseal) == "KEY_UNKNOWN"


def test_no_generation_is_given_twice(vault: Vault) -> None:
    """Whatever names a key by id and generation never means another one."""
    seen = set()
    for _ in range(2):
        vault.add()
        for _ in range(2):
            seen.add(vault.keys.rotate(vault.tpm, KEY, [vault.approval], created=1).generation)
            vault.keys.remove(vault.tpm, KEY, [vault.approval], generation=max(seen))
        vault.keys.remove(vault.tpm, KEY, [vault.approval])
    assert len(seen) == 4


def test_what_makes_no_sense_is_refused(vault: Vault) -> None:
    approvals, keys, tpm = [vault.approval], vault.keys, vault.tpm
    vault.add()
    assert refused(vault.add) == "KEY_EXISTS"
    assert refused(lambda: keys.rotate(tpm, "nobody", approvals, created=1)) == "KEY_UNKNOWN"
    assert refused(lambda: keys.remove(tpm, "nobody", approvals)) == "KEY_UNKNOWN"
    assert refused(lambda: keys.remove(tpm, KEY, approvals, generation=99)) == "KEY_UNKNOWN"
    for bad in ("", "../x", "A", "x" * 65):
        assert refused(lambda bad=bad: keys.add(tpm, bad, GROUP, approvals, created=1)) == "KEY_NAME"  # type: ignore[misc]
        assert refused(lambda bad=bad: keys.add(tpm, "x", bad, approvals, created=1)) == "KEY_NAME"  # type: ignore[misc]
    assert refused(lambda: keys.add(tpm, "x", "latch", approvals, created=1)) == "KEY_NAME"
    assert refused(lambda: keys.add(tpm, "x", GROUP, approvals, created=1, secret=bytes(129))) == "TPM_ARGUMENT"
    assert [info.id for info in keys.list(tpm)] == [KEY]


def test_full_store_takes_no_more(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    vault.add()
    monkeypatch.setattr(sealed, "MAX_KEYS", 1)
    assert refused(lambda: vault.keys.rotate(vault.tpm, KEY, [vault.approval], created=1)) == "KEYS_FULL"


def test_largest_store_fits_the_largest_file(vault: Vault) -> None:
    vault.add(bytes(128))
    ring = vault.ring
    info, blob = ring.keys[0]
    longest = KeyInfo("x" * 64, (1 << 63) - 1, "y" * 64, 1 << 40)
    full = KeyRing(1, ring.fleet, ring.authority, ring.parent, ring.setter, tuple([(longest, blob)] * MAX_KEYS))
    assert KeyRing.parse(full.encode()) == full
    assert info.id == KEY


def test_nothing_is_there_before_it_is_created(swtpm: Swtpm, tmp_path: Path) -> None:
    tpm = Commands(swtpm.transport())
    keys = SealedKeys(Store(tmp_path / "keys"))
    assert refused(lambda: keys.list(tpm)) == "NO_KEYS"
    assert refused(lambda: keys.open_latch(tpm, [])) == "NO_KEYS"
    assert refused(lambda: keys.epoch(tpm)) == "KEY_INDEX_LOST"
    assert not keys.close_latch(tpm, [])
    tpm.close()


def test_keys_are_created_once_and_in_an_approved_boot_only(swtpm: Swtpm, tmp_path: Path) -> None:
    tpm, owner = Commands(swtpm.transport()), Owner()
    keys = SealedKeys(Store(tmp_path / "keys"))

    def create(*approvals: Approval) -> None:
        keys.create(tpm, authority=owner.spki, fleet=FLEET, approvals=approvals)

    assert refused(create) == "KEY_NOT_APPROVED"
    assert refused(lambda: keys.list(tpm)) in ("KEYS_MISMATCH", "NO_KEYS")
    approval = owner.approve(tpm)
    create(approval)
    assert refused(lambda: create(approval)) == "KEYS_EXIST"
    assert keys.list(tpm) == ()
    tpm.close()


def test_epoch_only_rises(vault: Vault) -> None:
    assert vault.keys.epoch(vault.tpm) == 1
    assert vault.keys.raise_epoch(vault.tpm, 4) == 4
    assert vault.keys.raise_epoch(vault.tpm, 2) == 4
    assert refused(lambda: vault.keys.raise_epoch(vault.tpm, 1 << 40)) == "EPOCH_TOO_FAR"


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"format":"cgpu-keys/1"}'])
def test_damaged_file_is_a_mismatch(vault: Vault, damage: bytes) -> None:
    (vault.folder / "keys").write_bytes(damage)
    assert refused(lambda: vault.keys.list(vault.tpm)) == "KEYS_MISMATCH"


@pytest.mark.parametrize("field", ["fleet", "authority", "parent", "setter", "generation", "keys"])
def test_every_field_of_the_file_counts(vault: Vault, field: str) -> None:
    vault.add()
    file = vault.folder / "keys"
    document = json.loads(file.read_bytes())
    document[field] = {
        "fleet": "fleet-b",
        "authority": json.loads(Owner().approve(vault.tpm).encode())["authority"],
        "parent": "00" * 34,
        "setter": {k: document["keys"][0][k] for k in ("private", "public")},
        "generation": 99,
        "keys": [],
    }[field]
    file.write_bytes(json.dumps(document).encode())
    expected = {"parent": "KEY_LOST", "setter": "KEY_INDEX_LOST"}.get(field, "KEYS_MISMATCH")
    assert refused(lambda: vault.keys.list(vault.tpm)) == expected


# Whatever fails, and killed at any moment


@pytest.mark.parametrize("lose", [False, True])
def test_creation_that_failed_anywhere_can_be_done_again(swtpm: Swtpm, tmp_path: Path, lose: bool) -> None:
    owner, failing = Owner(), Failing(swtpm.transport(), lose=lose)
    approval = owner.approve(Commands(failing), epoch=1000)
    for fail_at in range(100):
        folder = tmp_path / f"keys-{fail_at}"
        keys, tpm = SealedKeys(Store(folder)), Commands(failing)
        failing.commands, failing.fail_at = [], fail_at
        create = {"authority": owner.spki, "fleet": FLEET, "approvals": [approval], "replace_lost": True}
        with contextlib.suppress(AgentError):
            keys.create(tpm, **create)  # type: ignore[arg-type]
        finished, failing.fail_at = len(failing.commands) <= fail_at, -1
        tpm = Commands(failing)
        try:
            found = keys.list(tpm)
        except AgentError:
            keys.create(tpm, **create)  # type: ignore[arg-type]
            found = keys.list(tpm)
        assert found == ()
        if finished:
            return
    pytest.fail("creation takes more commands than were failed")


@pytest.mark.parametrize("lose", [False, True])
def test_change_that_failed_anywhere_was_made_or_was_not(vault: Vault, lose: bool) -> None:
    failing = Failing(vault.swtpm.transport(), lose=lose)
    known: list[str] = []
    for fail_at in range(100):
        failing.commands, failing.fail_at = [], -1
        tpm, name = Commands(failing), f"k{fail_at}"
        failing.commands, failing.fail_at = [], fail_at
        with contextlib.suppress(AgentError):
            vault.keys.add(tpm, name, GROUP, [vault.approval], created=1)
        finished, failing.fail_at = len(failing.commands) <= fail_at, -1
        vault.reconnect()
        found = [info.id for info in vault.keys.list(vault.tpm)]
        assert found in (known, [*known, name])
        assert found == [*known, name] or not finished
        known = found
        if finished:
            assert len(known) > 1
            return
    pytest.fail("a change takes more commands than were failed")


def test_a_kill_at_any_moment_loses_no_key_and_brings_none_back(vault: Vault) -> None:
    """A child adds, rotates and removes until it is killed; what it said was done is done, and the rest is whole."""
    vault.open_latch()
    dice = random.Random(20260101)
    told: dict[str, list[str]] = {}
    hit = 0
    for round_number in range(ROUNDS):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            change_until_killed(vault, round_number, dict(told), writer)
        os.close(writer)
        first = os.read(reader, 1)  # it began its first change
        time.sleep(dice.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child failed by itself"
        with os.fdopen(reader, "rb") as pipe:
            lines = [json.loads(line) for line in (first + pipe.read()).split(b"\n")[:-1]]
        intended = None
        for line in lines:
            if "done" in line:
                told, intended = line["done"], None
            else:
                intended = line["intent"]
        hit += intended is not None
        vault.reconnect()
        assert left_behind(vault.tpm) == []
        found = contents(vault)
        assert found in [told] + ([intended] if intended is not None else [])
        told = found
        assert not (vault.folder / "keys-next").exists()
    assert hit, "no kill fell into a change"


def contents(vault: Vault) -> dict[str, list[str]]:
    """Key -> its secrets, the oldest first."""
    found: dict[str, list[str]] = {}
    for info in sorted(vault.keys.list(vault.tpm), key=lambda info: info.generation):
        _, secret = vault.keys.unseal(vault.tpm, info.id, [vault.approval], generation=info.generation)
        found.setdefault(info.id, []).append(secret.hex())
    return found


def change_until_killed(vault: Vault, seed: int, told: dict[str, list[str]], pipe: int) -> None:
    """Never returns."""
    try:
        dice, tpm, approvals = random.Random(seed), Commands(vault.swtpm.transport()), [vault.approval]
        for _ in range(10_000):
            secret, known = dice.randbytes(16), sorted(told)
            kind = dice.choice(["add", "rotate", "remove"]) if len(known) < 4 else "remove"
            key = dice.choice(known) if known and kind != "add" else f"k{seed}-{dice.randrange(1 << 30)}"
            if key not in told:
                kind, after = "add", {**told, key: [secret.hex()]}
            elif kind == "rotate":
                after = {**told, key: [*told[key], secret.hex()]}
            else:
                after = {name: secrets for name, secrets in told.items() if name != key}
            os.write(pipe, json.dumps({"intent": after}).encode() + b"\n")
            if kind == "add":
                vault.keys.add(tpm, key, GROUP, approvals, created=1, secret=secret)
            elif kind == "rotate":
                vault.keys.rotate(tpm, key, approvals, created=1, secret=secret)
            else:
                vault.keys.remove(tpm, key, approvals)
            told = after
            os.write(pipe, json.dumps({"done": told}).encode() + b"\n")
    finally:
        os._exit(1)
