"""docs/threat-model.md holds its form: every attack ends in a mitigation with its test, a duty, or a risk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "threat-model.md").read_text()
ID = re.compile(r"[MOU]-[A-Z]?\d+b?")
REQUIREMENTS = {str(number) for number in range(1, 38)}


def section(title: str) -> str:
    (found,) = [part for part in re.split(r"^## ", DOCUMENT, flags=re.MULTILINE) if part.startswith(f"{title}\n")]
    return found


def rows(text: str) -> Iterator[list[str]]:
    """Cells of the rows of all tables in a text, without their heads."""
    lines = text.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("| ") and not line.startswith("| ---") and before.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


ATTACKS = list(rows(section("What can be tried at each arrow")))
MITIGATIONS = {row[0]: row for row in rows(section("Mitigations"))}
DUTIES = {row[0]: row for row in rows(section("What the operator must do"))}
RISKS = dict(re.findall(r"^- \*\*(U-\d+)\.\*\* ((?:.|\n(?!- ))*)", section("What stays open"), flags=re.MULTILINE))
DEFINED = MITIGATIONS.keys() | DUTIES.keys() | RISKS.keys()


def ends(row: list[str]) -> list[str]:
    return row[-1].split(", ")


def test_the_tables_are_read() -> None:
    assert len(ATTACKS) > 50
    assert len(MITIGATIONS) > 45
    assert len(DUTIES) > 10
    assert len(RISKS) >= 21


@pytest.mark.parametrize("row", ATTACKS, ids=lambda row: row[0])
def test_every_row_ends_in_what_is_defined(row: list[str]) -> None:
    number, attack, letters, _ = row
    assert len(attack) > 15
    assert re.fullmatch(r"[STRIDE]( [STRIDE])*", letters)
    assert ends(row)
    assert all(ID.fullmatch(each) for each in ends(row))
    assert set(ends(row)) <= DEFINED
    assert all(each == f"M-{number}" for each in ends(row) if each.startswith("M-"))


def test_every_attack_of_the_requirements_is_there_once() -> None:
    numbers = [row[0] for row in ATTACKS]
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) >= REQUIREMENTS


def test_nothing_is_defined_that_no_attack_ends_in() -> None:
    assert {each for row in ATTACKS for each in ends(row)} == DEFINED


def test_every_arrow_of_the_drawing_has_its_attacks() -> None:
    drawn = set(re.findall(r"\bF\d+\b", section("Data flow")))
    assert (
        drawn == set(re.findall(r"^### (F\d+)\. ", DOCUMENT, flags=re.MULTILINE)) == {f"F{n}" for n in range(1, 13)}
    )


@pytest.mark.parametrize("name", MITIGATIONS)
def test_every_mitigation_names_tests_that_exist(name: str) -> None:
    _, answer, shown = MITIGATIONS[name]
    assert len(answer) > 15
    tests = re.findall(r"`([^`]+)`", shown)
    assert tests
    assert all((ROOT / "tests" / test).exists() for test in tests)


def test_every_test_named_anywhere_in_it_exists() -> None:
    named = re.findall(r"`(?:tests/)?([a-z0-9_]+/[a-z0-9_/]*test_\w+\.py)`", DOCUMENT)
    assert len(named) > 60
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []


def test_duties_say_what_happens_otherwise() -> None:
    assert all(len(row) == 4 and row[1] and row[2] for row in DUTIES.values())
    assert list(DUTIES) == [f"O-{number}" for number in range(1, len(DUTIES) + 1)]


def test_risks_are_numbered_and_said() -> None:
    assert list(RISKS) == [f"U-{number}" for number in range(1, len(RISKS) + 1)]
    assert all(len(text) > 60 for text in RISKS.values())


def test_what_other_documents_refer_to_is_there() -> None:
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs" / "man").iterdir()]
    files += [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    named = {name for path in files for name in re.findall(r"\b[U]-\d+\b", path.read_text().replace("\\-", "-"))}
    assert len(named) > 5
    assert named <= RISKS.keys()
