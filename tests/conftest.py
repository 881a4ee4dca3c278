"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Folder of the committed test vectors."""
    return ROOT / "tests" / "vectors"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of third-party recordings that live beside the project and are never committed."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("third-party recordings (../shared/data) are not on this machine")
    return folder
