"""A digest of the agent's own files: evidence carries it, and it is worth what measures the file system below."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cgpu_agent

_SUFFIXES = frozenset({".py", ".cedar", ".cedarschema"})


def build_digest() -> str:
    """SHA-256 hex over every Python file, policy and schema: path, NUL, size as u64be, content; in path order."""
    root = Path(cgpu_agent.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES):
        content = path.read_bytes()
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()
