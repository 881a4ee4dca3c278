"""Fixtures of the command line's tests."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from fixtures.ctl import Ctl


@pytest.fixture
def ctl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ctl:
    return Ctl(tmp_path, capsys)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """Bytes that a pipe hands over; write and rewind."""
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
    return pipe
