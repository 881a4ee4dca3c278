"""A key is released to whom policy names, while nothing changes, with its record, and otherwise not at all."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Hashable
from pathlib import Path

import pytest

from cgpu_agent.backends.base import Attester, ReleasedKey
from cgpu_agent.backends.keys.credential import CredentialKeys
from cgpu_agent.client.unwrap import Receiver
from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import Action, Decision, Facts, GpuName, Key, Policy
from cgpu_agent.domain.rate import Rate
from cgpu_agent.domain.release import Delivery, KeySpec, Release
from cgpu_agent.errors import AgentError, Denied, Exhausted, HostileInput, Misuse, Unavailable
from cgpu_agent.wire.audit import EMPTY, AuditRecord, follow
from cgpu_agent.wire.bundle import parse_bundle
from cgpu_agent.wire.delivery import parse_context
from cgpu_agent.wire.sealed import ObjectName
from cgpu_agent.wire.statement import parse_statement
from fixtures.gpusessions import MovableClock
from fixtures.machine import BOOT_ID, WORKLOAD, Machine

SECRET = b"the key to the model, 32 bytes.."
STRANGER = dataclasses.replace(WORKLOAD, unit="other.service")
RULES = """
@id("wrapped") permit(principal is CGpu::Workload, action == CGpu::Action::"key.get", resource is CGpu::Key)
when { principal.unit == "inference.service" && resource.group == "models" };
@id("plain") permit(principal is CGpu::Workload, action == CGpu::Action::"key.get_plain",
  resource == CGpu::Key::"plain") when { principal.unit == "inference.service" };
@id("opens") permit(principal is CGpu::Workload, action == CGpu::Action::"key.open",
  resource == CGpu::Key::"models/llama") when { principal.unit == "inference.service" };
@id("loads") permit(principal is CGpu::Workload, action == CGpu::Action::"key.load",
  resource == CGpu::Key::"models/lost") when { principal.unit == "inference.service" && context.gpu.uuid == "GPU-2" };
"""


class Watched(CredentialKeys):
    """systemd's credentials, with something that happens while the broker works."""

    meanwhile: Callable[[Attester], Awaitable[None]] | None = None
    secret: bytes | None = None
    asked = 0

    async def release(self, path: str, attester: Attester, *, timeout: float) -> ReleasedKey:
        self.asked += 1
        if self.meanwhile is not None:
            await self.meanwhile(attester)
        if self.secret is not None:
            return ReleasedKey(self.secret, 0)
        return await super().release(path, attester, timeout=timeout)


class Vault:
    """Everything that a release rests on, each of which a test may change."""

    def __init__(self, folder: Path, machine: object = None) -> None:
        credentials = folder / "credentials"
        credentials.mkdir()
        for name in ("llama.key", "plain"):
            (credentials / name).write_bytes(SECRET)
        state = folder / "state"
        state.mkdir(mode=0o700)
        self.log = state / "audit.jsonl"
        self.clock = MovableClock()
        self.audit: AuditLog | None = AuditLog(state, BOOT_ID, self.clock)
        self.policy = Policy.load(RULES, "test")
        self.facts = Facts(state="serving", endorsed=True, boot_log=True)
        self.epoch: Hashable = 1
        self.broker = Watched(credentials)
        self.machine = machine
        self.begun: list[Decision] = []
        self.full = False

    async def begin(self, decision: Decision) -> None:
        """Stands where the gate puts the call on record."""
        assert self.broker.asked == len(self.begun)
        if self.full:
            raise Unavailable("AUDIT_UNAVAILABLE", "the audit log cannot be written")
        self.begun.append(decision)

    @property
    def release(self) -> Release:
        keys = {
            "models/llama": KeySpec(Key("models/llama", "credential", "models"), "llama.key", 300),
            "models/lost": KeySpec(Key("models/lost", "credential", "models"), "nothing", 300),
            "models/far": KeySpec(Key("models/far", "openbao", "models"), "far", 300),
            "plain": KeySpec(Key("plain", "credential"), "plain", 60),
        }
        return Release(
            keys,
            {"credential": self.broker},
            self.decide,
            lambda: self.epoch,
            self.audit,
            self.machine,  # type: ignore[arg-type]
            Rate(self.clock, 10, "KEY_LIMIT", "too many"),
            self.clock,
        )

    def decide(self, caller: Caller, action: Action, key: Key) -> Decision:
        return self.policy.decide(caller, action, self.facts, key)

    def get(self, name: str, caller: Caller = WORKLOAD, recipient: bytes | None = None) -> Delivery:
        return asyncio.run(self.release.get(caller, name, recipient, self.begin))

    def refusal(self, name: str, caller: Caller = WORKLOAD, recipient: bytes | None = None) -> AgentError:
        with pytest.raises(AgentError) as raised:
            self.get(name, caller, recipient)
        return raised.value

    @property
    def records(self) -> list[AuditRecord]:
        return follow(self.log.read_bytes(), EMPTY)[0] if self.log.exists() else []


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path)


def test_a_call_is_on_record_by_the_policy_that_permits_it_before_the_broker_is_asked(vault: Vault) -> None:
    vault.get("plain")
    assert [decision.policy_ids for decision in vault.begun] == [("plain",)]
    vault.full = True
    assert vault.refusal("plain").slug == "AUDIT_UNAVAILABLE"
    assert vault.broker.asked == 1


def test_who_is_refused_puts_nothing_on_record(vault: Vault) -> None:
    for name, caller in (("plain", STRANGER), ("nothing", WORKLOAD), ("models/llama", WORKLOAD)):
        assert vault.refusal(name, caller).slug == "NOT_ALLOWED"
    assert (vault.begun, vault.records) == ([], [])


def test_a_key_comes_wrapped_with_its_context_and_its_record(vault: Vault) -> None:
    receiver = Receiver()
    found = vault.get("models/llama", recipient=receiver.recipient)
    assert found.wrapped
    assert SECRET not in found.secret
    assert receiver.open(found.secret, found.context) == SECRET
    context = parse_context(found.context)
    assert (context.key, context.broker, context.expires) == (
        "models/llama",
        "credential",
        int(vault.clock.wall) + 300,
    )
    assert context.caller == WORKLOAD.claims()
    (record,) = vault.records
    assert record.event == "key"
    assert record.sequence == context.sequence
    assert (record.data["key"], record.data["policies"]) == ("models/llama", ["wrapped"])
    assert record.data["recipient"] == (context.recipient or b"").hex()
    assert SECRET not in vault.log.read_bytes()


def test_in_plain_only_where_policy_says_so(vault: Vault) -> None:
    found = vault.get("plain")
    assert (found.wrapped, found.secret) == (False, SECRET)
    assert SECRET.decode() not in repr(found)
    assert vault.refusal("models/llama").slug == "NOT_ALLOWED"
    assert vault.refusal("plain", recipient=Receiver().recipient).slug == "NOT_ALLOWED"


def test_a_key_that_is_not_there_is_refused_like_one_that_is_not_allowed(vault: Vault) -> None:
    unknown = vault.refusal("models/none", recipient=Receiver().recipient)
    forbidden = vault.refusal("models/llama", STRANGER, Receiver().recipient)
    unserved = vault.refusal("models/far", recipient=Receiver().recipient)
    vault.policy = Policy.load(f'{RULES}@id("never") forbid(principal, action, resource is CGpu::Key);', "test")
    never = vault.refusal("models/llama", recipient=Receiver().recipient)
    assert isinstance(unknown, Denied)
    assert {(each.slug, each.message) for each in (unknown, forbidden, unserved, never)} == {
        ("NOT_ALLOWED", "not allowed: no policy allows this")
    }
    assert vault.broker.asked == 0
    assert vault.records == []


def test_a_key_that_the_broker_does_not_have_says_so_to_whom_it_is_for(vault: Vault) -> None:
    error = vault.refusal("models/lost", recipient=Receiver().recipient)
    assert (type(error), error.slug) == (Unavailable, "KEY_ABSENT")


@pytest.mark.parametrize("secret", [b"", bytes(8193)])
def test_what_cannot_be_a_key_is_not_passed_on(vault: Vault, secret: bytes) -> None:
    vault.broker.secret = secret
    assert vault.refusal("plain").slug == "BROKER_ANSWER"
    assert vault.records == []


def test_a_bad_recipient_costs_the_broker_nothing(vault: Vault) -> None:
    error = vault.refusal("models/llama", recipient=b"\x30\x00")
    assert (type(error), error.slug, vault.broker.asked) == (Misuse, "BAD_RECIPIENT", 0)


def test_without_an_audit_log_nothing_is_released(vault: Vault) -> None:
    vault.audit = None
    assert vault.refusal("plain").slug == "AUDIT_UNAVAILABLE"
    assert vault.broker.asked == 0


def test_a_record_that_cannot_be_written_keeps_the_key_back(vault: Vault) -> None:
    vault.log.mkdir()
    assert vault.refusal("plain").slug == "AUDIT_UNAVAILABLE"


def change_policy(vault: Vault) -> None:
    vault.policy = Policy.load('@id("nobody") forbid(principal, action, resource);', "test")


def change_epoch(vault: Vault) -> None:
    vault.epoch = 2


@pytest.mark.parametrize(
    ("change", "slug"), [(change_policy, "NOT_ALLOWED"), (change_epoch, "TRUST_CHANGED")], ids=["policy", "epoch"]
)
def test_what_changes_while_the_broker_works_ends_the_release(
    vault: Vault, change: Callable[[Vault], None], slug: str
) -> None:
    async def meanwhile(_attester: Attester) -> None:
        change(vault)

    vault.broker.meanwhile = meanwhile
    assert vault.refusal("plain").slug == slug
    assert vault.broker.asked == 1
    assert vault.records == []


@pytest.mark.parametrize(
    ("change", "slug"), [(change_policy, "NOT_ALLOWED"), (change_epoch, "TRUST_CHANGED")], ids=["policy", "epoch"]
)
def test_what_changes_while_the_record_is_written_ends_the_release(
    vault: Vault, change: Callable[[Vault], None], slug: str
) -> None:
    audit = vault.audit
    assert audit is not None
    record = audit.record

    async def slow(event: str, data: dict[str, object]) -> int:
        sequence = await record(event, data)
        change(vault)
        return sequence

    audit.record = slow  # type: ignore[assignment, method-assign]
    assert vault.refusal("plain").slug == slug
    assert [each.event for each in vault.records] == ["key"]


@pytest.mark.parametrize("kind", [HostileInput, Misuse])
def test_what_a_broker_cannot_read_is_nobodys_misuse(vault: Vault, kind: type[AgentError]) -> None:
    async def fails(_: Attester) -> None:
        raise kind("TRUNCATED", "what the platform said, word for word")

    vault.broker.meanwhile = fails
    error = vault.refusal("plain")
    assert (type(error), error.slug, error.message) == (
        Unavailable,
        "BROKER_ANSWER",
        "the key cannot be had: TRUNCATED",
    )


def test_facts_decide_as_well_as_callers(vault: Vault) -> None:
    ready = 'permit(principal, action == CGpu::Action::"key.get_plain", resource) when { context.gpus == "ready" };'
    vault.policy = Policy.load(f'@id("ready") {ready}', "test")
    assert vault.refusal("plain").slug == "NOT_ALLOWED"
    vault.facts = dataclasses.replace(vault.facts, gpus="ready")
    assert vault.get("plain").secret == SECRET


def test_one_uid_cannot_ask_without_end(vault: Vault) -> None:
    async def scenario() -> None:
        release = vault.release
        for _ in range(10):
            await release.get(WORKLOAD, "plain", None, vault.begin)
        with pytest.raises(Exhausted) as raised:
            await release.get(WORKLOAD, "plain", None, vault.begin)
        assert raised.value.retry_after is not None
        with pytest.raises(Denied):
            await release.get(dataclasses.replace(STRANGER, uid=5), "plain", None, vault.begin)

    asyncio.run(scenario())


def test_offers_are_what_the_caller_may_have(vault: Vault) -> None:
    first, second = GpuName("GPU-1", "one"), GpuName("GPU-2", "two")

    def offers(caller: Caller) -> list[tuple[object, ...]]:
        found = vault.release.offers(caller, [first, second])
        return [(each.key.id, each.wrapped, each.plain, each.opens, each.loads) for each in found]

    assert offers(WORKLOAD) == [
        ("models/llama", True, False, True, ()),
        ("models/lost", True, False, False, ("GPU-2",)),
        ("plain", False, True, False, ()),
    ]
    assert offers(STRANGER) == []
    assert vault.release.may_open(WORKLOAD)
    assert not vault.release.may_open(STRANGER)


OBJECT = ObjectName("models/llama", "llama-70b", 1 << 63)


def test_a_key_for_opening_goes_the_way_of_every_release(vault: Vault) -> None:
    secret, still = asyncio.run(vault.release.open(WORKLOAD, OBJECT, vault.begin))
    assert secret == SECRET
    still()
    (record,) = vault.records
    assert (record.event, record.data["key"], record.data["policies"]) == ("key", "models/llama", ["opens"])
    assert (record.data["how"], record.data["object"], record.data["version"]) == ("open", "llama-70b", str(1 << 63))
    assert record.data["recipient"] is None
    vault.epoch = 2
    with pytest.raises(Unavailable) as raised:
        still()
    assert raised.value.slug == "TRUST_CHANGED"


def test_a_permit_to_get_a_key_is_none_to_open_with_it_and_the_other_way(vault: Vault) -> None:
    for name in ("plain", "models/lost", "models/none", "models/far"):
        with pytest.raises(Denied) as raised:
            asyncio.run(vault.release.open(WORKLOAD, ObjectName(name, "llama-70b", 1), vault.begin))
        assert raised.value.message == "not allowed: no policy allows this"
    with pytest.raises(Denied):
        asyncio.run(vault.release.open(STRANGER, OBJECT, vault.begin))
    vault.policy = Policy.load(RULES.partition('@id("opens")')[1] + RULES.partition('@id("opens")')[2], "test")
    asyncio.run(vault.release.open(WORKLOAD, OBJECT, vault.begin))
    assert vault.refusal("models/llama", recipient=Receiver().recipient).slug == "NOT_ALLOWED"
    assert vault.refusal("models/llama").slug == "NOT_ALLOWED"


@pytest.mark.parametrize("secret", [bytes(16), bytes(31), bytes(33)])
def test_a_key_of_another_size_opens_nothing(vault: Vault, secret: bytes) -> None:
    vault.broker.secret = secret
    with pytest.raises(Unavailable) as raised:
        asyncio.run(vault.release.open(WORKLOAD, OBJECT, vault.begin))
    assert raised.value.slug == "KEY_NOT_FOR_OBJECTS"


def test_opening_counts_against_the_same_rate(vault: Vault) -> None:
    async def scenario() -> None:
        release = vault.release
        for _ in range(10):
            await release.open(WORKLOAD, OBJECT, vault.begin)
        with pytest.raises(Exhausted) as raised:
            await release.open(WORKLOAD, OBJECT, vault.begin)
        assert raised.value.slug == "KEY_LIMIT"

    asyncio.run(scenario())


class TestCredentials:
    @pytest.mark.parametrize("name", ["", "..", "../llama.key", "/etc/passwd", "a/b", ".hidden", "none", "x" * 200])
    def test_only_names_of_credentials_are_read(self, vault: Vault, name: str) -> None:
        with pytest.raises(Unavailable) as raised:
            asyncio.run(vault.broker.release(name, None, timeout=1))  # type: ignore[arg-type]
        assert raised.value.slug == "KEY_ABSENT"

    def test_where_systemd_handed_over_none_there_is_no_key(self) -> None:
        with pytest.raises(Unavailable) as raised:
            asyncio.run(CredentialKeys(None).release("a", None, timeout=1))  # type: ignore[arg-type]
        assert raised.value.slug == "KEY_ABSENT"


@pytest.fixture
def real(tmp_path: Path, machine: Machine) -> tuple[Vault, Machine]:
    folder = tmp_path / "vault"
    folder.mkdir()
    return Vault(folder), machine


@pytest.mark.swtpm
def test_a_broker_is_shown_evidence_for_this_key_and_this_caller_alone(real: tuple[Vault, Machine]) -> None:
    vault, machine = real
    receiver, seen = Receiver(), []

    async def meanwhile(attester: Attester) -> None:
        seen.append(await attester.bundle(b"challenge of the broker", "https://broker.example"))
        assert await attester.gpu_reports(bytes(32)) == ()

    async def scenario() -> None:
        async with machine.serving() as core:
            vault.machine = core
            vault.broker.meanwhile = meanwhile
            await vault.release.get(WORKLOAD, "models/llama", receiver.recipient, vault.begin)

    asyncio.run(scenario())
    statement = parse_statement(parse_bundle(seen[0]).statement)
    assert (statement.purpose, statement.audience) == ("release", "https://broker.example")
    assert statement.release is not None
    assert (statement.release.broker, statement.release.key) == ("credential", "models/llama")
    assert statement.release.recipient is not None
    assert statement.caller == WORKLOAD.claims()
