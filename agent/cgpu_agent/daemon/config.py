"""The configuration file: TOML -> frozen dataclasses. An unknown key or a bad value is an error that names it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from cgpu_agent import configfile
from cgpu_agent.backends.base import AkAlgorithm, BrokerKind
from cgpu_agent.configfile import bad, whole
from cgpu_agent.daemon.brokerconfig import (
    AzureTable,
    EgressConfig,
    OpenBaoTable,
    SealedConfig,
    TrusteeTable,
)
from cgpu_agent.wire.keyids import KEY_ID
from cgpu_agent.wire.ready import SOCKET

LogLevel = Literal["debug", "info", "warning", "error"]
MAX_KEYS = 256
DEFAULT_POLICY = "default"


@dataclass(frozen=True, slots=True)
class Sockets:
    """Paths bound where systemd does not hand over sockets named as these are. ``metrics``: or "none"."""

    api: str = "/run/cgpu-agent/agent.sock"
    admin: str = "/run/cgpu-agent/admin.sock"
    lease: str = "/run/cgpu-agent/lease.sock"
    metrics: str = "none"


@dataclass(frozen=True, slots=True)
class TpmConfig:
    """The vTPM.

    ``create_platform_ak``: what to make where no key is at ``platform_ak_handle``; "no" = refuse.
    ``ak_certificate``: a file (DER) that certifies that key, or "nv" for the certificate that the platform has in NV.
    """

    device: str = "device:/dev/tpmrm0"
    platform_ak_handle: int = 0x81000003
    create_platform_ak: Literal["rsa", "ecc", "no"] = "rsa"
    ak_certificate: str = "nv"
    register: int = 13
    evidence_pcrs: tuple[int, ...] = tuple(range(16))
    command_seconds: int = 10
    request_seconds: int = 30


@dataclass(frozen=True, slots=True)
class Logs:
    """Where the measurement logs are. The unit's credential ``eventlog`` is looked at before ``boot``."""

    boot: str = "/sys/kernel/security/tpm0/binary_bios_measurements"
    systemd: str = "/run/log/systemd/tpm2-measure.log"


@dataclass(frozen=True, slots=True)
class PlatformConfig:
    """``collateral``: directory of AMD's certificates (``amd.pem``) and of a TD quote (``td_quote.bin``)."""

    collateral: str = "/etc/cgpu-agent/platform"


@dataclass(frozen=True, slots=True)
class GpuConfig:
    """The GPUs, and what is trusted about them.

    ``backend``: "auto" = NVIDIA's driver where it is there, "nvml", "software:/path/of/socket" or "none".
    ``ready_helper``: socket of the root helper that sets NVIDIA's ready state, or "none" = the agent does so itself.
    ``device_roots``, ``rim_roots``: files of certificates, or SHA-256 digests of root keys in hex; empty = NVIDIA's.
    ``collateral``: directory of reference values (``*.xml``, ``*.swidtag``), ``*.crl`` and ``*.ocsp``.
    ``count``: how many GPUs there must be; 0 = any number.
    ``min_driver``, ``min_vbios``: the lowest version, or "none".
    """

    backend: str = "auto"
    ready_helper: str = SOCKET
    device_roots: tuple[str, ...] = ()
    rim_roots: tuple[str, ...] = ()
    collateral: str = "/etc/cgpu-agent/collateral"
    allow_simulated: bool = False
    allow_no_rim: bool = False
    require_revocation: bool = False
    count: int = 0
    min_driver: str = "none"
    min_vbios: str = "none"
    reattest_seconds: int = 3600
    report_seconds: int = 30


@dataclass(frozen=True, slots=True)
class KeyConfig:
    """A key that can be released, where the policy permits it.

    ``id``: what callers and the policy call it. ``broker``: who keeps it. ``path``: the broker's own name of it,
    "" = the id. ``group``: for the policy. ``seconds``: after which a caller should ask again.
    """

    id: str
    broker: BrokerKind
    path: str = ""
    group: str = ""
    seconds: int = 300


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what callers can hold: connections before, running calls after they are identified.

    ``tpm_seconds_per_minute``: how long the TPM may work for one uid. ``keys_per_minute``: how often one uid may ask
    for a key. ``leases``, ``lease_mib``: how many pieces of memory are shared with callers, and how large; then of
    one uid and in all. ``channels``: to GPUs' memory; of one uid: channels, transfers that wait or run, and memory of
    GPUs.
    """

    connections: int = 1024
    connections_per_uid: int = 64
    calls: int = 2048
    calls_per_uid: int = 512
    tpm_seconds_per_minute: int = 30
    keys_per_minute: int = 60
    leases: int = 128
    leases_per_uid: int = 32
    lease_mib: int = 1024
    lease_mib_per_uid: int = 2048
    lease_mib_in_all: int = 4096
    channels: int = 64
    channels_per_uid: int = 8
    transfers_per_uid: int = 128
    gpu_mib_per_uid: int = 1048576


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the daemon can be told. ``policy``: path of a Cedar policy, or ``default`` for the one built in."""

    log_level: LogLevel = "info"
    policy: str = DEFAULT_POLICY
    runtime_dir: str = "/run/cgpu-agent/private"
    state_dir: str = "/var/lib/cgpu-agent"
    sockets: Sockets = field(default_factory=Sockets)
    tpm: TpmConfig = field(default_factory=TpmConfig)
    logs: Logs = field(default_factory=Logs)
    platform: PlatformConfig = field(default_factory=PlatformConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    limits: Limits = field(default_factory=Limits)
    sealed: SealedConfig = field(default_factory=SealedConfig)
    egress: EgressConfig = field(default_factory=EgressConfig)
    openbao: OpenBaoTable | None = None
    trustee: TrusteeTable | None = None
    azure: AzureTable | None = None
    key: tuple[KeyConfig, ...] = ()
    source: bytes = b""

    @property
    def digest(self) -> str:
        """SHA-256 hex of the file as it was read: what evidence states of it."""
        return hashlib.sha256(self.source).hexdigest()

    @property
    def create_platform_ak(self) -> AkAlgorithm | None:
        return None if self.tpm.create_platform_ak == "no" else self.tpm.create_platform_ak


def load(path: Path | None) -> Config:
    """Read a configuration file; ``None`` = the defaults.

    Raises:
        Misuse: ``BAD_CONFIG``, with the table and key at fault.
    """
    if path is None:
        return Config()
    return parse(*configfile.read(path))


def parse(document: dict[str, Any], source: bytes = b"") -> Config:
    """Check a parsed document. Raises ``Misuse`` (``BAD_CONFIG``)."""
    readers = {int: whole(0, 0xFFFFFFFF), str: _text, tuple[int, ...]: _pcrs}
    config = replace(configfile.table(Config, document, readers), source=source)
    _check(config)
    return config


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise bad(f"{name} must be text")
    return value


def _pcrs(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(each) is int and 0 <= each <= 23 for each in value):
        raise bad(f"{name} must be a list of PCR indices")
    return tuple(sorted(set(value)))


def _check(config: Config) -> None:
    tpm = config.tpm
    if not re.fullmatch(r"(device|swtpm):/[^\0]*", tpm.device) or re.fullmatch(r"device:/dev/tpm\d+", tpm.device):
        raise bad("tpm.device must be device:/dev/tpmrm0 (not the raw /dev/tpm0) or swtpm:/path/of/socket")
    paths = {
        "runtime_dir": config.runtime_dir,
        "state_dir": config.state_dir,
        "sockets.api": config.sockets.api,
        "sockets.admin": config.sockets.admin,
        "sockets.lease": config.sockets.lease,
        "sockets.metrics": "/" if config.sockets.metrics == "none" else config.sockets.metrics,
        "logs.boot": config.logs.boot,
        "logs.systemd": config.logs.systemd,
        "platform.collateral": config.platform.collateral,
        "egress.socket": config.egress.socket,
        "sealed.approvals": config.sealed.approvals,
        "tpm.ak_certificate": "/" if tpm.ak_certificate == "nv" else tpm.ak_certificate,
    }
    if config.policy != DEFAULT_POLICY:
        paths["policy"] = config.policy
    for name, path in paths.items():
        if not path.startswith("/") or "\0" in path:
            raise bad(f"{name} must be an absolute path")
    if len({getattr(config.sockets, entry.name) for entry in fields(Sockets)}) != len(fields(Sockets)):
        raise bad("the paths in sockets must differ")
    if not 10 <= tpm.register <= 15:
        raise bad("tpm.register must be a PCR that firmware leaves alone and nobody can reset: 10-15, best 13")
    if tpm.register not in tpm.evidence_pcrs:
        raise bad("tpm.evidence_pcrs must hold tpm.register")
    if not 0x81000000 <= tpm.platform_ak_handle <= 0x81FFFFFF:
        raise bad("tpm.platform_ak_handle must be a persistent handle, 0x81000000-0x81ffffff")
    if min(tpm.command_seconds, tpm.request_seconds) < 1 or tpm.request_seconds < tpm.command_seconds:
        raise bad("tpm.request_seconds must be at least tpm.command_seconds, both at least 1")
    _check_gpu(config.gpu)
    _check_keys(config)
    if min(getattr(config.limits, entry.name) for entry in fields(config.limits)) < 1:
        raise bad("limits must be at least 1")


def _check_keys(config: Config) -> None:
    ids = [key.id for key in config.key]
    if len(set(ids)) != len(ids) or len(ids) > MAX_KEYS:
        raise bad(f"key: at most {MAX_KEYS} keys, each id once")
    for number, key in enumerate(config.key):
        if not KEY_ID.fullmatch(key.id):
            raise bad(f"key[{number}].id must be 1 to 128 letters, digits, dots, dashes, underscores and slashes")
        if not 1 <= key.seconds <= 86400 * 366:
            raise bad(f"key[{number}].seconds must be within 1 second and a year")
        if key.broker in ("openbao", "trustee", "azure") and getattr(config, key.broker) is None:
            raise bad(f"key[{number}].broker is {key.broker}, but there is no table [{key.broker}]")


def _check_gpu(gpu: GpuConfig) -> None:
    if not re.fullmatch(r"auto|nvml|none|software:/[^\0]+", gpu.backend):
        raise bad("gpu.backend must be auto, nvml, none or software:/path/of/socket")
    if not re.fullmatch(r"none|/[^\0]+", gpu.ready_helper):
        raise bad("gpu.ready_helper must be none or an absolute path")
    if not gpu.collateral.startswith("/") or "\0" in gpu.collateral:
        raise bad("gpu.collateral must be an absolute path")
    for name in ("device_roots", "rim_roots"):
        if not all(re.fullmatch(r"[0-9a-fA-F]{64}|/[^\0]+", root) for root in getattr(gpu, name)):
            raise bad(f"gpu.{name} must hold absolute paths, or SHA-256 digests of root keys (64 hex digits)")
    if gpu.count > 64:
        raise bad("gpu.count must be at most 64")
    if gpu.reattest_seconds < 60:
        raise bad("gpu.reattest_seconds must be at least 60")
    if not 1 <= gpu.report_seconds <= 300:
        raise bad("gpu.report_seconds must be 1-300")
