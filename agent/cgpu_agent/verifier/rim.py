"""Verifies the signature of a reference integrity manifest, and hands out only what was signed.

Canonical XML and XML Signature are left to ``signxml`` over ``lxml``, with everything they allow pinned down. By then
``wire.rim`` has refused whatever is not plain elements, one signature over the whole, and the expected algorithms.
The values come from the bytes that the signature covers, never from the document around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final

from cryptography import x509
from lxml import etree  # type: ignore[import-untyped]
from signxml.algorithms import DigestAlgorithm, SignatureMethod
from signxml.exceptions import InvalidDigest, SignXMLException
from signxml.verifier import SignatureConfiguration, VerifyResult, XMLVerifier

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.gpuchain import PinnedPath, PinnedRoots, verify_pinned_chain
from cgpu_agent.verifier.keys import certificate_from_der
from cgpu_agent.verifier.verdict import Check, Step, Steps
from cgpu_agent.wire.rim import Rim, RimDocument, parse_rim, parse_signed

RIM_CHAIN_LENGTH: Final = range(3, 6)
"""Certificates of a RIM's signer, root included; NVIDIA's have four."""
_KEPT: Final = 16
"""Manifests whose content is kept: those of a few generations of driver and firmware."""


@dataclass(frozen=True, slots=True)
class VerifiedRim:
    """A manifest that a pinned root vouches for.

    Attributes:
        rim: its content, from the signed bytes.
        path: the signer's chain.
    """

    rim: Rim
    path: PinnedPath


@dataclass(frozen=True, slots=True)
class RimResult:
    """What a manifest showed; ``verified`` is withheld where a step refused."""

    steps: tuple[Step, ...]
    verified: VerifiedRim | None
    refusal: Step | None

    def passed(self, step_id: str) -> bool:
        """Whether that step passed."""
        return any(step.id == step_id and step.outcome.value == "pass" for step in self.steps)

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it."""
        rim = None if self.verified is None else self.verified.rim
        return {
            "product": None if rim is None else rim.product,
            "signer": [] if self.verified is None else self.verified.path.path.to_json(),
            "steps": [step.to_json() for step in self.steps],
            "tag_id": None if rim is None else rim.tag_id,
            "version": None if rim is None else rim.version,
        }


@dataclass(slots=True)
class _Case:
    data: bytes | RimDocument
    roots: PinnedRoots
    at: datetime
    document: RimDocument | None = None
    path: PinnedPath | None = None
    signed: bytes | None = None
    rim: Rim | None = None

    @property
    def parsed(self) -> RimDocument:
        if self.document is None:
            raise LookupError("a step ran before the document was parsed")
        return self.document

    @property
    def chain(self) -> PinnedPath:
        if self.path is None:
            raise LookupError("a step ran before the chain was verified")
        return self.path


def _judge_format(case: _Case) -> str:
    case.document = parse_rim(case.data) if isinstance(case.data, bytes) else case.data
    claimed = case.document.claimed
    return f"{claimed.product} {claimed.edition}, version {claimed.version}, {len(claimed.active)} active goldens"


def _judge_chain(case: _Case) -> str:
    certificates = [certificate_from_der(der) for der in case.parsed.certificates]
    case.path = verify_pinned_chain(certificates, roots=case.roots, length=RIM_CHAIN_LENGTH, at=case.at)
    # NVIDIA has signers below the same root whose manifests are for engineering firmware.
    debug = next((each for each in case.path.facts if "debug" in each.subject_text.lower()), None)
    if debug is not None:
        raise HostileInput("DEBUG_RIM", f"signed below {debug.subject_text}, which is not for production devices")
    return f"{len(certificates)} certificates, the signer's expires {case.path.facts[0].not_after.date()}"


def _judge_signature(case: _Case) -> str:
    try:
        case.signed = _signed_content(case.parsed.data, case.chain.leaf)
    except InvalidDigest:
        case.signed = None  # SignedInfo was signed; that it is about another document is for the next step to say
    except (SignXMLException, etree.LxmlError, ValueError) as error:
        raise HostileInput("BAD_RIM_SIGNATURE", "SignedInfo is not signed by the certified key") from error
    return "ECDSA P-384 with SHA-384 over SignedInfo"


@lru_cache(_KEPT)
def _signed_content(document: bytes, signer: x509.Certificate) -> bytes:
    """The canonical bytes that the signature of a document covers. Nothing else decides it, so that it is found once
    for all devices that a manifest is about. Raises what ``signxml`` raises."""
    configuration = SignatureConfiguration(
        require_x509=True,
        location="./",
        expect_references=1,
        signature_methods=frozenset({SignatureMethod.ECDSA_SHA384}),
        digest_algorithms=frozenset({DigestAlgorithm.SHA384}),
        verification_time=signer.not_valid_before_utc,  # ``rim.chain`` has judged when it is valid
    )
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, dtd_validation=False, huge_tree=False, recover=False
    )
    found = XMLVerifier().verify(
        document,
        x509_cert=signer,
        validate_schema=False,  # wire.rim has read the signature more strictly than its schema does
        parser=parser,
        expect_config=configuration,
    )
    if not isinstance(found, VerifyResult):
        raise HostileInput("BAD_RIM_SIGNATURE", "the signature is not over exactly one thing")
    return found.signed_data


_parse_signed: Final = lru_cache(_KEPT)(parse_signed)


def _judge_digest(case: _Case) -> str:
    if case.signed is None:
        raise HostileInput("RIM_DIGEST_MISMATCH", "the document is not the one that was signed")
    case.rim = _parse_signed(case.signed)
    return f"SHA-384 over {len(case.signed)} canonical bytes"


RIM_CHECKS: Final[Sequence[Check[_Case]]] = (
    Check("rim.format", "it is a manifest with one signature over the whole", _judge_format),
    Check("rim.chain", "its signer's certificates lead to a pinned root and are valid", _judge_chain),
    Check("rim.signature", "the signer signed its SignedInfo", _judge_signature),
    Check("rim.digest", "SignedInfo is about this very document", _judge_digest),
)
"""The steps of ``verify_rim``, in order."""


def verify_rim(document: bytes | RimDocument, *, roots: PinnedRoots, at: datetime) -> RimResult:
    """Judge a manifest by ``RIM_CHECKS``. Whose goldens they are is for the caller to compare.

    Args:
        document: the file, or what ``parse_rim`` made of it.
        roots: root keys trusted for reference values.
        at: the moment of judgement, with a time zone: the signer's certificates live two years.
    """
    case = _Case(document, roots, at)
    steps = Steps()
    accepted = steps.run(RIM_CHECKS, case)
    verified = VerifiedRim(case.rim, case.chain) if accepted and case.rim is not None else None
    return RimResult(steps.all, verified, steps.refusal)


def verified_rim(document: RimDocument, *, roots: PinnedRoots, at: datetime) -> VerifiedRim:
    """What ``verify_rim`` accepts. Raises ``HostileInput`` with the reason of the step that refused."""
    result = verify_rim(document, roots=roots, at=at)
    if result.verified is None:
        slug, detail = (None, "") if result.refusal is None else (result.refusal.slug, result.refusal.detail)
        raise HostileInput(slug or "INTERNAL", f"RIM: {detail}")
    return result.verified
