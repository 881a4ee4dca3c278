"""``cgpuctl quote verify``: judge a bare TPM quote of any origin."""

from __future__ import annotations

import argparse
import re

from cgpu_agent.cli import output
from cgpu_agent.cli.inputs import parse_hex, read_file
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.verifier.quote import verify_quote
from cgpu_agent.wire import strictjson

_SMALL = 1 << 20


def run(arguments: argparse.Namespace) -> int:
    nonce = None if arguments.nonce is None else parse_hex(arguments.nonce, "--nonce")
    pcrs = None if arguments.pcrs is None else parse_pcrs(read_file(arguments.pcrs, _SMALL), arguments.bank)
    try:
        ak = load_attestation_key(read_file(arguments.ak, _SMALL))
    except HostileInput as error:
        if arguments.json:
            output.emit_json({"result": "refused", "reason": {"slug": error.slug, "detail": error.message}})
        output.complain(error)
        return output.EXIT_REFUSED
    result = verify_quote(
        read_file(arguments.attest, _SMALL),
        read_file(arguments.signature, _SMALL),
        ak,
        nonce=nonce,
        pcrs=pcrs,
        bank=arguments.bank,
        expected_pcrs=None,
        allow_sha1_bank=arguments.allow_sha1_bank,
    )
    refusal = result.refusal
    if arguments.json:
        reason = None if refusal is None else {"step": refusal.id, "slug": refusal.slug, "detail": refusal.detail}
        output.emit_json({"result": "pass" if result.accepted else "refused", "reason": reason, **result.to_json()})
    else:
        output.steps(result.steps)
        output.say()
        if refusal is None:
            output.say(f"{output.coloured('ACCEPTED', 'ok')} (AK attributes: {result.attributes})")
        else:
            output.say(f"{output.coloured('REFUSED', 'fail')}: {output.printable(refusal.detail)} [{refusal.slug}]")
    return output.EXIT_PASS if result.accepted else output.EXIT_REFUSED


def parse_pcrs(data: bytes, bank: str) -> dict[int, bytes]:
    """``{"0": "hex", ...}``, or the same one level down under the bank's name. Raises ``Misuse`` (``BAD_PCRS``)."""
    try:
        found = strictjson.loads(data, "PCR file", _SMALL)
    except HostileInput as error:
        raise Misuse("BAD_PCRS", error.message) from error
    if isinstance(found, dict) and isinstance(found.get(bank), dict):
        found = found[bank]
    if not isinstance(found, dict) or not found:
        raise Misuse("BAD_PCRS", 'the PCR file must be a JSON object {"index": "hex"}')
    values: dict[int, bytes] = {}
    for key, value in found.items():
        if not re.fullmatch(r"0|1[0-9]?|2[0-3]?|[3-9]", key) or not isinstance(value, str):
            raise Misuse("BAD_PCRS", "the PCR file has an entry that is not an index of 0-23 with a hex value")
        values[int(key)] = parse_hex(value.removeprefix("0x"), f"PCR {key}")
    return values
