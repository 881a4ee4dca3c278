"""This VM's evidence in the forms that Trustee's verifiers read: one for what stands below the vTPM, one for GPUs.

Source: these verifiers at v0.21. Bytes are hex here, and base64 of one or the other kind there, as they have it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from cgpu_agent.backends.base import Attester, GpuArchitecture, PlatformKind, PlatformReport
from cgpu_agent.errors import Unavailable
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.kbs import Tee
from cgpu_agent.wire.spdm import NONCE_SIZE
from cgpu_agent.wire.strictjson import b64
from cgpu_agent.wire.tpm import ALG_RSASSA, PCR_COUNT, RsaKey, parse_public, parse_signature

_TEES: Final[Mapping[PlatformKind, Tee]] = {
    "azure-cvm-snp": "az-snp-vtpm",
    "azure-cvm-tdx": "az-tdx-vtpm",
    "azure-trusted-launch": "tpm",
    "plain": "tpm",
    "tsm-tdx": "tdx",
}
_ARCHITECTURES: Final[Mapping[GpuArchitecture, str]] = {"blackwell": "BLACKWELL", "hopper": "HOPPER"}
_CHIP_KEYS: Final = frozenset({"SEV-VCEK", "SEV-VLEK"})
_ALL_PCRS: Final = tuple(range(PCR_COUNT))
_REPORT_DATA: Final = 64
_TPM_DATA: Final = 32


def tee_of(kind: PlatformKind) -> Tee:
    """How Trustee names it. Raises ``Unavailable`` (``PLATFORM_UNSUPPORTED``).

    An SNP report behind configfs-tsm has no form here: Trustee takes it field by field, as one Rust library has it.
    """
    if kind not in _TEES:
        raise _unsupported(f"evidence of {kind} is not made for Trustee")
    return _TEES[kind]


async def primary_evidence(attester: Attester, kind: PlatformKind, digest: bytes) -> dict[str, object]:
    """Evidence over the 48 bytes of the primary binding.

    Raises ``Unavailable``: ``PLATFORM_UNSUPPORTED``, ``NO_REPORT``, ``NO_CERTIFICATES``, ``NO_TD_QUOTE``; and what
    ``Attester`` raises.
    """
    if tee_of(kind) == "tpm":
        return await _tpm(attester, digest[:_TPM_DATA])
    report = await attester.platform(digest.ljust(_REPORT_DATA, b"\0"))
    if report.kind != kind or report.report is None:
        raise Unavailable("NO_REPORT", "the platform's report is gone, or of another kind than before")
    if kind == "tsm-tdx":
        return {"quote": b64(report.report)}
    return await _azure(attester, digest, report)


async def additional_evidence(attester: Attester, digest: bytes) -> str:
    """Evidence of all GPUs over the 48 bytes of the devices' binding, as JSON text; empty where there are none.

    Raises ``Unavailable`` (``GPU_UNSUPPORTED``): one of them is of a kind that Trustee does not know, and leaving it
    out would be a lie; and what ``Attester`` raises.
    """
    devices: list[dict[str, str]] = []
    for info, evidence in await attester.gpu_reports(digest[:NONCE_SIZE]):
        if info.architecture not in _ARCHITECTURES:
            raise Unavailable("GPU_UNSUPPORTED", "Trustee takes evidence of Hopper and Blackwell GPUs only")
        devices.append(
            {
                "arch": _ARCHITECTURES[info.architecture],
                "certificate": b64(evidence.chain),
                "evidence": b64(evidence.report),
                "uuid": info.uuid,
            }
        )
    if not devices:
        return ""
    return strictjson.dumps({"nvidia": {"device_evidence_list": devices}}).decode("utf-8")


async def _azure(attester: Attester, digest: bytes, report: PlatformReport) -> dict[str, object]:
    """Version 2 says that the report's user data are the digest, too; in version 1 the quote alone is over it."""
    if report.td_quote is None and report.kind == "azure-cvm-tdx":
        raise Unavailable("NO_TD_QUOTE", "there is no TD quote")
    endorsement = {"vcek": _chip_certificate(report)} if report.td_quote is None else {"td_quote": report.td_quote}
    signed, values = await attester.raw_quote(digest, _ALL_PCRS)
    return {
        "hcl_report": _base64url(report.report or b""),
        "tpm_quote": {
            "message": signed.attest.hex(),
            "pcrs": [values[index].hex() for index in _ALL_PCRS],
            "signature": _rsassa(signed.signature).hex(),
        },
        "version": 2 if report.fresh else 1,
        **{name: _base64url(value) for name, value in endorsement.items()},
    }


async def _tpm(attester: Attester, data: bytes) -> dict[str, object]:
    key = parse_public(await attester.platform_ak()).key
    if not isinstance(key, RsaKey):
        raise _unsupported("Trustee takes quotes of RSA keys only, and the platform AK is none")
    spki = RSAPublicNumbers(key.exponent, key.modulus).public_key()
    signed, values = await attester.raw_quote(data, _ALL_PCRS)
    _rsassa(signed.signature)
    return {
        "ak_public": b64(spki.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)),
        "tpm_quote": {
            "message": b64(signed.attest),
            "pcrs": [values[index].hex() for index in _ALL_PCRS],
            "signature": b64(signed.signature),
        },
    }


def _rsassa(marshalled: bytes) -> bytes:
    signature = parse_signature(marshalled)
    if signature.algorithm != ALG_RSASSA or signature.hash != "sha256":
        raise _unsupported("Trustee takes quotes signed by RSASSA with SHA-256 only")
    return signature.signature


def _chip_certificate(report: PlatformReport) -> bytes:
    """The one of the key that signed the report."""
    for der in report.certificates:
        try:
            names = x509.load_der_x509_certificate(der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        except ValueError:
            continue
        if any(each.value in _CHIP_KEYS for each in names):
            return der
    raise Unavailable("NO_CERTIFICATES", "AMD's certificate of this processor was not fetched")


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii")


def _unsupported(message: str) -> Unavailable:
    return Unavailable("PLATFORM_UNSUPPORTED", message)
