"""The register and its log: together after a crash at any moment, and refused when anybody else touches either."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgpu_agent.backends.base import TpmCommands
from cgpu_agent.domain.agentlog import MAX_CALLER_RECORDS, MAX_CALLER_RECORDS_EACH, AgentLog, CallerRecords
from cgpu_agent.domain.keys import establish
from cgpu_agent.domain.store import Store
from cgpu_agent.errors import Exhausted, Unavailable
from cgpu_agent.wire import cel, strictjson
from cgpu_agent.wire.tpm import PcrSelection, extend
from fixtures.machine import BOOT_ID, PLATFORM_AK, REGISTER, Machine
from fixtures.swtpm import running_swtpm

pytestmark = pytest.mark.swtpm

ONE, TWO, THREE, ENO = (b'{"event":"%s"}' % name for name in (b"one", b"two", b"three", b"eno"))


class Crash(BaseException):
    """The process ends here."""


class CrashingStore(Store):
    """A store whose process dies at the ``at``-th change: before it, in the middle of it, or right after it."""

    def __init__(self, folder: Path, at: int, moment: str) -> None:
        super().__init__(folder)
        self.changes = 0
        self._at = at
        self._moment = moment

    def _dies(self, moment: str) -> bool:
        return self.changes == self._at and self._moment == moment

    def write(self, name: str, data: bytes) -> None:
        self.changes += 1
        if self._dies("before"):
            raise Crash
        if self._dies("within"):
            (self._folder / f".{name}.new").write_bytes(data[: len(data) // 2])
            raise Crash
        super().write(name, data)
        if self._dies("after"):
            raise Crash

    def append(self, name: str, data: bytes, *, at: int) -> None:
        self.changes += 1
        if self._dies("before"):
            raise Crash
        if self._dies("within"):
            super().append(name, data[: len(data) // 2], at=at)
            raise Crash
        super().append(name, data, at=at)
        if self._dies("after"):
            raise Crash

    def remove(self, name: str) -> None:
        self.changes += 1
        if self._dies("before") or self._dies("within"):
            raise Crash
        super().remove(name)
        if self._dies("after"):
            raise Crash


def start_and_measure(tpm: TpmCommands, store: Store, *contents: bytes) -> AgentLog:
    """What a run of the agent does: establish its keys, then measure some records."""
    log = AgentLog(store, REGISTER)
    establish(tpm, store, log, boot_id=BOOT_ID, platform_ak_handle=PLATFORM_AK, create="ecc")
    for content in contents:
        log.measure(tpm, "agent", content)
    return log


def register_value(tpm: TpmCommands) -> bytes:
    return tpm.pcr_read(PcrSelection.of("sha256", [REGISTER]))[REGISTER]


def replayed(log: AgentLog) -> bytes:
    value = bytes(32)
    for record in log.records:
        value = extend("sha256", value, record.digest)
    return value


def changes_of_one_run(folder: Path) -> int:
    with running_swtpm() as tpm:
        store = CrashingStore(folder / "rehearsal", 0, "never")
        Machine(tpm, folder).on_tpm(lambda commands: start_and_measure(commands, store, ONE, TWO))
        return store.changes


def crash_points() -> list[tuple[int, str]]:
    # One run makes 10 changes: the AK, then intent, append and removal for each of three records.
    return [(change, moment) for change in range(1, 11) for moment in ("before", "within", "after")]


def test_a_run_makes_the_changes_that_the_crash_test_covers(tmp_path: Path) -> None:
    assert changes_of_one_run(tmp_path) == max(change for change, _ in crash_points())


@pytest.mark.parametrize(("change", "moment"), crash_points())
def test_crash_at_any_moment_is_recovered_at_the_next_start(machine: Machine, change: int, moment: str) -> None:
    crashing = CrashingStore(machine.runtime, change, moment)
    with pytest.raises(Crash):
        machine.on_tpm(lambda tpm: start_and_measure(tpm, crashing, ONE, TWO))

    def next_start(tpm: TpmCommands) -> None:
        log = start_and_measure(tpm, Store(machine.runtime), THREE)
        assert replayed(log) == register_value(tpm)
        assert [record.sequence for record in log.records] == list(range(len(log.records)))
        contents = [record.content for record in log.records]
        assert contents[1:] in ([THREE], [ONE, THREE], [ONE, TWO, THREE])
        assert cel.parse_agent_log(log.data) == log.records

    machine.on_tpm(next_start)


def test_record_goes_into_the_register_and_the_log(machine: Machine) -> None:
    def run(tpm: TpmCommands) -> None:
        log = start_and_measure(tpm, Store(machine.runtime))
        before = register_value(tpm)
        record = log.measure(tpm, "caller", ONE)
        assert register_value(tpm) == extend("sha256", before, record.digest)
        assert cel.parse_agent_log(log.data)[-1] == record
        assert (record.sequence, record.pcr, record.author) == (1, REGISTER, "caller")

    machine.on_tpm(run)


def test_foreign_extend_is_seen_at_the_next_start(machine: Machine) -> None:
    machine.on_tpm(lambda tpm: start_and_measure(tpm, Store(machine.runtime), ONE))
    machine.on_tpm(lambda tpm: tpm.pcr_extend(REGISTER, bytes(32)))
    with pytest.raises(Unavailable) as caught:
        machine.on_tpm(lambda tpm: start_and_measure(tpm, Store(machine.runtime)))
    assert caught.value.slug == "AGENT_LOG_DIVERGED"


def test_foreign_extend_is_seen_before_the_next_record(machine: Machine) -> None:
    def run(tpm: TpmCommands) -> None:
        log = start_and_measure(tpm, Store(machine.runtime))
        data = log.data
        tpm.pcr_extend(REGISTER, bytes(32))
        with pytest.raises(Unavailable) as caught:
            log.measure(tpm, "agent", ONE)
        assert caught.value.slug == "AGENT_LOG_DIVERGED"
        assert log.data == data

    machine.on_tpm(run)


def test_foreign_extend_between_intent_and_crash_is_not_taken_for_ours(machine: Machine) -> None:
    crashing = CrashingStore(machine.runtime, 8, "after")  # the intent of record TWO is down, its extend is not made
    with pytest.raises(Crash):
        machine.on_tpm(lambda tpm: start_and_measure(tpm, crashing, ONE, TWO))
    machine.on_tpm(lambda tpm: tpm.pcr_extend(REGISTER, bytes(32)))
    with pytest.raises(Unavailable) as caught:
        machine.on_tpm(lambda tpm: start_and_measure(tpm, Store(machine.runtime)))
    assert caught.value.slug == "AGENT_LOG_DIVERGED"


def test_register_that_others_used_before_the_first_start_is_refused(machine: Machine) -> None:
    """Evidence on it would be refused by every verifier: the agent's AK could not be the first record."""
    machine.on_tpm(lambda tpm: tpm.pcr_extend(REGISTER, b"\1" * 32))
    for _ in range(2):
        with pytest.raises(Unavailable) as caught:
            machine.on_tpm(lambda tpm: start_and_measure(tpm, Store(machine.runtime), ONE))
        assert caught.value.slug == "REGISTER_IN_USE"
        assert not (machine.runtime / "agent-log").exists()


def edit(machine: Machine, name: str, old: bytes, new: bytes) -> None:
    path = machine.runtime / name
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def encoded(content: bytes) -> bytes:
    return strictjson.b64(content).encode()


@pytest.mark.parametrize("damage", ["content", "dropped", "emptied", "swapped", "recomputed", "framing"])
def test_edited_log_is_refused(machine: Machine, damage: str) -> None:
    log = machine.on_tpm(lambda tpm: start_and_measure(tpm, Store(machine.runtime), ONE, TWO))
    path = machine.runtime / "agent-log"
    first, one, two = (record.encode() for record in log.records)
    if damage == "content":
        edit(machine, "agent-log", encoded(ONE), encoded(ENO))
    elif damage == "dropped":
        path.write_bytes(first + one)
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "swapped":
        path.write_bytes(first + two + one)
    elif damage == "recomputed":
        path.write_bytes(first + cel.Record(1, REGISTER, "agent", ENO).encode() + two)
    else:
        path.write_bytes(first + one + two[1:])
    with pytest.raises(Unavailable) as caught:
        machine.on_tpm(lambda tpm: start_and_measure(tpm, Store(machine.runtime)))
    assert caught.value.slug == "AGENT_LOG_DIVERGED"


def test_edited_intent_is_refused(machine: Machine) -> None:
    crashing = CrashingStore(machine.runtime, 9, "before")  # TWO is extended but not logged
    with pytest.raises(Crash):
        machine.on_tpm(lambda tpm: start_and_measure(tpm, crashing, ONE, TWO))
    for old, new in ((encoded(TWO), encoded(THREE)), (b'"agent"', b'"nobody"'), (b"{", b"{{")):
        intent = (machine.runtime / "agent-log-intent").read_bytes()
        edit(machine, "agent-log-intent", old, new)
        with pytest.raises(Unavailable) as caught:
            machine.on_tpm(lambda tpm: AgentLog(Store(machine.runtime), REGISTER).open(tpm))
        assert caught.value.slug == "AGENT_LOG_DIVERGED"
        (machine.runtime / "agent-log-intent").write_bytes(intent)
    log = machine.on_tpm(lambda tpm: start_and_measure(tpm, Store(machine.runtime)))
    assert [record.content for record in log.records[1:]] == [ONE, TWO]


def test_extend_whose_outcome_was_lost_is_found_out_before_anything_else(machine: Machine) -> None:
    """Without a restart: the same process goes on after its store failed between extend and append."""

    class FullStore(Store):
        full = False

        def append(self, name: str, data: bytes, *, at: int) -> None:
            if self.full:
                raise Unavailable("STATE_DIRECTORY", "no space left", retry_after=1.0)
            super().append(name, data, at=at)

    def run(tpm: TpmCommands) -> None:
        store = FullStore(machine.runtime)
        log = start_and_measure(tpm, store)
        store.full = True
        with pytest.raises(Unavailable, match="no space left"):
            log.measure(tpm, "agent", ONE)
        store.full = False
        log.settle(tpm)
        assert log.records[-1].content == ONE
        log.check({REGISTER: register_value(tpm)})
        assert log.measure(tpm, "agent", TWO).sequence == 2

    machine.on_tpm(run)


def test_settling_a_settled_log_asks_the_tpm_nothing(machine: Machine) -> None:
    log = machine.on_tpm(lambda tpm: start_and_measure(tpm, Store(machine.runtime), ONE))
    machine.tpm.kill()
    log.settle(None)  # type: ignore[arg-type]
    assert len(log.records) == 2


def test_quoted_register_must_be_what_the_log_leads_to(machine: Machine) -> None:
    def run(tpm: TpmCommands) -> None:
        log = start_and_measure(tpm, Store(machine.runtime), ONE)
        log.check({REGISTER: register_value(tpm)})
        log.check({0: bytes(32)})
        with pytest.raises(Unavailable) as caught:
            log.check({REGISTER: bytes(32)})
        assert caught.value.slug == "AGENT_LOG_DIVERGED"

    machine.on_tpm(run)


def test_oversized_record_is_refused_before_it_is_extended(machine: Machine) -> None:
    def run(tpm: TpmCommands) -> None:
        log = start_and_measure(tpm, Store(machine.runtime))
        before = register_value(tpm)
        with pytest.raises(Unavailable) as caught:
            log.measure(tpm, "agent", bytes(cel.MAX_CONTENT + 1))
        assert caught.value.slug == "AGENT_LOG_FULL"
        assert register_value(tpm) == before
        log.measure(tpm, "agent", b'{"x":"%s"}' % (b"x" * (cel.MAX_CONTENT - 8)))

    machine.on_tpm(run)


def test_records_of_one_uid_and_of_all_are_bounded(machine: Machine) -> None:
    def run(tpm: TpmCommands) -> AgentLog:
        return start_and_measure(tpm, Store(machine.runtime))

    log = machine.on_tpm(run)
    records = CallerRecords(log)
    for _ in range(MAX_CALLER_RECORDS_EACH):
        records.take(1)
    with pytest.raises(Exhausted) as caught:
        records.take(1)
    assert caught.value.slug == "MEASURE_LIMIT"
    records.take(2)


def test_records_of_all_callers_stay_bounded_over_restarts(machine: Machine) -> None:
    def fill(tpm: TpmCommands) -> None:
        log = start_and_measure(tpm, Store(machine.runtime))
        for _ in range(MAX_CALLER_RECORDS):
            log.measure(tpm, "caller", b"{}")

    machine.on_tpm(fill)
    log = machine.on_tpm(lambda tpm: start_and_measure(tpm, Store(machine.runtime)))
    with pytest.raises(Exhausted) as caught:
        CallerRecords(log).take(7)
    assert caught.value.slug == "MEASURE_LIMIT"
