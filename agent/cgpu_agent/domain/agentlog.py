"""The agent register and its log: what the agent does goes into a PCR and on record, never one without the other.

A crash or a TPM time-out between the extend and the log would otherwise part the two for ever. So the record to be
measured is first written down as an intent; at the next start, or before the next record, the PCR itself says whether
that extend happened.
"""

from __future__ import annotations

from cgpu_agent.backends.base import TpmCommands
from cgpu_agent.domain.store import Store
from cgpu_agent.errors import DeviceFault, Exhausted, HostileInput, Unavailable
from cgpu_agent.wire import cel, strictjson
from cgpu_agent.wire.strictjson import Fields
from cgpu_agent.wire.tpm import PcrSelection, extend

_LOG, _INTENT = "agent-log", "agent-log-intent"
_INITIAL = bytes(32)  # of a PCR that nobody extended (TPM 2.0 Part 1, 17.1)

MAX_CALLER_RECORDS = 256
MAX_CALLER_RECORDS_EACH = 16


class AgentLog:
    """The log of this boot. Every method that takes ``TpmCommands`` must run inside one TPM job.

    Args:
        store: where the log lives; empty at the first start after boot.
        register: PCR index, one that cannot be reset (never 16 or 23).
    """

    def __init__(self, store: Store, register: int) -> None:
        self._store = store
        self._selection = PcrSelection.of("sha256", [register])
        self.register = register
        self.data = b""
        self._records: list[cel.Record] = []
        self._value = _INITIAL
        self._settled = True

    @property
    def records(self) -> tuple[cel.Record, ...]:
        return tuple(self._records)

    def open(self, tpm: TpmCommands) -> None:
        """Load the log and bring it and the register together.

        Raises:
            Unavailable: ``AGENT_LOG_DIVERGED`` when the register holds something that the log does not explain:
                somebody else extended it, or the log was edited; only a reboot mends that. ``REGISTER_IN_USE`` when
                that was so before the agent's first record: a verifier wants that record to be the very first.
            DeviceFault: from the TPM.
        """
        actual = self._read(tpm)
        data = self._whole_records(self._store.read(_LOG) or b"")
        try:
            records = list(cel.parse_agent_log(data))
        except HostileInput as error:
            raise self._diverged() from error
        value = _INITIAL
        for record in records:
            value = extend("sha256", value, record.digest)
        self.data, self._records, self._value = data, records, value
        self._resolve(actual)

    @staticmethod
    def _whole_records(data: bytes) -> bytes:
        """Drop a record that a crash cut short; its intent is still there and decides about it."""
        return data[: data.rfind(b"\n") + 1]

    def settle(self, tpm: TpmCommands) -> None:
        """Find out how the last ``measure`` ended, if it did not say; costs nothing otherwise.

        Raises:
            Unavailable: ``AGENT_LOG_DIVERGED``.
            DeviceFault: from the TPM.
        """
        if not self._settled:
            self._resolve(self._read(tpm))

    def _resolve(self, actual: bytes) -> None:
        """Settle an open intent by what the register says."""
        intent = self._store.read(_INTENT)
        if intent is not None:
            record = self._parse_intent(intent)
            extended = extend("sha256", self._value, record.digest)
            if actual == extended and record.sequence == len(self._records):
                self._commit(record)
            self._store.remove(_INTENT)
        if actual != self._value:
            began = intent is not None or self._store.read(_LOG) is not None
            raise self._diverged() if began else self._in_use()
        self._settled = True

    def _parse_intent(self, data: bytes) -> cel.Record:
        try:
            fields = Fields(strictjson.loads(data, "intent", 4 * cel.MAX_CONTENT), "intent")
            author = fields.choice("author", frozenset({"agent", "caller"}))
            record = cel.Record(
                fields.integer("sequence", 0, cel.MAX_RECORDS),
                self.register,
                "agent" if author == "agent" else "caller",
                fields.base64("content", cel.MAX_CONTENT),
            )
            fields.end()
        except HostileInput as error:
            raise self._diverged() from error
        return record

    def _diverged(self) -> Unavailable:
        return Unavailable(
            "AGENT_LOG_DIVERGED",
            f"PCR {self.register} holds what the agent log does not explain; evidence is refused until reboot",
        )

    def _in_use(self) -> Unavailable:
        return Unavailable(
            "REGISTER_IN_USE",
            f"PCR {self.register} was extended by somebody else before the agent first started in this boot",
        )

    def _read(self, tpm: TpmCommands) -> bytes:
        return tpm.pcr_read(self._selection)[self.register]

    def measure(self, tpm: TpmCommands, author: cel.Author, content: bytes) -> cel.Record:
        """Extend the register with one record and write it down.

        Raises:
            Unavailable: ``AGENT_LOG_DIVERGED``, ``AGENT_LOG_FULL``.
            DeviceFault: from the TPM; if the extend may have happened, ``settle`` or the next call finds out.
        """
        actual = self._read(tpm)
        self._resolve(actual)
        record = cel.Record(len(self._records), self.register, author, content)
        if len(content) > cel.MAX_CONTENT or len(self._records) >= cel.MAX_RECORDS:
            raise Unavailable("AGENT_LOG_FULL", "the agent log takes no more records until reboot")
        intent = {"author": author, "content": strictjson.b64(content), "sequence": record.sequence}
        self._settled = False
        self._store.write(_INTENT, strictjson.dumps(intent))
        tpm.pcr_extend(self.register, record.digest)
        if self._read(tpm) != extend("sha256", actual, record.digest):
            raise DeviceFault("TPM_ERROR", "the agent register did not take the record", outcome_unknown=True)
        self._commit(record)
        self._store.remove(_INTENT)
        self._settled = True
        return record

    def _commit(self, record: cel.Record) -> None:
        encoded = record.encode()
        self._store.append(_LOG, encoded, at=len(self.data))
        self.data += encoded
        self._records.append(record)
        self._value = extend("sha256", self._value, record.digest)

    def check(self, pcrs: dict[int, bytes]) -> None:
        """Refuse (``AGENT_LOG_DIVERGED``) when a quoted register is not what the log leads to."""
        if self.register in pcrs and pcrs[self.register] != self._value:
            raise self._diverged()


class CallerRecords:
    """How many events callers may still measure: the log rides in every bundle, so it must not grow at will."""

    def __init__(self, log: AgentLog) -> None:
        self._log = log
        self._by_uid: dict[int, int] = {}

    def take(self, uid: int) -> None:
        """Count one event. Raises ``Exhausted`` (``MEASURE_LIMIT``): per boot for all, per start for one uid."""
        total = sum(record.author == "caller" for record in self._log.records)
        mine = self._by_uid.get(uid, 0)
        if total >= MAX_CALLER_RECORDS or mine >= MAX_CALLER_RECORDS_EACH:
            raise Exhausted("MEASURE_LIMIT", "no more events can be measured for this caller")
        self._by_uid[uid] = mine + 1
