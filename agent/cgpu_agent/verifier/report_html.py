"""A verdict as one page for people: who asked, what booted, who vouches for what, and what nobody proved.

Self-contained: no scripts, no links out, one style sheet whose hash the page's own Content-Security-Policy names, so
that nothing which slipped through the escaping could load, run or even look like anything.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.appraisal import Appraisal, PartAppraisal
from cgpu_agent.verifier.boot import boot_story
from cgpu_agent.verifier.bootscene import Stage
from cgpu_agent.verifier.claims import claims_of
from cgpu_agent.verifier.html import Markup, join, tag
from cgpu_agent.verifier.report_style import STYLE
from cgpu_agent.verifier.verdict import Step

_HEADLINES: Final = {
    "affirming": "Affirmed",
    "warning": "Accepted, with warnings",
    "none": "Not judged",
    "contraindicated": "Do not trust",
}
_PART_TITLES: Final = {
    "platform": "Platform",
    "boot": "Boot",
    "agent": "Agent",
    "gpus": "GPUs",
    "workload": "Workload",
}
_STATUS_MARKS: Final = {"affirming": "\u2713", "warning": "!", "none": "\u2013", "contraindicated": "\u2715"}
_OUTCOME_STATUS: Final = {"pass": "affirming", "skip": "none", "refuse": "contraindicated"}
_PCR_STATUS: Final = {
    "explained": "affirming",
    "untouched": "none",
    "unexplained": "warning",
    "mismatch": "contraindicated",
    "uncompared": "contraindicated",
}
_GPU_PROVED: Final = (
    ("hwmodel", "Chip"),
    ("device_id", "Device"),
    ("driver", "Driver"),
    ("vbios", "Firmware"),
    ("fwid_matched", "Certificate is for this firmware"),
)
_GPU_REPORTED: Final = (
    ("bdf", "PCI address"),
    ("uuid", "Name"),
    ("cc", "CC mode"),
    ("cc_environment", "Environment"),
    ("dev_tools", "Developer tools"),
    ("multi_gpu", "Multi-GPU mode"),
    ("trusted", "Trusted by the agent"),
)
_MAX_STATEMENTS: Final = 100


def report(appraisal: Appraisal, *, at: datetime, gaps: Sequence[str]) -> str:
    """The page, as HTML 5 in UTF-8.

    Args:
        appraisal: to be shown.
        at: the moment of judgement.
        gaps: what accepted evidence does not show, in sentences.
    """
    csp = f"default-src 'none'; style-src 'sha256-{_hash(STYLE)}'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=csp),
        tag("meta", name_="referrer", content="no-referrer"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", f"Evidence: {_HEADLINES[appraisal.status]}"),
        tag("style", Markup(STYLE)),
    )
    sections = (
        _headline(appraisal, at),
        _parts(appraisal),
        _who(appraisal),
        _boot(appraisal),
        _vouching(appraisal),
        _pcrs(appraisal),
        _gpus(appraisal),
        _not_proven(appraisal, gaps),
        _steps(appraisal.result.steps),
    )
    body = tag("body", tag("main", *sections), _foot(appraisal))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _headline(appraisal: Appraisal, at: datetime) -> Markup:
    refusal = appraisal.result.refusal
    headline = "Refused" if refusal is not None else _HEADLINES[appraisal.status]
    facts = [tag("p", appraisal.reason, class_="reason")]
    if appraisal.result.simulated:
        facts.append(tag("p", "Simulated: a simulator's root signed this. It proves nothing about a real machine."))
    when = at.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    facts.append(tag("p", f"Judged at {when}", class_="quiet"))
    mark = tag("span", _STATUS_MARKS[appraisal.status], class_="mark", aria_hidden="true")
    return tag("header", mark, tag("div", tag("h1", headline), *facts), class_=f"verdict {appraisal.status}")


def _parts(appraisal: Appraisal) -> Markup:
    return _section("Part by part", tag("div", *(_part(each) for each in appraisal.parts), class_="cards"))


def _part(part: PartAppraisal) -> Markup:
    needed = "required" if part.required else "not required"
    below = [tag("p", part.reason)]
    if part.better:
        below += [tag("p", "It would take:", class_="quiet"), tag("ul", *(tag("li", each) for each in part.better))]
    title = tag("h3", _PART_TITLES[part.part], tag("span", needed, class_="quiet"))
    return tag("article", title, _badge(part.status, part.status), *below, class_=f"card {part.status}")


def _who(appraisal: Appraisal) -> Markup:
    statement, facts = appraisal.result.statement, appraisal.facts
    if statement is None or facts is None:
        return Markup("")
    caller = statement.caller
    covered = facts.agent_coverage != "nothing"
    worth = (
        "The agent says so, and its own files are measured." if covered else "The agent says so; nothing measures it."
    )
    rows = [
        ("For", statement.audience),
        ("Purpose", statement.purpose),
        ("Process", f"uid {caller['uid']}, gid {caller['gid']}, pid {caller['pid']}"),
        ("Unit", _or_dash(caller["unit"])),
        ("Container", _or_dash(caller["container"])),
        ("Identified by", "pidfd" if caller["identity_strength"] == "pidfd" else "pid alone"),
        ("Nonce", statement.nonce.hex()),
    ]
    if statement.public_key is not None:
        rows.append(
            ("Bound key", f"SHA-256 {hashlib.sha256(statement.public_key).hexdigest()}, possession not shown")
        )
    return _section("Who asked", tag("p", worth, class_="quiet"), _table(rows))


def _or_dash(value: object) -> str:
    return "\u2013" if value is None else str(value)


def _boot(appraisal: Appraisal) -> Markup:
    log = appraisal.result.boot_log
    if log is None:
        return Markup("")
    try:
        stages = boot_story(log, "sha256").stages
    except HostileInput as error:
        return _section("What booted", tag("p", error.message))
    legend = tag(
        "p",
        tag("span", "", class_="dot proven"),
        "under a digest that the quote confirms ",
        tag("span", "", class_="dot"),
        "described by firmware or a loader, not proven",
        class_="quiet legend",
    )
    return _section("What booted", legend, tag("ol", *(_stage(stage) for stage in stages), class_="timeline"))


def _stage(stage: Stage) -> Markup:
    shown = stage.statements[:_MAX_STATEMENTS]
    items = [tag("li", tag("span", "", class_="dot proven" if each.digested else "dot"), each.text) for each in shown]
    if len(stage.statements) > len(shown):
        items.append(tag("li", f"and {len(stage.statements) - len(shown)} more"))
    note = tag("p", stage.note, class_="quiet") if stage.note else Markup("")
    return tag("li", tag("h3", stage.title), tag("ul", *items), note)


def _vouching(appraisal: Appraisal) -> Markup:
    result, coverage = appraisal.result, appraisal.coverage
    if result.endorsement is None or result.manifest is None or coverage is None:
        return Markup("")
    path = () if result.endorsement.path is None else result.endorsement.path.certificates
    chain = [f"{each.subject} (until {each.not_after:%Y-%m-%d})" for each in reversed(path)]
    name = result.endorsement.ak_name
    rows = [
        ("Platform AK", result.endorsement.detail),
        *(("Certificate", each) for each in chain),
        ("Its Name", "\u2013" if name is None else name.hex()),
        ("Agent AK", f"certified by the platform AK in this boot; Name {result.manifest.agent_ak_name.hex()}"),
        ("Agent's files", coverage.detail),
        *(("Differs", each.detail) for each in appraisal.differences),
    ]
    if not appraisal.differences:
        given = "match in everything they pin" if appraisal.reference_given else "none were given"
        rows.append(("Reference values", given))
    return _section("Who vouches for what", _table(rows))


def _pcrs(appraisal: Appraisal) -> Markup:
    registers = appraisal.result.registers
    if not registers:
        return Markup("")
    rows = [
        tag(
            "tr",
            tag("td", str(index), class_="number"),
            tag("td", _badge(_PCR_STATUS[found.status], found.status)),
            tag("td", tag("code", (found.actual or b"").hex())),
            tag("td", found.note),
        )
        for index, found in sorted(registers.items())
    ]
    head = _row("th", "PCR", "Status", "Quoted value (SHA-256 bank)", "Note")
    return _section("Platform configuration registers", _grid(head, rows))


def _gpus(appraisal: Appraisal) -> Markup:
    claims = claims_of("gpus", appraisal.result, appraisal.facts, appraisal.coverage)
    if not claims.signed:
        return _section("GPUs", tag("p", "This evidence says nothing of any GPU."))
    return _section(
        "GPUs",
        tag("p", "Proved by each device's certificates and signature:", class_="quiet"),
        _columns(_GPU_PROVED, claims.signed["devices"]),
        tag("p", "Said by the driver and handed on by the agent; no signature covers it:", class_="quiet"),
        _columns(_GPU_REPORTED, claims.reported["devices"]),
    )


def _columns(columns: Sequence[tuple[str, str]], records: Iterable[Mapping[str, object]]) -> Markup:
    rows = [tag("tr", *(tag("td", _word(record.get(name))) for name, _ in columns)) for record in records]
    return _grid(_row("th", *(title for _, title in columns)), rows)


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _or_dash(value)


def _not_proven(appraisal: Appraisal, gaps: Sequence[str]) -> Markup:
    if not appraisal.result.accepted:
        gaps = ("Refused evidence proves nothing. What it says is not shown, so that nobody leans on it.",)
    return _section("What was not proven", tag("ul", *(tag("li", gap) for gap in gaps)))


def _steps(steps: Iterable[Step]) -> Markup:
    rows = [
        tag(
            "tr",
            tag("td", str(step.number), class_="number"),
            tag("td", tag("code", step.id)),
            tag("td", _badge(_OUTCOME_STATUS[step.outcome.value], step.outcome.value)),
            tag("td", step.title),
            tag("td", step.detail + (f" [{step.slug}]" if step.slug else "")),
        )
        for step in steps
    ]
    return _section("Every step", _grid(_row("th", "", "Step", "Outcome", "Claim", "Finding"), rows))


def _foot(appraisal: Appraisal) -> Markup:
    return tag("footer", "Appraisal policy SHA-256 ", tag("code", appraisal.policy_digest))


def _section(title: str, *children: str) -> Markup:
    return tag("section", tag("h2", title), *children)


def _badge(status: str, text: str) -> Markup:
    return tag("span", f"{_STATUS_MARKS[status]} {text}", class_=f"badge {status}")


def _table(rows: Iterable[tuple[str, str]]) -> Markup:
    return tag("dl", *(join((tag("dt", label), tag("dd", value))) for label, value in rows))


def _row(cell: str, *texts: str) -> Markup:
    return tag("tr", *(tag(cell, text) for text in texts))


def _grid(head: Markup, rows: Iterable[Markup]) -> Markup:
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll")


def _hash(style: str) -> str:
    return base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
