"""The service's configuration: TOML -> frozen dataclasses. An unknown key or bad value is an error that names it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

from cgpu_agent import configfile
from cgpu_agent.configfile import bad
from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.ekclass import EkClass
from cgpu_agent.wire.bundle import MAX_BUNDLE
from cgpu_agent.wire.gpuinventory import MAX_DEVICES
from cgpu_agent.wire.statement import PURPOSES, check_audience

LogLevel = Literal["debug", "info", "warning", "error"]
CREDENTIAL: Final = "credential:"
"""A path that begins so names a file of systemd's ``$CREDENTIALS_DIRECTORY``."""

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Keys:
    """Key files. The first of ``signing`` signs, all are published; ``replica`` is shared by all replicas."""

    replica: Path
    signing: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """The EAR. ``audience``: who shall take it; empty = the service's own name. Times in seconds."""

    audience: str = ""
    seconds: int = 300
    nonce_seconds: int = 120


@dataclass(frozen=True, slots=True)
class Trust:
    """What a bundle is judged by. Files of certificates are PEM or DER; ``pinned_ak_names`` are hex."""

    ak_roots: tuple[Path, ...] = ()
    ak_intermediates: tuple[Path, ...] = ()
    simulated_ak_roots: tuple[Path, ...] = ()
    pinned_ak_names: tuple[str, ...] = ()
    policy: Path | None = None
    reference: Path | None = None
    purposes: tuple[str, ...] = ("evidence",)
    register: int = 13
    allow_unendorsed: bool = False
    allow_no_boot_log: bool = False


@dataclass(frozen=True, slots=True)
class Platform:
    """What is demanded of the processor below the vTPM; ``floors`` as for ``cgpuctl verify --floor``."""

    floors: tuple[str, ...] = ()
    require_fresh: bool = False


@dataclass(frozen=True, slots=True)
class Gpu:
    """What is demanded of GPUs, as by the options of ``cgpuctl verify``.

    ``device_roots``, ``rim_roots``: files of certificates; none = NVIDIA's. ``collateral``: a store. ``count``: how
    many there must be; 0 = not said. ``max_age``: days of CRLs and OCSP responses; 0 = as long as they say.
    """

    device_roots: tuple[Path, ...] = ()
    rim_roots: tuple[Path, ...] = ()
    collateral: Path | None = None
    count: int = 0
    min_driver: str = ""
    min_vbios: str = ""
    max_age: int = 0
    require_revocation: bool = False
    allow_no_rim: bool = False


@dataclass(frozen=True, slots=True)
class Enrol:
    """The enrolment CAs (none by default) and the roots of EK certificates, by class.

    ``vendor_ek_roots`` maps a vendor's name to files; ``days`` is the life of an AK certificate.
    """

    certificate: Path | None = None
    key: Path | None = None
    simulated_certificate: Path | None = None
    simulated_key: Path | None = None
    vendor_ek_roots: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    operator_ek_roots: tuple[Path, ...] = ()
    simulated_ek_roots: tuple[Path, ...] = ()
    ek_intermediates: tuple[Path, ...] = ()
    days: int = 7

    @property
    def enabled(self) -> bool:
        return self.certificate is not None or self.simulated_certificate is not None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds. ``buffered_bytes``: bodies of all requests together; ``verifications``: running and waiting ones."""

    bundle_bytes: int = MAX_BUNDLE
    buffered_bytes: int = 8 * MAX_BUNDLE
    body_seconds: int = 10
    header_seconds: int = 10
    connections: int = 512
    workers: int = 2
    verifications: int = 64


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the service can be told. ``audience``: its own name, as evidence must hold it."""

    audience: str
    keys: Keys
    listen: str = "127.0.0.1:8440"
    log_level: LogLevel = "info"
    token: Token = field(default_factory=Token)
    trust: Trust = field(default_factory=Trust)
    platform: Platform = field(default_factory=Platform)
    gpu: Gpu = field(default_factory=Gpu)
    enrol: Enrol = field(default_factory=Enrol)
    limits: Limits = field(default_factory=Limits)

    @property
    def unix_socket(self) -> str | None:
        return self.listen.removeprefix("unix:") if self.listen.startswith("unix:") else None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, where there is no ``unix_socket``."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


def load(path: Path) -> Config:
    """Read a configuration file. Raises ``Misuse`` (``BAD_CONFIG``), with the table and key at fault."""
    return parse(configfile.read(path)[0])


def parse(document: dict[str, Any]) -> Config:
    """Check a parsed document. Raises ``Misuse`` (``BAD_CONFIG``)."""
    config = configfile.table(Config, document, {Path: _path})
    _check(config)
    return config


def _path(value: Any, name: str) -> Path:
    if not isinstance(value, str) or "\0" in value:
        raise bad(f"{name} must be a path")
    credential = value.removeprefix(CREDENTIAL)
    if credential != value and _NAME.fullmatch(credential) and credential not in (".", ".."):
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        if folder is None:
            raise bad(f"{name}: systemd handed over no credentials")
        return Path(folder) / credential
    if not value.startswith("/"):
        raise bad(f"{name} must be an absolute path or {CREDENTIAL}NAME")
    return Path(value)


def _check(config: Config) -> None:
    if not all(check_audience(each) for each in (config.audience, config.token.audience or config.audience)):
        raise bad("audience and token.audience must be 1-255 bytes of plain text")
    _check_listen(config.listen)
    if not 1 <= len(config.keys.signing) <= 8:
        raise bad("keys.signing must list 1 to 8 files")
    token = config.token
    if not 1 <= token.nonce_seconds < token.seconds <= 86400:
        raise bad("token.seconds must be within a day, and more than token.nonce_seconds")
    if not config.trust.purposes or not set(config.trust.purposes) <= PURPOSES:
        raise bad(f"trust.purposes must list some of {', '.join(sorted(PURPOSES))}")
    if config.trust.register > 15:
        raise bad("trust.register must be a PCR that cannot be reset: 0-15")
    if not all(re.fullmatch(r"000[bcd]([0-9a-f]{2}){32,64}", name) for name in config.trust.pinned_ak_names):
        raise bad("trust.pinned_ak_names must hold Names: the algorithm and the digest, in lower-case hex")
    if config.gpu.count > MAX_DEVICES:
        raise bad(f"gpu.count must be at most {MAX_DEVICES}")
    _check_enrol(config.enrol)
    limits = config.limits
    if min(getattr(limits, entry.name) for entry in fields(limits)) < 1 or limits.workers > 64:
        raise bad("limits must be at least 1, limits.workers at most 64")
    if not limits.bundle_bytes <= min(MAX_BUNDLE, limits.buffered_bytes):
        raise bad(f"limits.bundle_bytes must be at most {MAX_BUNDLE} and limits.buffered_bytes")


def _check_listen(listen: str) -> None:
    if re.fullmatch(r"unix:/[^\0]{1,106}", listen):
        return
    match = re.fullmatch(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})", listen)
    if match is None or int(match[1]) > 0xFFFF:
        raise bad("listen must be HOST:PORT, [IPV6]:PORT or unix:/PATH")


def _check_enrol(enrol: Enrol) -> None:
    for one, other in ((enrol.certificate, enrol.key), (enrol.simulated_certificate, enrol.simulated_key)):
        if (one is None) != (other is None):
            raise bad("enrol: a CA needs its certificate and its key")
    if enrol.certificate is not None and enrol.certificate == enrol.simulated_certificate:
        raise bad("enrol: the CA beside simulated EKs must be another one")
    if (enrol.vendor_ek_roots or enrol.operator_ek_roots) and enrol.certificate is None:
        raise bad("enrol.certificate is missing: no CA for AKs beside these EK roots")
    if enrol.simulated_ek_roots and enrol.simulated_certificate is None:
        raise bad("enrol.simulated_certificate is missing: no CA for AKs beside simulated EKs")
    if not 1 <= enrol.days <= 366:
        raise bad("enrol.days must be within 1-366")
    for name in enrol.vendor_ek_roots:
        try:
            EkClass(f"vendor:{name}")
        except Misuse:
            raise bad("enrol.vendor_ek_roots: a vendor's name is 1-32 letters, digits, dots and dashes") from None
