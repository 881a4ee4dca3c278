"""A reference integrity manifest (RIM): signed SWID XML with the golden measurements of one driver or firmware.

Read by the field, strictly, instead of by schema: what could change a meaning and is not known here is refused.
Sources: ISO/IEC 19770-2:2015; TCG RIM information model 1.01; XML Signature 1.1; documents that NVIDIA signed.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.xmlsafe import Node, parse_xml

MAX_RIM: Final = 256 * 1024
MAX_CERTIFICATES: Final = 8
MAX_INDEX: Final = 253
"""Golden index i belongs to SPDM block i + 1, and blocks end at 254."""
HASH_SIZE: Final = 48
"""SHA-384."""

SWID: Final = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
TCG: Final = "{https://trustedcomputinggroup.org/resource/tcg-reference-integrity-manifest-rim-information-model/}"
SHA384: Final = "{http://www.w3.org/2001/04/xmlenc#sha384}"
DS: Final = "{http://www.w3.org/2000/09/xmldsig#}"

C14N_11: Final = "http://www.w3.org/2006/12/xml-c14n11"
ENVELOPED: Final = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
ECDSA_SHA384: Final = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
DIGEST_SHA384: Final = "http://www.w3.org/2001/04/xmldsig-more#sha384"

_EDITIONS: Final = frozenset({"GPU", "SWITCH"})
_RESOURCE_NAMES: Final = frozenset({"type", "index", "active", "alternatives", "name", "size"})
_VERSION = re.compile(r"[0-9A-Za-z.]{1,32}")
_PRODUCT = re.compile(r"[0-9A-Z_]{2,16}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")
_HASH = re.compile(r"[0-9a-f]{96}")
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]{1,16384}")


@dataclass(frozen=True, slots=True)
class Golden:
    """The reference value of one measurement.

    Attributes:
        index: from 0; the SPDM block has index + 1.
        active: whether a device's measurement must match; others are placeholders.
        name: as the document has it; its meaning is not published.
        alternatives: digests of 48 bytes, one of which the measurement must equal.
    """

    index: int
    active: bool
    name: str
    alternatives: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Rim:
    """What a manifest says.

    Attributes:
        product: chip, ``GH100``.
        edition: ``GPU`` or ``SWITCH``.
        version: of the driver (``550.90.07``) or firmware (``96.00.9F.00.01``) it describes.
        tag_id: its own identifier.
        manufacturer: FirmwareManufacturerId, an IANA enterprise number.
        goldens: in document order, indices distinct.
    """

    product: str
    edition: str
    version: str
    tag_id: str
    manufacturer: str
    goldens: tuple[Golden, ...]

    @property
    def active(self) -> tuple[Golden, ...]:
        """The goldens that count."""
        return tuple(golden for golden in self.goldens if golden.active)


@dataclass(frozen=True, slots=True)
class RimDocument:
    """A manifest as a file; nothing of it is verified.

    Attributes:
        data: its exact bytes.
        claimed: what it says, before anybody looked at the signature. To choose by, not to compare with.
        certificates: DER of its signer's chain, leaf first.
    """

    data: bytes
    claimed: Rim
    certificates: tuple[bytes, ...]


def parse_rim(document: bytes) -> RimDocument:
    """Parse a signed manifest: one enveloped signature, over the whole, by the algorithms that NVIDIA uses.

    Raises:
        HostileInput: what ``parse_xml`` raises, and ``BAD_RIM``.
    """
    root = Node(parse_xml(document, "RIM", MAX_RIM), "RIM")
    *_, signature = _parts(root, signed=True)
    return RimDocument(document, _rim(root, signed=True), _signature(signature))


def parse_signed(canonical: bytes) -> Rim:
    """Parse what a manifest's signature covers: the document without its signature. Raises as ``parse_rim``."""
    return _rim(Node(parse_xml(canonical, "RIM", MAX_RIM), "RIM"), signed=False)


def _parts(root: Node, *, signed: bool) -> tuple[Node, ...]:
    """Meta, Payload and, of a signed document, Signature."""
    if root.tag != f"{SWID}SoftwareIdentity":
        raise root.fail("the document is not a SoftwareIdentity")
    wanted = [f"{SWID}Meta", f"{SWID}Payload", *([f"{DS}Signature"] if signed else [])]
    found = [node for node in root.children(f"{SWID}Entity", *wanted) if node.tag != f"{SWID}Entity"]
    if [node.tag for node in found] != wanted:
        raise root.fail("Meta, Payload and Signature must be there once each, in this order")
    return tuple(found)


def _rim(root: Node, *, signed: bool) -> Rim:
    meta, payload, *_ = _parts(root, signed=signed)
    goldens = tuple(_golden(node) for node in payload.children(f"{SWID}Resource"))
    indices = {golden.index for golden in goldens}
    if not goldens or len(indices) != len(goldens):
        raise root.fail("no resources, or two of one index")
    if (meta.attribute("PayloadType"), meta.attribute(f"{TCG}BindingSpec")) != ("direct", "RIMIM"):
        raise meta.fail("the payload is not the measurements themselves")
    edition = meta.attribute("edition")
    if edition not in _EDITIONS:
        raise meta.fail("edition is neither GPU nor SWITCH")
    return Rim(
        product=_match(meta, "product", _PRODUCT),
        edition=edition,
        version=_match(meta, "colloquialVersion", _VERSION),
        tag_id=_match(root, "tagId", _HASH),
        manufacturer=_match(meta, f"{TCG}FirmwareManufacturerId", _NUMBER),
        goldens=goldens,
    )


def _match(node: Node, name: str, pattern: re.Pattern[str]) -> str:
    value = node.attribute(name)
    if pattern.fullmatch(value) is None:
        raise node.fail(f"{name.rpartition('}')[2]} is not of the expected form")
    return value


def _golden(node: Node) -> Golden:
    node.sequence()
    index = int(_match(node, "index", _NUMBER))
    count = int(_match(node, "alternatives", _NUMBER))
    active = node.attribute("active")
    if index > MAX_INDEX or active not in ("True", "False"):
        raise node.fail(f"resource {index} is out of range, or neither active nor inactive")
    if node.attribute("type") != "Measurement" or node.attribute("size") != str(HASH_SIZE):
        raise node.fail(f"resource {index} is not a measurement of {HASH_SIZE} bytes")
    hashes = [f"{SHA384}Hash{number}" for number in range(count)]
    if not hashes or node.attributes.keys() != _RESOURCE_NAMES | set(hashes):
        raise node.fail(f"resource {index} has other attributes than {count} alternatives and its description")
    values = tuple(bytes.fromhex(_match(node, name, _HASH)) for name in hashes)
    return Golden(index, active == "True", node.attribute("name")[:64], values)


def _signature(node: Node) -> tuple[bytes, ...]:
    info, value, key = node.sequence(f"{DS}SignedInfo", f"{DS}SignatureValue", f"{DS}KeyInfo")
    c14n, method, reference = info.sequence(f"{DS}CanonicalizationMethod", f"{DS}SignatureMethod", f"{DS}Reference")
    transforms, digest, digest_value = reference.sequence(f"{DS}Transforms", f"{DS}DigestMethod", f"{DS}DigestValue")
    steps = transforms.sequence(f"{DS}Transform", f"{DS}Transform")
    algorithms = tuple(_algorithm(each) for each in (c14n, method, *steps, digest))
    if algorithms != (C14N_11, ECDSA_SHA384, ENVELOPED, C14N_11, DIGEST_SHA384):
        raise node.fail("the signature is made with other algorithms than are accepted")
    if any(not _decode(each) for each in (value, digest_value)):
        raise node.fail("the signature is empty")
    if reference.attributes != {"URI": ""}:
        raise node.fail("the signature is not over the whole document")
    (data,) = key.sequence(f"{DS}X509Data")
    certificates = data.children(f"{DS}X509Certificate")
    if not 1 <= len(certificates) <= MAX_CERTIFICATES:
        raise node.fail(f"{len(certificates)} certificates, 1 to {MAX_CERTIFICATES} are allowed")
    return tuple(_decode(each) for each in certificates)


def _algorithm(node: Node) -> str:
    node.sequence()
    only: Mapping[str, str] = node.attributes
    if only.keys() != {"Algorithm"}:
        raise node.fail(f"{node.local} has other attributes than its algorithm")
    return only["Algorithm"]


def _decode(node: Node) -> bytes:
    text = node.text()
    try:
        if _BASE64.fullmatch(text) is None:
            raise ValueError
        return base64.b64decode("".join(text.split()), validate=True)
    except (ValueError, binascii.Error):
        raise HostileInput("BAD_RIM", "RIM: a certificate, signature or digest is not base64") from None
