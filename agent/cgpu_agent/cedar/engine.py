"""Asks Cedar, and believes only a clean answer: an error anywhere, a missing fact or an unknown word denies.

Cedar skips a policy whose evaluation fails, a ``forbid`` too, and still allows. So an answer counts only when nothing
failed, when principal and resource were checked against the schema, and when policies with an ``@id`` decided.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Final

import cedarpy

from cgpu_agent.cedar.text import Malformed, Problem, Source, check_ids, split
from cgpu_agent.errors import Misuse

_NOBODY_ALLOWS: Final = "no policy allows this"
_NOT_EVALUATED: Final = "a policy could not be evaluated"
_SHOWN: Final = 300


@dataclass(frozen=True, slots=True)
class Entity:
    """A principal or resource with all attributes its type has in the schema.

    Attributes:
        type: with its namespace, e.g. ``CGpu::Workload``.
        id: an opaque name of our choice. Names from outside belong into ``attrs``.
        attrs: values are ``bool``, ``int`` (64 bits), ``str``, or mappings, lists, tuples and sets of these.
        parents: (type, id) of entities this one is in.
    """

    type: str
    id: str
    attrs: Mapping[str, Any]
    parents: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer.

    Attributes:
        policy_ids: the policies that decided, in the order of the text; empty when none did.
        reason: a sentence for a person, fit for any client.
        log_detail: what failed inside, in the library's words: for the journal, never for a client.
    """

    allowed: bool
    policy_ids: tuple[str, ...]
    reason: str
    log_detail: str = field(default="", compare=False)


class Policies:
    """A validated policy text. Immutable; may be asked from any thread (0.2 ms a decision, holding the GIL).

    Attributes:
        digest: SHA-256 of the text, hex.
        ids: ``@id`` of every policy, in the order of the text.
        sources: the policies, as written.
    """

    __slots__ = ("_order", "_policies", "_schema", "digest", "ids", "sources")

    def __init__(self, text: str, sources: tuple[Source, ...], schema: cedarpy.Schema) -> None:
        """Use ``load``."""
        self.sources: Final = sources
        self.ids: Final = tuple(source.id for source in sources)
        self.digest: Final = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self._order: Final = {name: number for number, name in enumerate(self.ids)}
        self._schema: Final = schema
        self._policies: Final = cedarpy.PolicySet.from_str(text, release_gil=True)

    @classmethod
    def load(cls, text: str, schema: str, what: str) -> Policies:
        """Check and take in a policy text.

        Args:
            text: Cedar policies, at most 256 KiB.
            schema: Cedar schema, from this package and so trusted.
            what: what the text is, for messages (its path).

        Raises:
            Misuse: ``BAD_POLICY``, with the first policy at fault and its line.
        """
        found, sources, parsed = _examine(text, schema)
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise Misuse("BAD_POLICY", f"{what}: {found[0]}{more}")
        return cls(text, sources, parsed)

    def decide(self, *, principal: Entity, action: str, resource: Entity, context: Mapping[str, Any]) -> Decision:
        """Whether ``principal`` may do ``action`` to ``resource``. Never raises for what it is asked about.

        Args:
            action: its id; the type is ``Action`` in the principal's namespace.
            context: the complete record that the schema states for the action.
        """
        try:
            return self._decide(principal, action, resource, context)
        except (TypeError, ValueError, KeyError, RecursionError) as error:
            return _unevaluated(f"{type(error).__name__}: {error}")

    def _decide(self, principal: Entity, action: str, resource: Entity, context: Mapping[str, Any]) -> Decision:
        entities = json.dumps([_entity(principal), _entity(resource)])
        # With the schema: a handle made without one is never checked against it later.
        handle = cedarpy.Entities.from_json_str(entities, self._schema)
        namespace = principal.type.rpartition("::")[0]
        request = {
            "principal": {"type": principal.type, "id": principal.id},
            "action": {"type": f"{namespace}::Action" if namespace else "Action", "id": action},
            "resource": {"type": resource.type, "id": resource.id},
            "context": _plain(context),
        }
        answer = cedarpy.is_authorized(request, self._policies, handle, self._schema)
        diagnostics = answer.diagnostics
        if answer.decision is cedarpy.Decision.NoDecision or diagnostics.errors:
            return _unevaluated("; ".join(diagnostics.errors))
        named = diagnostics.id_annotations_by_reason
        ids = tuple(sorted((named[reason] for reason in diagnostics.reasons), key=self._order.__getitem__))
        if not ids:
            return Decision(False, (), _NOBODY_ALLOWS)
        allowed = answer.decision is cedarpy.Decision.Allow
        verb = "allowed" if allowed else "forbidden"
        return Decision(allowed, ids, f"{verb} by policy {', '.join(ids)}")


def problems(text: str, schema: str) -> tuple[Problem, ...]:
    """Everything that keeps ``text`` from being loaded; empty when nothing does."""
    return tuple(_examine(text, schema)[0])


def _unevaluated(detail: str) -> Decision:
    return Decision(False, (), _NOT_EVALUATED, detail)


def _examine(text: str, schema: str) -> tuple[list[Problem], tuple[Source, ...], cedarpy.Schema]:
    try:
        parsed = cedarpy.Schema.from_str(schema)
    except ValueError as error:
        raise Misuse("BAD_SCHEMA", "the policy schema is not valid") from error
    try:
        sources = split(text)
    except Malformed as error:
        return [error.problem], (), parsed
    found = [*check_ids(sources), *_syntax(sources)] or _types(text, sources, parsed)
    return found, sources, parsed


def _syntax(sources: tuple[Source, ...]) -> list[Problem]:
    """Cedar's parser gives no place and one error at a time, so each policy is parsed alone."""
    found = []
    for source in sources:
        try:
            alone = cedarpy.PolicySet.from_str(source.text, release_gil=True)
        except ValueError as error:
            found.append(Problem(source.name, source.line, _said(str(error))))
        else:
            if len(alone) != 1:
                found.append(Problem(source.name, source.line, "is not one policy"))
    return found


def _types(text: str, sources: tuple[Source, ...], schema: cedarpy.Schema) -> list[Problem]:
    """Strict validation: unknown names, types that cannot be compared, scopes that can never hold."""
    result = cedarpy.validate_policies(text, schema, release_gil=True)
    found = []
    for error in result.errors:
        number = error.policy_id.removeprefix("policy")
        source = sources[int(number)] if number.isdecimal() and int(number) < len(sources) else None
        said = _said(error.error.removeprefix(f"for policy `{error.policy_id}`, "))
        found.append(Problem(source.name, source.line, said) if source else Problem("", 0, said))
    if not found and not result.validation_passed:
        found.append(Problem("", 0, "did not pass validation"))
    return sorted(found, key=lambda problem: problem.line)


def _said(message: str) -> str:
    """Cedar's words on the author's own text, in one line of bounded length."""
    line = " ".join(message.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def _entity(entity: Entity) -> dict[str, Any]:
    return {
        "uid": {"type": entity.type, "id": entity.id},
        "attrs": _plain(entity.attrs),
        "parents": [{"type": kind, "id": name} for kind, name in entity.parents],
    }


def _plain(value: Any) -> Any:
    """JSON's view of a value. Keys such as ``__entity`` would be read as Cedar's escapes, so they are refused."""
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and not key.startswith("__") for key in value):
            raise TypeError("a record's keys must be attribute names")
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, AbstractSet)):
        return [_plain(inner) for inner in value]
    raise TypeError(f"{type(value).__name__} has no counterpart in Cedar")
