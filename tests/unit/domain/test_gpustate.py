"""The gate to the GPUs is open only while every device is trusted and nothing else is there."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cgpu_agent.backends.base import GpuInfo
from cgpu_agent.domain.gpustate import EXPIRED, MAX_LOST, STARTED, Attempt, GpuState, Reason, Verdict
from fixtures.gpuinfo import gpu

BAD = Reason("BAD", "it is bad")


ONE, TWO = gpu(1), gpu(2)


def passed(attempt: Attempt, *, until: float = 100.0, suffix: str = "") -> dict[str, Verdict]:
    return {info.uuid: Verdict(f"ueid {info.uuid}{suffix}", 0.0, until, simulated=False) for info in attempt.devices}


def opened(*devices: GpuInfo) -> GpuState:
    state = GpuState()
    attempt = state.begin(devices or (ONE, TWO))
    assert state.accept(attempt, passed(attempt)) == "opening"
    assert state.confirm(attempt, attempt.devices)
    return state


def gate(state: GpuState) -> str:
    return state.gate


def phases(state: GpuState) -> list[str]:
    return [session.phase for session in state.sessions]


def test_begins_closed_and_says_why() -> None:
    state = GpuState()
    assert (state.gate, state.why, state.sessions) == ("closed", STARTED, ())


def test_opens_when_every_device_passed_and_the_inventory_held() -> None:
    state = GpuState()
    attempt = state.begin((ONE, TWO))
    assert phases(state) == ["attesting", "attesting"]
    assert state.accept(attempt, passed(attempt)) == "opening"
    assert gate(state) == "opening"
    assert state.confirm(attempt, (TWO, ONE))
    assert gate(state) == "open"
    assert phases(state) == ["trusted", "trusted"]


@pytest.mark.parametrize(
    "seen",
    [
        (),
        (ONE,),
        (ONE, TWO, gpu(3)),
        (ONE, gpu(3)),
        (ONE, dataclasses.replace(TWO, driver="1")),
        (ONE, dataclasses.replace(TWO, dev_tools=True)),
        (ONE, dataclasses.replace(TWO, cc=False)),
        (ONE, dataclasses.replace(TWO, bdf=ONE.bdf)),
        (ONE, ONE),
    ],
)
def test_closes_when_the_inventory_is_another_one_after_opening(seen: tuple[GpuInfo, ...]) -> None:
    state = GpuState()
    attempt = state.begin((ONE, TWO))
    state.accept(attempt, passed(attempt))
    assert not state.confirm(attempt, seen)
    assert state.gate == "closed"
    assert state.why.slug == "GPU_INVENTORY_CHANGED"


def test_a_doubt_closes_at_once_and_spoils_what_is_running() -> None:
    state = opened()
    attempt, epoch = state.begin((ONE, TWO)), state.epoch
    state.doubt(BAD)
    assert (state.gate, state.why, state.epoch) == ("closed", BAD, epoch + 1)
    assert phases(state) == ["stale", "stale"]
    assert state.accept(attempt, passed(attempt)) == "spoilt"
    assert not state.confirm(attempt, (ONE, TWO))
    assert state.gate == "closed"


def test_a_doubt_between_verdict_and_confirmation_keeps_the_gate_closed() -> None:
    state = GpuState()
    attempt = state.begin((ONE,))
    state.accept(attempt, passed(attempt))
    state.doubt(BAD)
    assert not state.confirm(attempt, (ONE,))
    assert state.gate == "closed"


def test_attesting_again_drops_nothing_until_it_fails() -> None:
    state = opened()
    epoch = state.epoch
    attempt = state.begin((ONE, TWO))
    assert (state.gate, phases(state)) == ("open", ["trusted", "trusted"])
    assert state.accept(attempt, passed(attempt, until=200.0)) == "kept"
    assert (state.gate, state.epoch) == ("open", epoch)
    assert not state.expire(150.0)
    attempt = state.begin((ONE, TWO))
    state.refuse(attempt, BAD, {TWO.uuid: BAD})
    assert (state.gate, phases(state)) == ("closed", ["stale", "rejected"])


def test_another_identity_under_the_same_name_closes() -> None:
    state = opened()
    attempt, epoch = state.begin((ONE, TWO)), state.epoch
    assert state.accept(attempt, passed(attempt, suffix=" of another")) == "spoilt"
    assert (state.gate, state.why.slug, state.epoch) == ("closed", "GPU_IDENTITY_CHANGED", epoch + 1)


def test_two_devices_of_one_identity_are_refused() -> None:
    state = GpuState()
    attempt = state.begin((ONE, TWO))
    verdict = passed(attempt)[ONE.uuid]
    assert state.accept(attempt, {ONE.uuid: verdict, TWO.uuid: verdict}) == "spoilt"
    assert (state.gate, state.why.slug) == ("closed", "DUPLICATE_DEVICE")


@pytest.mark.parametrize("judged", [(), (ONE,), (ONE, TWO, gpu(3)), (ONE, gpu(3))])
def test_a_judgement_about_other_devices_is_refused(judged: tuple[GpuInfo, ...]) -> None:
    state = GpuState()
    attempt = state.begin((ONE, TWO))
    assert state.accept(attempt, passed(Attempt(judged, attempt.doubts))) == "spoilt"
    assert (state.gate, state.why.slug) == ("closed", "GPU_JUDGEMENT")


def test_no_devices_open_nothing() -> None:
    state = GpuState()
    attempt = state.begin(())
    assert state.accept(attempt, {}) == "spoilt"
    assert state.gate == "closed"


def test_an_expired_verdict_closes() -> None:
    state = opened()
    assert not state.expire(99.9)
    assert state.expire(100.0)
    assert (state.gate, state.why) == ("closed", EXPIRED)


def test_a_vanished_device_is_lost_and_the_others_are_stale() -> None:
    state = opened()
    state.doubt(BAD, lost=ONE.bdf)
    assert phases(state) == ["lost", "stale"]
    state.see((TWO,))
    assert [(each.info.uuid, each.phase) for each in state.sessions] == [("GPU-1", "lost"), ("GPU-2", "discovered")]


def test_memory_of_vanished_devices_is_bounded() -> None:
    state = GpuState()
    for number in range(3 * MAX_LOST):
        state.see((gpu(number),))
    assert len(state.sessions) <= MAX_LOST + 1


def test_a_late_refusal_does_not_blame_what_came_after_a_doubt() -> None:
    state = GpuState()
    attempt = state.begin((ONE,))
    state.doubt(BAD)
    epoch = state.epoch
    state.refuse(attempt, Reason("LATE", ""), {ONE.uuid: Reason("LATE", "")})
    assert (state.why, state.epoch, phases(state)) == (BAD, epoch, ["stale"])


class Hostile(RuleBasedStateMachine):
    """A driver that does what the state machine says, and a world in which devices come, go and lie in between.

    ``ready`` is the devices' ready state. Whatever happens in the world is told to the machine later, or found when
    the driver looks, as with real events; so what is claimed of ``ready`` is claimed once the machine was told.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state = GpuState()
        self.world: dict[str, tuple[GpuInfo, str]] = {ONE.uuid: (ONE, "a"), TWO.uuid: (TWO, "b")}
        self.honest: dict[str, bool] = {"a": True, "b": True}
        self.now = 0.0
        self.ready = False
        self.untold = False
        self.attempt: Attempt | None = None
        self.answers: dict[str, Verdict] | None = None
        self.pending = False
        self.made = 2
        self.epoch_when_opened = -1

    def _drive(self) -> None:
        """What a driver does after everything: close what must be closed."""
        if self.state.gate == "closed":
            self.ready = False

    def _there(self) -> tuple[GpuInfo, ...]:
        return tuple(info for info, _ in self.world.values())

    @rule(good=st.booleans())
    def plug(self, good: bool) -> None:
        self.made += 1
        info = gpu(self.made)
        self.world[info.uuid] = (info, str(self.made))
        self.honest[str(self.made)] = good
        self.untold = True

    @precondition(lambda self: self.world)
    @rule(data=st.data())
    def unplug(self, data: st.DataObject) -> None:
        del self.world[data.draw(st.sampled_from(sorted(self.world)))]
        self.untold = True

    @precondition(lambda self: self.world)
    @rule(data=st.data(), good=st.booleans())
    def swap_the_device_behind_a_name(self, data: st.DataObject, good: bool) -> None:
        uuid = data.draw(st.sampled_from(sorted(self.world)))
        self.made += 1
        self.world[uuid] = (self.world[uuid][0], str(self.made))
        self.honest[str(self.made)] = good
        self.untold = True

    @precondition(lambda self: self.world)
    @rule(data=st.data(), driver=st.sampled_from(["550.90.07", "1.0"]))
    def reload_the_driver(self, data: st.DataObject, driver: str) -> None:
        uuid = data.draw(st.sampled_from(sorted(self.world)))
        info, identity = self.world[uuid]
        self.world[uuid] = (dataclasses.replace(info, driver=driver), identity)
        self.untold = True

    @precondition(lambda self: self.untold)
    @rule()
    def tell(self) -> None:
        self.state.doubt(BAD)
        self.untold = False
        self._drive()

    @rule()
    def look(self) -> None:
        self.state.see(self._there())
        self._drive()

    @rule(seconds=st.floats(0.5, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.state.expire(self.now)
        self._drive()

    @precondition(lambda self: self.attempt is None)
    @rule()
    def begin(self) -> None:
        self.attempt = self.state.begin(self._there())
        self.answers, self.pending = None, False
        self._drive()

    @precondition(lambda self: self.attempt is not None and self.answers is None)
    @rule()
    def ask(self) -> None:
        """Ask whoever answers under the names of the attempt; who lies or is gone makes it fail."""
        assert self.attempt is not None
        names = [info.uuid for info in self.attempt.devices]
        bad = [uuid for uuid in names if uuid not in self.world or not self.honest[self.world[uuid][1]]]
        if bad:
            self.state.refuse(self.attempt, BAD, dict.fromkeys(bad, BAD))
            self.attempt = None
        else:
            self.answers = {uuid: Verdict(self.world[uuid][1], 0.0, self.now + 60, simulated=False) for uuid in names}
        self._drive()

    @precondition(lambda self: self.answers is not None and not self.pending)
    @rule()
    def judge(self) -> None:
        assert self.attempt is not None
        assert self.answers is not None
        if self.state.accept(self.attempt, self.answers) == "opening":
            self.pending = True
        else:
            self.attempt = self.answers = None
        self._drive()

    @precondition(lambda self: self.pending)
    @rule()
    def set_ready(self) -> None:
        """The order reaches the devices; the driver looks again at once."""
        assert self.attempt is not None
        if self.state.current(self.attempt):
            self.ready = True
            self.state.confirm(self.attempt, self._there())
        self.attempt, self.answers, self.pending = None, None, False
        self.epoch_when_opened = self.state.epoch
        self._drive()

    @invariant()
    def ready_only_while_the_gate_is_open_in_one_epoch(self) -> None:
        if self.ready:
            assert self.state.gate == "open"
            assert self.state.epoch == self.epoch_when_opened

    @invariant()
    def ready_only_with_trusted_devices(self) -> None:
        if self.ready:
            assert self.state.inventory
            here = [each for each in self.state.sessions if each.phase != "lost"]
            assert {each.info.uuid for each in here} == {info.uuid for info in self.state.inventory}
            for session in here:
                assert session.phase == "trusted"
                assert session.verdict is not None
                assert self.honest[session.verdict.identity]
                assert session.verdict.until > self.now

    @invariant()
    def once_told_ready_means_exactly_the_devices_that_are_there(self) -> None:
        if self.ready and not self.untold:
            believed = {each.info.uuid: each.verdict for each in self.state.sessions if each.phase == "trusted"}
            assert believed.keys() == self.world.keys()
            for uuid, verdict in believed.items():
                assert verdict is not None
                assert verdict.identity == self.world[uuid][1]

    @invariant()
    def a_verdict_is_held_exactly_while_trusted(self) -> None:
        assert all((each.verdict is not None) == (each.phase == "trusted") for each in self.state.sessions)


TestHostile = Hostile.TestCase
TestHostile.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
