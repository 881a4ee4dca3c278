"""GPU verdicts in the agent register: what was trusted and when it ended, in a bounded number of records."""

from __future__ import annotations

import asyncio
import json

import pytest

from cgpu_agent.domain.core import Core
from cgpu_agent.domain.gpurecord import MAX_RECORDS, GpuRecords
from cgpu_agent.domain.gpustate import Reason, Verdict
from cgpu_agent.errors import Unavailable
from fixtures.machine import WORKLOAD, Machine, judge, request

pytestmark = pytest.mark.swtpm

VERDICTS = {f"GPU-{number}": Verdict(f"ueid {number}", 0.0, 1.0, simulated=number == 2) for number in (1, 2)}
REASON = Reason("GPU_XID", "an error")


def events(core: Core) -> list[dict[str, str]]:
    found = [json.loads(record.content) for record in core.boot.log.records if record.author == "agent"]
    return [event for event in found if event["event"].startswith("gpu-")]


def test_a_verdict_and_its_end_are_measured_and_evidence_stays_good(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            records = GpuRecords(lambda: core.boot)
            await records.attested(VERDICTS)
            await records.dropped(REASON)
            told = events(core)
            assert [event["event"] for event in told] == ["gpu-attested", "gpu-dropped"]
            assert (told[0]["gpus"], told[0]["simulated"], told[1]["reason"]) == ("2", "true", "GPU_XID")
            asked = request()
            bundle = await core.evidence.get(WORKLOAD, asked)
            assert judge(bundle, asked.nonce).accepted

    asyncio.run(scenario())


def test_other_devices_have_another_digest(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            records = GpuRecords(lambda: core.boot)
            await records.attested(VERDICTS)
            await records.attested(dict(reversed(VERDICTS.items())))
            await records.attested({"GPU-1": VERDICTS["GPU-1"]})
            first, again, other = (event["devices"] for event in events(core))
            assert first == again != other

    asyncio.run(scenario())


def test_the_records_of_a_boot_are_bounded_and_the_last_one_says_so(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            records = GpuRecords(lambda: core.boot)
            for _ in range(MAX_RECORDS):
                await records.dropped(REASON)
            assert records.full
            await records.attested(VERDICTS)
            assert len(events(core)) == MAX_RECORDS
            assert events(core)[-1] == {"event": "gpu-records-end"}
        async with machine.serving() as core:  # another start of the same boot
            await GpuRecords(lambda: core.boot).dropped(REASON)
            assert len(events(core)) == MAX_RECORDS

    asyncio.run(scenario())


def test_without_a_tpm_nothing_counts_as_recorded(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.agent() as core:
            with pytest.raises(Unavailable):
                await GpuRecords(lambda: core.boot).attested(VERDICTS)

    asyncio.run(scenario())
