"""Judges an SNP report: AMD's key of this very chip signed it, and the code it names is a known paravisor.

The last step is the one that counts. Anybody may rent an EPYC and have it sign whatever code asks for: without a
known paravisor, a genuine report endorses a vTPM that somebody wrote last night.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.platformcase import PlatformCase, found
from cgpu_agent.verifier.teechain import leaf_key, order_chain, require_ecdsa, verify_tee_chain
from cgpu_agent.verifier.vcek import VCEK_NAME, VLEK_NAME, chip_certificate
from cgpu_agent.verifier.verdict import Check, Skip
from cgpu_agent.wire.snp import Product, Tcb, parse_tcb

_LEAVES: Final = {0: VCEK_NAME, 1: VLEK_NAME}
"""Signing key of the report -> common name of its certificate."""
_NO_DIGEST: Final = bytes(48)


def _judge_chain(case: PlatformCase) -> str:
    report = found(case.snp)
    name = _LEAVES.get(report.signing_key)
    if name is None:
        raise HostileInput("UNKNOWN_ALGORITHM", "the report is signed by no key that AMD certifies")
    if not case.evidence.certificates:
        raise HostileInput("NO_VCEK", "no certificate of the chip's key came along")
    chain = order_chain(case.evidence.certificates, {name})
    roots = case.party.pins.amd_roots
    case.path, root = verify_tee_chain(chain, roots, case.party.at)
    case.leaf, case.product = chain[0], roots[root]
    return f"{name} below AMD's root key for {case.product}"


def _judge_product(case: PlatformCase) -> str:
    report, product = found(case.snp), found(case.product)
    certified = chip_certificate(found(case.leaf), vlek=report.signing_key == 1)
    if certified.product != product:
        raise HostileInput("PRODUCT_MISMATCH", f"a certificate for {certified.product} below the root for {product}")
    if report.product not in (None, product):
        raise HostileInput("PRODUCT_MISMATCH", f"a report by a {report.product} under a certificate for {product}")
    return f"{product}, by root and certificate" + (" and report" if report.product else "")


def _judge_chip(case: PlatformCase) -> str:
    report = found(case.snp)
    certified = chip_certificate(found(case.leaf), vlek=report.signing_key == 1)
    if certified.chip_id is None:
        return "a VLEK: a key for the machines of one cloud, not of one chip"
    if report.masked or not hmac.compare_digest(certified.chip_id, report.chip_id):
        raise HostileInput("CHIP_MISMATCH", "the certificate is for another chip than the report's")
    return f"chip {report.chip_id[:8].hex()}"


def _judge_tcb(case: PlatformCase) -> str:
    report = found(case.snp)
    certified = chip_certificate(found(case.leaf), vlek=report.signing_key == 1)
    reported = parse_tcb(report.reported_tcb, found(case.product))
    if certified.tcb != reported:
        raise HostileInput("TCB_MISMATCH", "the certificate is for other firmware versions than the report's")
    case.tcb = reported
    return _tcb_text(reported)


def _judge_signature(case: PlatformCase) -> str:
    report = found(case.snp)
    require_ecdsa(leaf_key(found(case.leaf), "secp384r1"), report.r, report.s, report.signed, "the SNP report")
    return "ECDSA P-384 with SHA-384"


def _judge_policy(case: PlatformCase) -> str:
    report = found(case.snp)
    if report.debug:
        raise HostileInput("DEBUG_ENABLED", "the guest policy lets the host debug the guest, so read its memory")
    if report.migration:
        raise HostileInput("MIGRATION_ALLOWED", "the guest policy lets a migration agent read the guest's memory")
    return "no debugging, no migration agent"


def _judge_vmpl(case: PlatformCase) -> str:
    report = found(case.snp)
    if report.vmpl:
        raise HostileInput("WRONG_VMPL", f"asked for at VMPL {report.vmpl}: by the guest, not by the paravisor at 0")
    return "VMPL 0"


def _judge_floor(case: PlatformCase) -> str | Skip:
    report, floor = found(case.snp), case.party.snp_floor
    product: Product = found(case.product)
    names = ("bootloader", "tee", "snp", "microcode", "fmc")
    wanted = {name: low for name in names if (low := getattr(floor, name)) is not None}
    if not wanted and floor.guest_svn is None:
        return Skip("NO_FLOOR", "floor: none configured")
    # The versions at launch too: what an old firmware started, a new one does not make good.
    stages = {"reported": report.reported_tcb, "committed": report.committed_tcb, "launch": report.launch_tcb}
    for word, raw in stages.items():
        tcb = parse_tcb(raw, product)
        for name, low in wanted.items():
            if getattr(tcb, name) < low:
                raise HostileInput("BELOW_FLOOR", f"{word} {name} is {getattr(tcb, name)}, at least {low} is wanted")
    if floor.guest_svn is not None and report.guest_svn < floor.guest_svn:
        raise HostileInput("BELOW_FLOOR", f"guest SVN is {report.guest_svn}, at least {floor.guest_svn} is wanted")
    return f"not older than demanded; guest SVN {report.guest_svn}"


def _judge_revocation(_case: PlatformCase) -> Skip:
    return Skip("REVOCATION_UNKNOWN", "AMD's revocation lists are not looked at")


def _judge_paravisor(case: PlatformCase) -> str:
    report, pins = found(case.snp), case.party.pins
    name = pins.snp_measurements.get(report.measurement)
    if name is None and report.id_key_digest != _NO_DIGEST:
        name = pins.snp_id_keys.get(report.id_key_digest)
    if name is None:
        raise HostileInput(
            "UNKNOWN_PARAVISOR", "unknown paravisor: neither the measurement nor the key that signed it is pinned"
        )
    case.code = name
    return name


def _tcb_text(tcb: Tcb) -> str:
    return ", ".join(f"{name} {value}" for name, value in tcb.to_json().items())


SNP_CHECKS: Final[Sequence[Check[PlatformCase]]] = (
    Check("snp.chain", "a pinned root key of AMD leads to the key that signs reports", _judge_chain),
    Check("snp.product", "root, certificate and report are of one product", _judge_product),
    Check("snp.chip", "the certificate is for this very chip", _judge_chip),
    Check("snp.tcb", "the certificate is for the firmware versions that the report states", _judge_tcb),
    Check("snp.signature", "this key signed exactly these bytes", _judge_signature),
    Check("snp.policy", "nobody but the guest may read its memory", _judge_policy),
    Check("snp.vmpl", "the most privileged software asked for it", _judge_vmpl),
    Check("snp.floor", "firmware and paravisor are not older than demanded", _judge_floor),
    Check("snp.revocation", "no certificate was revoked", _judge_revocation),
    Check("snp.paravisor", "the code that owns the vTPM is a known paravisor", _judge_paravisor),
)
"""The steps of an SNP report, in order."""

SNP_REQUIRED: Final = frozenset(each.id for each in SNP_CHECKS) - {"snp.floor", "snp.revocation"}
"""Those without which nothing is endorsed."""
