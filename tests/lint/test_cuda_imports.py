"""CUDA's binding stays behind one file, which loads it when it is first needed and keeps its exceptions in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "agent" / "cgpu_agent"
CUDA = PACKAGE / "backends" / "gpu" / "cuda.py"


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node, node.module


def of_the_binding(path: Path) -> list[ast.stmt]:
    return [node for node, name in imports(path) if name.split(".")[0] == "cuda"]


def test_one_file_imports_the_binding() -> None:
    assert [path for path in PACKAGE.rglob("*.py") if of_the_binding(path)] == [CUDA]


def test_the_binding_is_imported_and_called_in_one_place() -> None:
    """``_ask`` turns its exceptions into ours; a call elsewhere would let them, and the library's words, pass."""
    (ask,) = [node for node in ast.parse(CUDA.read_text()).body if getattr(node, "name", None) == "_ask"]
    assert [node.lineno for node in of_the_binding(CUDA)] == [
        node.lineno for node in ast.walk(ask) if isinstance(node, ast.ImportFrom)
    ]


def test_a_daemon_that_starts_does_not_load_it() -> None:
    script = (
        "import cgpu_agent.daemon.app, sys; print([name for name in sys.modules if name.split('.')[0] == 'cuda'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
