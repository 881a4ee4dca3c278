"""A boot log as JSON: every replayed register, the Secure Boot verdict, the events and the story."""

from __future__ import annotations

from typing import Final

from cgpu_agent.verifier.boot import boot_story
from cgpu_agent.verifier.bootkeys import Certificate
from cgpu_agent.verifier.bootscene import BootStory, Stage
from cgpu_agent.verifier.eventproof import prove
from cgpu_agent.verifier.replay import replay, startup_locality
from cgpu_agent.verifier.secureboot import Authority, KeyDatabase, SecureBoot
from cgpu_agent.wire.eventlog import Event, EventLog
from cgpu_agent.wire.eventtypes import type_name
from cgpu_agent.wire.tpm import HASH_SIZES

_PREFERENCE: Final = ("sha256", "sha384", "sha512", "sha1")


def best_bank(log: EventLog) -> str | None:
    """The bank a story should rest on: SHA-256 where there is one, SHA-1 last; ``None`` when none can be computed."""
    return next((bank for bank in _PREFERENCE if bank in log.banks), None)


def to_json(log: EventLog, bank: str | None = None) -> dict[str, object]:
    """Everything known of a log, ready for ``json.dumps``. Digests and data are lower-case hex.

    Keys: ``kind``, ``format``, ``spec`` (or null), ``banks``, ``unreplayed_banks`` (announced, but an event lacks
    them or they cannot be computed), ``padding`` (bytes), ``startup_locality``, ``pcrs`` (``pcrs.<bank>.<index>``;
    the index is MrIndex for a CCEL), ``rtmrs`` (CCEL only: the same by RTMR number), ``story_bank``,
    ``secure_boot`` (its state), ``secure_boot_detail``, ``stages``, ``events``. Where no bank can be computed,
    ``secure_boot`` is ``unknown``, and the detail and the stages are null.

    Args:
        bank: whose digests the story rests on; ``best_bank(log)`` by default.

    Raises:
        HostileInput: as ``replay`` and ``boot_story`` do.
    """
    replayed = [name for name in log.banks if name in HASH_SIZES]
    announced = [name for name, _ in log.spec.algorithms] if log.spec is not None else list(log.banks)
    pcrs = {name: {str(index): value.hex() for index, value in replay(log, name).pcrs.items()} for name in replayed}
    chosen = bank or best_bank(log)
    story = None if chosen is None else boot_story(log, chosen)
    result: dict[str, object] = {
        "kind": log.kind,
        "format": log.format,
        "spec": _spec(log),
        "banks": list(log.banks),
        "unreplayed_banks": [name for name in announced if name not in replayed],
        "padding": log.padding,
        "startup_locality": startup_locality(log),
        "pcrs": pcrs,
        "story_bank": chosen,
        "secure_boot": "unknown" if story is None else story.secure_boot.state,
        "secure_boot_detail": None if story is None else secure_boot_json(story.secure_boot),
        "stages": None if story is None else story_json(story),
        "events": [_event(event, chosen) for event in log.events],
    }
    if log.kind == "ccel":
        result["rtmrs"] = {
            name: {str(int(index) - 1): value for index, value in values.items()} for name, values in pcrs.items()
        }
    return result


def story_json(story: BootStory) -> list[dict[str, object]]:
    """The stages of a story."""
    return [_stage(stage) for stage in story.stages]


def secure_boot_json(state: SecureBoot) -> dict[str, object]:
    """The Secure Boot verdict."""
    return {
        "state": state.state,
        "reason": state.reason,
        "event": state.event,
        "separator": state.separator,
        "pk": _database(state.pk),
        "kek": _database(state.kek),
        "db": _database(state.db),
        "dbx": _database(state.dbx),
        "authorities": [_authority(authority) for authority in state.authorities],
        "warnings": list(state.warnings),
    }


def _spec(log: EventLog) -> dict[str, object] | None:
    if log.spec is None:
        return None
    return {
        "platform_class": log.spec.platform_class,
        "version": list(log.spec.version),
        "uintn_size": log.spec.uintn_size,
        "algorithms": dict(log.spec.algorithms),
        "vendor_info": log.spec.vendor_info.hex(),
    }


def _stage(stage: Stage) -> dict[str, object]:
    return {
        "name": stage.name,
        "title": stage.title,
        "note": stage.note,
        "statements": [
            {"text": each.text, "events": list(each.events), "digested": each.digested, "data": dict(each.data)}
            for each in stage.statements
        ],
    }


def _event(event: Event, bank: str | None) -> dict[str, object]:
    proof = None if bank is None else prove(event, bank)
    return {
        "index": event.index,
        "pcr": event.pcr,
        "claimed_type": type_name(event.claimed_type),
        "measured": event.measured,
        "proof": None if proof is None else proof.form,
        "digests": {name: value.hex() for name, value in event.digests},
        "data": event.data.hex(),
    }


def _certificate(certificate: Certificate) -> dict[str, object]:
    return {"subject": certificate.subject, "sha256": certificate.sha256}


def _database(database: KeyDatabase | None) -> dict[str, object] | None:
    if database is None:
        return None
    return {
        "event": database.event,
        "certificates": [_certificate(each) for each in database.certificates],
        "hashes": database.hashes,
        "others": database.others,
    }


def _authority(authority: Authority) -> dict[str, object]:
    return {
        "event": authority.event,
        "variable": authority.variable,
        "certificate": None if authority.certificate is None else _certificate(authority.certificate),
        "text": authority.text,
        "before_separator": authority.before_separator,
        "proven": authority.proven,
    }
