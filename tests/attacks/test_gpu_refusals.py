"""Attacks on one device's report and certificates, one or more for each numbered step; each names what stops it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.verifier import gpu as gpu_module
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.gpu import GPU_CHECKS, verify_device
from cgpu_agent.verifier.gpucapability import Architecture
from cgpu_agent.verifier.gpucase import DeviceEvidence
from cgpu_agent.verifier.gpufloor import Floors
from cgpu_agent.wire.spdm import Measurement
from fixtures.gpu import DRIVER, FWID, NONCE, OFF, ON, Device, Vendor, measurements
from fixtures.gpujudge import GPU, OTHER, PARTY, RIM_STEPS, SWITCH, VENDOR, Given, chain, fields, of, revoked
from fixtures.gpupki import SIGNER_EXTENSIONS, digest
from fixtures.gpurevocation import crl
from fixtures.pki import NOW

LEAF, BOOT_ROM, PROVISIONER, FAMILY, ROOT = GPU.certificates


# --- gpu.verifiable ---


def ampere_by_its_own_word() -> Given:
    return replace(of(), evidence=replace(of().evidence, architecture=Architecture.AMPERE))


def ampere_wanted() -> Given:
    return replace(of(), party=replace(PARTY, architecture=Architecture.AMPERE))


# --- gpu.chain ---


def root_alone() -> Given:
    """It verifies against itself, and its key signed nothing."""
    return chain(ROOT)


def provisioner_left_out() -> Given:
    return chain(LEAF, BOOT_ROM, FAMILY, ROOT)


def one_certificate_too_many() -> Given:
    return chain(*GPU.certificates, ROOT)


def chain_of_a_stranger() -> Given:
    """A look-alike hierarchy with every name right."""
    stranger = Vendor().device()
    return Given(DeviceEvidence(stranger.report(), stranger.chain))


def strangers_chain_with_the_real_root_appended() -> Given:
    stranger = Vendor().device()
    return chain(*stranger.certificates[:4], ROOT, report=stranger.report())


def provisioner_of_another_family() -> Given:
    other = VENDOR.device("GB100").certificates
    return chain(LEAF, BOOT_ROM, other[2], FAMILY, ROOT)


def self_made_leaf_below_a_real_leaf() -> Given:
    """A device's own signing key used as a CA."""
    forged = GPU.leaf.issue("forged", SIGNER_EXTENSIONS)
    return chain(forged.certificate, LEAF, BOOT_ROM, PROVISIONER, ROOT, report=GPU.report(signer=forged))


def boot_rom_certificate_as_leaf() -> Given:
    above = VENDOR.root.issue("filler")
    family = above.issue("filler 2")
    provisioner = family.issue("filler 3")
    ca = provisioner.issue("a CA that signs reports")
    certificates = [each.certificate for each in (ca, provisioner, family, above, VENDOR.root)]
    return chain(*certificates, report=GPU.report(signer=ca))


def flipped_certificate_signature() -> Given:
    der = bytearray(LEAF.public_bytes(Encoding.DER))
    der[-1] ^= 1
    return chain(x509.load_der_x509_certificate(bytes(der)), *GPU.certificates[1:])


def expired_family() -> Given:
    return chain(*GPU.certificates, party=replace(PARTY, at=NOW + timedelta(days=366)))


def signed_with_sha256() -> Given:
    weak = GPU.signers[1].issue("weak", SIGNER_EXTENSIONS, algorithm=SHA256())
    return chain(weak.certificate, *GPU.certificates[1:], report=GPU.report(signer=weak))


def unknown_critical_extension() -> Given:
    constraint = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0")
    leaf = GPU.signers[1].issue("constrained", (*SIGNER_EXTENSIONS, (constraint, True)))
    return chain(leaf.certificate, *GPU.certificates[1:], report=GPU.report(signer=leaf))


# --- gpu.architecture ---


def another_generation_than_wanted() -> Given:
    return replace(of(), party=replace(PARTY, architecture=Architecture.BLACKWELL))


def another_generation_than_the_sender_says() -> Given:
    return replace(of(), evidence=replace(of().evidence, architecture=Architecture.BLACKWELL))


def switch_in_place_of_a_gpu() -> Given:
    return replace(of(SWITCH), party=replace(PARTY, architecture=Architecture.HOPPER))


def chip_of_the_future() -> Given:
    return of(VENDOR.device("GR100"))


def ampere_below_the_pinned_root() -> Given:
    return of(VENDOR.device("GA100"))


def nameless_device() -> Given:
    return of(VENDOR.device(leaf=SIGNER_EXTENSIONS))


def device_with_a_malformed_name() -> Given:
    return of(VENDOR.device(name="NVIDIA:GH100:48B02D92494BADF4\n"))


# --- gpu.revocation ---


def revoked_boot_rom() -> Given:
    return revoked(crl(GPU.signers[2], BOOT_ROM))


def revoked_by_a_crl_long_stale() -> Given:
    old = {"this_update": NOW - timedelta(days=900), "next_update": NOW - timedelta(days=840)}
    return revoked(crl(GPU.signers[3], PROVISIONER, **old))


def boot_rom_on_hold() -> Given:
    """Tolerated for a signer of reference values at most, never for a device."""
    paper = crl(GPU.signers[2], BOOT_ROM, reason=x509.ReasonFlags.certificate_hold)
    return revoked(paper, allow_rim_hold=True)


def revocation_unknown_where_it_is_demanded() -> Given:
    return replace(of(), party=replace(PARTY, require_revocation=True))


def forged_crl() -> Given:
    """In the provisioner's name, by somebody else."""
    return revoked(crl(GPU.signers[2], signer=OTHER.leaf))


# --- gpu.format ---


def one_stray_byte() -> Given:
    return Given(DeviceEvidence(GPU.report() + b"\0", GPU.chain))


def truncated_signature() -> Given:
    return Given(DeviceEvidence(GPU.report()[:-1], GPU.chain))


def newer_spdm() -> Given:
    report = bytearray(GPU.report())
    report[0] = 0x12
    return Given(DeviceEvidence(bytes(report), GPU.chain))


def one_index_twice() -> Given:
    return of(blocks=[*measurements(), Measurement(1, 1, digest("block 1"))])


# --- gpu.signature ---


def report_of_another_device() -> Given:
    """A real report under the chain of a device of the same family."""
    return Given(DeviceEvidence(GPU.report(), OTHER.chain))


def altered_measurement() -> Given:
    report = bytearray(GPU.report())
    report[120] ^= 1
    return Given(DeviceEvidence(bytes(report), GPU.chain))


def swapped_nonce() -> Given:
    """An old report with today's nonce written into the request."""
    report = bytearray(GPU.report(digest("yesterday")[:32]))
    report[4:36] = NONCE
    return Given(DeviceEvidence(bytes(report), GPU.chain))


def zero_signature() -> Given:
    return Given(DeviceEvidence(GPU.report()[:-96] + bytes(96), GPU.chain))


# --- gpu.nonce ---


def replayed_report() -> Given:
    return of(nonce=digest("yesterday")[:32])


def nonce_where_the_device_chooses() -> Given:
    """The nonce stands in the responder's nonce, which proves nothing; the request answers somebody else."""
    return of(nonce=digest("responder")[:32])


def sender_names_another_nonce() -> Given:
    return replace(of(), evidence=replace(of().evidence, claims={"nonce": "00" * 32}))


# --- gpu.fields ---


def layout_of_the_future() -> Given:
    return fields(OPAQUE_VERSION=b"\2\0")


def field_of_a_wrong_length() -> Given:
    return fields(FWID=FWID[:47])


def driver_that_steers_a_terminal() -> Given:
    return fields(DRIVER_VERSION=b"550.90.07\x1b[2J\0")


def sender_names_another_driver() -> Given:
    return replace(of(), evidence=replace(of().evidence, claims={"driver": "580.95.05"}))


def chip_other_than_certified() -> Given:
    return fields(CHIP_INFO=b"GB202\0")


def half_an_nvdec_status() -> Given:
    """A status that is neither value must not be read as "disabled", which skips a measurement."""
    return fields(NVDEC0_STATUS=b"\x54")


# --- gpu.fwid ---


def other_firmware_than_certified() -> Given:
    return fields(FWID=digest("firmware of an attacker"))


def second_fwid_of_blackwell() -> Given:
    """It is all zero, and not the firmware's."""
    device = VENDOR.device("GB100")
    evidence = DeviceEvidence(device.report(fields=device.fields(FWID=bytes(48))), device.chain)
    return Given(evidence, replace(PARTY, allow_no_rim=True, collateral=Collateral()))


def certificate_without_fwid() -> Given:
    name = LEAF.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return of(VENDOR.device(leaf=(*SIGNER_EXTENSIONS, (name.value, False))))


def fwid_left_out_where_it_is_demanded() -> Given:
    return replace(fields(FWID=None), party=replace(PARTY, require_fwid=True))


# --- gpu.mode ---


def protected_pcie_denied_by_the_flag() -> Given:
    return fields(PROTECTED_PCIE_STATUS=ON, FEATURE_FLAG=b"\0\0")


def protected_pcie_denied_by_the_status() -> Given:
    return fields(PROTECTED_PCIE_STATUS=OFF, FEATURE_FLAG=b"\2\0")


def unlocked_switch() -> Given:
    return fields(SWITCH, LOCK_STATUS=b"\0\0")


# --- gpu.floor ---


def old_driver() -> Given:
    return replace(of(), party=replace(PARTY, floors=Floors(driver="550.127.05")))


def old_firmware() -> Given:
    return replace(of(), party=replace(PARTY, floors=Floors(vbios="96.00.A5.00.01")))


def floor_of_another_family() -> Given:
    """Blackwell's firmware numbers are all above Hopper's: a floor of the one says nothing of the other."""
    return replace(of(), party=replace(PARTY, floors=Floors(vbios="95.00.00.00.00")))


def old_switch() -> Given:
    return replace(of(SWITCH), party=replace(PARTY, floors=Floors(switch_bios="96.10.73.00.01")))


ATTACKS: dict[Callable[[], Given], tuple[str, str]] = {
    ampere_by_its_own_word: ("gpu.verifiable", "UNVERIFIABLE"),
    ampere_wanted: ("gpu.verifiable", "UNVERIFIABLE"),
    root_alone: ("gpu.chain", "CHAIN_LENGTH"),
    provisioner_left_out: ("gpu.chain", "CHAIN_LENGTH"),
    one_certificate_too_many: ("gpu.chain", "CHAIN_LENGTH"),
    chain_of_a_stranger: ("gpu.chain", "UNKNOWN_ROOT"),
    strangers_chain_with_the_real_root_appended: ("gpu.chain", "BAD_CERTIFICATE_SIGNATURE"),
    provisioner_of_another_family: ("gpu.chain", "WRONG_ISSUER"),
    self_made_leaf_below_a_real_leaf: ("gpu.chain", "NOT_A_CA"),
    boot_rom_certificate_as_leaf: ("gpu.chain", "WRONG_PURPOSE"),
    flipped_certificate_signature: ("gpu.chain", "BAD_CERTIFICATE_SIGNATURE"),
    expired_family: ("gpu.chain", "CERTIFICATE_EXPIRED"),
    signed_with_sha256: ("gpu.chain", "WEAK_HASH"),
    unknown_critical_extension: ("gpu.chain", "UNKNOWN_CRITICAL_EXTENSION"),
    another_generation_than_wanted: ("gpu.architecture", "ARCHITECTURE_MISMATCH"),
    another_generation_than_the_sender_says: ("gpu.architecture", "ARCHITECTURE_MISMATCH"),
    switch_in_place_of_a_gpu: ("gpu.architecture", "ARCHITECTURE_MISMATCH"),
    chip_of_the_future: ("gpu.architecture", "UNKNOWN_CHIP"),
    ampere_below_the_pinned_root: ("gpu.architecture", "UNVERIFIABLE"),
    nameless_device: ("gpu.architecture", "BAD_DEVICE_NAME"),
    device_with_a_malformed_name: ("gpu.architecture", "BAD_DEVICE_NAME"),
    revoked_boot_rom: ("gpu.revocation", "CERTIFICATE_REVOKED"),
    revoked_by_a_crl_long_stale: ("gpu.revocation", "CERTIFICATE_REVOKED"),
    boot_rom_on_hold: ("gpu.revocation", "CERTIFICATE_REVOKED"),
    revocation_unknown_where_it_is_demanded: ("gpu.revocation", "REVOCATION_UNKNOWN"),
    forged_crl: ("gpu.revocation", "BAD_CRL"),
    one_stray_byte: ("gpu.format", "TRAILING_BYTES"),
    truncated_signature: ("gpu.format", "TRUNCATED"),
    newer_spdm: ("gpu.format", "BAD_REPORT"),
    one_index_twice: ("gpu.format", "DUPLICATE_MEASUREMENT"),
    report_of_another_device: ("gpu.signature", "BAD_SIGNATURE"),
    altered_measurement: ("gpu.signature", "BAD_SIGNATURE"),
    swapped_nonce: ("gpu.signature", "BAD_SIGNATURE"),
    zero_signature: ("gpu.signature", "BAD_SIGNATURE"),
    replayed_report: ("gpu.nonce", "NONCE_MISMATCH"),
    nonce_where_the_device_chooses: ("gpu.nonce", "NONCE_MISMATCH"),
    sender_names_another_nonce: ("gpu.nonce", "NONCE_MISMATCH"),
    layout_of_the_future: ("gpu.fields", "UNKNOWN_LAYOUT"),
    field_of_a_wrong_length: ("gpu.fields", "BAD_FIELD"),
    driver_that_steers_a_terminal: ("gpu.fields", "BAD_FIELD"),
    sender_names_another_driver: ("gpu.fields", "CLAIM_MISMATCH"),
    chip_other_than_certified: ("gpu.fields", "ARCHITECTURE_MISMATCH"),
    half_an_nvdec_status: ("gpu.fields", "BAD_FIELD"),
    other_firmware_than_certified: ("gpu.fwid", "FWID_MISMATCH"),
    second_fwid_of_blackwell: ("gpu.fwid", "FWID_MISMATCH"),
    certificate_without_fwid: ("gpu.fwid", "FWID_NOT_CERTIFIED"),
    fwid_left_out_where_it_is_demanded: ("gpu.fwid", "FWID_ABSENT"),
    protected_pcie_denied_by_the_flag: ("gpu.mode", "MODE_CONFLICT"),
    protected_pcie_denied_by_the_status: ("gpu.mode", "MODE_CONFLICT"),
    unlocked_switch: ("gpu.mode", "SWITCH_UNLOCKED"),
    old_driver: ("gpu.floor", "BELOW_FLOOR"),
    old_firmware: ("gpu.floor", "BELOW_FLOOR"),
    floor_of_another_family: ("gpu.floor", "BELOW_FLOOR"),
    old_switch: ("gpu.floor", "BELOW_FLOOR"),
}


@pytest.mark.parametrize("device", [GPU, SWITCH, OTHER], ids=["gpu", "switch", "other"])
def test_the_honest_device_passes(device: Device) -> None:
    result = of(device).judge()
    assert result.refusal is None
    assert result.result == "pass"
    assert result.passed("gpu.measurements")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_refuses(attack: Callable[[], Given]) -> None:
    result = attack().judge()
    assert result.refusal is not None
    assert (result.refusal.id, result.refusal.slug) == ATTACKS[attack]
    assert result.result == ("unverifiable" if result.refusal.slug == "UNVERIFIABLE" else "refused")
    assert not result.accepted
    assert result.capabilities is None


def test_every_step_has_an_attack_that_it_stops() -> None:
    assert {step for step, _ in ATTACKS.values()} == {check.id for check in GPU_CHECKS} - RIM_STEPS


@pytest.mark.parametrize(
    "attack",
    [
        revoked_boot_rom,
        replayed_report,
        other_firmware_than_certified,
        protected_pcie_denied_by_the_flag,
        old_driver,
    ],
    ids=lambda attack: attack.__name__,
)
def test_without_its_step_the_attack_would_succeed(
    attack: Callable[[], Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, _ = ATTACKS[attack]
    remaining = tuple(check for check in GPU_CHECKS if check.id != step)
    monkeypatch.setattr(gpu_module, "GPU_CHECKS", remaining)
    assert attack().judge().accepted


@pytest.mark.parametrize("missing", [check.id for check in GPU_CHECKS])
def test_a_step_that_others_rest_on_cannot_be_dropped_into_a_pass_of_a_forgery(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_module, "GPU_CHECKS", tuple(check for check in GPU_CHECKS if check.id != missing))
    forged = bytearray(GPU.report())
    forged[120] ^= 1
    assert not verify_device(DeviceEvidence(bytes(forged), GPU.chain), PARTY).accepted


def test_facts_are_withheld_until_the_signature_is_good() -> None:
    assert altered_measurement().judge().facts is None
    assert chain_of_a_stranger().judge().facts is None
    facts = old_driver().judge().facts
    assert facts is not None
    assert facts.driver == DRIVER


def test_below_any_other_root_a_device_is_simulated_and_keeps_nothing_secret() -> None:
    result = of().judge()
    assert result.facts is not None
    assert result.facts.simulated
    assert result.capabilities is not None
    assert result.capabilities.data_confidential == "no"
