"""X.509 path validation for AK and EK certificates: pinned roots, one purpose, a given point in time.

An own builder, because the one of ``cryptography`` is made for web servers: it knows neither a TPM's purposes nor the
critical directory name of an EK certificate, and cannot say which rule refused. This one is stricter than RFC 5280
(6.1) where a TPM's chain never needs the freedom: no name constraints, no policies, at most five certificates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.certificate import (
    CertificateFacts,
    Purpose,
    require_ca,
    require_leaf,
    require_signed,
    require_valid,
)

MAX_CERTIFICATES: Final = 16
"""Intermediates, and as many roots: bounds what a stranger can make the search compare."""
MAX_DEPTH: Final = 5
"""Certificates of a path, leaf and root included; the longest known chain of a TPM has four."""
MAX_SIGNATURES: Final = 32
"""Signatures that one search verifies at most: many CAs of one name cannot make it exponential."""


@dataclass(frozen=True, slots=True)
class PathCertificate:
    """One certificate of a verified path; ``sha256`` is the fingerprint of its DER in lower-case hex."""

    subject: str
    sha256: str
    not_after: datetime

    def to_json(self) -> dict[str, str]:
        """As a verdict's JSON has it."""
        return {"not_after": self.not_after.isoformat(), "sha256": self.sha256, "subject": self.subject}


@dataclass(frozen=True, slots=True)
class CertificatePath:
    """A verified path: the leaf first, a pinned root last."""

    certificates: tuple[PathCertificate, ...]

    @property
    def not_after(self) -> datetime:
        """When the first of them expires."""
        return min(each.not_after for each in self.certificates)

    def to_json(self) -> list[dict[str, str]]:
        """As a verdict's JSON has it."""
        return [each.to_json() for each in self.certificates]


def verify_chain(
    leaf: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    *,
    purpose: Purpose,
    at: datetime,
) -> CertificatePath:
    """Find a path from the leaf to a pinned root in which every rule holds at ``at``.

    Every certificate: valid at ``at``, sound key. The leaf: for ``purpose``, no CA. Every CA, the root included: a CA
    by basicConstraints and keyUsage, path length kept, not limited to other purposes. Every signature: over SHA-256
    or better. No critical extension that is not understood.

    Args:
        leaf: the certificate in question.
        intermediates: further certificates, from anywhere.
        roots: trust anchors that the caller pinned.
        purpose: ``AK`` or ``EK``.
        at: the moment of judgement, with a time zone. This function reads no clock.

    Raises:
        HostileInput: ``NO_ROOTS``, ``TOO_MANY_CERTIFICATES``, ``PATH_TOO_LONG``, ``UNKNOWN_ISSUER``, and the slugs of
            ``certificate``. Where several candidates fail, the one that came closest speaks.
        Misuse: ``NAIVE_TIME``.
    """
    if at.tzinfo is None:
        raise Misuse("NAIVE_TIME", "the moment of judgement needs a time zone")
    if not roots:
        raise HostileInput("NO_ROOTS", "no trusted root is configured, so no certificate can be trusted")
    if len(intermediates) > MAX_CERTIFICATES or len(roots) > MAX_CERTIFICATES:
        raise HostileInput("TOO_MANY_CERTIFICATES", f"more than {MAX_CERTIFICATES} certificates to search")
    start = CertificateFacts.of(leaf)
    require_leaf(start, purpose)
    require_valid(start, at)
    search = _Search(roots, intermediates, purpose, at)
    path = search.climb((start,))
    if path is None:
        raise search.closest
    return CertificatePath(
        tuple(PathCertificate(each.subject_text, each.sha256.hex(), each.not_after) for each in path)
    )


class _Search:
    """Depth-first search for a path, bounded in depth and in signatures."""

    def __init__(
        self,
        roots: Sequence[x509.Certificate],
        intermediates: Sequence[x509.Certificate],
        purpose: Purpose,
        at: datetime,
    ) -> None:
        anchors = [CertificateFacts.of(each) for each in roots]
        self._anchors = frozenset(each.sha256 for each in anchors)
        self._candidates = [*anchors, *(CertificateFacts.of(each) for each in intermediates)]
        self._purpose = purpose
        self._at = at
        self._signatures_left = MAX_SIGNATURES
        self._closeness = (0, 0)
        self.closest = HostileInput("UNKNOWN_ISSUER", "no trusted root leads to this certificate")

    def climb(self, path: tuple[CertificateFacts, ...]) -> tuple[CertificateFacts, ...] | None:
        """Extend the path upwards until it ends in a root; ``None`` when nothing does."""
        child = path[-1]
        on_path = {each.sha256 for each in path}
        for issuer in self._candidates:
            if issuer.subject != child.issuer or issuer.sha256 in on_path:
                continue
            if len(path) == MAX_DEPTH:
                self._note(path, 1, HostileInput("PATH_TOO_LONG", f"a path of more than {MAX_DEPTH} certificates"))
                continue
            if not self._issued(child, issuer, path):
                continue
            longer = (*path, issuer)
            found = longer if issuer.sha256 in self._anchors else self.climb(longer)
            if found is not None:
                return found
        return None

    def _issued(self, child: CertificateFacts, issuer: CertificateFacts, path: tuple[CertificateFacts, ...]) -> bool:
        if self._signatures_left == 0:
            raise HostileInput("TOO_MANY_CERTIFICATES", "too many certificates could have issued one another")
        self._signatures_left -= 1
        try:
            require_signed(child, issuer)
        except HostileInput as error:
            self._note(path, 0, error)
            return False
        try:
            require_ca(issuer, self._purpose, cas_below=len(path) - 1)
            require_valid(issuer, self._at)
        except HostileInput as error:
            self._note(path, 1, error)
            return False
        return True

    def _note(self, path: tuple[CertificateFacts, ...], stage: int, error: HostileInput) -> None:
        closeness = (len(path), stage)
        if closeness > self._closeness:
            self._closeness, self.closest = closeness, error
