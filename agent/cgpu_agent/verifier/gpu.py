"""Judges one NVIDIA device (a GPU or an NVSwitch) offline, as a list of numbered steps.

The order is that of trust: who signs (the chain), whether he did (the signature), for me (the nonce), and only then
what is said. Every judgement starts from nothing: no state is shared between devices or runs.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.certificate import load_certificates
from cgpu_agent.verifier.fwid import certified_fwid
from cgpu_agent.verifier.gpucapability import Architecture, architecture_of
from cgpu_agent.verifier.gpucase import Case, DeviceEvidence, DeviceFacts, DeviceResult, GpuParty, Result
from cgpu_agent.verifier.gpuchain import DEVICE_CHAIN_LENGTH, PinnedPath, device_identity, verify_pinned_chain
from cgpu_agent.verifier.gpufloor import require_bios, require_driver
from cgpu_agent.verifier.gpumeasure import Source, compare
from cgpu_agent.verifier.revocation import chain_status
from cgpu_agent.verifier.rim import verify_rim
from cgpu_agent.verifier.verdict import Check, Skip, Steps
from cgpu_agent.wire.nvidia import GpuFields, SwitchFields, parse_gpu, parse_switch
from cgpu_agent.wire.rim import Rim
from cgpu_agent.wire.rimservice import same_chip
from cgpu_agent.wire.spdm import parse_report

_NEWEST_LAYOUT: Final = 1
CHECKED_IN_DEVICE_CHAIN: Final = (1, 2, 3)
"""Positions whose revocation counts: the leaf is the device's own work, and nobody revokes a root."""
CHECKED_IN_RIM_CHAIN: Final = (0, 1, 2)
"""The same of a manifest's signer."""


def _judge_verifiable(case: Case) -> str:
    for claimed in (case.evidence.architecture, case.party.architecture):
        if claimed is Architecture.AMPERE:
            raise HostileInput("UNVERIFIABLE", "Ampere: report format, roots and reference values are not published")
    return "nothing says that it is of a generation without published roots"


def _judge_chain(case: Case) -> str:
    length = range(DEVICE_CHAIN_LENGTH, DEVICE_CHAIN_LENGTH + 1)
    certificates = load_certificates(case.evidence.chain)
    case.path = verify_pinned_chain(certificates, roots=case.party.device_roots, length=length, at=case.party.at)
    return f"{len(certificates)} certificates, root key {case.path.root.hex()[:16]}..."


def _judge_architecture(case: Case) -> str:
    case.identity = device_identity(case.chain_path)
    case.architecture = architecture_of(case.identity.chip)
    if case.architecture is Architecture.AMPERE:
        raise HostileInput("UNVERIFIABLE", "Ampere: report format and reference values are not published")
    for who, wanted in (("sender", case.evidence.architecture), ("relying party", case.party.architecture)):
        if wanted is not None and wanted is not case.architecture:
            raise HostileInput(
                "ARCHITECTURE_MISMATCH", f"a {case.architecture.value} chip, and the {who} says {wanted.value}"
            )
    return f"{case.identity.chip} ({case.architecture.value}), device {case.identity.device_id}"


def _judge_revocation(case: Case) -> str | Skip:
    return _revocation(case, "device", case.chain_path, CHECKED_IN_DEVICE_CHAIN, allow_hold=False)


def _revocation(case: Case, name: str, path: PinnedPath, positions: Sequence[int], *, allow_hold: bool) -> str | Skip:
    party = case.party
    statuses = chain_status(path, positions, party.collateral.revocation, party.at)
    case.revocation[name] = statuses
    revoked = [each for each in statuses if each.status == "revoked"]
    refused = next((each for each in revoked if not (allow_hold and each.on_hold)), None)
    if refused is not None:
        raise HostileInput("CERTIFICATE_REVOKED", f"{refused.subject} is revoked: {refused.reason}")
    unknown = [each for each in statuses if each.status == "unknown"]
    detail = f"{len(unknown)} of {len(statuses)} certificates: no fresh CRL or OCSP response"
    if unknown and party.require_revocation:
        raise HostileInput("REVOCATION_UNKNOWN", f"{detail} ({unknown[0].reason})")
    if revoked:
        return Skip("CERTIFICATE_ON_HOLD", f"{revoked[0].subject} is on hold; allowed by the relying party")
    if unknown:
        return Skip("REVOCATION_UNKNOWN", f"{detail} ({unknown[0].reason})")
    return f"{len(statuses)} certificates, not revoked by fresh word of their issuers"


def _judge_format(case: Case) -> str:
    case.report = parse_report(case.evidence.report)
    return f"{len(case.evidence.report)} bytes, {len(case.report.measurements)} measurements"


def _judge_signature(case: Case) -> str:
    report = case.parsed
    half = len(report.signature) // 2
    r, s = (int.from_bytes(part, "big") for part in (report.signature[:half], report.signature[half:]))
    try:
        case.chain_path.leaf_key.verify(encode_dss_signature(r, s), report.signed, ECDSA(SHA384()))
    except (InvalidSignature, ValueError) as error:
        raise HostileInput("BAD_SIGNATURE", "the report is not signed by the key of this leaf certificate") from error
    case.signed = True
    return f"ECDSA P-384 with SHA-384 over {len(report.signed)} bytes"


def _judge_nonce(case: Case) -> str | Skip:
    nonce = case.parsed.nonce
    claimed = case.evidence.claims.get("nonce")
    if claimed is not None and not hmac.compare_digest(claimed, nonce.hex()):
        raise HostileInput("NONCE_MISMATCH", "the report answers another nonce than its sender says")
    if case.party.nonce is None:
        return Skip("NO_NONCE", "no nonce to compare with: the report may be of any age")
    if not hmac.compare_digest(nonce, case.party.nonce):
        raise HostileInput("NONCE_MISMATCH", "the report is not an answer to this nonce")
    return "the request within the signed bytes holds the nonce"


def _judge_fields(case: Case) -> str:
    opaque = case.parsed.opaque
    is_switch = case.architecture is not None and case.architecture.is_switch
    case.fields = fields = parse_switch(opaque) if is_switch else parse_gpu(opaque)
    if fields.opaque_version > _NEWEST_LAYOUT:
        raise HostileInput(
            "UNKNOWN_LAYOUT", f"opaque data of layout {fields.opaque_version}, newer than is known here"
        )
    facts = case.facts
    for name, found in (("driver", facts.driver), ("vbios", facts.vbios)):
        claimed = case.evidence.claims.get(name)
        if claimed is not None and claimed.upper() != (found or "").upper():
            raise HostileInput("CLAIM_MISMATCH", f"the report names another {name} version than its sender says")
    if isinstance(fields, GpuFields) and fields.chip is not None:
        _require_chip(fields.chip, facts.identity.chip)
    unknown = f", unknown fields {', '.join(map(str, sorted(fields.unknown)))}" if fields.unknown else ""
    return f"driver {facts.driver or 'none'}, firmware {facts.vbios or 'none'}{unknown}"


def _require_chip(reported: str, certified: str) -> None:
    if not same_chip(reported, certified):
        raise HostileInput(
            "ARCHITECTURE_MISMATCH", f"the report is of a {reported}, the certificate of a {certified}"
        )


def _judge_fwid(case: Case) -> str | Skip:
    reported = case.facts.fields.fwid
    certified = certified_fwid(case.chain_path.leaf)
    if reported is None:
        if case.party.require_fwid:
            raise HostileInput("FWID_ABSENT", "this firmware does not report its FWID")
        return Skip("FWID_ABSENT", "this firmware does not report its FWID, so there is nothing to compare")
    if certified is None:
        raise HostileInput("FWID_NOT_CERTIFIED", "the leaf certificate does not certify any firmware")
    case.fwid_matched = hmac.compare_digest(reported, certified)
    if not case.fwid_matched:
        raise HostileInput("FWID_MISMATCH", "the leaf certificate was made for other firmware than is reported")
    return "the leaf certificate was made for the firmware that runs"


def _judge_mode(case: Case) -> str | Skip:
    fields = case.facts.fields
    if isinstance(fields, SwitchFields):
        if fields.locked is False:
            raise HostileInput("SWITCH_UNLOCKED", "the switch's configuration is not locked")
        return (
            f"position {fields.position}, configuration locked" if fields.locked else Skip("NO_LOCK", "not reported")
        )
    if fields.mode is not None and fields.protected_pcie is not None:
        if (fields.mode == "ppcie") is not fields.protected_pcie:
            raise HostileInput(
                "MODE_CONFLICT", "the report says protected PCIe in one field and denies it in another"
            )
        return f"{fields.mode}, protected PCIe {'on' if fields.protected_pcie else 'off'}"
    if fields.mode is None and fields.protected_pcie is None:
        return Skip("MODE_NOT_REPORTED", "this driver does not report how the GPU is passed through")
    return fields.mode or f"protected PCIe {'on' if fields.protected_pcie else 'off'}"


def _judge_driver_rim(case: Case) -> str | Skip:
    facts = case.facts
    if facts.architecture.is_switch:
        return Skip("NOT_APPLICABLE", "a switch has no driver of its own")
    return _rim(case, "driver", facts.driver, facts.rim_ids[0])


def _judge_firmware_rim(case: Case) -> str | Skip:
    facts = case.facts
    return _rim(case, "firmware", facts.vbios, facts.rim_ids[-1])


def _rim(case: Case, source: Source, version: str | None, rim_id: str) -> str | Skip:
    party, facts = case.party, case.facts
    edition = "SWITCH" if facts.architecture.is_switch else "GPU"
    document = None if version is None else party.collateral.newest_rim(edition, version, _products(facts))
    if document is None:
        if party.allow_no_rim and not party.collateral.rims:
            return Skip("NO_RIM", f"no reference values; NVIDIA publishes them as {rim_id}")
        there = ", ".join(party.collateral.versions(edition)) or "none"
        raise HostileInput("NO_RIM", f"no reference values for {source} {version} ({rim_id}); there are: {there}")
    judged = verify_rim(document, roots=party.rim_roots, at=party.at)
    case.rims[source] = judged
    if judged.verified is None:
        refusal = judged.refusal
        if refusal is None:
            raise LookupError("a manifest that is not verified was refused by no step")
        raise HostileInput(refusal.slug or "INTERNAL", f"{source} RIM: {refusal.detail}")
    verified = judged.verified
    if verified.rim.edition != edition or verified.rim.version.upper() != (version or "").upper():
        raise HostileInput("RIM_VERSION_MISMATCH", f"the {source} RIM is about another version than it claimed")
    _require_product(verified.rim, facts)
    return f"signed for {verified.rim.product} {version} until {verified.path.path.not_after.date()}"


def _require_product(rim: Rim, facts: DeviceFacts) -> None:
    """NVIDIA's service answers the wrong question with a validly signed manifest for another chip."""
    names = _products(facts)
    if rim.product not in names:
        listed = " or ".join(sorted(names))
        raise HostileInput("RIM_PRODUCT_MISMATCH", f"values for {rim.product}, and the device is a {listed}")


def _products(facts: DeviceFacts) -> set[str]:
    """Names under which reference values may be for this chip."""
    reported = facts.fields.chip if isinstance(facts.fields, GpuFields) else None
    return {facts.identity.chip.replace("_", ""), *([] if reported is None else [reported])}


def _judge_rim_revocation(case: Case) -> str | Skip:
    words = [
        _revocation(case, source, judged.verified.path, CHECKED_IN_RIM_CHAIN, allow_hold=case.party.allow_rim_hold)
        for source, judged in case.rims.items()
        if judged.verified is not None
    ]
    if not words:
        return Skip("NO_RIM", "no reference values, so no signer of them")
    doubts = [word for word in words if isinstance(word, Skip)]
    if not doubts:
        return "; ".join(str(word) for word in words)
    return next((doubt for doubt in doubts if doubt.slug == "CERTIFICATE_ON_HOLD"), doubts[0])


def _judge_measurements(case: Case) -> str | Skip:
    rims = [(source, judged.verified.rim) for source, judged in case.rims.items() if judged.verified is not None]
    if not rims:
        return Skip("NO_RIM", "no reference values: nothing says that driver and firmware are NVIDIA's")
    fields = case.facts.fields
    nvdec0 = fields.nvdec0 if isinstance(fields, GpuFields) else None
    case.comparison = compare(case.parsed.measurements, rims, nvdec0=nvdec0)
    differ = case.comparison.mismatched
    if differ:
        listed = ", ".join(f"{each.index} ({each.source})" for each in differ)
        raise HostileInput("MEASUREMENT_MISMATCH", f"{len(differ)} measurements are not as published: {listed}")
    skipped = f", {len(case.comparison.skipped)} skipped by rule" if case.comparison.skipped else ""
    return f"{len(case.comparison.compared)} measurements are as published{skipped}"


def _judge_floor(case: Case) -> str | Skip:
    facts, floors = case.facts, case.party.floors
    if facts.architecture.is_switch:
        found = [require_bios(facts.vbios, floors.switch_bios)]
    else:
        found = [require_driver(facts.driver, floors.driver), require_bios(facts.vbios, floors.vbios)]
    said = [each for each in found if each is not None]
    if not said:
        return Skip("NO_FLOOR", "floor: none configured; a vulnerable old version would pass")
    return "; ".join(said)


GPU_CHECKS: Final[Sequence[Check[Case]]] = (
    Check("gpu.verifiable", "its generation can be verified at all", _judge_verifiable),
    Check("gpu.chain", "five certificates lead to a pinned root key", _judge_chain),
    Check("gpu.architecture", "they are of a known chip, the expected one", _judge_architecture),
    Check("gpu.revocation", "none of them was revoked", _judge_revocation),
    Check("gpu.format", "the report is an SPDM 1.1 measurements exchange, to the last byte", _judge_format),
    Check("gpu.signature", "the device signed exactly these bytes", _judge_signature),
    Check("gpu.nonce", "the report answers this nonce", _judge_nonce),
    Check("gpu.fields", "what the device says of itself is well-formed and consistent", _judge_fields),
    Check("gpu.fwid", "the leaf certificate is for the firmware that runs", _judge_fwid),
    Check("gpu.mode", "its mode is stated without contradiction", _judge_mode),
    Check(
        "gpu.driver-rim",
        "the driver's reference values are NVIDIA's, current, and for this version",
        _judge_driver_rim,
    ),
    Check("gpu.firmware-rim", "the same of the firmware's", _judge_firmware_rim),
    Check("gpu.rim-revocation", "no signer of them was revoked", _judge_rim_revocation),
    Check("gpu.measurements", "every measurement equals a reference value", _judge_measurements),
    Check("gpu.floor", "driver and firmware are recent enough", _judge_floor),
)
"""The steps of ``verify_device``, in order."""


def verify_device(evidence: DeviceEvidence, party: GpuParty) -> DeviceResult:
    """Judge one device by ``GPU_CHECKS``.

    Whether it is one of several, and the only one with its identity, is for ``gpuset`` to see.
    """
    case = Case(evidence, party)
    steps = Steps()
    accepted = steps.run(GPU_CHECKS, case)
    refusal = steps.refusal
    result: Result = "pass" if accepted else "refused"
    if refusal is not None and refusal.slug == "UNVERIFIABLE":
        result = "unverifiable"
    return DeviceResult(
        result=result,
        steps=steps.all,
        refusal=refusal,
        facts=case.facts_so_far,
        rims=dict(case.rims),
        comparison=case.comparison,
        revocation=dict(case.revocation),
        fwid_matched=case.fwid_matched,
    )
