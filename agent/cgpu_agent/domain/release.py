"""Releases keys: policy, a record, broker, policy again, another record, and only then the key.

A broker takes seconds. What was decided before it answered is decided anew after, in one step with the delivery: a
GPU that was lost meanwhile, a policy that was reloaded, ends the release.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from cgpu_agent.backends.base import MAX_SECRET, Clock, KeyBroker
from cgpu_agent.domain.attester import CoreAttester, Machine
from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import NO_GPU, Action, Decision, GpuName, Key
from cgpu_agent.domain.rate import Rate
from cgpu_agent.domain.wrap import load_recipient, wrap
from cgpu_agent.errors import AgentError, Denied, HostileInput, Misuse, Unavailable
from cgpu_agent.wire.delivery import DeliveryContext
from cgpu_agent.wire.sealed import KEY_SIZE, ObjectName
from cgpu_agent.wire.statement import KeyRelease

BROKER_SECONDS: Final = 30.0

Decide = Callable[[Caller, Action, Key], Decision]
Begin = Callable[[Decision], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class KeySpec:
    """A key that the agent can release.

    Attributes:
        key: its id, broker and group, as policy sees them.
        path: the broker's own name of it.
        seconds: after which a caller should ask again.
    """

    key: Key
    path: str
    seconds: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """A released key on its way. ``secret`` is wrapped where ``wrapped`` says so."""

    context: bytes
    secret: bytes
    wrapped: bool

    def __repr__(self) -> str:
        return f"Delivery(wrapped={self.wrapped})"


@dataclass(frozen=True, slots=True)
class _Released:
    """What a broker let go of, on record, in the epoch in which that was decided."""

    spec: KeySpec
    secret: bytes = field(repr=False)
    generation: int
    sequence: int
    expires: int
    epoch: Hashable


@dataclass(frozen=True, slots=True)
class Offer:
    """A key, and how a caller may use it now: wrapped, in plain, to have objects opened, and into which GPUs."""

    key: Key
    wrapped: bool
    plain: bool
    opens: bool
    loads: tuple[str, ...]


class Release:
    """The keys of this VM.

    Args:
        keys: by id.
        brokers: by kind; a key whose broker is not there is no key.
        decide: asks the policy of this moment, about the machine of this moment.
        epoch: changes whenever what was decided before is void.
        audit: the log; ``None`` where none can be kept: then nothing is released.
        machine: what a broker may have shown.
        rate: how often a caller may ask.

    Attributes:
        outcomes: how often a key was ``released`` or ``refused``, by (broker, outcome); the broker is ``none`` where
            there is no such key.
    """

    def __init__(
        self,
        keys: Mapping[str, KeySpec],
        brokers: Mapping[str, KeyBroker],
        decide: Decide,
        epoch: Callable[[], Hashable],
        audit: AuditLog | None,
        machine: Machine,
        rate: Rate,
        clock: Clock,
    ) -> None:
        self._keys = {name: spec for name, spec in keys.items() if spec.key.broker in brokers}
        self._brokers = brokers
        self._decide = decide
        self._epoch = epoch
        self._audit = audit
        self._machine = machine
        self._rate = rate
        self._clock = clock
        self.outcomes: Counter[tuple[str, str]] = Counter()

    def offers(self, caller: Caller, gpus: Sequence[GpuName]) -> list[Offer]:
        """The keys that this caller may use now in any way; these are the GPUs that objects could go to.

        Raises ``Exhausted`` (``KEY_LIMIT``): policy is asked three times for every key, and once more for each GPU.
        """
        self._rate.take(caller.uid)
        found = []
        for spec in self._keys.values():
            actions = (Action.KEY_GET, Action.KEY_PLAIN, Action.KEY_OPEN)
            wrapped, plain, opens = (self._decide(caller, action, spec.key).allowed for action in actions)
            loads = tuple(gpu.uuid for gpu in gpus if self._may_load(caller, spec, gpu))
            if wrapped or plain or opens or loads:
                found.append(Offer(spec.key, wrapped, plain, opens, loads))
        return found

    async def get(self, caller: Caller, name: str, recipient: bytes | None, begin: Begin) -> Delivery:
        """A key for this caller, wrapped to ``recipient`` (DER SubjectPublicKeyInfo) or in plain.

        Args:
            begin: puts the call on record; only called once it is permitted, so that nobody fills the log by being
                refused.

        Raises as ``open``, but for the key's size, and ``Misuse``: ``BAD_RECIPIENT``.
        """
        self._rate.take(caller.uid)
        target = None if recipient is None else load_recipient(recipient)
        action = Action.KEY_PLAIN if target is None else Action.KEY_GET
        digest = None if recipient is None else hashlib.sha256(recipient).digest()
        released = await self._release(caller, action, name, digest, {}, begin)
        spec = released.spec
        context = DeliveryContext(
            key=spec.key.id,
            broker=spec.key.broker,
            generation=released.generation,
            sequence=released.sequence,
            expires=released.expires,
            caller=caller.claims(),
            recipient=digest,
        ).encode()
        if target is None:
            return Delivery(context, released.secret, wrapped=False)
        return Delivery(context, wrap(released.secret, target, context), wrapped=True)

    async def open(self, caller: Caller, name: ObjectName, begin: Begin) -> tuple[bytes, Callable[[], None]]:
        """The key ``name.key_id`` for the agent's own use: to open this object for this caller, who never gets it.

        Returns the key, and what raises when the caller may not go on: to be called before anything is handed over.

        Raises:
            Denied: ``NOT_ALLOWED``, also where there is no such key; ``KEY_REFUSED``: the broker refused.
            Exhausted: ``KEY_LIMIT``.
            Unavailable: ``TRUST_CHANGED``: what was decided is void, ask again; ``AUDIT_UNAVAILABLE``;
                ``KEY_NOT_FOR_OBJECTS``: not a key of sealed objects; and what ``KeyBroker.release`` raises.
        """
        how = {"how": "open", "object": name.object_id, "version": str(name.version)}
        return await self._for_object(caller, Action.KEY_OPEN, name, NO_GPU, how, begin)

    async def load(
        self, caller: Caller, name: ObjectName, gpu: GpuName, begin: Begin
    ) -> tuple[bytes, Callable[[], None]]:
        """As ``open``, to have the object in this GPU's memory alone."""
        how = {"how": "load", "object": name.object_id, "version": str(name.version), "gpu": gpu.uuid}
        return await self._for_object(caller, Action.KEY_LOAD, name, gpu, how, begin)

    async def _for_object(
        self,
        caller: Caller,
        action: Action,
        name: ObjectName,
        gpu: GpuName,
        how: Mapping[str, object],
        begin: Begin,
    ) -> tuple[bytes, Callable[[], None]]:
        self._rate.take(caller.uid)
        released = await self._release(caller, action, name.key_id, None, how, begin, gpu)
        if len(released.secret) != KEY_SIZE:
            raise Unavailable("KEY_NOT_FOR_OBJECTS", f"the key of a sealed object has {KEY_SIZE} bytes, not this one")

        def still() -> None:
            self._still_permitted(caller, action, name.key_id, released.epoch, gpu)

        return released.secret, still

    def may_open(self, caller: Caller) -> bool:
        """Whether the caller may have any object opened now."""
        return any(self._decide(caller, Action.KEY_OPEN, spec.key).allowed for spec in self._keys.values())

    def may_load(self, caller: Caller, gpus: Sequence[GpuName]) -> bool:
        """Whether the caller may have any object in the memory of any of these GPUs now."""
        return any(self._may_load(caller, spec, gpu) for spec in self._keys.values() for gpu in gpus)

    def _may_load(self, caller: Caller, spec: KeySpec, gpu: GpuName) -> bool:
        return self._decide(caller, Action.KEY_LOAD, replace(spec.key, gpu=gpu)).allowed

    async def _release(
        self,
        caller: Caller,
        action: Action,
        name: str,
        digest: bytes | None,
        how: Mapping[str, object],
        begin: Begin,
        gpu: GpuName = NO_GPU,
    ) -> _Released:
        spec = self._keys.get(name)
        broker = "none" if spec is None else spec.key.broker
        try:
            released = await self._let_go(caller, action, name, digest, how, begin, gpu)
        except AgentError:
            self.outcomes[broker, "refused"] += 1
            raise
        self.outcomes[broker, "released"] += 1
        return released

    async def _let_go(
        self,
        caller: Caller,
        action: Action,
        name: str,
        digest: bytes | None,
        how: Mapping[str, object],
        begin: Begin,
        gpu: GpuName,
    ) -> _Released:
        """What every release goes through. When it returns nothing has changed, and from then on nothing may wait."""
        spec, decision = self._permitted(caller, action, name, gpu)
        epoch = self._epoch()
        if self._audit is None:
            raise Unavailable("AUDIT_UNAVAILABLE", "no audit log is kept, and a release needs its record")
        await begin(decision)
        release = KeyRelease(spec.key.broker, spec.key.id, digest)
        attester = CoreAttester(self._machine, caller, release)
        broker = self._brokers[spec.key.broker]
        try:
            released = await broker.release(spec.path, attester, timeout=BROKER_SECONDS)
        except (HostileInput, Misuse) as error:
            # Not the caller's doing: what TPM, platform or broker said, or how the operator named the key.
            raise Unavailable("BROKER_ANSWER", f"the key cannot be had: {error.slug}") from error
        if not 1 <= len(released.secret) <= MAX_SECRET:
            raise Unavailable("BROKER_ANSWER", "the broker let go of what cannot be a key")
        decision = self._still_permitted(caller, action, name, epoch, gpu)
        expires = int(self._clock.time()) + spec.seconds
        sequence = await self._audit.record(
            "key",
            {
                "broker": spec.key.broker,
                "broker_sees_gpus": broker.sees_gpus,
                "caller": caller.claims(),
                "expires": expires,
                "generation": released.generation,
                "key": spec.key.id,
                "policies": list(decision.policy_ids),
                "recipient": None if digest is None else digest.hex(),
                **how,
            },
        )
        self._still_permitted(caller, action, name, epoch, gpu)
        return _Released(spec, released.secret, released.generation, sequence, expires, epoch)

    def _permitted(self, caller: Caller, action: Action, name: str, gpu: GpuName) -> tuple[KeySpec, Decision]:
        spec = self._keys.get(name)
        if spec is not None:
            decision = self._decide(caller, action, replace(spec.key, gpu=gpu))
            if decision.allowed:
                return spec, decision
        # In the same words, whatever policy says: nobody learns which keys there are.
        raise Denied("NOT_ALLOWED", "not allowed: no policy allows this")

    def _still_permitted(self, caller: Caller, action: Action, name: str, epoch: Hashable, gpu: GpuName) -> Decision:
        if self._epoch() != epoch:
            raise Unavailable("TRUST_CHANGED", "what the release rests on has changed meanwhile", retry_after=1.0)
        return self._permitted(caller, action, name, gpu)[1]

    def close(self) -> None:
        """Have every broker forget what it holds."""
        for broker in self._brokers.values():
            broker.close()
