"""A real daemon with software GPUs beside it: what workloads, operators and relying parties see of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cgpu_agent.api.v1 import gpus_pb2
from cgpu_agent.client import Agent
from cgpu_agent.errors import Denied, Exhausted, Misuse, Unavailable
from cgpu_agent.verifier.gpu import verify_device
from cgpu_agent.verifier.gpucase import DeviceEvidence
from cgpu_agent.wire import cel
from fixtures.ctl import PASS, REFUSED, Ctl
from fixtures.daemon import PATIENCE, Daemon, booted_daemon
from fixtures.machine import AUDIENCE, judge
from fixtures.policies import permit
from fixtures.softwaregpu import GpuProcess, party_of, running_gpus, using

pytestmark = pytest.mark.swtpm

ME = f"principal.uid == {os.geteuid()}"
READY, NOT_READY = gpus_pb2.GPU_SET_STATE_READY, gpus_pb2.GPU_SET_STATE_NOT_READY


def table(gpus: GpuProcess, **more: str) -> str:
    folder = gpus.socket.parent / "export"
    keys = {
        "backend": f'"software:{gpus.socket}"',
        "device_roots": f'["{folder}/device-root.pem"]',
        "rim_roots": f'["{folder}/rim-root.pem"]',
        "collateral": f'"{folder}"',
        "allow_simulated": "true",
    }
    return "\n".join(f"{key} = {value}" for key, value in (keys | more).items())


@pytest.fixture
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuProcess]:
    with running_gpus("--count", "2") as process:
        files = using(process, lambda client: client.collateral(timeout=PATIENCE))
        folder = process.socket.parent / "export"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        yield process


@pytest.fixture
def site(gpus: GpuProcess) -> Iterator[Daemon]:
    """A daemon, not started, that is to own these GPUs."""
    with booted_daemon() as daemon:
        daemon.tables["gpu"] = table(gpus)
        yield daemon


def misbehave(gpus: GpuProcess, name: str, gpu: int | None = None) -> None:
    using(gpus, lambda client: client.misbehave(name, gpu=gpu, timeout=PATIENCE))


def ready(gpus: GpuProcess) -> bool | None:
    return using(gpus, lambda client: client.ready(timeout=PATIENCE))


def until(agent: Agent, state: gpus_pb2.GpuSetState.ValueType) -> gpus_pb2.GpuSet:
    end = time.monotonic() + PATIENCE
    while (found := agent.list_gpus()).state != state:
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def agent_events(agent: Agent) -> list[str]:
    records = cel.parse_agent_log(agent.get_event_log("agent"))
    return [json.loads(record.content).get("event", "") for record in records if record.author == "agent"]


@pytest.mark.parametrize("backend", ["auto", "none"])
def test_without_gpus_boot_evidence_is_served_and_nothing_is_amiss(backend: str) -> None:
    with booted_daemon() as daemon:
        daemon.tables["gpu"] = f'backend = "{backend}"'
        daemon.start()
        if any(vendor.read_text() == "0x10de\n" for vendor in Path("/sys/bus/pci/devices").glob("*/vendor")):
            pytest.skip("this machine has a GPU")
        with daemon.client() as agent:
            until(agent, gpus_pb2.GPU_SET_STATE_NONE)  # before the first look nobody knows
            nonce = secrets.token_bytes(32)
            assert judge(agent.get_evidence(nonce, AUDIENCE), nonce).accepted
            found = agent.list_gpus()
            assert (found.state, found.reason) == (gpus_pb2.GPU_SET_STATE_NONE, "NO_GPUS")
            with pytest.raises((Unavailable, Misuse)):
                agent.get_gpu_report("GPU-x", bytes(32))
        assert "channels" not in daemon.manager.status
        assert daemon.stop() == 0


def test_gpus_become_ready_are_measured_and_are_shown(site: Daemon, gpus: GpuProcess) -> None:
    site.start()
    with site.client() as agent:
        found = until(agent, READY)
        assert ready(gpus) is True
        assert [gpu.phase for gpu in found.gpus] == [gpus_pb2.GPU_PHASE_TRUSTED] * 2
        assert all(gpu.simulated and gpu.ueid and gpu.valid_seconds > 0 and not gpu.reason for gpu in found.gpus)
        assert site.shows("2/2 simulated GPUs trusted 0 min ago")
        assert agent_events(agent).count("gpu-attested") == 1
        nonce = secrets.token_bytes(32)
        assert judge(agent.get_evidence(nonce, AUDIENCE), nonce).accepted
        assert any("GPUs" in line and "ready" in line for line in site.journal)
    assert site.stop() == 0
    assert ready(gpus) is False


def test_evidence_with_gpus_is_judged_offline(
    site: Daemon, gpus: GpuProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an operator and a relying party do it, with cgpuctl alone."""
    ctl = Ctl(tmp_path, capsys)
    site.start()
    with site.client() as agent:
        until(agent, READY)
    bundle, nonce, export = str(tmp_path / "bundle.json"), secrets.token_hex(32), gpus.socket.parent / "export"
    get = ctl("evidence", "get", "--gpus", "--nonce", nonce, "-o", bundle, "--socket", str(site.socket))
    assert (get.code, get.err) == (PASS, "")
    roots = ("--device-root", str(export / "device-root.pem"), "--rim-root", str(export / "rim-root.pem"))
    rims = [word for path in sorted(export.glob("*.swidtag")) for word in ("--rim", str(path))]
    verify = ("verify", bundle, "--nonce", nonce, "--allow-unendorsed", "--json", "--gpus", "2", *roots)
    found = ctl(*verify, *rims)
    assert found.code == PASS, found.out
    assert found.json["gpus"]["result"] == "pass"
    assert found.json["simulated"] is True
    assert [gpu["trusted"] for gpu in found.json["reported"]["gpus"]["devices"]] == [True, True]
    assert found.json["appraisal"]["parts"]["gpus"]["status"] == "contraindicated"
    unmeasured = ctl(*verify)
    assert (unmeasured.code, unmeasured.json["reason"]["slug"]) == (REFUSED, "NO_RIM")
    assert site.stop() == 0


def test_a_gpu_that_turns_bad_is_closed_and_everybody_is_told(site: Daemon, gpus: GpuProcess) -> None:
    site.start()
    with site.client() as agent:
        until(agent, READY)
        epoch = agent.list_gpus().trust_epoch
        misbehave(gpus, "other-chain", 2)
        misbehave(gpus, "vanish", 1)
        found = until(agent, NOT_READY)
        assert ready(gpus) is False
        assert found.trust_epoch > epoch
        assert site.shows("GPUs not ready: gpu.chain")
        assert [gpu.reason for gpu in agent.list_gpus().gpus] == ["GPU_LOST", "UNKNOWN_ROOT"]
        assert any("UNKNOWN_ROOT" in line for line in site.journal)
        problems = [problem.reason for problem in site.admin().get_status().problems]
        assert "UNKNOWN_ROOT" in problems
        assert "gpu-dropped" in agent_events(agent)
        nonce = secrets.token_bytes(32)
        assert judge(agent.get_evidence(nonce, AUDIENCE), nonce).accepted


def test_a_report_names_its_caller_and_is_verified_offline(site: Daemon, gpus: GpuProcess) -> None:
    site.start()
    nonce = secrets.token_bytes(32)
    with site.client() as agent:
        uuid = until(agent, READY).gpus[0].uuid
        found = agent.get_gpu_report(uuid, nonce)
        identity = agent.get_identity()
    claims = found.caller_claims
    assert json.loads(claims)["uid"] == os.geteuid()
    assert found.ak_name == b"\0\x0b" + hashlib.sha256(identity.agent_ak).digest()
    framed = b"cgpu/gpu-report/1\0" + found.ak_name + b"\0" + len(claims).to_bytes(4, "big") + claims + nonce
    party = party_of(using(gpus, lambda client: client.collateral(timeout=PATIENCE)))
    evidence = DeviceEvidence(found.report, found.chain)
    assert verify_device(evidence, replace(party, nonce=hashlib.sha256(framed).digest())).accepted
    refused = verify_device(evidence, replace(party, nonce=nonce))
    assert refused.refusal is not None
    assert refused.refusal.slug == "NONCE_MISMATCH"


def test_raw_reports_and_attesting_need_grants(site: Daemon, gpus: GpuProcess) -> None:
    site.start()
    with site.client() as agent:
        uuid = until(agent, READY).gpus[0].uuid
        for call in (lambda: agent.get_raw_gpu_report(uuid, bytes(32)), agent.attest_gpus):
            with pytest.raises(Denied) as caught:
                call()
            assert caught.value.slug == "NOT_ALLOWED"
        site.grants = permit("gpu.raw_report", ME) + permit("gpu.attest", ME)
        site.configure()
        site.reload()
        until(agent, READY)
        with pytest.raises(Exhausted) as limited:
            agent.attest_gpus()
        assert limited.value.slug == "GPU_ATTEST_LIMIT"
        raw = agent.get_raw_gpu_report(uuid, bytes(range(32)))
    party = party_of(using(gpus, lambda client: client.collateral(timeout=PATIENCE)), nonce=bytes(range(32)))
    assert verify_device(DeviceEvidence(raw.report, raw.chain), party).accepted
    assert any("GetRawReport" in line for line in (site.folder / "state" / "audit.jsonl").read_text().splitlines())


def test_a_crash_leaves_the_gpus_open_only_until_the_next_start(site: Daemon, gpus: GpuProcess) -> None:
    site.start()
    with site.client() as agent:
        until(agent, READY)
    site.kill()
    assert ready(gpus) is True
    misbehave(gpus, "cc-off", 1)
    site.start()
    assert ready(gpus) is False
    with site.client() as agent:
        found = until(agent, NOT_READY)
        assert found.reason
        problems = [problem.reason for problem in site.admin().get_status().problems]
        assert "GPU_READY_FOREIGN" in problems
        assert ready(gpus) is False


def test_a_watcher_is_asked_again_at_every_update(site: Daemon, gpus: GpuProcess) -> None:
    site.start()

    async def scenario() -> None:
        async with site.async_client() as agent:
            stream = agent.watch_gpus()
            async for found in stream:
                if found.state == READY:
                    break
            site.policy.write_text(site.policy.read_text().replace('CGpu::Action::"gpu.watch",', ""))
            await asyncio.to_thread(site.reload)  # the changed policy drops the GPUs, which is an update
            with pytest.raises(Denied) as caught:
                async for _ in stream:
                    pass
            assert caught.value.slug == "NOT_ALLOWED"

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_a_changed_policy_drops_and_attests_again(site: Daemon, gpus: GpuProcess) -> None:
    site.start()
    with site.client() as agent:
        epoch = until(agent, READY).trust_epoch
        site.grants = permit("boot.measure", ME)
        site.configure()
        site.reload()
        assert until(agent, READY).trust_epoch > epoch
        assert agent_events(agent).count("gpu-attested") == 2


def test_collateral_that_cannot_be_read_is_a_bad_configuration(site: Daemon, gpus: GpuProcess) -> None:
    (gpus.socket.parent / "export" / "broken.swidtag").write_bytes(b"<")
    site.configure()
    site.start(ready=False)
    assert site.process is not None
    assert site.process.wait(PATIENCE) == 2


def test_workloads_may_not_trust_simulated_gpus_by_default(site: Daemon, gpus: GpuProcess) -> None:
    site.tables["gpu"] = table(gpus, allow_simulated="false")
    site.start()
    with site.client() as agent:
        until(agent, NOT_READY)
        assert site.shows("GPUs not ready")
        assert ready(gpus) is False
