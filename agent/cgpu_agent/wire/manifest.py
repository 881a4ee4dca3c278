"""What one quote signs for every caller of a batch: strict JSON <-> frozen dataclasses (docs/evidence-format.md).

It is signed, so it travels as the exact bytes that were hashed and is never re-serialised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cgpu_agent.wire import strictjson
from cgpu_agent.wire.audit import AuditHead
from cgpu_agent.wire.gpuinventory import GpuInventory, parse_inventory
from cgpu_agent.wire.merkle import MAX_LEAVES
from cgpu_agent.wire.strictjson import Fields

VERSION: Final = 1

MAX_MANIFEST = 65536
MAX_LOG = 4 << 20


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
