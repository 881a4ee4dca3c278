"""The hardware report of a bundle: whether the processor vouches for the platform AK, under code that is known."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.certificate import load_certificate
from cgpu_agent.verifier.endorsement import Endorsement
from cgpu_agent.verifier.gpuchain import spki_digest
from cgpu_agent.verifier.keys import PublicKey
from cgpu_agent.verifier.platform import TRUSTED, PlatformEndorsement, endorse_platform
from cgpu_agent.verifier.platformcase import PlatformEvidence, PlatformParty
from cgpu_agent.verifier.roots.platform import SHIPPED
from cgpu_agent.wire.bundle import Bundle
from cgpu_agent.wire.manifest import Manifest


def judge_hardware(
    bundle: Bundle,
    manifest: Manifest,
    party: PlatformParty | None,
    *,
    at: datetime,
    ak: PublicKey,
    pcrs: Mapping[int, bytes],
) -> PlatformEndorsement | None:
    """What the hardware says of the platform AK; ``None`` where no report came along, and none was left out.

    Args:
        party: who judges; its ``at`` does not matter. ``None``: as shipped.
        at: the moment of judgement.
        ak: the platform AK.
        pcrs: the quoted values.

    Raises:
        HostileInput: ``PLATFORM_MISMATCH``: not the report that the manifest signs; ``BAD_CERTIFICATE``.
    """
    words = bundle.platform
    if words is None or manifest.platform is None:
        if words is not None or manifest.platform is not None:
            raise HostileInput("PLATFORM_MISMATCH", "a hardware report was left out, or added")
        return None
    if not hmac.compare_digest(words.digest(), manifest.platform):
        raise HostileInput("PLATFORM_MISMATCH", "the hardware report is not the one that the manifest signs")
    evidence = PlatformEvidence(
        report=words.report,
        claims=words.claims,
        td_quote=words.td_quote,
        certificates=[load_certificate(der) for der in words.certificates],
    )
    demands = PlatformParty(at=at) if party is None else replace(party, at=at)
    return endorse_platform(evidence, demands, ak=ak, pcrs=pcrs, root=manifest.root)


def combine(
    endorsement: Endorsement,
    hardware: PlatformEndorsement | None,
    roots: Sequence[x509.Certificate],
    party: PlatformParty | None,
) -> Endorsement:
    """Who vouches for the AK, the hardware's word and the certificate's together.

    The hardware's word is worth more, and so names the kind. It does not wash off a simulator's certificate, and
    counts as a simulator's itself where roots are believed that do not ship.

    Args:
        roots: the relying party's, for AK certificates; Azure's is known by its key.
    """
    pins = SHIPPED if party is None else party.pins
    if hardware is not None and hardware.endorsed_by != "none":
        return replace(
            endorsement,
            kind=hardware.endorsed_by,
            reason="",
            detail=f"endorsed by {hardware.endorsed_by}: {hardware.trusted}",
            simulated=endorsement.simulated or not pins.processor_roots <= SHIPPED.processor_roots,
        )
    azure = {each.fingerprint(SHA256()).hex() for each in roots if spki_digest(each) in pins.azure_vtpm_roots}
    path = endorsement.path
    if endorsement.kind == "ak-certificate" and path is not None and path.certificates[-1].sha256 in azure:
        detail = f"{endorsement.detail}; {TRUSTED['azure-trusted-launch']}"
        return replace(endorsement, kind="azure-trusted-launch", detail=detail)
    return endorsement
