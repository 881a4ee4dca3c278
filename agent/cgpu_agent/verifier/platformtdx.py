"""Judges a TD quote: Intel's enclave on a genuine machine signed it, and the TD it names is a known paravisor.

From the PCK certificate down: the machine's key certifies the quoting enclave, the enclave its attestation key, that
key the quote (Intel "TDX DCAP Quoting Library API", A.3 and A.4). Intel's TCB info and revocation lists are not part
of a quote; without them a machine of any patch level passes, and the verdict says so.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import fields
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.certificate import load_certificates
from cgpu_agent.verifier.platformcase import PlatformCase, found
from cgpu_agent.verifier.roots.platform import INTEL_QE_SIGNER, INTEL_TD_QE_PRODUCT
from cgpu_agent.verifier.teechain import leaf_key, order_chain, require_ecdsa, sha256, verify_tee_chain
from cgpu_agent.verifier.verdict import Check, Skip
from cgpu_agent.wire.tdx import TdBody, parse_td_quote

_PCK_NAME: Final = "Intel SGX PCK Certificate"
_SAME: Final = tuple(each.name for each in fields(TdBody) if each.name != "service_td")
"""What a TDREPORT and the quote made of it both tell: all but a digest of two different forms."""


def _judge_quote(case: PlatformCase) -> str:
    data = case.evidence.td_quote
    if case.quote is None:
        if data is None:
            raise HostileInput(
                "NO_TD_QUOTE", "a TDREPORT proves nothing outside of its machine, and no quote came along"
            )
        case.quote = parse_td_quote(data)
    return f"version {case.quote.version}"


def _judge_match(case: PlatformCase) -> str:
    quote, report = found(case.quote), case.td
    if report is None:
        return "a bare quote"
    for name in _SAME:
        if getattr(quote.body, name) != getattr(report, name):
            raise HostileInput(
                "QUOTE_MISMATCH", f"the quote is of another TD or time than the report: {name} differs"
            )
    return f"the same in {len(_SAME)} fields"


def _judge_chain(case: PlatformCase) -> str:
    chain = order_chain(load_certificates(found(case.quote).certificates), {_PCK_NAME})
    case.path, _ = verify_tee_chain(chain, case.party.pins.intel_roots, case.party.at)
    case.leaf = chain[0]
    return f"{_PCK_NAME} below Intel's root key"


def _judge_enclave(case: PlatformCase) -> str:
    qe = found(case.quote).qe
    require_ecdsa(leaf_key(found(case.leaf), "secp256r1"), qe.r, qe.s, qe.signed, "the quoting enclave's report")
    if qe.debug:
        raise HostileInput("DEBUG_ENABLED", "the quoting enclave is open to a debugger")
    if qe.mr_signer != INTEL_QE_SIGNER or qe.product != INTEL_TD_QE_PRODUCT:
        raise HostileInput("UNKNOWN_ENCLAVE", "the quote was signed by an enclave that is not Intel's for TDs")
    return f"Intel's quoting enclave, SVN {qe.svn}"


def _judge_key(case: PlatformCase) -> str:
    quote = found(case.quote)
    bound = sha256(quote.attestation_key, quote.auth_data) + bytes(32)
    if not hmac.compare_digest(quote.qe.report_data, bound):
        raise HostileInput("KEY_NOT_BOUND", "the enclave's report is not about this attestation key")
    return "the enclave's report data are its digest"


def _judge_signature(case: PlatformCase) -> str:
    quote = found(case.quote)
    try:
        key = EllipticCurvePublicKey.from_encoded_point(SECP256R1(), b"\4" + quote.attestation_key)
    except ValueError as error:
        raise HostileInput("BAD_KEY", "the attestation key is no point of P-256") from error
    require_ecdsa(key, quote.r, quote.s, quote.signed, "the TD quote")
    return "ECDSA P-256 with SHA-256"


def _judge_attributes(case: PlatformCase) -> str:
    if found(case.quote).body.debug:
        raise HostileInput("DEBUG_ENABLED", "the TD lets the host debug it, so read its memory")
    return "no debugging"


def _judge_floor(case: PlatformCase) -> str | Skip:
    quote, floor = found(case.quote), case.party.tdx_floor
    if floor.tee_tcb_svn is None and floor.qe_svn is None:
        return Skip("NO_FLOOR", "floor: none configured")
    for index, low in enumerate(floor.tee_tcb_svn or b""):
        svn = quote.body.tee_tcb_svn[index]
        if svn < low:
            raise HostileInput("BELOW_FLOOR", f"TEE TCB SVN {index} is {svn}, at least {low} is wanted")
    if floor.qe_svn is not None and quote.qe.svn < floor.qe_svn:
        raise HostileInput("BELOW_FLOOR", f"the enclave's SVN is {quote.qe.svn}, at least {floor.qe_svn} is wanted")
    return "not older than demanded"


def _judge_collateral(_case: PlatformCase) -> Skip:
    return Skip("REVOCATION_UNKNOWN", "Intel's TCB info and revocation lists are not looked at")


def _judge_module(case: PlatformCase) -> str:
    body = found(case.quote).body
    name = case.party.pins.td_modules.get(body.mrseam)
    if name is None or any(body.mrsignerseam) or any(body.seam_attributes):
        raise HostileInput("UNKNOWN_MODULE", "the TDX module below the guest is not pinned, or is not Intel's")
    return name


def _judge_paravisor(case: PlatformCase) -> str:
    body = found(case.quote).body
    attributes = case.party.pins.td_paravisors.get(body.mrtd)
    if attributes is None:
        raise HostileInput("UNKNOWN_PARAVISOR", "unknown paravisor: its MRTD is not pinned")
    if body.attributes not in attributes or _configured(body):
        raise HostileInput(
            "UNKNOWN_PARAVISOR", "unknown paravisor: a known MRTD with other attributes or configuration than pinned"
        )
    case.code = f"Azure paravisor, MRTD {body.mrtd[:8].hex()}"
    return case.code


def _configured(body: TdBody) -> bool:
    """Whether whoever built the TD, or a TD that serves it, added something to the known image."""
    return any(body.mrconfigid + body.mrowner + body.mrownerconfig + body.service_td)


TDX_CHECKS: Final[Sequence[Check[PlatformCase]]] = (
    Check("tdx.quote", "there is a TD quote", _judge_quote),
    Check("tdx.match", "the quote was made of the report that binds the claims", _judge_match),
    Check("tdx.chain", "a pinned root key of Intel leads to the machine's PCK certificate", _judge_chain),
    Check("tdx.enclave", "this machine certifies Intel's quoting enclave", _judge_enclave),
    Check("tdx.key", "the enclave certifies the attestation key", _judge_key),
    Check("tdx.signature", "this key signed exactly these bytes", _judge_signature),
    Check("tdx.attributes", "nobody but the guest may read its memory", _judge_attributes),
    Check("tdx.floor", "module and enclave are not older than demanded", _judge_floor),
    Check("tdx.collateral", "Intel calls the machine up to date, and revoked nothing", _judge_collateral),
    Check("tdx.module", "the TDX module is a known one of Intel's", _judge_module),
    Check("tdx.paravisor", "the code that owns the vTPM is a known paravisor", _judge_paravisor),
)
"""The steps of a TD quote, in order."""

TDX_REQUIRED: Final = frozenset(each.id for each in TDX_CHECKS) - {"tdx.floor", "tdx.collateral"}
"""Those without which nothing is endorsed."""
