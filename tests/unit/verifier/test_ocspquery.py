"""The question and its answer: whom it is about, and that nothing else passes for it."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.gpuchain import verify_pinned_chain
from cgpu_agent.verifier.ocspquery import NONCE_SIZE, ocsp_request, require_answer
from fixtures.gpujudge import GPU, VENDOR
from fixtures.gpurevocation import ocsp_response
from fixtures.pki import NOW

PATH = verify_pinned_chain(GPU.certificates, roots=VENDOR.device_roots, length=range(5, 6), at=NOW)
NONCE = bytes(range(NONCE_SIZE))


@pytest.mark.parametrize("position", [1, 2, 3])
def test_the_question_names_certificate_issuer_and_nonce(position: int) -> None:
    asked = ocsp.load_der_ocsp_request(ocsp_request(PATH, position, NONCE))
    assert asked.serial_number == GPU.certificates[position].serial_number
    issuer = hashes.Hash(hashes.SHA384())
    issuer.update(GPU.certificates[position + 1].subject.public_bytes())
    assert asked.issuer_name_hash == issuer.finalize()
    extension = asked.extensions.get_extension_for_class(x509.OCSPNonce)
    assert (extension.value.nonce, extension.critical) == (NONCE, True)


def test_an_answer_without_a_nonce_is_none() -> None:
    with pytest.raises(HostileInput) as caught:
        require_answer(ocsp_response(GPU.certificates[1], GPU.signers[2]), PATH, 1, NONCE, NOW)
    assert caught.value.slug == "OCSP_NONCE"


@pytest.mark.parametrize("status", list(ocsp.OCSPResponseStatus)[1:])
def test_an_error_is_no_answer(status: ocsp.OCSPResponseStatus) -> None:
    data = ocsp.OCSPResponseBuilder.build_unsuccessful(status).public_bytes(Encoding.DER)
    with pytest.raises(HostileInput) as caught:
        require_answer(data, PATH, 1, NONCE, NOW)
    assert caught.value.slug == "BAD_OCSP"
