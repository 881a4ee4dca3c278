"""Signed reference values: nothing of XML but elements, attributes and text; nothing of SWID but what counts."""

from __future__ import annotations

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.rim import DS, MAX_RIM, parse_rim, parse_signed
from cgpu_agent.wire.xmlsafe import parse_xml
from fixtures.gpu import DRIVER, DRIVER_INDICES, Vendor
from fixtures.gpupki import digest
from fixtures.gpurim import Manifest

VENDOR = Vendor()
RIM = VENDOR.rim()
GOLDEN = digest("block 22").hex()


def refused(document: bytes) -> str:
    with pytest.raises(HostileInput) as caught:
        parse_rim(document)
    return caught.value.slug


def bent(**changed: object) -> bytes:
    return VENDOR.rim(**changed)  # type: ignore[arg-type]


def replaced(old: str, new: str) -> bytes:
    assert old.encode() in RIM
    return RIM.replace(old.encode(), new.encode(), 1)


def test_reads_what_the_document_says() -> None:
    document = parse_rim(RIM)
    rim = document.claimed
    assert (rim.product, rim.edition, rim.version, rim.manufacturer) == ("GH100", "GPU", DRIVER, "5703")
    assert len(rim.goldens) == 64
    assert tuple(golden.index for golden in rim.active) == DRIVER_INDICES
    assert all(golden.alternatives == (digest(f"block {golden.index + 1}"),) for golden in rim.active)
    assert document.data == RIM
    assert len(document.certificates) == 4


def test_reads_alternatives_in_order() -> None:
    values = (digest("a"), digest("b"), digest("c"))
    document = parse_rim(bent(goldens={5: values}))
    assert document.claimed.active[0].alternatives == values


def test_the_signed_part_reads_like_the_whole() -> None:
    unsigned = Manifest(DRIVER, goldens={7: (digest("block 8"),)}).unsigned().encode()
    assert parse_signed(unsigned).version == DRIVER
    with pytest.raises(HostileInput):
        parse_rim(unsigned)
    with pytest.raises(HostileInput):
        parse_signed(RIM)


@pytest.mark.parametrize(
    "prefix",
    [
        b'<!DOCTYPE r [<!ENTITY e SYSTEM "file:///etc/passwd">]>',
        b"<!DOCTYPE r>",
        b"<!-- a comment -->",
        b"<?php ?>",
        b'<?xml version="1.0"?><?xml-stylesheet href="x"?>',
        b'<?xml version="1.0" encoding="utf-16"?>',
        b'<?xml version="1.1"?>',
        b' <?xml version="1.0"?>',
    ],
)
def test_refuses_xml_beyond_elements(prefix: bytes) -> None:
    assert refused(prefix + RIM) == "XML_FORBIDDEN"


@pytest.mark.parametrize("inner", ["<![CDATA[x]]>", "<!-- x -->", "<?x?>"])
def test_refuses_what_hides_within(inner: str) -> None:
    assert refused(replaced("<ds:DigestValue>", f"<ds:DigestValue>{inner}")) == "XML_FORBIDDEN"


def test_an_xml_declaration_is_allowed_at_the_start() -> None:
    assert parse_rim(b'<?xml version="1.0" encoding="UTF-8"?>\n' + RIM).claimed.version == DRIVER


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<",
        b"x" + RIM,
        RIM + b"<x/>",
        RIM + b"x",
        RIM[:-30],
        b"\xef\xbb\xbf\xff" + RIM,
        RIM.decode().encode("utf-16"),
        RIM.replace(b'name="GH100"', b'name="\xff"'),
        RIM.replace(b'name="GH100"', b'name="&amp;&lol;"'),
        RIM.replace(b'index="3"', b'index="3" index="3"'),
    ],
)
def test_refuses_what_is_not_well_formed(document: bytes) -> None:
    assert refused(document) in ("BAD_XML", "BAD_RIM")


def test_refuses_depth_and_number_beyond_measure() -> None:
    deep = b"<a>" * 100_000 + b"</a>" * 100_000
    with pytest.raises(HostileInput) as caught:
        parse_xml(deep, "XML", len(deep))
    assert caught.value.slug == "BAD_XML"
    many = b"<a>" + b"<b/>" * 100_000 + b"</a>"
    with pytest.raises(HostileInput) as caught:
        parse_xml(many, "XML", len(many))
    assert caught.value.slug == "BAD_XML"
    assert refused(RIM + b" " * MAX_RIM) == "TOO_LARGE"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('edition="GPU"', 'edition="CPU"'),
        ('PayloadType="direct"', 'PayloadType="indirect"'),
        ('BindingSpec="RIMIM"', 'BindingSpec="IMA"'),
        ('product="GH100"', 'product="gh100 "'),
        (f'colloquialVersion="{DRIVER}"', 'colloquialVersion=""'),
        (f'colloquialVersion="{DRIVER}"', 'colloquialVersion="550&#10;.90"'),
        ('FirmwareManufacturerId="5703"', 'FirmwareManufacturerId="x"'),
        ('index="3"', 'index="4"'),
        ('index="3"', 'index="254"'),
        ('index="3"', 'index="03"'),
        ('index="3"', 'index="-3"'),
        ('index="3" active="False"', 'index="3" active="false"'),
        ('type="Measurement" index="3"', 'type="Other" index="3"'),
        ('name="Measurement_3" size="48"', 'name="Measurement_3" size="32"'),
        ('name="Measurement_3"', 'name="Measurement_3" note=""'),
        ('alternatives="1"', 'alternatives="2"'),
        ('alternatives="1"', 'alternatives="0"'),
        ("ns2:Hash0=", "ns2:Hash1="),
        ("ns2:Hash0=", "Hash0="),
        (GOLDEN, GOLDEN.upper()),
        (GOLDEN, GOLDEN[:-2]),
        ("<ns0:Payload>", "<ns0:Payload>text"),
        ("<ns0:Payload>", "<ns0:Payload><ns0:Directory/>"),
        ("</ns0:Payload>", "</ns0:Payload><ns0:Payload></ns0:Payload>"),
        ("<ns0:Payload>", "<ns0:Evidence/><ns0:Payload>"),
    ],
)
def test_refuses_content_that_is_not_known_here(old: str, new: str) -> None:
    assert refused(bent(replace={old: new})) in ("BAD_RIM", "BAD_XML")


def test_refuses_another_kind_of_document() -> None:
    assert refused(RIM.replace(b"SoftwareIdentity", b"SoftwareIdentify")) == "BAD_RIM"
    assert refused(b"<SoftwareIdentity/>") == "BAD_RIM"


@pytest.mark.parametrize(
    "changed",
    [
        {"uri": "#payload"},
        {"uri": "http://example.org/other"},
        *(
            {
                "algorithms": tuple(
                    "urn:x" if at == number else each for at, each in enumerate(Manifest("1").algorithms)
                )
            }
            for number in range(5)
        ),
    ],
)
def test_refuses_a_signature_made_otherwise(changed: dict[str, object]) -> None:
    assert refused(bent(**changed)) == "BAD_RIM"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "<ds:Transforms>",
            '<ds:Transforms><ds:Transform Algorithm="http://www.w3.org/TR/1999/REC-xpath-19991116"/>',
        ),
        ("</ds:Reference>", '</ds:Reference><ds:Reference URI=""/>'),
        ('<ds:Reference URI="">', '<ds:Reference URI="" Id="a">'),
        ("<ds:KeyInfo>", "<ds:KeyInfo><ds:KeyName>x</ds:KeyName>"),
        ("<ds:X509Data>", "<ds:X509Data><ds:X509SubjectName>x</ds:X509SubjectName>"),
        ("<ds:X509Certificate>", "<ds:X509Certificate>*"),
        ("<ds:X509Certificate>", "<ds:X509Certificate></ds:X509Certificate><ds:X509Certificate>"),
        ("<ds:X509Certificate>", "<ds:X509Certificate>QQ==</ds:X509Certificate>" * 5 + "<ds:X509Certificate>"),
        ("</ds:KeyInfo>", "</ds:KeyInfo><ds:Object/>"),
        ("</ds:Signature>", f'</ds:Signature><Signature xmlns="{DS[1:-1]}"/>'),
    ],
)
def test_refuses_a_signature_of_another_shape(old: str, new: str) -> None:
    assert refused(replaced(old, new)) == "BAD_RIM"
