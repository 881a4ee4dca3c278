"""Asks about one certificate of a verified chain by OCSP, and takes the answer to that very question alone.

The nonce makes an answer that somebody kept worthless, so here the answer must have it; in RFC 9654 it may.
Sources: RFC 6960, 4.1; RFC 9654, 2.1.
"""

from __future__ import annotations

import hmac
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.gpuchain import PinnedPath
from cgpu_agent.verifier.revocation import CertificateStatus, RevocationData, chain_status, load_ocsp

NONCE_SIZE: Final = 32


def ocsp_request(path: PinnedPath, position: int, nonce: bytes) -> bytes:
    """DER of a request about the certificate at ``position``, as NVIDIA's verifier asks (nvtrust 2.7.3)."""
    child, issuer = path.facts[position].certificate, path.facts[position + 1].certificate
    builder = ocsp.OCSPRequestBuilder().add_certificate(child, issuer, SHA384())
    return builder.add_extension(x509.OCSPNonce(nonce), critical=True).build().public_bytes(Encoding.DER)


def require_answer(data: bytes, path: PinnedPath, position: int, nonce: bytes, at: datetime) -> CertificateStatus:
    """The status that a response gives: ``good`` or ``revoked``.

    Args:
        data: DER of the response.
        path, position, nonce: as they were asked with.
        at: the moment of judgement, with a time zone.

    Raises:
        HostileInput: what ``load_ocsp`` and ``chain_status`` raise; ``OCSP_NONCE``: it answers another request;
            ``OCSP_NO_ANSWER``: it is about another certificate, not fresh, or does not know.
    """
    response = load_ocsp(data)
    try:
        found = response.extensions.get_extension_for_class(x509.OCSPNonce).value.nonce
        count = len(list(response.responses))
    except x509.ExtensionNotFound:
        raise HostileInput("OCSP_NONCE", "an OCSP response without the nonce of the request") from None
    except (ValueError, TypeError, x509.DuplicateExtension) as error:
        raise HostileInput("BAD_OCSP", "an OCSP response with unreadable content") from error
    if not hmac.compare_digest(found, nonce):
        raise HostileInput("OCSP_NONCE", "an OCSP response to another request")
    if count != 1:
        raise HostileInput("OCSP_NO_ANSWER", f"an OCSP response about {count} certificates where one was asked for")
    (status,) = chain_status(path, [position], RevocationData(responses=(response,)), at)
    if status.status == "unknown":
        why = "it is about another certificate" if status.reason == "absent" else status.reason
        raise HostileInput("OCSP_NO_ANSWER", f"the OCSP response says nothing of {status.subject}: {why}")
    return status
