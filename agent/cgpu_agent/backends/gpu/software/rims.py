"""What a relying party needs to judge software GPUs: both roots, signed reference values (RIMs), CRLs.

The RIM is written in canonical form (C14N 1.1) from the start, so its digest needs no XML library. ``stale`` and
``revoked`` are what a relying party must refuse.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta, timezone
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.backends.gpu.software import pki
from cgpu_agent.backends.gpu.software.make import BLOCKS, CHIP, DRIVER, VBIOS, Maker, measured
from cgpu_agent.wire import rim as wire

DRIVER_INDICES: Final = frozenset({7, *range(21, 41)})
VBIOS_INDICES: Final = frozenset({*range(7), *range(8, 13)})

_SIGNER_LIFE: Final = timedelta(days=730)
_CRL_LIFE: Final = timedelta(days=30)
_HOUR: Final = timedelta(hours=1)
_STALE_BEGIN: Final = datetime(2025, 1, 1, tzinfo=timezone.utc)
_STALE_END: Final = datetime(2025, 6, 1, tzinfo=timezone.utc)
_SWID, _SHA384, _TCG, _DS = (name[1:-1] for name in (wire.SWID, wire.SHA384, wire.TCG, wire.DS))
# In-scope namespaces, which canonical XML repeats on SignedInfo when that is taken by itself.
_SCOPE: Final = f'xmlns="{_SWID}" xmlns:ds="{_DS}" xmlns:ns2="{_SHA384}"'


def _resource(index: int, active: bool) -> str:
    value = measured(index + 1) if active else bytes(48)
    return (
        f'<Resource active="{active}" alternatives="1" index="{index}" name="Measurement_{index}" size="48" '
        f'type="Measurement" ns2:Hash0="{value.hex()}"></Resource>\n'
    )


def _document(version: str, active: Collection[int]) -> str:
    """The unsigned manifest, canonical: attributes in order, no empty-element tags, no comments."""
    tag = hashlib.sha384(f"software GPU RIM {version}".encode()).hexdigest()
    resources = "".join(_resource(index, index in active) for index in range(BLOCKS))
    return (
        f'<SoftwareIdentity xmlns="{_SWID}" xmlns:ns2="{_SHA384}" corpus="false" name="{CHIP}" patch="false" '
        f'supplemental="false" tagId="{tag}" tagVersion="0" version="1.0">\n'
        '<Entity name="Software GPU (simulated)" role="softwareCreator tagCreator"></Entity>\n'
        f'<Meta xmlns:ns1="{_TCG}" PayloadType="direct" colloquialVersion="{version}" edition="GPU" '
        f'product="{CHIP}" revision="r1" ns1:BindingSpec="RIMIM" ns1:BindingSpecVersion="1.01" '
        'ns1:FirmwareManufacturerId="5703"></Meta>\n'
        f"<Payload>\n{resources}</Payload>\n"
    )


def rim(maker: Maker, version: str, active: Collection[int], begin: datetime, end: datetime) -> bytes:
    """A signed manifest of one version.

    Args:
        version: driver or firmware version.
        active: golden indices that count.
        begin, end: life of the signer's certificate.
    """
    issuers = _issuers(maker)
    signer = pki.issue(
        maker.seed, issuers[0], "Software GPU RIM Signer (simulated)", pki.SIGNER, begin=begin, end=end
    )
    body = _document(version, active)
    digest = hashlib.sha384(f"{body}</SoftwareIdentity>".encode()).digest()
    methods = "".join(
        f'<ds:{name} Algorithm="{algorithm}"></ds:{name}>'
        for name, algorithm in (("CanonicalizationMethod", wire.C14N_11), ("SignatureMethod", wire.ECDSA_SHA384))
    )
    transforms = "".join(
        f'<ds:Transform Algorithm="{algorithm}"></ds:Transform>' for algorithm in (wire.ENVELOPED, wire.C14N_11)
    )
    reference = (
        f'<ds:Reference URI=""><ds:Transforms>{transforms}</ds:Transforms>'
        f'<ds:DigestMethod Algorithm="{wire.DIGEST_SHA384}"></ds:DigestMethod>'
        f"<ds:DigestValue>{_base64(digest)}</ds:DigestValue></ds:Reference></ds:SignedInfo>"
    )
    signature = signer.sign(f"<ds:SignedInfo {_SCOPE}>{methods}{reference}".encode())
    chain = (each.certificate for each in (signer, *issuers))
    certificates = "".join(f"<ds:X509Certificate>{_der(each)}</ds:X509Certificate>" for each in chain)
    return (
        f'{body}<ds:Signature xmlns:ds="{_DS}"><ds:SignedInfo>{methods}{reference}'
        f"<ds:SignatureValue>{_base64(signature)}</ds:SignatureValue>"
        f"<ds:KeyInfo><ds:X509Data>{certificates}</ds:X509Data></ds:KeyInfo></ds:Signature></SoftwareIdentity>\n"
    ).encode()


def _issuers(maker: Maker) -> tuple[pki.Signer, ...]:
    """Who stands behind the signer of RIMs: his issuer first, the root last."""
    upper = pki.issue(maker.seed, maker.rim_root, "Software GPU RIM CA (simulated)")
    return pki.issue(maker.seed, upper, "Software GPU RIM L3 (simulated)"), upper, maker.rim_root


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _der(certificate: x509.Certificate) -> str:
    return _base64(certificate.public_bytes(Encoding.DER))


def collateral(
    maker: Maker, now: datetime, *, stale: bool = False, revoked: Collection[x509.Certificate] = ()
) -> Mapping[str, Callable[[], bytes]]:
    """File name -> maker of its content, for everything that a relying party needs.

    Args:
        now: when it is issued; with ``stale`` the RIMs' signer had its time long ago.
        revoked: boot ROM certificates that their issuer takes back.
    """
    begin, end = (_STALE_BEGIN, _STALE_END) if stale else (now - _HOUR, now + _SIGNER_LIFE)

    def good(issuer: pki.Signer) -> Callable[[], bytes]:
        return lambda: pki.crl(issuer, (), *crl_life)

    crl_life = now - _HOUR, now + _CRL_LIFE
    return {
        "device-root.pem": lambda: maker.device_root_pem,
        "rim-root.pem": lambda: maker.rim_root_pem,
        "driver.swidtag": lambda: rim(maker, DRIVER, DRIVER_INDICES, begin, end),
        "vbios.swidtag": lambda: rim(maker, VBIOS, VBIOS_INDICES, begin, end),
        "root.crl": good(maker.root),
        **{f"rim-{number}.crl": good(issuer) for number, issuer in enumerate(_issuers(maker))},
        "identity.crl": good(maker.identity),
        "provisioner.crl": lambda: pki.crl(maker.provisioner, tuple(revoked), *crl_life),
    }
