"""Attack 12: the host turns the clock back, and CRLs or OCSP responses that NVIDIA signed since then show it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from cgpu_agent.backends.base import GpuEvent, GpuEvidence, GpuInfo
from cgpu_agent.domain.gpuexam import GpuExaminer, Refused
from cgpu_agent.domain.gpujudge import GpuJudge
from cgpu_agent.domain.gpurules import GpuRules
from cgpu_agent.domain.gpustate import Attempt
from cgpu_agent.domain.store import Store
from cgpu_agent.domain.timefloor import TimeFloor
from cgpu_agent.errors import Unavailable
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.revocation import CLOCK_SKEW
from fixtures.gpuinfo import gpu
from fixtures.gpujudge import GPU, OTHER, VENDOR
from fixtures.gpupki import Signer
from fixtures.gpurevocation import RESPONDER_EXTENSIONS, crl, ocsp_response
from fixtures.gpusessions import MovableClock
from fixtures.pki import NOW

BOOT_ROM, PROVISIONER = GPU.signers[1:3]
INFO = gpu(1)


class OneGpu:
    """A driver of one throw-away GPU, which signs its answers."""

    kind = "none"

    async def pci(self, *, timeout: float) -> tuple[str, ...]:
        return (INFO.bdf,)

    async def list(self, *, timeout: float) -> tuple[GpuInfo, ...]:
        return (INFO,)

    async def evidence(self, uuid: str, nonce: bytes, *, timeout: float) -> GpuEvidence:
        return GpuEvidence(GPU.report(nonce), GPU.chain)

    async def ready(self, *, timeout: float) -> bool | None:
        return None

    async def set_ready(self, ready: bool, *, timeout: float) -> None:
        raise Unavailable("GPU_UNSUPPORTED", "no such state")

    async def events(self) -> AsyncIterator[GpuEvent]:
        await asyncio.Event().wait()
        yield GpuEvent("watch-lost", None, "")

    def heartbeat_age(self, now: float) -> float:
        return 0.0

    def close(self) -> None:
        pass


class Agent:
    """The examiner of an agent whose clock says ``NOW``, and a state directory that outlives it."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "state")
        self.clock = MovableClock()
        self.clock.wall = NOW.timestamp()

    def judge(self, *, crls: tuple[bytes, ...] = (), responses: tuple[bytes, ...] = ()) -> str:
        """``trusted``, or why not."""
        rules = GpuRules(allow_simulated=True)
        examiner = GpuExaminer(OneGpu(), self.clock, TimeFloor(self.clock, self.store), rules)  # type: ignore[arg-type]
        judge = GpuJudge(
            device_roots=VENDOR.device_roots,
            rim_roots=VENDOR.rim_roots,
            collateral=Collateral.load(rims=VENDOR.rims(), crls=crls, ocsp=responses),
        )
        try:
            return "trusted" if asyncio.run(examiner.examine(Attempt((INFO,), 0), judge)) else "nothing"
        except Refused as refused:
            return refused.whole.slug
        except Unavailable as error:
            return error.slug

    def earliest(self) -> datetime:
        """The persisted floor, by the moments at which a new agent would judge."""
        data = self.store.read("time-floor")
        assert data is not None
        return datetime.fromtimestamp(int(data), NOW.tzinfo)


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


def papers(signed: datetime, signer: Signer | None = None) -> list[dict[str, tuple[bytes, ...]]]:
    """A CRL and an OCSP response, as arguments of ``judge``."""
    until = signed + timedelta(days=9)
    by = PROVISIONER if signer is None else signer
    return [
        {"crls": (crl(PROVISIONER, this_update=signed, next_update=until, signer=by),)},
        {
            "responses": (
                ocsp_response(
                    BOOT_ROM.certificate,
                    PROVISIONER,
                    responder=None if signer is None else signer.issue("responder", RESPONDER_EXTENSIONS),
                    this_update=signed,
                    next_update=until,
                ),
            )
        },
    ]


@pytest.mark.parametrize("kind", [0, 1], ids=["crl", "ocsp"])
def test_12_what_was_signed_later_than_the_clock_says_stops_the_judgement_and_the_next(
    agent: Agent, kind: int
) -> None:
    later = NOW + timedelta(days=30)
    assert agent.judge(**papers(later)[kind]) == "CLOCK_BEFORE_FLOOR"
    assert agent.earliest() >= later - CLOCK_SKEW
    assert agent.judge() == "CLOCK_BEFORE_FLOOR"  # also after a restart, and without the paper
    agent.clock.wall = later.timestamp()
    assert agent.judge() == "trusted"


@pytest.mark.parametrize("kind", [0, 1], ids=["crl", "ocsp"])
def test_12_nobody_else_moves_the_floor(agent: Agent, kind: int) -> None:
    assert agent.judge(crls=(crl(PROVISIONER),)) == "trusted"
    before = agent.earliest()
    forged = papers(NOW + timedelta(days=30), OTHER.leaf)[kind]
    assert agent.judge(**forged) in ("BAD_CRL", "BAD_OCSP", "BAD_CERTIFICATE_SIGNATURE")
    assert agent.earliest() == before
    assert agent.judge() == "trusted"


def test_12_papers_of_another_device_say_nothing(agent: Agent) -> None:
    rom, issuer = OTHER.signers[1], Signer.root("stranger")
    later = NOW + timedelta(days=30)
    foreign = ocsp_response(rom.certificate, issuer, this_update=later, next_update=later + timedelta(days=1))
    paper = crl(issuer, this_update=later, next_update=later + timedelta(days=1))
    assert agent.judge(crls=(paper,), responses=(foreign,)) == "trusted"
    assert agent.judge() == "trusted"


@pytest.mark.parametrize("kind", [0, 1], ids=["crl", "ocsp"])
def test_12_a_fresh_paper_raises_the_floor_by_no_more_than_is_sure(agent: Agent, kind: int) -> None:
    ahead = NOW + CLOCK_SKEW - timedelta(seconds=1)  # its maker's clock may be right, or ours
    assert agent.judge(**papers(ahead)[kind]) == "trusted"
    assert agent.earliest() == ahead - CLOCK_SKEW
    assert agent.judge() == "trusted"
    agent.clock.wall -= 3600.0
    assert agent.judge() == "CLOCK_BEFORE_FLOOR"


def test_12_a_stale_paper_counts_too(agent: Agent) -> None:
    stale = crl(PROVISIONER, this_update=NOW - timedelta(days=9), next_update=NOW - timedelta(days=8))
    assert agent.judge(crls=(stale,)) == "trusted"
    assert agent.earliest() == NOW - timedelta(days=9) - CLOCK_SKEW


def test_12_the_newest_of_several_papers_counts(agent: Agent) -> None:
    new, old = papers(NOW - timedelta(hours=1)), papers(NOW - timedelta(days=2))
    given = {"crls": (*old[0]["crls"], *new[0]["crls"])}
    assert agent.judge(**given) == "trusted"
    assert agent.earliest() == NOW - timedelta(hours=1) - CLOCK_SKEW


def test_12_an_answer_counts_by_when_it_was_produced_also_where_it_repeats_an_older_word(agent: Agent) -> None:
    later = NOW + timedelta(days=1)
    response = ocsp_response(BOOT_ROM.certificate, PROVISIONER, produced=later)
    assert agent.judge(responses=(response,)) == "CLOCK_BEFORE_FLOOR"
    assert agent.earliest() == later - CLOCK_SKEW
