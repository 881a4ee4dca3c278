"""What a relying party pays: replay and judgement beside the bare hashing and signature checks inside them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from online import AUDIENCE, NONCE, in_turns
from ratios import Pair, per_second
from world import BOOT_LOG, VECTORS

from cgpu_agent.verifier.evidence import RelyingParty, verify_evidence
from cgpu_agent.verifier.keys import AttestationKey, load_attestation_key
from cgpu_agent.verifier.platform import endorse_platform
from cgpu_agent.verifier.platformcase import PlatformEvidence
from cgpu_agent.verifier.quote import verify_quote
from cgpu_agent.verifier.replay import replay
from cgpu_agent.wire import eventlog
from cgpu_agent.wire.bundle import parse_bundle
from cgpu_agent.wire.hcl import parse_hcl
from cgpu_agent.wire.snp import parse_snp_report
from cgpu_agent.wire.tdx import parse_td_quote
from cgpu_agent.wire.tpm import parse_signature

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fixtures.platform import AK, AMD, BATCH, INTEL, PARTY, SNP, TDX

_RATE = "/s"


def offline(bundle: bytes, *, rounds: int, seconds: float) -> list[Pair]:
    """Rates a second on one core. Ratios below 1: how much of the bare work's speed is left."""
    return [
        _replay(rounds, seconds),
        _quote(rounds, seconds),
        _evidence(bundle, rounds, seconds),
        _snp(rounds, seconds),
        _tdx(rounds, seconds),
    ]


def _compare(title: str, against: str, rounds: int, seconds: float, work: Sequence[Callable[[], object]]) -> Pair:
    ours, theirs = work
    found = in_turns(
        rounds, {"ours": lambda: per_second(ours, seconds), "theirs": lambda: per_second(theirs, seconds)}
    )
    return Pair.of(title, against, _RATE, found["ours"], found["theirs"])


def _replay(rounds: int, seconds: float) -> Pair:
    data = BOOT_LOG.read_bytes()
    digests = [event.digest("sha256") or b"" for event in eventlog.parse(data).events if event.measured]

    def extend_only() -> bytes:
        value = bytes(32)
        for digest in digests:
            value = hashlib.sha256(value + digest).digest()
        return value

    title = f"parse and replay a log of {len(digests)} events"
    work = (lambda: replay(eventlog.parse(data), "sha256"), extend_only)
    return _compare(title, "hashlib alone: as many extends", rounds, seconds, work)


def _bare_check(ak: AttestationKey, attest: bytes, signature: bytes) -> Callable[[], object]:
    value, key = parse_signature(signature).signature, ak.key
    if isinstance(key, rsa.RSAPublicKey):
        return lambda: key.verify(value, attest, padding.PKCS1v15(), hashes.SHA256())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return lambda: key.verify(value, attest, ec.ECDSA(hashes.SHA256()))


def _quote(rounds: int, seconds: float) -> Pair:
    folder = VECTORS / "quote-sample"
    attest, signature = (folder / "quote.msg").read_bytes(), (folder / "quote.sig").read_bytes()
    ak = load_attestation_key((folder / "ak.pub.pem").read_bytes())

    def judge() -> object:
        result = verify_quote(attest, signature, ak, nonce=None, pcrs=None, expected_pcrs=None)
        assert result.accepted
        return result

    work = (judge, _bare_check(ak, attest, signature))
    return _compare("verify_quote", "its one signature check alone", rounds, seconds, work)


def _evidence(data: bytes, rounds: int, seconds: float) -> Pair:
    party = RelyingParty(AUDIENCE, NONCE, datetime.now(timezone.utc), allow_unendorsed=True)
    bundle = parse_bundle(data)
    quote, certify = bundle.quote, bundle.agent_ak_certify
    checks = [
        _bare_check(load_attestation_key(bundle.agent_ak), quote.attest, quote.signature),
        _bare_check(load_attestation_key(bundle.platform_ak), certify.attest, certify.signature),
    ]

    def judge() -> object:
        result = verify_evidence(data, party)
        assert result.accepted, result.refusal
        return result

    def both() -> None:
        for check in checks:
            check()

    title = f"verify_evidence, {len(data) >> 10} KiB"
    return _compare(title, "its two signature checks alone", rounds, seconds, (judge, both))


def _links(path: Sequence[x509.Certificate]) -> Callable[[], None]:
    """Each certificate's signature by the next."""

    def check() -> None:
        for certificate, issuer in pairwise(path):
            certificate.verify_directly_issued_by(issuer)

    return check


def _judged(evidence: PlatformEvidence) -> Callable[[], object]:
    def judge() -> object:
        answer = endorse_platform(evidence, PARTY, ak=AK, root=BATCH)
        assert answer.endorsed_by != "none", answer.refusal
        return answer

    return judge


def _snp(rounds: int, seconds: float) -> Pair:
    links, key = _links(AMD.certificates), AMD.vcek.certificate.public_key()
    report = parse_snp_report(parse_hcl(SNP.report or b"").hardware)
    signature = encode_dss_signature(report.r, report.s)
    assert isinstance(key, ec.EllipticCurvePublicKey)

    def bare() -> None:
        links()
        key.verify(signature, report.signed, ec.ECDSA(hashes.SHA384()))

    return _compare("HCL report, SEV-SNP", "its three signature checks alone", rounds, seconds, (_judged(SNP), bare))


def _tdx(rounds: int, seconds: float) -> Pair:
    links, pck = _links(INTEL.certificates), INTEL.pck.certificate.public_key()
    quote = parse_td_quote(TDX.td_quote or b"")
    point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\4" + quote.attestation_key)
    outer, inner = (encode_dss_signature(each.r, each.s) for each in (quote, quote.qe))
    assert isinstance(pck, ec.EllipticCurvePublicKey)

    def bare() -> None:
        links()
        pck.verify(inner, quote.qe.signed, ec.ECDSA(hashes.SHA256()))
        point.verify(outer, quote.signed, ec.ECDSA(hashes.SHA256()))

    return _compare("HCL report, TDX", "its four signature checks alone", rounds, seconds, (_judged(TDX), bare))
