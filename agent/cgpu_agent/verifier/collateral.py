"""What a judge of GPUs needs beside the evidence, kept offline: reference values (RIMs), CRLs, OCSP responses.

The store is read once and never changes; it holds nothing of any device. Reference values are chosen by what they
claim and verified afterwards, for every device anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.gpucapability import Architecture
from cgpu_agent.verifier.keys import certificate_from_der
from cgpu_agent.verifier.revocation import RevocationData, load_crl, load_ocsp
from cgpu_agent.wire.nvidia import GpuFields, SwitchFields
from cgpu_agent.wire.rim import RimDocument, parse_rim

MAX_RIMS: Final = 256
_UNKNOWN = "?"


@dataclass(frozen=True, slots=True)
class Collateral:
    """RIMs and revocation data. Make it with ``load``."""

    rims: tuple[RimDocument, ...] = ()
    revocation: RevocationData = field(default_factory=RevocationData)

    @classmethod
    def load(
        cls,
        *,
        rims: Iterable[bytes] = (),
        crls: Iterable[bytes] = (),
        ocsp: Iterable[bytes] = (),
        max_age: timedelta | None = None,
    ) -> Collateral:
        """Parse files. One that cannot be read is refused here, so that nobody takes it for absent.

        Args:
            rims: signed manifests.
            crls: DER or PEM.
            ocsp: DER responses.
            max_age: see ``RevocationData``.

        Raises:
            HostileInput: ``TOO_MANY_RIMS``, and what ``parse_rim``, ``load_crl`` and ``load_ocsp`` raise.
        """
        files = tuple(islice(rims, MAX_RIMS + 1))
        if len(files) > MAX_RIMS:
            raise HostileInput("TOO_MANY_RIMS", f"more than {MAX_RIMS} RIMs")
        documents = tuple(parse_rim(each) for each in files)
        revocation = RevocationData(
            tuple(load_crl(each) for each in crls), tuple(load_ocsp(each) for each in ocsp), max_age
        )
        return cls(documents, revocation)

    def newest_rim(self, edition: str, version: str, products: Collection[str] = ()) -> RimDocument | None:
        """The manifest that claims to be about this version; of several issues the one signed last.

        An older issue is no fallback, even where the newer one fails: the goldens of one version have changed between
        issues, and whoever holds an old one back must not win by that (compare versions without regard to case).

        Args:
            edition: ``GPU`` or ``SWITCH``.
            version: of driver or firmware.
            products: names of the chip, whose issues are told apart from those of other chips for the same driver;
                where there is none for it, one for another chip is found, for the caller to refuse.

        Raises:
            HostileInput: ``AMBIGUOUS_RIM``: two different issues of one moment; ``BAD_CERTIFICATE``.
        """
        named = [
            each
            for each in self.rims
            if each.claimed.edition == edition and each.claimed.version.upper() == version.upper()
        ]
        own = [each for each in named if each.claimed.product in products]
        fits = [(signed_at(each), each) for each in own or named]
        if not fits:
            return None
        latest = max(moment for moment, _ in fits)
        newest = [document for moment, document in fits if moment == latest]
        if any(each.data != newest[0].data for each in newest):
            raise HostileInput("AMBIGUOUS_RIM", f"two different RIMs for {version}, signed at one time")
        return newest[0]

    def versions(self, edition: str) -> tuple[str, ...]:
        """Versions of which there is a manifest, for messages."""
        return tuple(sorted({each.claimed.version for each in self.rims if each.claimed.edition == edition}))


def signed_at(document: RimDocument) -> datetime:
    """When the signer's certificate began, which NVIDIA issues anew with each manifest; claimed, not verified.

    Raises ``HostileInput`` (``BAD_CERTIFICATE``).
    """
    return certificate_from_der(document.certificates[0]).not_valid_before_utc


def driver_rim_id(architecture: Architecture, fields: GpuFields) -> str:
    """The name under which NVIDIA publishes the RIM of a GPU's driver."""
    if architecture is Architecture.BLACKWELL:
        # Drivers before the field are GB100's, and NVIDIA's verifier takes it for them too.
        return f"NV_GPU_CC_DRIVER_{fields.chip or 'GB100'}_{fields.driver or _UNKNOWN}"
    return f"NV_GPU_DRIVER_GH100_{fields.driver or _UNKNOWN}"


def vbios_rim_id(fields: GpuFields) -> str:
    """The name under which NVIDIA publishes the RIM of a GPU's firmware."""
    board = "_".join((fields.project or _UNKNOWN, fields.project_sku or _UNKNOWN, fields.chip_sku or _UNKNOWN))
    return f"NV_GPU_VBIOS_{board}_{(fields.vbios or _UNKNOWN).replace('.', '')}".upper()


def switch_rim_id(fields: SwitchFields) -> str:
    """The name under which NVIDIA publishes the RIM of an LS10's firmware."""
    return f"NV_SWITCH_BIOS_5612_0002_890_{(fields.bios or _UNKNOWN).replace('.', '')}"
