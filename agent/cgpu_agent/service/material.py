"""Everything the service works with, read from files once, at the start, and checked before the first request."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from joserfc.jwk import ECKey

from cgpu_agent import __version__
from cgpu_agent.cedar.engine import Policies
from cgpu_agent.cedar.files import APPRAISAL_SCHEMA
from cgpu_agent.errors import AgentError, HostileInput, Misuse
from cgpu_agent.service import replica
from cgpu_agent.service.config import Config, Gpu
from cgpu_agent.service.enrol import MAX_INTERMEDIATES, EkRoots
from cgpu_agent.service.issuer import Issuer, Issuers
from cgpu_agent.service.judge import Judge
from cgpu_agent.service.replica import ReplicaKeys
from cgpu_agent.verifier.certificate import load_certificate, load_trusted
from cgpu_agent.verifier.chain import MAX_CERTIFICATES
from cgpu_agent.verifier.ear import sign_ear
from cgpu_agent.verifier.ekclass import EkClass
from cgpu_agent.verifier.evidence import RelyingParty
from cgpu_agent.verifier.platformcase import PlatformParty
from cgpu_agent.verifier.platformfloor import parse_floors
from cgpu_agent.verifier.reference import Reference, parse_reference

if TYPE_CHECKING:
    from cgpu_agent.verifier.gpucase import GpuParty

MAX_FILE: Final = 1 << 20
DEFAULT_POLICY: Final = APPRAISAL_SCHEMA.parent / "default-appraisal.cedar"


@dataclass(frozen=True, slots=True)
class Material:
    """What a replica holds; its secrets are kept out of ``repr``."""

    config: Config
    judge: Judge
    replica_keys: ReplicaKeys
    signing_keys: tuple[EllipticCurvePrivateKey, ...] = field(repr=False)
    ek_trust: tuple[EkRoots, ...]
    ek_intermediates: tuple[x509.Certificate, ...]
    issuers: Issuers

    def sign(self, claims: dict[str, Any]) -> str:
        """A token, by the first key."""
        return sign_ear(claims, self.signing_keys[0])

    def jwks(self) -> dict[str, Any]:
        """All public signing keys (RFC 7517), so that tokens of a key on its way out still verify."""
        return {"keys": [_public_jwk(key) for key in self.signing_keys]}


def load(config: Config) -> Material:
    """Read every file that the configuration names. Raises ``Misuse``, with the file at fault."""
    trust, enrol = config.trust, config.enrol
    issuers = Issuers(
        _issuer(enrol.certificate, enrol.key), _issuer(enrol.simulated_certificate, enrol.simulated_key)
    )
    replica_keys = _read_replica(config.keys.replica)
    signing = tuple(_private_key(path) for path in config.keys.signing)
    roots = [*_certificates(trust.ak_roots), *_own(issuers.genuine)]
    simulated = [*_certificates(trust.simulated_ak_roots), *_own(issuers.simulated)]
    _require_disjoint({"AK roots": roots, "simulated AK roots": simulated})
    party = RelyingParty(
        audience=config.audience,
        nonce=b"",
        at=datetime.fromtimestamp(0, timezone.utc),
        roots=tuple(roots),
        simulated_roots=tuple(simulated),
        intermediates=_intermediates(trust.ak_intermediates, MAX_CERTIFICATES),
        pinned_names=frozenset(bytes.fromhex(name) for name in trust.pinned_ak_names),
        allow_unendorsed=trust.allow_unendorsed,
        allow_no_boot_log=trust.allow_no_boot_log,
        register=trust.register,
        purposes=frozenset(trust.purposes),
        platform_party=_platform_party(config),
        gpu_count=config.gpu.count or None,
        gpu_party=_gpu_party(config),
    )
    policy_path = trust.policy or DEFAULT_POLICY
    judge = Judge(
        party=party,
        policy=Policies.load(_text(policy_path), _text(APPRAISAL_SCHEMA), str(policy_path)),
        reference=None if trust.reference is None else _reference(trust.reference),
        replica_keys=replica_keys,
        nonce_seconds=config.token.nonce_seconds,
        token_seconds=config.token.seconds,
        token_audience=config.token.audience or config.audience,
        verifier_id={"build": f"cgpu-verifier {__version__}", "developer": "cgpu-agent"},
    )
    return Material(
        config=config,
        judge=judge,
        replica_keys=replica_keys,
        signing_keys=signing,
        ek_trust=_ek_trust(config),
        ek_intermediates=_intermediates(enrol.ek_intermediates, MAX_CERTIFICATES - MAX_INTERMEDIATES),
        issuers=issuers,
    )


def _platform_party(config: Config) -> PlatformParty:
    snp_floor, tdx_floor = parse_floors(config.platform.floors)
    at = datetime.fromtimestamp(0, timezone.utc)
    return PlatformParty(at, snp_floor=snp_floor, tdx_floor=tdx_floor, require_fresh=config.platform.require_fresh)


def _gpu_party(config: Config) -> GpuParty | None:
    """``None`` where nothing is demanded of GPUs: then nothing for them need be installed."""
    if config.gpu == Gpu():
        return None
    try:
        from cgpu_agent.service import gpus  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise Misuse("GPU_PACKAGES_MISSING", "gpu: judging GPUs takes more: pip install 'cgpu-agent[gpu]'") from error
    return gpus.load_party(config.gpu)


def _ek_trust(config: Config) -> tuple[EkRoots, ...]:
    enrol = config.enrol
    stores = {
        **{f"vendor:{name}": paths for name, paths in sorted(enrol.vendor_ek_roots.items())},
        "operator": enrol.operator_ek_roots,
        "simulated": enrol.simulated_ek_roots,
    }
    found = {name: _certificates(paths) for name, paths in stores.items() if paths}
    _require_disjoint(found)
    return tuple(EkRoots(EkClass(name), tuple(roots)) for name, roots in found.items())


def _require_disjoint(stores: dict[str, list[x509.Certificate]]) -> None:
    """A root of two stores would let the better one win. By key: a root can be certified again."""
    owners: dict[bytes, str] = {}
    for name, roots in stores.items():
        if len(roots) > MAX_CERTIFICATES:
            raise Misuse("TOO_MANY_CERTIFICATES", f"{name}: more than {MAX_CERTIFICATES} certificates")
        for root in roots:
            key = root.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            if owners.setdefault(key, name) != name:
                fingerprint = root.fingerprint(SHA256()).hex()
                raise Misuse("ROOT_IN_TWO_STORES", f"root {fingerprint} is both in {owners[key]} and in {name}")


def _own(issuer: Issuer | None) -> list[x509.Certificate]:
    return [] if issuer is None else [issuer.certificate]


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            if secret and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & stat.S_IRWXO:
                raise Misuse("KEY_EXPOSED", f"{path} is a secret that everybody may read: chmod o= it")
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise Misuse("NO_FILE", f"{path}: {error.strerror}") from error
    if len(data) > MAX_FILE:
        raise Misuse("FILE_TOO_LARGE", f"{path}: larger than {MAX_FILE} bytes")
    return data


def _text(path: Path) -> str:
    try:
        return _read(path).decode("utf-8")
    except UnicodeDecodeError:
        raise Misuse("BAD_FILE", f"{path}: not UTF-8") from None


def _reference(path: Path) -> Reference:
    try:
        return parse_reference(_read(path))
    except HostileInput as error:
        raise Misuse("BAD_REFERENCE", f"{path}: {error.message}") from error


def _certificates(paths: Iterable[Path]) -> list[x509.Certificate]:
    found: list[x509.Certificate] = []
    for path in paths:
        try:
            found += load_trusted(_read(path))
        except HostileInput as error:
            raise Misuse("BAD_CERTIFICATE", f"{path}: {error.message}") from error
    return found


def _intermediates(paths: Iterable[Path], limit: int) -> tuple[x509.Certificate, ...]:
    found = _certificates(paths)
    if len(found) > limit:
        raise Misuse("TOO_MANY_CERTIFICATES", f"more than {limit} intermediate certificates")
    return tuple(found)


def _read_replica(path: Path) -> ReplicaKeys:
    try:
        return replica.parse(_read(path, secret=True))
    except Misuse as error:
        raise Misuse(error.slug, f"{path}: {error.message}") from error


def _private_key(path: Path) -> EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(_read(path, secret=True), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Misuse("BAD_KEY", f"{path}: not a private key in PEM without a password") from error
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        raise Misuse("BAD_KEY", f"{path}: not a key on P-256")
    return key


def _public_jwk(key: EllipticCurvePrivateKey) -> dict[str, Any]:
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    jwk = ECKey.import_key(pem)
    return {**jwk.as_dict(private=False), "alg": "ES256", "kid": jwk.thumbprint(), "use": "sig"}


def _issuer(certificate: Path | None, key: Path | None) -> Issuer | None:
    if certificate is None or key is None:
        return None
    try:
        return Issuer(load_certificate(_read(certificate)), _private_key(key))
    except AgentError as error:
        raise Misuse("BAD_ISSUER", f"{certificate}: {error.message}") from error
