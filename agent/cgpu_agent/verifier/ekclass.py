"""What an enrolled AK's certificate says of the TPM behind it: who certified the EK that the AK was seen beside.

An enrolment CA vouches for what it saw: this AK and that EK are in one TPM. What the TPM is worth rests on the EK's
certificate, so the AK's certificate carries its class, in a critical extension: whoever does not know it refuses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from cryptography import x509

from cgpu_agent.errors import HostileInput, Misuse

OID: Final = x509.ObjectIdentifier("2.25.189011454763611772256115653434988394449")
"""Of the extension: the UUID 8e324834-d4d7-4436-8a04-34e4af0977d1 (ITU-T X.667). Its value is a UTF8String."""

EkKind = Literal["vendor", "operator", "simulated"]

_TEXT: Final = re.compile(r"vendor:[A-Za-z0-9._-]{1,32}|operator|simulated")
_UTF8_STRING: Final = 0x0C


@dataclass(frozen=True, slots=True)
class EkClass:
    """Whose root the EK's certificate led to.

    ``vendor:NAME``: a maker of TPMs, or a cloud that makes vTPMs; ``operator``: the owner's own CA; ``simulated``: a
    root for software TPMs. Raises ``Misuse`` (``BAD_EK_CLASS``) for another text.
    """

    text: str

    def __post_init__(self) -> None:
        if not _TEXT.fullmatch(self.text):
            raise Misuse("BAD_EK_CLASS", "an EK class is vendor:NAME, operator or simulated")

    @property
    def kind(self) -> EkKind:
        if self.text.startswith("vendor:"):
            return "vendor"
        return "operator" if self.text == "operator" else "simulated"

    def __str__(self) -> str:
        return self.text

    def extension(self) -> x509.UnrecognizedExtension:
        """As it stands in a certificate."""
        encoded = self.text.encode("ascii")
        return x509.UnrecognizedExtension(OID, bytes([_UTF8_STRING, len(encoded)]) + encoded)


def ek_class_of(certificate: x509.Certificate) -> EkClass | None:
    """The class that an AK certificate states; ``None``: it is no enrolled AK's.

    Raises ``HostileInput`` (``BAD_EK_CLASS``) for one that cannot be read.
    """
    try:
        extension = certificate.extensions.get_extension_for_oid(OID)
    except x509.ExtensionNotFound:
        return None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise HostileInput("BAD_CERTIFICATE", "a certificate with unreadable content") from error
    value = extension.value.value if isinstance(extension.value, x509.UnrecognizedExtension) else b""
    text = value[2:].decode("ascii", "replace")
    if value[:2] != bytes([_UTF8_STRING, len(value) - 2 & 0x7F]) or not _TEXT.fullmatch(text):
        raise HostileInput("BAD_EK_CLASS", "the AK certificate states an EK class that does not exist")
    return EkClass(text)
