"""What Microsoft's attestation service says of a VM: its token, judged by whoever trusts that service.

Source: RFC 7515 and 7519; the claims as recorded tokens have them. A token is that service's word about what it saw,
when it saw it; the nonce, where one was demanded, is all that makes it an answer to this relying party.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.keys import PublicKey, certificate_from_der, certificate_key, require_strong, same_key
from cgpu_agent.verifier.platform import EndorsedBy
from cgpu_agent.verifier.platformcase import PlatformFacts, Tee, found
from cgpu_agent.verifier.verdict import Check, Outcome, Skip, Step, Steps
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.der import trim_der
from cgpu_agent.wire.strictjson import Fields, unb64url

MAX_TOKEN: Final = 64 << 10
MAX_JWKS: Final = 1 << 20
MAX_LIFETIME: Final = timedelta(hours=8)
"""What the service gives; a longer one is none of its."""

_CLOCK_SKEW: Final = timedelta(minutes=1)
_MAX_KEYS: Final = 64
_MAX_TEXT: Final = 4096
_TEES: Final[Mapping[str, Tee]] = {"sevsnpvm": "sev-snp", "tdxvm": "tdx"}
_ENDORSERS: Final[Mapping[Tee, EndorsedBy]] = {
    "sev-snp": "amd-sev-snp",
    "tdx": "intel-tdx",
    "none": "azure-trusted-launch",
}
_COMPLIANT: Final = "azure-compliant-cvm"
_TCB: Final = {"bootloader": "bootloader-svn", "tee": "tee-svn", "snp": "snpfw-svn", "microcode": "microcode-svn"}


@dataclass(frozen=True, slots=True)
class MaaParty:
    """Who judges.

    Attributes:
        at: the moment of judgement, with a time zone.
        issuers: the services that are believed, as whole ``https`` URLs.
        jwks: their key set, fetched over TLS from ``ISSUER/certs``; never from where a token says.
        nonce: what was given as the client payload's nonce; ``None``: none was, so old tokens pass until they expire.
    """

    at: datetime
    issuers: Sequence[str]
    jwks: bytes
    nonce: bytes | None = None


@dataclass(frozen=True, slots=True)
class MaaResult:
    """The answer.

    Attributes:
        endorsed_by: as a platform's endorsement has it, by that service's word; ``none`` also for a genuine TEE whose
            code the service knows nothing of.
        reason: a few stable words for ``none``.
        tee: what it saw below the VM.
        steps: every step, in order.
        facts: what the token says; empty where a step refused.
        ak: SHA-256 of the SubjectPublicKeyInfo of the AK that the report names, hex.
        token: issuer, times and policy; empty where a step refused.
    """

    endorsed_by: EndorsedBy
    reason: str
    tee: Tee
    steps: tuple[Step, ...]
    facts: PlatformFacts = field(default_factory=PlatformFacts)
    ak: str | None = None
    token: Mapping[str, str] = field(default_factory=dict)

    @property
    def refusal(self) -> Step | None:
        """The step that refused."""
        return next((step for step in self.steps if step.outcome is Outcome.REFUSE), None)

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it."""
        skipped = () if self.refusal else (step for step in self.steps if step.outcome is Outcome.SKIP)
        return {
            "ak": self.ak,
            "claims": self.facts.to_json(),
            "endorsed_by": self.endorsed_by,
            "reason": self.reason,
            "steps": [step.to_json() for step in self.steps],
            "tee": self.tee,
            "token": dict(self.token),
            "warnings": {step.slug or step.id: step.detail for step in skipped},
        }


@dataclass(slots=True)
class _Case:
    token: bytes
    party: MaaParty
    kid: str | None = None
    signed: bytes | None = None
    signature: bytes | None = None
    claims: dict[str, Any] | None = None
    key: RSAPublicKey | None = None
    issued: datetime | None = None
    expires: datetime | None = None
    tee: Tee = "none"
    endorsed_by: EndorsedBy = "none"
    facts: PlatformFacts | None = None
    ak: str | None = None


def _judge_format(case: _Case) -> str:
    if len(case.token) > MAX_TOKEN:
        raise HostileInput("TOO_LARGE", f"a token of more than {MAX_TOKEN} bytes")
    try:
        parts = [unb64url(part) for part in case.token.decode("ascii").split(".")]
    except ValueError:
        raise HostileInput("BAD_TOKEN", "not base64url with dots between") from None
    if len(parts) != 3:
        raise HostileInput("BAD_TOKEN", "a signed token has three parts")
    header = Fields(strictjson.loads(parts[0], "token header", MAX_TOKEN), "token header")
    if "crit" in header.keys():  # noqa: SIM118 - Fields is no mapping
        raise HostileInput("CRITICAL_HEADER", "the token demands extensions that are not known here")
    if header.raw("alg") != "RS256":
        raise HostileInput("WRONG_ALGORITHM", "the token is not signed by RS256")
    if "typ" in header.keys() and header.raw("typ") != "JWT":  # noqa: SIM118
        raise HostileInput("WRONG_TYPE", "the token is no JWT")
    case.kid = header.text("kid", 256)
    claims = strictjson.loads(parts[1], "token", MAX_TOKEN)
    if not isinstance(claims, dict):
        raise HostileInput("BAD_TOKEN", "a token's claims are a JSON object")
    case.claims, case.signature = claims, parts[2]
    case.signed = case.token.rpartition(b".")[0]
    return "RS256"


def _judge_issuer(case: _Case) -> str:
    # The whole URL: names that end alike belong to others (there are test authorities, too).
    issuer = _text(found(case.claims), "iss").removesuffix("/")
    if issuer not in {each.removesuffix("/") for each in case.party.issuers}:
        raise HostileInput("UNKNOWN_ISSUER", "the token is of a service that is not believed here")
    return issuer


def _judge_key(case: _Case) -> str:
    kid = found(case.kid)
    keys = Fields(strictjson.loads(case.party.jwks, "key set", MAX_JWKS), "key set").items("keys", _MAX_KEYS)
    named = [key for key in keys if isinstance(key, dict) and key.get("kid") == kid]
    if len(named) != 1:
        slug = "AMBIGUOUS_KEY" if named else "UNKNOWN_KEY"
        raise HostileInput(slug, f"{len(named)} keys in the set have the token's key id, one is wanted")
    case.key = _jwk_key(named[0])
    return f"RSA, {case.key.key_size} bits"


def _jwk_key(jwk: Mapping[str, Any]) -> RSAPublicKey:
    """RFC 7517: by n and e or, as this service has it, by the first certificate alone; both must agree."""
    if jwk.get("kty") != "RSA" or jwk.get("alg", "RS256") != "RS256" or jwk.get("use", "sig") != "sig":
        raise HostileInput("BAD_KEY", "the key is not for signatures by RS256")
    keys: list[PublicKey] = []
    try:
        if "n" in jwk or "e" in jwk:
            n, e = (int.from_bytes(unb64url(_text(jwk, name)), "big") for name in ("n", "e"))
            keys.append(RSAPublicNumbers(e, n).public_key())
        chain = jwk.get("x5c", [])
        if chain:
            der = base64.b64decode(chain[0], validate=True)
            keys.append(certificate_key(certificate_from_der(trim_der(der))))
    except (ValueError, TypeError, KeyError, IndexError, binascii.Error, UnsupportedAlgorithm) as error:
        raise HostileInput("BAD_KEY", "the key cannot be read") from error
    if not keys or not same_key(keys[0], keys[-1]) or not isinstance(keys[0], RSAPublicKey):
        raise HostileInput("BAD_KEY", "the key is none, or two")
    require_strong(keys[0])
    return keys[0]


def _judge_signature(case: _Case) -> str:
    try:
        found(case.key).verify(found(case.signature), found(case.signed), PKCS1v15(), SHA256())
    except InvalidSignature:
        raise HostileInput("BAD_SIGNATURE", "the service did not sign this") from None
    return "signed by that key"


def _judge_time(case: _Case) -> str:
    claims, at = found(case.claims), case.party.at
    issued, begins, expires = (_time(claims, name) for name in ("iat", "nbf", "exp"))
    if not issued <= expires <= issued + MAX_LIFETIME:
        raise HostileInput("BAD_LIFETIME", f"the token lives longer than {MAX_LIFETIME}, or not at all")
    if max(issued, begins) > at + _CLOCK_SKEW:
        raise HostileInput("TOKEN_NOT_YET_VALID", f"the token is valid from {max(issued, begins).isoformat()} on")
    if at >= expires:
        raise HostileInput("TOKEN_EXPIRED", f"the token expired at {expires.isoformat()}")
    case.issued, case.expires = issued, expires
    return f"valid until {expires.isoformat()}"


def _judge_nonce(case: _Case) -> str | Skip:
    if case.party.nonce is None:
        return Skip("NO_NONCE", "no nonce was demanded: the token may be an older answer to somebody else")
    payload = _object(_object(found(case.claims), "x-ms-runtime"), "client-payload")
    try:
        nonce = base64.b64decode(_text(payload, "nonce"), validate=True)
    except ValueError:
        raise HostileInput("BAD_TOKEN", "the token's nonce is not base64") from None
    if not hmac.compare_digest(nonce, case.party.nonce):
        raise HostileInput("NONCE_MISMATCH", "the token answers another nonce")
    return "answers your nonce"


def _judge_platform(case: _Case) -> str:
    claims = found(case.claims)
    kind = _text(claims, "x-ms-attestation-type")
    if kind == "azurevm":
        inner = _object(claims, "x-ms-isolation-tee") if "x-ms-isolation-tee" in claims else None
        kind = "azurevm" if inner is None else _text(inner, "x-ms-attestation-type")
    else:
        inner = claims
    if inner is not None:
        if kind not in _TEES:
            raise HostileInput("WRONG_TYPE", "the token is about something that is not known here")
        case.tee = _TEES[kind]
        _refuse_open(inner)
    compliant = inner is None or inner.get("x-ms-compliance-status") == _COMPLIANT
    case.endorsed_by = _ENDORSERS[case.tee] if compliant else "none"
    case.facts = _facts(claims, inner or {})
    case.ak = _ak(inner or {})
    return f"{case.tee}, {'as Azure runs it' if compliant else 'code that nobody names'}"


def _refuse_open(inner: Mapping[str, Any]) -> None:
    """Who can read the guest's memory need not have any of this signed."""
    for name, slug in (("is-debuggable", "DEBUG_ENABLED"), ("migration-allowed", "MIGRATION_ALLOWED")):
        if inner.get(f"x-ms-sevsnpvm-{name}", False) is not False:
            raise HostileInput(slug, f"the report says {name}")


def _facts(claims: Mapping[str, Any], inner: Mapping[str, Any]) -> PlatformFacts:
    secure_boot = claims.get("secureboot")
    vm_id = claims.get("x-ms-azurevm-vmid")
    svns = {name: inner.get(f"x-ms-sevsnpvm-{name}") for name in (*_TCB.values(), "guestsvn")}
    svn = svns["guestsvn"]
    return PlatformFacts(
        measurement=_hex(inner, "x-ms-sevsnpvm-launchmeasurement"),
        signer=_hex(inner, "x-ms-sevsnpvm-idkeydigest"),
        guest_svn=svn if isinstance(svn, int) else None,
        tcb={ours: svns[name] for ours, name in _TCB.items() if isinstance(svns[name], int)},
        secure_boot=secure_boot if isinstance(secure_boot, bool) else None,
        vm_unique_id=vm_id.lower() if isinstance(vm_id, str) else None,
    )


def _ak(inner: Mapping[str, Any]) -> str | None:
    runtime = inner.get("x-ms-runtime")
    keys = runtime.get("keys") if isinstance(runtime, dict) else None
    named = [key for key in keys or () if isinstance(key, dict) and key.get("kid") == "HCLAkPub"]
    if len(named) != 1:
        return None
    key = _jwk_key({"kty": named[0].get("kty"), "n": named[0].get("n"), "e": named[0].get("e")})
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise HostileInput("BAD_TOKEN", f"{name} is missing, or no text")
    return value


def _object(claims: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = claims.get(name)
    if not isinstance(value, dict):
        raise HostileInput("BAD_TOKEN", f"{name} is missing, or no object")
    return value


def _time(claims: Mapping[str, Any], name: str) -> datetime:
    value = claims.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 33:
        raise HostileInput("BAD_TOKEN", f"{name} is missing, or no time")
    return datetime.fromtimestamp(value, timezone.utc)


def _hex(claims: Mapping[str, Any], name: str) -> bytes | None:
    value = claims.get(name)
    try:
        return bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        raise HostileInput("BAD_TOKEN", f"{name} is not hex") from None


MAA_STEPS: Final[Sequence[Check[_Case]]] = (
    Check("maa.format", "a signed token, to the last byte", _judge_format),
    Check("maa.issuer", "of a service that is believed", _judge_issuer),
    Check("maa.key", "its key is in that service's set", _judge_key),
    Check("maa.signature", "signed by that key", _judge_signature),
    Check("maa.time", "valid now, and not for too long", _judge_time),
    Check("maa.nonce", "an answer to this nonce", _judge_nonce),
    Check("maa.platform", "about a VM that is closed to its host", _judge_platform),
)
_REQUIRED: Final = frozenset(step.id for step in MAA_STEPS) - {"maa.nonce"}


def verify_maa_token(token: bytes, party: MaaParty) -> MaaResult:
    """Judge a token in compact form. Never raises for it: whatever is wrong with it is in the answer."""
    case = _Case(token, party)
    steps = Steps()
    steps.run(MAA_STEPS, case)
    if not steps.accepted or not all(steps.passed(each) for each in _REQUIRED) or case.facts is None:
        slug = None if steps.refusal is None else steps.refusal.slug
        return MaaResult("none", (slug or "nothing was judged").lower().replace("_", " "), "none", steps.all)
    claims = found(case.claims)
    times = {"expires": found(case.expires), "issued": found(case.issued)}
    names = {"issuer": "iss", "policy_hash": "x-ms-policy-hash", "type": "x-ms-attestation-type"}
    told = {ours: claims.get(theirs) for ours, theirs in names.items()}
    return MaaResult(
        case.endorsed_by,
        "" if case.endorsed_by != "none" else "unknown paravisor",
        case.tee,
        steps.all,
        case.facts,
        case.ak,
        {
            **{name: value for name, value in told.items() if isinstance(value, str)},
            **{name: value.isoformat() for name, value in times.items()},
        },
    )
