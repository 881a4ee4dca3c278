"""What the configuration says of key brokers out in the world: no table, no broker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cgpu_agent.wire.egress import SOCKET

Encoding = Literal["base64", "text"]
BROKER_TABLES = ("sealed", "egress", "openbao", "trustee", "azure")


@dataclass(frozen=True, slots=True)
class EgressConfig:
    """``socket``: where ``cgpu-egress`` listens, the only way from the agent to a broker."""

    socket: str = SOCKET


@dataclass(frozen=True, slots=True)
class SealedConfig:
    """``approvals``: directory of the owner's approvals (``*.json``) of boots in which sealed keys may open."""

    approvals: str = "/etc/cgpu-agent/approvals"


@dataclass(frozen=True, slots=True)
class TrusteeTable:
    """Trustee's key broker: ``https://HOST[:PORT]``. ``ca_file``: the only CAs that may vouch for it (PEM)."""

    url: str
    ca_file: str


@dataclass(frozen=True, slots=True)
class OpenBaoTable:
    """OpenBao, and the verifier service whose tokens it trusts.

    ``addresses``: ``https://HOST[:PORT]`` of every node of one cluster. ``role``: of the JWT auth method at
    ``auth_mount``. ``verifier``: ``https://HOST[:PORT][/PREFIX]``; ``audience``: the verifier's own name.
    ``kv_mount``: of a KV version 2 engine; ``field``: of its entries, which hold a key as ``encoding`` says; or, with
    ``transit``, a ciphertext that this path (``transit/decrypt/NAME``) opens. ``namespace``: of OpenBao.
    ``ca_file``: the only CAs that may vouch for all these servers (PEM). "none": there is none.
    """

    addresses: tuple[str, ...]
    role: str
    verifier: str
    audience: str
    ca_file: str
    auth_mount: str = "jwt"
    kv_mount: str = "kv"
    field: str = "key"
    encoding: Encoding = "base64"
    transit: str = "none"
    namespace: str = "none"


@dataclass(frozen=True, slots=True)
class AzureTable:
    """Azure's attestation service, and a Key Vault or Managed HSM.

    ``attestation``, ``vault``: ``https://HOST``. ``access_token``: file with a bearer token for the vault, which a
    unit beside the agent keeps fresh. ``ca_file``: the only CAs that may vouch for both servers, and for the
    signature under a released key (PEM). ``mechanism``: how the vault wraps.
    """

    attestation: str
    vault: str
    access_token: str
    ca_file: str
    mechanism: str = "RSA_AES_KEY_WRAP_256"
