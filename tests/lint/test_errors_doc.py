"""docs/errors.md has every reason that this package can give, and none that it cannot."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "agent" / "cgpu_agent"
DOCUMENT = ROOT / "docs" / "errors.md"
SLUG = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*")
KERNELS = {"SO_PEERPIDFD"}
NAMES = ("slug", "slugs", "reason")
"""What a parameter or field that takes a reason is called here."""


@cache
def trees() -> dict[Path, ast.Module]:
    found = [path for path in PACKAGE.rglob("*.py") if "api" not in path.relative_to(PACKAGE).parts]
    return {path: ast.parse(path.read_text()) for path in found}


def parameters(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    """Of a call of it; empty for a class that leaves its constructor to its base."""
    if isinstance(node, ast.ClassDef):
        made = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        if made:
            return parameters(made[0])
        return [
            each.target.id
            for each in node.body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        ]
    names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


@cache
def takers() -> dict[str, int]:
    """Place of the reason among the arguments, by the name of whatever takes one."""
    found: dict[str, int] = {}
    bases: dict[str, list[str]] = {}
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                names = parameters(node)
                places = [names.index(name) for name in NAMES if name in names]
                if places:
                    found[node.name] = places[0]
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
    while more := {
        name: found[base] for name, above in bases.items() for base in above if name not in found and base in found
    }:
        found |= more
    return found


def literals(node: ast.AST) -> Iterator[str]:
    """Reasons in an expression: itself, the branches of a choice, the values of a table."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and SLUG.fullmatch(node.value):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from (*literals(node.body), *literals(node.orelse))
    elif isinstance(node, (ast.BoolOp, ast.Dict)):
        yield from (each for value in node.values for each in literals(value))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # TABLE.get(key, reason)
        yield from (each for value in (node.func.value, *node.args) for each in literals(value))


def in_call(node: ast.Call) -> Iterator[str]:
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    place = takers().get(name)
    if place is not None and len(node.args) > place:
        yield from literals(node.args[place])
    yield from (each for keyword in node.keywords if keyword.arg in NAMES for each in literals(keyword.value))


@cache
def given() -> frozenset[str]:
    """Every reason in the source."""
    found: set[str] = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                found.update(in_call(node))
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(each, ast.Name) and (each.id in NAMES or "SLUGS" in each.id) for each in targets):
                    found.update(literals(node.value))
    return frozenset(found)


@cache
def told() -> frozenset[str]:
    return frozenset(each for each in re.findall(r"`([A-Z0-9_]+)`", DOCUMENT.read_text()) if SLUG.fullmatch(each))


def test_the_source_gives_reasons_in_the_ways_that_this_test_knows() -> None:
    assert {"NOT_ALLOWED", "INTERNAL", "TPM_BUSY", "KEY_LATCH_STUCK", "GPU_XID", "NO_FLOOR", "STUCK"} <= given()


def test_nothing_is_told_that_is_nowhere_in_the_source() -> None:
    words = {
        node.value
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert told() - words - KERNELS == set()


@pytest.mark.parametrize("slug", sorted(given()))
def test_every_reason_is_told(slug: str) -> None:
    assert slug in told()
