"""Makes the key brokers that the configuration names, each with its way to them."""

from __future__ import annotations

import os
from pathlib import Path

from cgpu_agent.backends.base import KeyBroker
from cgpu_agent.backends.egress import Outbound
from cgpu_agent.backends.keys.credential import CredentialKeys
from cgpu_agent.backends.keys.openbao import OpenBao, OpenBaoConfig
from cgpu_agent.backends.keys.trustee import TrusteeKbs
from cgpu_agent.daemon.brokerconfig import OpenBaoTable, TrusteeTable
from cgpu_agent.daemon.config import Config
from cgpu_agent.errors import Misuse


def make_brokers(config: Config) -> dict[str, KeyBroker]:
    """The brokers, by kind. Raises ``Misuse`` (``BAD_CONFIG``)."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    brokers: dict[str, KeyBroker] = {"credential": CredentialKeys(Path(credentials) if credentials else None)}
    try:
        if config.openbao is not None:
            brokers["openbao"] = _openbao(config.openbao, config.egress.socket)
        if config.trustee is not None:
            brokers["trustee"] = _trustee(config.trustee, config.egress.socket)
    except Misuse as error:
        raise Misuse("BAD_CONFIG", error.message) from error
    return brokers


def _openbao(table: OpenBaoTable, socket: str) -> OpenBao:
    outbound = Outbound((*table.addresses, table.verifier), ca_file=Path(table.ca_file), socket=socket)
    return OpenBao(
        OpenBaoConfig(
            addresses=table.addresses,
            role=table.role,
            verifier=table.verifier,
            audience=table.audience,
            auth_mount=table.auth_mount,
            kv_mount=table.kv_mount,
            field=table.field,
            encoding=table.encoding,
            transit=None if table.transit == "none" else table.transit,
            namespace=None if table.namespace == "none" else table.namespace,
        ),
        outbound,
    )


def _trustee(table: TrusteeTable, socket: str) -> TrusteeKbs:
    return TrusteeKbs(table.url, Outbound([table.url], ca_file=Path(table.ca_file), socket=socket))
