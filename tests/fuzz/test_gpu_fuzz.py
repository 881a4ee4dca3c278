"""Hostile bytes in place of GPU evidence, and one flipped byte in each place: refused, or shown to be without effect.

The full sweep of every byte runs with HYPOTHESIS_PROFILE=campaign; a normal run takes samples.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.certificate import load_certificates
from cgpu_agent.verifier.fwid import certified_fwid
from cgpu_agent.verifier.gpu import verify_device
from cgpu_agent.verifier.gpucase import DeviceEvidence, GpuParty
from cgpu_agent.verifier.gpuchain import NVIDIA_RIM_ROOTS, PinnedRoots
from cgpu_agent.verifier.revocation import load_crl, load_ocsp
from cgpu_agent.verifier.rim import verify_rim
from cgpu_agent.wire.gpuevidence import EvidenceItem, encode_evidence, parse_evidence
from cgpu_agent.wire.nvidia import encode_fields, parse_gpu, parse_switch
from cgpu_agent.wire.rim import parse_rim, parse_signed
from cgpu_agent.wire.spdm import parse_report
from fixtures.gpu import NONCE, composite_device_id, tcb_info
from fixtures.gpujudge import GPU, PARTY, SWITCH, VENDOR
from fixtures.gpupki import SIGNER_EXTENSIONS
from fixtures.gpurevocation import crl, ocsp_response
from fixtures.gpurim import Manifest
from fixtures.pki import NOW
from fixtures.recorded_gpu import DRIVER_RIM, GPU_DAY, N1, VBIOS_RIM, device, party

CAMPAIGN = os.environ.get("HYPOTHESIS_PROFILE") == "campaign"
SAMPLES = 60

RIM = VENDOR.rim()
ITEM = EvidenceItem("HOPPER", NONCE.hex(), GPU.report(), GPU.chain, None, None)
SEEDS: dict[Callable[[bytes], object], tuple[bytes, ...]] = {
    parse_report: (GPU.report(), SWITCH.report()),
    parse_gpu: (encode_fields(GPU.fields()), encode_fields(SWITCH.fields())),
    parse_switch: (encode_fields(SWITCH.fields()), encode_fields(GPU.fields())),
    parse_rim: (RIM,),
    parse_signed: (Manifest("1.2").unsigned().encode(),),
    parse_evidence: (encode_evidence([ITEM]),),
    load_crl: (crl(GPU.signers[2], GPU.signers[1].certificate),),
    load_ocsp: (ocsp_response(GPU.signers[1].certificate, GPU.signers[2]),),
}


def mutated(seeds: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """Real structures with bytes replaced, cut out, doubled or appended."""

    @st.composite
    def mutate(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(seeds)))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data)))
            length = draw(st.integers(0, 4))
            data[at : at + length] = draw(st.binary(max_size=6))
        return bytes(data)

    return mutate()


@pytest.mark.parametrize("parse", SEEDS, ids=lambda parse: parse.__name__)
def test_parsers_refuse_or_read(parse: Callable[[bytes], object]) -> None:
    @settings(max_examples=300, deadline=None)
    @given(mutated(SEEDS[parse]) | st.binary(max_size=200))
    def run(data: bytes) -> None:
        with contextlib.suppress(HostileInput):
            parse(data)

    run()


@settings(max_examples=60, deadline=None)
@given(mutated((GPU.report(),)) | st.binary(max_size=64), mutated((GPU.chain,)) | st.just(GPU.chain))
def test_no_altered_evidence_passes(report: bytes, chain: bytes) -> None:
    result = verify_device(DeviceEvidence(report, chain), PARTY)
    assert result.refusal is None or result.refusal.slug != "INTERNAL"
    if result.accepted:
        assert report == GPU.report() or report[:-96] == GPU.report()[:-96]
        assert certified(load_certificates(chain)) == certified(load_certificates(GPU.chain))


@settings(max_examples=60, deadline=None)
@given(mutated((composite_device_id(bytes(48), GPU.leaf.key.public_key()).value, tcb_info(bytes(48)).value)))
def test_any_extension_is_a_fwid_of_48_bytes_or_refused(value: bytes) -> None:
    for oid in (composite_device_id(b"", GPU.leaf.key.public_key()).oid, tcb_info(b"").oid):
        extension = x509.UnrecognizedExtension(oid, value)
        leaf = GPU.signers[1].issue("leaf", (*SIGNER_EXTENSIONS, (extension, False))).certificate
        with contextlib.suppress(HostileInput):
            found = certified_fwid(leaf)
            assert found is not None
            assert len(found) == 48


# --- one byte, everywhere ---


def flips(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The data with one bit of one byte flipped: every byte in a campaign, some of them else."""
    step = 1 if CAMPAIGN else max(1, len(data) // SAMPLES)
    for at in range(0, len(data), step):
        yield at, data[:at] + bytes((data[at] ^ (1 << at % 8),)) + data[at + 1 :]


def sweep_report(evidence: DeviceEvidence, judge: GpuParty) -> list[int]:
    """Where a flip in the report is accepted."""
    return [
        at
        for at, report in flips(evidence.report)
        if verify_device(DeviceEvidence(report, evidence.chain), judge).accepted
    ]


def certified(certificates: Iterable[x509.Certificate]) -> list[bytes]:
    """What issuers signed. The signature itself has several encodings, in certificates as in ECDSA."""
    return [each.tbs_certificate_bytes for each in certificates]


def sweep_chain(evidence: DeviceEvidence, judge: GpuParty) -> list[int]:
    """Where a flip is accepted although it changed what an issuer signed."""
    good = certified(load_certificates(evidence.chain))
    return [
        at
        for at, chain in flips(evidence.chain)
        if verify_device(DeviceEvidence(evidence.report, chain), judge).accepted
        and certified(load_certificates(chain)) != good
    ]


def sweep_rim(document: bytes, roots: PinnedRoots, moment: datetime) -> list[int]:
    """Where a flip is accepted although it changed what the manifest says, or what certifies its signer."""
    good = verify_rim(document, roots=roots, at=moment).verified
    assert good is not None
    signer = certified(each.certificate for each in good.path.facts)
    bad = []
    for at, flipped in flips(document):
        judged = verify_rim(flipped, roots=roots, at=moment)
        assert judged.refusal is None or judged.refusal.slug != "INTERNAL", at
        found = judged.verified
        if found is None:
            continue
        if found.rim != good.rim or certified(each.certificate for each in found.path.facts) != signer:
            bad.append(at)
    return bad


def test_no_byte_of_a_report_may_change() -> None:
    assert sweep_report(DeviceEvidence(GPU.report(), GPU.chain), PARTY) == []


def test_no_byte_of_a_certificate_may_change() -> None:
    assert sweep_chain(DeviceEvidence(GPU.report(), GPU.chain), PARTY) == []


def test_no_byte_of_what_a_manifest_says_may_change() -> None:
    assert sweep_rim(RIM, VENDOR.rim_roots, NOW) == []


def test_the_same_of_nvidias_own(shared_data: Path) -> None:
    folder = shared_data / "nvidia"
    evidence = device(folder, "hopper/nvtrust-v2.7")
    judge = party(folder, DRIVER_RIM, VBIOS_RIM, nonce=N1)
    assert verify_device(evidence, judge).accepted
    assert sweep_report(evidence, judge) == []
    assert sweep_chain(evidence, judge) == []
    for name in (DRIVER_RIM, VBIOS_RIM):
        assert sweep_rim((folder / name).read_bytes(), NVIDIA_RIM_ROOTS, GPU_DAY) == []
