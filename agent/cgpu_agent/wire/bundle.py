"""The evidence bundle, its statement and its manifest: strict JSON <-> frozen dataclasses (docs/evidence-format.md).

Statement and manifest are signed, so they travel as the exact bytes that were hashed and are never re-serialised.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.audit import AuditHead
from cgpu_agent.wire.gpuinventory import (
    MAX_DEVICES,
    GpuInventory,
    GpuWords,
    parse_inventory,
    parse_words,
)
from cgpu_agent.wire.keyids import BROKER, KEY_ID, MAX_KEY_ID
from cgpu_agent.wire.merkle import MAX_LEAVES
from cgpu_agent.wire.platformwords import PlatformWords, parse_platform
from cgpu_agent.wire.strictjson import Fields, b64

FORMAT: Final = "cgpu-evidence/1"
VERSION: Final = 1

MAX_BUNDLE = 16 << 20
MAX_STATEMENT = 16384
MAX_MANIFEST = 65536
MAX_BOOT_LOG = 4 << 20
MAX_LOG = 4 << 20
MAX_CERTIFICATE = 8192
MIN_NONCE, MAX_NONCE = 8, 64
MAX_USER_DATA = 64
MAX_PUBLIC_KEY = 2048
MAX_AUDIENCE = 255

PURPOSES: Final = frozenset({"evidence", "release"})
LANES: Final = frozenset({"boot", "gpus"})

_MANIFEST_PREFIX: Final = b"\xc6\x01"
_QUOTE_PREFIX: Final = b"\xc6\x02"
_TEXT = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def manifest_extra_data(manifest: bytes) -> bytes:
    """extraData of the quote that signs a manifest: C6 01 || SHA-256(manifest), 34 bytes."""
    return _MANIFEST_PREFIX + hashlib.sha256(manifest).digest()


def caller_quote_extra_data(caller_claims: bytes, nonce: bytes) -> bytes:
    """extraData of a plain quote: C6 02 || SHA-256("cgpu/quote/2" || 00 || u32be(len(claims)) || claims || nonce)."""
    framed = b"cgpu/quote/2\0" + len(caller_claims).to_bytes(4, "big") + caller_claims + nonce
    return _QUOTE_PREFIX + hashlib.sha256(framed).digest()


def agent_ak_qualifying_data(agent_ak_name: bytes) -> bytes:
    """extraData of the TPM2_Certify that vouches for the agent's AK: SHA-256("cgpu/agent-ak/1" || 00 || Name)."""
    return hashlib.sha256(b"cgpu/agent-ak/1\0" + agent_ak_name).digest()


def is_reserved_extra_data(data: bytes) -> bool:
    """Whether these bytes could be read as one of the agent's own extraData forms, in this or a later version."""
    return len(data) == 34 and data[0] == 0xC6


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


@dataclass(frozen=True, slots=True)
class LogDigest:
    """SHA-256 and size in bytes of a log that travels in the bundle."""

    sha256: bytes
    size: int

    @classmethod
    def of(cls, log: bytes) -> LogDigest:
        return cls(hashlib.sha256(log).digest(), len(log))


@dataclass(frozen=True, slots=True)
class AuditAnchor:
    """The audit log at this moment: its head, and the head that the manifest before this one held.

    A relying party that keeps bundles sees from the two whether the log only ever grew (see ``wire.audit``).
    """

    head: AuditHead
    quoted: AuditHead


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one quote signs for every caller of a batch.

    Attributes:
        root: Merkle root over the statements (RFC 9162).
        tree_size: number of statements.
        agent_ak_name: Name of the AK that signs the quote.
        reset_count, restart_count: the TPM's, equal to the quote's.
        agent: digests of what the agent is: ``build``, ``config``, ``policy`` (SHA-256 hex) and ``version`` (text).
            The agent's own words: worth what measures the agent.
        register: PCR index of the agent register.
        boot_log, systemd_log: digests, or ``None`` when the machine has no such log.
        agent_log: digest of the agent log.
        missing: (part, reason) pairs: what a reader would expect and does not get, and why.
        audit: the audit log's heads, or ``None`` where none is kept.
        gpus: the GPUs, or ``None`` where the batch did not ask for them.
        platform: ``PlatformWords.digest`` of the hardware report, or ``None`` where this machine has none.
        vm_generation: the hypervisor's count of restores and copies of this machine, or ``None`` where it tells none.
    """

    root: bytes
    tree_size: int
    agent_ak_name: bytes
    reset_count: int
    restart_count: int
    agent: Mapping[str, str]
    register: int
    boot_log: LogDigest | None
    systemd_log: LogDigest | None
    agent_log: LogDigest
    missing: tuple[tuple[str, str], ...]
    audit: AuditAnchor | None = None
    gpus: GpuInventory | None = None
    platform: bytes | None = None
    vm_generation: int | None = None

    def encode(self) -> bytes:
        def log(digest: LogDigest | None) -> dict[str, Any] | None:
            return None if digest is None else {"sha256": digest.sha256.hex(), "size": digest.size}

        def head(audit: AuditHead) -> dict[str, Any]:
            return {"digest": audit.digest.hex(), "sequence": audit.sequence}

        return strictjson.dumps(
            {
                "agent": dict(self.agent),
                "agent_ak_name": self.agent_ak_name.hex(),
                "audit": None
                if self.audit is None
                else {"head": head(self.audit.head), "quoted": head(self.audit.quoted)},
                "gpus": None if self.gpus is None else self.gpus.to_json(),
                "logs": {"agent": log(self.agent_log), "boot": log(self.boot_log), "systemd": log(self.systemd_log)},
                "missing": [{"part": part, "reason": reason} for part, reason in self.missing],
                "platform": None if self.platform is None else self.platform.hex(),
                "register": self.register,
                "reset_count": self.reset_count,
                "restart_count": self.restart_count,
                "root": self.root.hex(),
                "tree_size": self.tree_size,
                "version": VERSION,
                "vm_generation": self.vm_generation,
            }
        )


def _log_digest(fields: Fields, name: str) -> LogDigest:
    entry = fields.fields(name)
    digest = LogDigest(entry.hex("sha256", 32, 32), entry.integer("size", 0, MAX_LOG))
    entry.end()
    return digest


def _optional_log_digest(fields: Fields, name: str) -> LogDigest | None:
    return None if fields.absent(name) else _log_digest(fields, name)


def _audit(fields: Fields) -> AuditAnchor:
    heads = []
    for name in ("head", "quoted"):
        entry = fields.fields(name)
        heads.append(AuditHead(entry.integer("sequence", -1, 1 << 53), entry.hex("digest", 32, 32)))
        entry.end()
    fields.end()
    return AuditAnchor(heads[0], heads[1])


def parse_manifest(data: bytes) -> Manifest:
    """Parse manifest bytes. Raises ``HostileInput``."""
    fields = Fields(strictjson.loads(data, "manifest", MAX_MANIFEST), "manifest")
    fields.integer("version", VERSION, VERSION)
    agent_fields = fields.fields("agent")
    agent = {name: agent_fields.hex(name, 32, 32).hex() for name in ("build", "config", "policy")}
    agent["version"] = agent_fields.text("version", 64)
    agent_fields.end()
    logs = fields.fields("logs")
    missing: list[tuple[str, str]] = []
    for item in fields.items("missing", 32):
        entry = Fields(item, "manifest.missing")
        missing.append((entry.text("part", 64), entry.text("reason", 256)))
        entry.end()
    manifest = Manifest(
        root=fields.hex("root", 32, 32),
        tree_size=fields.integer("tree_size", 1, MAX_LEAVES),
        agent_ak_name=fields.hex("agent_ak_name", 34, 34),
        reset_count=fields.integer("reset_count", 0, 0xFFFFFFFF),
        restart_count=fields.integer("restart_count", 0, 0xFFFFFFFF),
        agent=agent,
        register=fields.integer("register", 0, 23),
        boot_log=_optional_log_digest(logs, "boot"),
        systemd_log=_optional_log_digest(logs, "systemd"),
        agent_log=_log_digest(logs, "agent"),
        missing=tuple(missing),
        audit=None if fields.absent("audit") else _audit(fields.fields("audit")),
        gpus=None if fields.absent("gpus") else parse_inventory(fields.fields("gpus")),
        platform=None if fields.absent("platform") else fields.hex("platform", 32, 32),
        vm_generation=None if fields.absent("vm_generation") else fields.integer("vm_generation", 0, (1 << 64) - 1),
    )
    logs.end()
    fields.end()
    return manifest


@dataclass(frozen=True, slots=True)
class SignedAttest:
    """TPMS_ATTEST and TPMT_SIGNATURE."""

    attest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Bundle:
    """Everything a relying party needs to check one statement, in one file.

    Attributes:
        statement, manifest: the exact signed bytes.
        leaf_index, inclusion_path: place of the statement in the manifest's tree.
        quote: TPM2_Quote by the agent's AK over the SHA-256 bank.
        agent_ak: TPMT_PUBLIC; ``agent_ak_certify``: TPM2_Certify of it by the platform AK.
        platform_ak: TPMT_PUBLIC; ``platform_ak_certificate``: DER, or ``None``.
        ek_certificates: DER, informative.
        pcrs: values of the quoted PCRs.
        boot_log, systemd_log, agent_log: the logs whose digests the manifest holds.
        gpus: the devices' own words, in the order of the manifest's records; ``None`` where it has none.
        platform: the hardware report below the vTPM, or ``None``.
    """

    statement: bytes
    manifest: bytes
    leaf_index: int
    inclusion_path: tuple[bytes, ...]
    quote: SignedAttest
    agent_ak: bytes
    agent_ak_certify: SignedAttest
    platform_ak: bytes
    platform_ak_certificate: bytes | None
    ek_certificates: tuple[bytes, ...]
    pcrs: Mapping[int, bytes]
    boot_log: bytes | None
    systemd_log: bytes | None
    agent_log: bytes
    gpus: tuple[GpuWords, ...] | None = None
    platform: PlatformWords | None = None

    def encode(self) -> bytes:
        def signed(pair: SignedAttest) -> dict[str, str]:
            return {"attest": b64(pair.attest), "signature": b64(pair.signature)}

        def optional(data: bytes | None) -> str | None:
            return None if data is None else b64(data)

        return strictjson.dumps(
            {
                "agent_ak": {"certify": signed(self.agent_ak_certify), "public": b64(self.agent_ak)},
                "ek_certificates": [b64(der) for der in self.ek_certificates],
                "format": FORMAT,
                "gpus": None if self.gpus is None else [words.to_json() for words in self.gpus],
                "inclusion_path": [node.hex() for node in self.inclusion_path],
                "leaf_index": self.leaf_index,
                "logs": {
                    "agent": b64(self.agent_log),
                    "boot": optional(self.boot_log),
                    "systemd": optional(self.systemd_log),
                },
                "manifest": b64(self.manifest),
                "pcrs": {str(index): value.hex() for index, value in sorted(self.pcrs.items())},
                "platform": None if self.platform is None else self.platform.to_json(),
                "platform_ak": {
                    "certificate": optional(self.platform_ak_certificate),
                    "public": b64(self.platform_ak),
                },
                "quote": signed(self.quote),
                "statement": b64(self.statement),
            }
        )


class BundleFrame:
    """A bundle encoded once for a whole batch: only statement, leaf and path differ from caller to caller.

    Args:
        shared: any bundle of the batch.
    """

    _HOLES: Final = (b'"inclusion_path":[]', b'"leaf_index":0', b'"statement":""')

    def __init__(self, shared: Bundle) -> None:
        rest = replace(shared, statement=b"", leaf_index=0, inclusion_path=()).encode()
        self._parts: list[bytes] = []
        for hole in self._HOLES:  # each once and in this order: keys are sorted, and base64 holds no quotes
            before, _, rest = rest.partition(hole)
            self._parts.append(before)
        self._parts.append(rest)

    def fill(self, statement: bytes, leaf_index: int, inclusion_path: Sequence[bytes]) -> bytes:
        """The bundle of one caller, byte for byte what ``Bundle.encode`` gives."""
        nodes = ",".join(f'"{node.hex()}"' for node in inclusion_path)
        holes = (f'"inclusion_path":[{nodes}]', f'"leaf_index":{leaf_index}', f'"statement":"{b64(statement)}"')
        first, second, third, last = self._parts
        return b"".join((first, holes[0].encode(), second, holes[1].encode(), third, holes[2].encode(), last))


def _signed(fields: Fields, name: str) -> SignedAttest:
    entry = fields.fields(name)
    pair = SignedAttest(entry.base64("attest", 1024), entry.base64("signature", 1024))
    entry.end()
    return pair


def _pcrs(fields: Fields) -> dict[int, bytes]:
    entries = fields.fields("pcrs")
    values: dict[int, bytes] = {}
    for name in entries.keys():  # noqa: SIM118 - a method of ours, not a dict's
        if not re.fullmatch(r"0|1[0-9]?|2[0-3]?|[3-9]", name):
            raise entries.fail("a key is not a PCR index of 0-23")
        values[int(name)] = entries.hex(name, 32, 32)
    return values


def parse_bundle(data: bytes) -> Bundle:
    """Parse a bundle file; statement and manifest stay bytes.

    Raises:
        HostileInput: ``BAD_FORMAT`` for another or unknown format, ``TOO_LARGE``, ``BAD_JSON``, ``DUPLICATE_KEY``,
            ``UNKNOWN_KEY``, ``BAD_FIELD``.
    """
    fields = Fields(strictjson.loads(data, "bundle", MAX_BUNDLE), "bundle")
    if fields.raw("format") != FORMAT:
        raise HostileInput("BAD_FORMAT", f"bundle: the format is not {FORMAT!r}; another version made this file")
    agent_ak, platform_ak, logs = fields.fields("agent_ak"), fields.fields("platform_ak"), fields.fields("logs")
    bundle = Bundle(
        statement=fields.base64("statement", MAX_STATEMENT),
        manifest=fields.base64("manifest", MAX_MANIFEST),
        leaf_index=fields.integer("leaf_index", 0, MAX_LEAVES - 1),
        inclusion_path=tuple(
            fields.decode_hex(node, "inclusion_path", 32, 32) for node in fields.items("inclusion_path", 16)
        ),
        quote=_signed(fields, "quote"),
        agent_ak=agent_ak.base64("public", 1024),
        agent_ak_certify=_signed(agent_ak, "certify"),
        platform_ak=platform_ak.base64("public", 1024),
        platform_ak_certificate=(
            None if platform_ak.absent("certificate") else platform_ak.base64("certificate", MAX_CERTIFICATE)
        ),
        ek_certificates=tuple(
            fields.decode_base64(der, "ek_certificates", MAX_CERTIFICATE)
            for der in fields.items("ek_certificates", 4)
        ),
        pcrs=_pcrs(fields),
        boot_log=None if logs.absent("boot") else logs.base64("boot", MAX_BOOT_LOG),
        systemd_log=None if logs.absent("systemd") else logs.base64("systemd", MAX_LOG),
        agent_log=logs.base64("agent", MAX_LOG),
        gpus=None
        if fields.absent("gpus")
        else tuple(parse_words(Fields(item, "bundle.gpus")) for item in fields.items("gpus", MAX_DEVICES)),
        platform=None if fields.absent("platform") else parse_platform(fields.fields("platform")),
    )
    for part in (agent_ak, platform_ak, logs, fields):
        part.end()
    return bundle
