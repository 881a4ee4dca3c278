"""The driver's library stays behind one file, and no exception of its binding leaves it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "agent" / "cgpu_agent"
NVML = PACKAGE / "backends" / "gpu" / "nvml.py"


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_one_file_imports_the_binding() -> None:
    importers = [
        path
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] in {"pynvml", "pynvml_utils"} for name in imported(ast.parse(path.read_text())))
    ]
    assert importers == [NVML]


def test_the_binding_is_called_in_one_place() -> None:
    """``_ask`` turns its exceptions into ours; a call elsewhere would let them, and the library's words, pass."""
    tree = ast.parse(NVML.read_text())
    used = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert {name for name in used if name.startswith("pynvml.")} == {
        "pynvml.NVMLError",
        "pynvml.c_nvmlSystemConfComputeSettings_v1_t",
        "pynvml.nvmlEventTypeXidCriticalError",
    }
