"""What the agent states about one caller and one request: strict JSON <-> dataclasses (docs/evidence-format.md).

It is signed, so it travels as the exact bytes that were hashed and is never re-serialised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cgpu_agent.wire import strictjson
from cgpu_agent.wire.keyids import BROKER, KEY_ID, MAX_KEY_ID
from cgpu_agent.wire.strictjson import Fields, b64

VERSION: Final = 1

MAX_STATEMENT = 16384
MIN_NONCE, MAX_NONCE = 8, 64
MAX_USER_DATA = 64
MAX_PUBLIC_KEY = 2048
MAX_AUDIENCE = 255

PURPOSES: Final = frozenset({"evidence", "release"})
LANES: Final = frozenset({"boot", "gpus"})

_TEXT = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def check_audience(audience: str) -> bool:
    """Whether ``audience`` is 1-255 bytes of UTF-8 without control characters or line separators."""
    try:
        size = len(audience.encode("utf-8"))
    except UnicodeEncodeError:
        return False
    return 1 <= size <= MAX_AUDIENCE and _TEXT.fullmatch(audience) is not None


@dataclass(frozen=True, slots=True)
class KeyRelease:
    """Which key a statement of purpose ``release`` is for. Only ever set by the agent itself.

    Attributes:
        broker: its kind, e.g. ``openbao``.
        key: the agent's id of the key.
        recipient: SHA-256 of the DER SubjectPublicKeyInfo that the key will be wrapped to, or ``None``: in plain.
    """

    broker: str
    key: str
    recipient: bytes | None

    def to_json(self) -> dict[str, Any]:
        """As a statement has it."""
        return {
            "broker": self.broker,
            "key": self.key,
            "recipient": None if self.recipient is None else self.recipient.hex(),
        }


def _release(fields: Fields) -> KeyRelease:
    release = KeyRelease(
        broker=fields.text("broker", 32),
        key=fields.text("key", MAX_KEY_ID),
        recipient=None if fields.absent("recipient") else fields.hex("recipient", 32, 32),
    )
    fields.end()
    if not BROKER.fullmatch(release.broker) or not KEY_ID.fullmatch(release.key):
        raise fields.fail("broker or key is malformed")
    return release


@dataclass(frozen=True, slots=True)
class Statement:
    """What the agent states about one caller and one request.

    Attributes:
        purpose: ``evidence`` for GetEvidence; other purposes are only ever set by the agent itself.
        audience: the relying party this is for.
        nonce: the relying party's challenge, 8-64 bytes.
        user_data: up to 64 bytes of the caller's, or ``None``.
        public_key: DER SubjectPublicKeyInfo that the caller claims, or ``None``. Possession is not proven.
        release: which key it is for, where the purpose is ``release``; ``None`` otherwise.
        lane: what was asked to be collected: ``boot``, or ``gpus``: the GPUs too.
        caller: the caller's claims, see ``domain.caller.Caller.claims``.
        salt: 16 random bytes, so that a neighbour's leaf hash confirms no guess.
        boot_id: the kernel's random boot id.
        time: seconds since the epoch by the VM's clock, which the host sets: untrusted.
    """

    purpose: str
    audience: str
    nonce: bytes
    user_data: bytes | None
    public_key: bytes | None
    lane: str
    caller: Mapping[str, Any]
    salt: bytes
    boot_id: str
    time: int
    release: KeyRelease | None = None

    def encode(self) -> bytes:
        return strictjson.dumps(
            {
                "audience": self.audience,
                "boot_id": self.boot_id,
                "caller": dict(self.caller),
                "nonce": self.nonce.hex(),
                "public_key": None if self.public_key is None else b64(self.public_key),
                "purpose": self.purpose,
                "request": {
                    "lane": self.lane,
                    "release": None if self.release is None else self.release.to_json(),
                },
                "salt": self.salt.hex(),
                "time": self.time,
                "user_data": None if self.user_data is None else b64(self.user_data),
                "version": VERSION,
            }
        )


def _caller(fields: Fields) -> dict[str, Any]:
    claims: dict[str, Any] = {}
    for name in ("cgroup", "container", "exe_at_identify", "unit"):
        claims[name] = None if fields.absent(name) else fields.text(name, 4096)
    for name in ("uid", "gid", "pid"):
        claims[name] = fields.integer(name, 0, 0xFFFFFFFF)
    if fields.absent("groups"):
        claims["groups"] = None
    else:
        groups = fields.items("groups", 65536)
        if not all(isinstance(g, int) and not isinstance(g, bool) and 0 <= g <= 0xFFFFFFFF for g in groups):
            raise fields.fail("groups is not a list of group ids")
        claims["groups"] = groups
    claims["identity_strength"] = fields.choice("identity_strength", frozenset({"pidfd", "pid"}))
    fields.end()
    return claims


def parse_statement(data: bytes) -> Statement:
    """Parse statement bytes. Raises ``HostileInput``."""
    fields = Fields(strictjson.loads(data, "statement", MAX_STATEMENT), "statement")
    fields.integer("version", VERSION, VERSION)
    request = fields.fields("request")
    lane = request.choice("lane", LANES)
    release = None if request.absent("release") else _release(request.fields("release"))
    request.end()
    audience = fields.text("audience", MAX_AUDIENCE)
    if not check_audience(audience):
        raise fields.fail("audience is empty or holds control characters")
    boot_id = fields.text("boot_id", 36)
    if not _UUID.fullmatch(boot_id):
        raise fields.fail("boot_id is not a UUID")
    statement = Statement(
        purpose=fields.choice("purpose", PURPOSES),
        audience=audience,
        nonce=fields.hex("nonce", MIN_NONCE, MAX_NONCE),
        user_data=None if fields.absent("user_data") else fields.base64("user_data", MAX_USER_DATA),
        public_key=None if fields.absent("public_key") else fields.base64("public_key", MAX_PUBLIC_KEY),
        lane=lane,
        caller=_caller(fields.fields("caller")),
        salt=fields.hex("salt", 16, 16),
        boot_id=boot_id,
        time=fields.integer("time", 0, 1 << 40),
        release=release,
    )
    fields.end()
    if (statement.purpose == "release") is not (release is not None):
        raise fields.fail("a key is named exactly where the purpose is to release one")
    return statement
