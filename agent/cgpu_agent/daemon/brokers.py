"""Makes the key brokers that the configuration names, each with its way to them."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509

from cgpu_agent.backends.base import Clock, KeyBroker, MeasurementLogs, Tpm
from cgpu_agent.backends.egress import Outbound
from cgpu_agent.backends.keys.azure import AzureBroker, AzureKeys, token_file
from cgpu_agent.backends.keys.credential import CredentialKeys
from cgpu_agent.backends.keys.openbao import OpenBao, OpenBaoConfig
from cgpu_agent.backends.keys.trustee import TrusteeKbs
from cgpu_agent.daemon.brokerconfig import AzureTable, OpenBaoTable, TrusteeTable
from cgpu_agent.daemon.config import Config
from cgpu_agent.errors import AgentError, Misuse
from cgpu_agent.verifier.azurekeys import AzureJudge
from cgpu_agent.wire.maarequest import GuestOs


def make_brokers(
    config: Config, tpm: Tpm, logs: MeasurementLogs, clock: Clock, sealed: KeyBroker | None
) -> dict[str, KeyBroker]:
    """The brokers, by kind. Raises ``Misuse`` (``BAD_CONFIG``)."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    brokers: dict[str, KeyBroker] = {"credential": CredentialKeys(Path(credentials) if credentials else None)}
    if sealed is not None:
        brokers["sealed"] = sealed
    try:
        if config.openbao is not None:
            brokers["openbao"] = _openbao(config.openbao, config.egress.socket)
        if config.trustee is not None:
            brokers["trustee"] = _trustee(config.trustee, config.egress.socket)
        if config.azure is not None:
            brokers["azure"] = _azure(config, config.azure, tpm, logs, clock)
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


def _azure(config: Config, table: AzureTable, tpm: Tpm, logs: MeasurementLogs, clock: Clock) -> AzureBroker:
    try:
        roots = x509.load_pem_x509_certificates(Path(table.ca_file).read_bytes())
        guest = GuestOs.of(platform.freedesktop_os_release())
    except (OSError, ValueError):
        raise Misuse("BAD_CONFIG", "azure.ca_file or os-release(5) cannot be read") from None
    try:
        boot_log = logs.boot() or b""
    except AgentError:
        boot_log = b""  # too large to be shown
    keys = AzureKeys(table.attestation, table.vault, guest, boot_log, table.mechanism, config.tpm.platform_ak_handle)
    return AzureBroker(
        Outbound((table.attestation, table.vault), ca_file=Path(table.ca_file), socket=config.egress.socket),
        tpm,
        AzureJudge(
            table.attestation, table.vault, roots, lambda: datetime.fromtimestamp(clock.time(), tz=timezone.utc)
        ),
        keys,
        token_file(Path(table.access_token)),
    )
