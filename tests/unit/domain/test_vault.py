"""The latch of the sealed keys is as the machine is, whatever comes between; nothing else opens it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cgpu_agent.domain.core import Core
from cgpu_agent.domain.sealedkeys import SealedKeys
from cgpu_agent.domain.store import Store
from cgpu_agent.domain.vault import Vault
from cgpu_agent.errors import Unavailable
from cgpu_agent.wire.keyring import LATCH_HANDLE, OPEN
from fixtures.gpusessions import MovableClock
from fixtures.machine import Machine
from fixtures.owner import FLEET, GROUP, Owner

pytestmark = pytest.mark.swtpm


class Site:
    """A vault beside an agent that serves, with one key in it."""

    def __init__(self, core: Core, folder: Path) -> None:
        self.core = core
        self.clock = MovableClock()
        self.owner = Owner()
        self.keys = SealedKeys(Store(folder))
        self.vault = Vault(core.tpm, self.keys, (), self.clock, timeout=30.0)
        core.vault = self.vault

    async def approve(self) -> None:
        self.vault.use([await self.core.tpm.run(self.owner.approve, timeout=30)])

    async def make(self) -> None:
        await self.approve()
        await self.vault.change(
            lambda keys, tpm, approvals: keys.create(
                tpm, authority=self.owner.spki, fleet=FLEET, approvals=approvals
            ),
            new_latch=True,
        )
        await self.vault.change(lambda keys, tpm, approvals: keys.add(tpm, "a", GROUP, approvals, created=1))

    async def is_open(self) -> bool:
        return await self.vault.look(lambda keys, tpm: keys.latch_is_open(tpm))

    async def opened(self) -> bool:
        """Whether the TPM opens the key now."""
        try:
            await self.vault.look(lambda keys, tpm: keys.unseal(tpm, "a", self.vault._approvals))
        except Unavailable:
            return False
        return True


@asynccontextmanager
async def site(machine: Machine, folder: Path) -> AsyncIterator[Site]:
    async with machine.agent() as core:
        here = Site(core, folder)
        await core.establish()
        await here.make()
        yield here


def yes() -> bool:
    return True


def no() -> bool:
    return False


def test_the_latch_follows(machine: Machine, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(machine, tmp_path / "keys") as here:
            assert not await here.opened()
            await here.vault.follow(no)
            assert not await here.opened()
            await here.vault.follow(yes)
            assert await here.opened()
            await here.vault.follow(no)
            assert not await here.opened()
            assert here.vault.problem is None

    asyncio.run(scenario())


def test_trust_that_ends_while_the_latch_opens_closes_it(machine: Machine, tmp_path: Path) -> None:
    answers: list[bool] = [True]

    async def scenario() -> None:
        async with site(machine, tmp_path / "keys") as here:
            await here.vault.follow(lambda: bool(answers) and answers.pop())
            assert not await here.opened()

    asyncio.run(scenario())


def test_no_approval_is_a_problem_and_not_asked_for_all_the_time(machine: Machine, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(machine, tmp_path / "keys") as here:
            here.vault.use(())
            await here.vault.follow(yes)
            assert here.vault.problem is not None
            assert here.vault.problem.slug == "KEY_NOT_APPROVED"
            approval = await here.core.tpm.run(here.owner.approve, timeout=30)
            here.vault._approvals = (approval,)  # installed, and nobody said so
            await here.vault.follow(yes)
            assert not await here.is_open()
            here.clock.pass_by(10.0)
            await here.vault.follow(yes)
            assert await here.is_open()
            assert here.vault.problem is None

    asyncio.run(scenario())


def test_approvals_that_come_are_tried_at_once(machine: Machine, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(machine, tmp_path / "keys") as here:
            here.vault.use(())
            await here.vault.follow(yes)
            await here.approve()
            await here.vault.follow(yes)
            assert await here.is_open()

    asyncio.run(scenario())


def test_a_latch_that_somebody_closed_is_opened_again(machine: Machine, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(machine, tmp_path / "keys") as here:
            await here.vault.follow(yes)
            await here.vault.look(lambda keys, tpm: keys.close_latch(tpm, here.vault._approvals))
            assert not await here.opened()
            with pytest.raises(Unavailable, match="KEY_LATCH_CLOSED") as refused:
                await here.vault.release("a", here, timeout=30)  # type: ignore[arg-type]
            assert refused.value.retry_after is not None  # it is about to be opened
            await here.vault.follow(yes)
            assert (await here.vault.release("a", here, timeout=30)).generation == 2  # type: ignore[arg-type]

    asyncio.run(scenario())


def test_a_latch_that_is_to_be_closed_is_no_reason_to_come_back_soon(machine: Machine, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(machine, tmp_path / "keys") as here:
            await here.vault.follow(yes)
            await here.vault.follow(lambda: False)
            with pytest.raises(Unavailable, match="KEY_LATCH_CLOSED") as refused:
                await here.vault.release("a", here, timeout=30)  # type: ignore[arg-type]
            assert refused.value.retry_after is None

    asyncio.run(scenario())


def test_before_the_start_is_on_record_nothing_opens(machine: Machine, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(machine, tmp_path / "keys") as here:
            another = Vault(here.core.tpm, here.keys, here.vault._approvals, here.clock, timeout=30.0)
            await another.follow(yes)
            assert not await here.is_open()
            await here.core.tpm.run(lambda tpm: another.begin(tpm, here.core.boot.log), timeout=30)
            await another.follow(yes)
            assert not await here.is_open()
            assert another.problem is not None
            another.recorded()
            here.clock.pass_by(10.0)
            await another.follow(yes)
            assert await here.is_open()

    asyncio.run(scenario())


def test_a_start_closes_what_a_crash_left_open(machine: Machine, tmp_path: Path) -> None:
    async def crash() -> None:
        async with site(machine, tmp_path / "keys") as here:
            await here.vault.follow(yes)
            assert await here.is_open()

    async def restart() -> None:
        async with machine.agent() as core:
            core.vault = Vault(core.tpm, SealedKeys(Store(tmp_path / "keys")), (), MovableClock(), timeout=30.0)
            await core.establish()

    asyncio.run(crash())
    asyncio.run(restart())
    index = machine.on_tpm(lambda tpm: tpm.sealing.nv_public(LATCH_HANDLE))
    content = None if index is None else machine.on_tpm(lambda tpm: tpm.sealing.nv_content(index))
    assert content != OPEN
