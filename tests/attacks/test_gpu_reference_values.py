"""Attacks on reference values and on what is compared with them; each names the step that must stop it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.verifier import gpu as gpu_module
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.gpu import GPU_CHECKS
from cgpu_agent.wire.spdm import Measurement
from fixtures.gpu import DRIVER, DRIVER_INDICES, ON, VBIOS, VBIOS_INDICES, Vendor, measurements
from fixtures.gpujudge import GPU, RIM_STEPS, RIMS, VENDOR, Given, of, revoked, rims
from fixtures.gpupki import SIGNER_EXTENSIONS, digest
from fixtures.gpurevocation import crl
from fixtures.pki import NOW

# --- gpu.driver-rim, gpu.firmware-rim ---

GOOD_DRIVER, GOOD_VBIOS = VENDOR.rims()


def no_reference_values() -> Given:
    return rims()


def firmware_values_left_out() -> Given:
    """What is missing cannot be waved through by a flag that is for having none at all."""
    return rims(GOOD_DRIVER, allow_no_rim=True)


def values_of_another_driver() -> Given:
    return rims(VENDOR.rim("550.144.03"), GOOD_VBIOS)


def values_for_another_chip() -> Given:
    return rims(VENDOR.rim(product="GB100"), GOOD_VBIOS)


def values_by_a_stranger() -> Given:
    return rims(Vendor().rim(), GOOD_VBIOS)


def values_below_a_debug_signer() -> Given:
    l3 = VENDOR.rim_chain[1].issue("Throw-away Reference Value L3 Debug Only")
    return rims(VENDOR.rim(chain=(l3, *VENDOR.rim_chain[1:])), GOOD_VBIOS)


def expired_values() -> Given:
    return rims(VENDOR.rim(not_after=NOW - timedelta(days=1)), GOOD_VBIOS)


def altered_golden() -> Given:
    golden = digest("block 22").hex()
    return rims(VENDOR.rim(tamper={golden: digest("malware").hex()}), GOOD_VBIOS)


def altered_version() -> Given:
    """The values of a newer driver, renamed."""
    return rims(VENDOR.rim("550.144.03", tamper={"550.144.03": DRIVER}), GOOD_VBIOS)


def signature_by_another_key() -> Given:
    """The signer's certificate exchanged for that of another honest signer."""
    other = VENDOR.rim_chain[0].issue("honest", SIGNER_EXTENSIONS)
    head, _, rest = VENDOR.rim().partition(b"<ds:X509Certificate>")
    _, _, tail = rest.partition(b"</ds:X509Certificate>")
    certificate = base64.b64encode(other.certificate.public_bytes(Encoding.DER))
    return rims(head + b"<ds:X509Certificate>" + certificate + b"</ds:X509Certificate>" + tail, GOOD_VBIOS)


def older_issue_beside_the_newer_one() -> Given:
    """Two issues of one version: the newer one no longer fits, and the older one must not be taken instead."""
    old = VENDOR.rim(not_before=NOW - timedelta(days=700))
    new = VENDOR.rim(goldens={index: (digest("fixed"),) for index in DRIVER_INDICES})
    return rims(old, new, GOOD_VBIOS)


def two_issues_of_one_moment() -> Given:
    other = VENDOR.rim(goldens={index: (digest("other"),) for index in DRIVER_INDICES})
    return rims(GOOD_DRIVER, other, GOOD_VBIOS)


def store_that_lies(*documents: bytes, **claimed: str) -> Given:
    """A store that was filled by other means than reading files, and says what its files do not."""
    given = rims(*documents)
    first, second = given.party.collateral.rims
    lie = replace(first, claimed=replace(first.claimed, **claimed))  # type: ignore[arg-type]
    return Given(given.evidence, replace(given.party, collateral=Collateral((lie, second))))


def store_that_lies_about_a_version() -> Given:
    return store_that_lies(VENDOR.rim("550.144.03"), GOOD_VBIOS, version=DRIVER)


def store_that_lies_about_an_edition() -> Given:
    return store_that_lies(VENDOR.rim(edition="SWITCH"), GOOD_VBIOS, edition="GPU")


def firmware_values_of_a_switch() -> Given:
    return rims(GOOD_DRIVER, VENDOR.rim(VBIOS, VBIOS_INDICES, edition="SWITCH"))


# --- gpu.rim-revocation ---


def signer_on_hold() -> Given:
    signer = x509.load_der_x509_certificate(RIMS.rims[0].certificates[0])
    return revoked(crl(VENDOR.rim_chain[0], signer, reason=x509.ReasonFlags.certificate_hold))


def signer_revoked() -> Given:
    signer = x509.load_der_x509_certificate(RIMS.rims[1].certificates[0])
    return revoked(crl(VENDOR.rim_chain[0], signer), allow_rim_hold=True)


# --- gpu.measurements ---


def other_driver_code() -> Given:
    blocks = measurements()
    blocks[21] = Measurement(22, 1, digest("malware"))
    return of(blocks=blocks)


def other_firmware_code() -> Given:
    blocks = measurements()
    blocks[0] = Measurement(1, 1, digest("malware"))
    return of(blocks=blocks)


def truncated_measurement() -> Given:
    blocks = measurements()
    blocks[0] = Measurement(1, 1, digest("block 1")[:32])
    return of(blocks=blocks)


def fewer_measurements_than_goldens() -> Given:
    return of(blocks=measurements(40))


def moved_measurements() -> Given:
    """The right values at the wrong places."""
    return of(blocks=[Measurement(each.index % 64 + 1, 1, each.value) for each in measurements()])


def video_decoder_enabled_with_foreign_code() -> Given:
    blocks = measurements()
    blocks[35] = Measurement(36, 1, digest("malware"))
    return of(blocks=blocks, fields=GPU.fields(NVDEC0_STATUS=ON))


def index_in_both_manifests() -> Given:
    return rims(GOOD_DRIVER, VENDOR.rim(VBIOS, (*VBIOS_INDICES, 7)))


def manifest_without_active_goldens() -> Given:
    return rims(GOOD_DRIVER, VENDOR.rim(VBIOS, ()))


ATTACKS: dict[Callable[[], Given], tuple[str, str]] = {
    no_reference_values: ("gpu.driver-rim", "NO_RIM"),
    firmware_values_left_out: ("gpu.firmware-rim", "NO_RIM"),
    values_of_another_driver: ("gpu.driver-rim", "NO_RIM"),
    values_for_another_chip: ("gpu.driver-rim", "RIM_PRODUCT_MISMATCH"),
    values_by_a_stranger: ("gpu.driver-rim", "UNKNOWN_ROOT"),
    values_below_a_debug_signer: ("gpu.driver-rim", "DEBUG_RIM"),
    expired_values: ("gpu.driver-rim", "CERTIFICATE_EXPIRED"),
    altered_golden: ("gpu.driver-rim", "RIM_DIGEST_MISMATCH"),
    altered_version: ("gpu.driver-rim", "RIM_DIGEST_MISMATCH"),
    signature_by_another_key: ("gpu.driver-rim", "BAD_RIM_SIGNATURE"),
    older_issue_beside_the_newer_one: ("gpu.measurements", "MEASUREMENT_MISMATCH"),
    store_that_lies_about_a_version: ("gpu.driver-rim", "RIM_VERSION_MISMATCH"),
    store_that_lies_about_an_edition: ("gpu.driver-rim", "RIM_VERSION_MISMATCH"),
    two_issues_of_one_moment: ("gpu.driver-rim", "AMBIGUOUS_RIM"),
    firmware_values_of_a_switch: ("gpu.firmware-rim", "NO_RIM"),
    signer_on_hold: ("gpu.rim-revocation", "CERTIFICATE_REVOKED"),
    signer_revoked: ("gpu.rim-revocation", "CERTIFICATE_REVOKED"),
    other_driver_code: ("gpu.measurements", "MEASUREMENT_MISMATCH"),
    other_firmware_code: ("gpu.measurements", "MEASUREMENT_MISMATCH"),
    truncated_measurement: ("gpu.measurements", "MEASUREMENT_MISMATCH"),
    fewer_measurements_than_goldens: ("gpu.measurements", "MEASUREMENT_MISSING"),
    moved_measurements: ("gpu.measurements", "MEASUREMENT_MISMATCH"),
    video_decoder_enabled_with_foreign_code: ("gpu.measurements", "MEASUREMENT_MISMATCH"),
    index_in_both_manifests: ("gpu.measurements", "RIM_INDEX_CONFLICT"),
    manifest_without_active_goldens: ("gpu.measurements", "NO_GOLDENS"),
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_refuses(attack: Callable[[], Given]) -> None:
    result = attack().judge()
    assert result.refusal is not None
    assert (result.refusal.id, result.refusal.slug) == ATTACKS[attack]
    assert result.result == "refused"


def test_every_step_about_reference_values_has_an_attack_that_it_stops() -> None:
    assert {step for step, _ in ATTACKS.values()} == RIM_STEPS


@pytest.mark.parametrize(
    "attack",
    [expired_values, firmware_values_left_out, signer_revoked, other_driver_code],
    ids=lambda attack: attack.__name__,
)
def test_without_its_step_the_attack_would_succeed(
    attack: Callable[[], Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, _ = ATTACKS[attack]
    remaining = tuple(check for check in GPU_CHECKS if check.id != step)
    monkeypatch.setattr(gpu_module, "GPU_CHECKS", remaining)
    assert attack().judge().accepted
