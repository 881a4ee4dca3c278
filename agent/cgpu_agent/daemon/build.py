"""A digest of the agent's own files: evidence carries it, and it is worth what measures the file system below."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cgpu_agent


def build_digest() -> str:
    """SHA-256 hex over every Python file of the package: path, NUL, size as u64be, content; in path order."""
    root = Path(cgpu_agent.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()
