"""``cgpuctl ak enrol``: have a verifier service certify this VM's platform AK, beside an EK that it trusts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.cli import output
from cgpu_agent.cli.files import write_whole
from cgpu_agent.cli.https import Service
from cgpu_agent.cli.inputs import read_file
from cgpu_agent.client import Agent
from cgpu_agent.client.calls import Identity
from cgpu_agent.errors import HostileInput, Misuse, Unavailable
from cgpu_agent.verifier.certificate import load_certificate
from cgpu_agent.verifier.ekclass import ek_class_of
from cgpu_agent.verifier.keys import certificate_key, key_of, load_attestation_key, same_key
from cgpu_agent.wire.strictjson import b64
from cgpu_agent.wire.tpm import parse_public_any

_SMALL = 1 << 16
_MAX_CERTIFICATE = 8192

EkKind = Literal["rsa", "ecc"]


def run(arguments: argparse.Namespace) -> int:
    service = Service(arguments.url)
    with Agent(arguments.socket) as agent:
        identity = agent.get_identity()
        kind, certificate = _choose_ek(identity, arguments)
        asked = service.post(
            "/v1/enrol/challenge",
            {
                "ak_public": b64(identity.platform_ak),
                "ek_certificate": b64(certificate),
                "ek_intermediates": [b64(_der(path)) for path in arguments.ek_intermediate],
                "ek_public": b64(identity.ek_rsa if kind == "rsa" else identity.ek_ecc),
            },
        )
        blob, encrypted = asked.base64("credential_blob", 256), asked.base64("secret", 512)
        secret = agent.activate_credential(kind, blob, encrypted)
    answer = service.post("/v1/enrol/complete", {"secret": b64(secret), "ticket": b64(asked.base64("ticket", 1024))})
    made = load_certificate(answer.base64("certificate", _MAX_CERTIFICATE))
    if not same_key(certificate_key(made), load_attestation_key(identity.platform_ak).key):
        raise HostileInput("BAD_ANSWER", "the service certified another key than this VM's platform AK")
    ek_class = ek_class_of(made)
    write_whole(arguments.output, made.public_bytes(Encoding.DER))
    output.say(f"{arguments.output}: AK certificate, beside an EK of class {ek_class or 'unknown'}")
    output.pairs([("valid until", made.not_valid_after_utc.isoformat()), ("issuer", made.issuer.rfc4514_string())])
    output.say("  to use it: tpm.ak_certificate in the agent's configuration; then, and at each renewal, reload it")
    return output.EXIT_PASS


def _choose_ek(identity: Identity, arguments: argparse.Namespace) -> tuple[EkKind, bytes]:
    """An EK of this TPM and its certificate, DER: those given, else what the TPM itself holds."""
    given = arguments.ek_certificate
    found = identity.ek_certificates if given is None else (_der(given),)
    kinds: tuple[EkKind, ...] = ("rsa", "ecc") if arguments.ek is None else (arguments.ek,)
    for kind in kinds:
        key = key_of(parse_public_any(identity.ek_rsa if kind == "rsa" else identity.ek_ecc))
        for der in found:
            try:
                fits = same_key(certificate_key(load_certificate(der)), key)
            except HostileInput:
                continue  # a certificate that cannot be read certifies nothing
            if fits:
                return kind, der
    if given is not None:
        raise Misuse("EK_CERTIFICATE_MISMATCH", f"{given} is not for an EK of this TPM")
    raise Unavailable("NO_EK_CERTIFICATE", "the TPM holds no certificate of its EK; give one with --ek-certificate")


def _der(path: Path) -> bytes:
    try:
        return load_certificate(read_file(path, _SMALL)).public_bytes(Encoding.DER)
    except HostileInput as error:
        raise Misuse("BAD_CERTIFICATE", f"{path}: {error.message}") from error
