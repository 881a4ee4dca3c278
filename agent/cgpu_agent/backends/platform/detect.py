"""Finds out what stands below the vTPM, by what is there and not by what anybody says about the VM."""

from __future__ import annotations

import asyncio

from cgpu_agent.backends.base import Platform, Tpm, TpmCommands
from cgpu_agent.backends.platform.azure import KINDS, AzureCvm, TdQuoter
from cgpu_agent.backends.platform.plain import Plain
from cgpu_agent.backends.platform.store import PlatformStore
from cgpu_agent.backends.platform.tsm import Requests, Tsm, find_kind
from cgpu_agent.errors import DeviceFault
from cgpu_agent.wire.hcl import AK_CERTIFICATE_INDEX, REPORT_INDEX, parse_hcl


async def detect(
    tpm: Tpm, store: PlatformStore, requests: Requests, *, timeout: float, quoter: TdQuoter | None = None
) -> Platform:
    """The platform of this VM; what it is does not change while it runs.

    Args:
        store: collateral that was fetched before.
        requests: the kernel's interface for reports.
        timeout: seconds.
        quoter: see ``AzureCvm``.

    Raises:
        DeviceFault: from the TPM.
        HostileInput: there is a report in the TPM that breaks its format, so nobody can tell.
    """

    def look(commands: TpmCommands) -> tuple[bytes | None, bool]:
        return commands.nv_read(REPORT_INDEX), commands.nv_read(AK_CERTIFICATE_INDEX) is not None

    report, certified = await tpm.run(look, timeout=timeout)
    if report is not None:
        return AzureCvm(tpm, KINDS[parse_hcl(report).kind], store, quoter)
    if certified:
        return Plain("azure-trusted-launch", "Trusted Launch has none: the host emulates the vTPM")
    try:
        kind = await asyncio.to_thread(find_kind, requests)
    except DeviceFault as fault:
        return Plain("plain", fault.message)
    if kind is not None:
        return Tsm(requests, kind)
    return Plain("plain", "nothing here makes one")
