"""How far a long copy has come, on a terminal's last line."""

from __future__ import annotations

import sys
import time

_EVERY = 0.2
"""Seconds between two lines."""


class Progress:
    """Told of every piece; speaks on stderr, and only where that is a terminal.

    Args:
        what: the first word of the line.
        total: bytes there will be; ``None`` when nobody knows.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._begun = self._told = time.monotonic()
        self._shown = sys.stderr.isatty()

    def add(self, count: int) -> None:
        self.reach(self._done + count, self._total)

    def reach(self, done: int, total: int | None) -> None:
        """So many bytes, of so many, in all."""
        self._done, self._total = done, total
        now = time.monotonic()
        if self._shown and now - self._told >= _EVERY:
            self._told = now
            print(
                f"\r\x1b[K{describe(self._what, self._done, self._total, now - self._begun)}", end="", file=sys.stderr
            )
            sys.stderr.flush()

    def end(self) -> None:
        """Clear the line."""
        if self._told != self._begun:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def describe(what: str, done: int, total: int | None, seconds: float) -> str:
    """One line: bytes, rate and, where the total is known, the time that is left."""
    rate = done / seconds
    line = f"{what}  {done / 1e9:.2f} GB"
    if total is None or not rate:
        return f"{line}  {rate / 1e6:.0f} MB/s"
    left = max(0, round((total - done) / rate))
    return f"{line} of {total / 1e9:.2f}  {rate / 1e6:.0f} MB/s  {left // 60}:{left % 60:02d} left"
