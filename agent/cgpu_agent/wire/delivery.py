"""What goes with a released key: which it is, for whom, until when. The wrapped key is bound to these very bytes.

HPKE in base mode says nothing of who wrapped: whoever gets a key over the agent's socket knows, others do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cgpu_agent.wire import strictjson
from cgpu_agent.wire.keyids import BROKER, KEY_ID, MAX_KEY_ID
from cgpu_agent.wire.strictjson import Fields

MAX_CONTEXT: Final = 16384
VERSION: Final = 0


def hpke_info(context: bytes) -> bytes:
    """``info`` of RFC 9180: "cgpu/key/1" || 00 || context."""
    return b"cgpu/key/1\0" + context


@dataclass(frozen=True, slots=True)
class DeliveryContext:
    """One delivery.

    Attributes:
        key, broker: the agent's id of the key, and who keeps it.
        generation: which of the key's generations, by the broker's count.
        sequence: of the record in the agent's audit log.
        expires: seconds since the epoch by the VM's clock (untrusted): ask again by then.
        caller: the caller's claims, as in a statement.
        recipient: SHA-256 of the SubjectPublicKeyInfo that it is wrapped to; ``None`` in plain.
    """

    key: str
    broker: str
    generation: int
    sequence: int
    expires: int
    caller: Mapping[str, Any]
    recipient: bytes | None

    def encode(self) -> bytes:
        return strictjson.dumps(
            {
                "broker": self.broker,
                "caller": dict(self.caller),
                "expires": self.expires,
                "generation": self.generation,
                "key": self.key,
                "recipient": None if self.recipient is None else self.recipient.hex(),
                "sequence": self.sequence,
                "version": VERSION,
            }
        )


def parse_context(data: bytes) -> DeliveryContext:
    """Read it on the receiving side. Raises ``HostileInput``."""
    fields = Fields(strictjson.loads(data, "delivery", MAX_CONTEXT), "delivery")
    fields.integer("version", VERSION, VERSION)
    caller = fields.raw("caller")
    context = DeliveryContext(
        key=fields.text("key", MAX_KEY_ID),
        broker=fields.text("broker", 32),
        generation=fields.integer("generation", 0, 1 << 53),
        sequence=fields.integer("sequence", 0, 1 << 53),
        expires=fields.integer("expires", 0, 1 << 53),
        caller=caller,
        recipient=None if fields.absent("recipient") else fields.hex("recipient", 32, 32),
    )
    fields.end()
    if not isinstance(caller, dict) or not KEY_ID.fullmatch(context.key) or not BROKER.fullmatch(context.broker):
        raise fields.fail("key, broker or caller is malformed")
    return context
