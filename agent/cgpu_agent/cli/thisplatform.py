"""``cgpuctl platform show|fetch``: what this VM's platform says of itself, and what its agent needs of others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.cli import output
from cgpu_agent.cli.files import write_whole
from cgpu_agent.cli.imds import MetadataService
from cgpu_agent.client import Agent
from cgpu_agent.client.calls import Platform
from cgpu_agent.errors import Misuse, Unavailable
from cgpu_agent.verifier.certificate import load_certificate
from cgpu_agent.wire.hcl import ReportType, is_hcl, parse_claims, parse_hcl
from cgpu_agent.wire.snp import parse_snp_report
from cgpu_agent.wire.tdx import is_td_quote, parse_td_quote, parse_tdreport
from cgpu_agent.wire.tpm import parse_public


def run(arguments: argparse.Namespace) -> int:
    with Agent(arguments.socket) as agent:
        found = agent.get_platform()
    if arguments.verb == "fetch":
        return fetch(found, MetadataService(arguments.metadata_service), arguments.store)
    if arguments.out is not None:
        save(found, arguments.out)
    if arguments.json:
        output.emit_json(document(found))
    else:
        show(found)
    return output.EXIT_PASS


def fetch(found: Platform, service: MetadataService, store: Path) -> int:
    """Put into the store what this kind of VM needs, in the files that the agent reads."""
    if found.kind == "azure-cvm-snp":
        certification = service.certification()
        _make(store)
        write_whole(store / "amd.pem", _pem(certification.certificates))
        output.say(f"{store / 'amd.pem'}: {len(certification.certificates)} certificates of AMD")
        output.pairs([("for firmware", certification.tcb.hex())])
    elif found.kind == "azure-cvm-tdx" and found.report is not None:
        tdreport = parse_hcl(found.report).hardware
        quote = service.td_quote(tdreport)
        if parse_td_quote(quote).body.report_data != parse_tdreport(tdreport).report_data:
            raise Unavailable("QUOTE_MISMATCH", "the service made a quote over another report")
        _make(store)
        write_whole(store / "td_quote.bin", quote)
        output.say(f"{store / 'td_quote.bin'}: a TD quote over this VM's report")
    else:
        raise Unavailable("NOTHING_TO_FETCH", f"a VM of kind {found.kind} needs nothing of Azure's metadata service")
    return output.EXIT_PASS


def save(found: Platform, folder: Path) -> None:
    """Write the files, each under the name of the option of ``platform verify`` that takes it."""
    _make(folder)
    files = {
        "report.bin": found.report,
        "td-quote.bin": found.td_quote,
        "vcek.pem": _pem(found.certificates) or None,
        "ak.bin": found.platform_ak,
        "ak-certificate.der": found.platform_ak_certificate,
    }
    for name, data in files.items():
        if data is not None:
            write_whole(folder / name, data)
        elif (folder / name).exists():
            raise Misuse("CANNOT_WRITE", f"{folder / name} is of another report: give an empty directory")


def document(found: Platform) -> dict[str, object]:
    """All of it as JSON. ``reported``: words of the report, which nobody has judged here."""
    certificate = found.platform_ak_certificate
    return {
        "ak_certificate": None if certificate is None else _certificate(certificate),
        "ak_name": parse_public(found.platform_ak).name.hex(),
        "certificates": [_certificate(each) for each in found.certificates],
        "kind": found.kind,
        "missing": found.missing,
        "reported": None if found.report is None else _reported(found.report),
        "td_quote": found.td_quote is not None,
    }


def show(found: Platform) -> None:
    """The same for people."""
    output.say(f"kind {output.printable(found.kind)}, AK {parse_public(found.platform_ak).name.hex()}")
    if found.report is not None:
        output.say("  the report says, and nobody has judged it yet:")
        rows = _reported(found.report).items()
        output.pairs([(name.replace("_", " "), _word(value)) for name, value in rows], "    ")
    certificates = [("certificate", each) for each in found.certificates]
    if found.platform_ak_certificate is not None:
        certificates.append(("AK certificate", found.platform_ak_certificate))
    for label, der in certificates:
        each = _certificate(der)
        output.say(f"  {label}: {output.printable(each['subject'])}")
        output.pairs([("valid", f"{each['not_before']} to {each['not_after']}")], "    ")
    for part, reason in sorted(found.missing.items()):
        output.say(f"  missing: {output.printable(part)}: {output.printable(reason)}")
    output.say("  This is no evidence: write it out (--out DIR) and have cgpuctl platform verify judge it.")


def _reported(report: bytes) -> dict[str, object]:
    if not is_hcl(report):
        if is_td_quote(report):
            return {"debug": parse_td_quote(report).body.debug, "type": "TD quote"}
        return {"debug": parse_snp_report(report).debug, "type": "SNP report"}
    hcl = parse_hcl(report)
    claims = parse_claims(hcl.claims)
    tdx = hcl.kind is ReportType.TDX
    hardware = parse_tdreport(hcl.hardware) if tdx else parse_snp_report(hcl.hardware)
    return {
        "debug": hardware.debug,
        "secure_boot": claims.secure_boot,
        "type": f"HCL report with {'a TDREPORT' if tdx else 'an SNP report'}",
        "user_data": None if claims.user_data is None else claims.user_data.hex(),
        "vm_unique_id": claims.vm_unique_id,
    }


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def _certificate(der: bytes) -> dict[str, str]:
    certificate = load_certificate(der)
    return {
        "not_after": certificate.not_valid_after_utc.isoformat(),
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "subject": certificate.subject.rfc4514_string(),
    }


def _pem(certificates: Sequence[bytes]) -> bytes:
    return b"".join(load_certificate(each).public_bytes(Encoding.PEM) for each in certificates)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Misuse("CANNOT_WRITE", f"{folder}: {error.strerror}") from error
