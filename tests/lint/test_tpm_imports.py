"""The TSS stays behind one file, and that file never reads what the TSS may have freed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "agent" / "cgpu_agent"
ESAPI = PACKAGE / "backends" / "tpm" / "esapi.py"


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def is_call(node: ast.expr, function: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == function


def bound_to_results(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and is_call(node.value, "self._call"):
            for target in node.targets:
                found |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def violations(source: str) -> list[str]:
    """Uses of a library result other than ``marshal()``: on the call itself, or on a name bound to it."""
    tree = ast.parse(source)
    results = bound_to_results(tree)

    def forbidden(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            return function.startswith("self._esys.") and function != "self._esys.close"
        if isinstance(node, ast.Subscript):
            return isinstance(node.value, ast.Name) and node.value.id in results
        if not isinstance(node, ast.Attribute) or node.attr == "marshal":
            return False
        base = node.value
        while isinstance(base, ast.Subscript):
            base = base.value
        if isinstance(base, ast.Name):
            return base.id in results
        return isinstance(base, ast.Call) and not is_call(base, "super")

    return [ast.unparse(node) for node in ast.walk(tree) if forbidden(node)]


def test_one_file_imports_the_tss() -> None:
    importers = [
        path
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "tpm2_pytss" for name in imported(ast.parse(path.read_text())))
    ]
    assert importers == [ESAPI]


def test_results_of_the_tss_are_only_marshalled() -> None:
    assert violations(ESAPI.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "self._call('Quote', f).attest.marshal()",
        "self._call('Quote', f)[1].data.handles",
        "x = self._call('Quote', f)\ny = x.publicArea",
        "x, *_ = self._call('Quote', f)\nlen(x.a.b)",
        "x = self._call('Quote', f)\nx[0].marshal()",
        "public, _ = self._esys.read_public(h)",
        "read().a",
    ],
)
def test_the_rule_sees_what_it_forbids(source: str) -> None:
    assert violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "x, *_ = self._call('Quote', f)\ny = x.marshal()",
        "x = self._call('Quote', f)[1].marshal()",
        "super().__init__()\nself._esys.close()",
    ],
)
def test_the_rule_allows_what_is_safe(source: str) -> None:
    assert violations(source) == []


def test_library_is_silenced_before_it_is_imported() -> None:
    source = ESAPI.read_text()
    assert source.index('"TSS2_LOG", "all+none"') < source.index("from tpm2_pytss import")
