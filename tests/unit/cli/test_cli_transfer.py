"""The parts of ``cgpuctl transfer`` that need no GPU: sizes, ranks, and how far it is."""

from __future__ import annotations

import sys

import pytest

from cgpu_agent.cli.inputs import parse_size
from cgpu_agent.cli.progress import Progress
from cgpu_agent.cli.transferbench import Measured
from cgpu_agent.errors import Misuse
from fixtures.ctl import USAGE, Ctl


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("4096", 4096), ("64KiB", 1 << 16), ("16MiB", 1 << 24), ("2GiB", 2 << 30)]
)
def test_sizes_are_bytes_or_have_a_unit(text: str, size: int) -> None:
    assert parse_size(text, "--size") == size


@pytest.mark.parametrize(
    "text", ["", "0", "0MiB", "-1", "+1", "1.5MiB", "1MB", "1mib", "1 MiB", "1MiB ", "MiB", "0x10", "٣", "9" * 13]
)
def test_what_is_no_size_is_refused_by_the_name_of_its_option(text: str) -> None:
    with pytest.raises(Misuse, match="--size must be a size") as caught:
        parse_size(text, "--size")
    assert caught.value.slug == "BAD_ARGUMENT"


def test_ranks_and_rates() -> None:
    waited = tuple(float(number) for number in range(200, 0, -1))
    found = Measured(size=1 << 20, copies=1000, seconds=2.0, waited=waited)
    assert (found.small(0.5), found.small(0.99)) == (100.0, 198.0)
    assert found.gigabytes == pytest.approx(0.524288)
    alone = Measured(1, 1, 1.0, (7.0,))
    assert (alone.small(0.5), alone.small(0.99)) == (7.0, 7.0)


def test_progress_can_be_told_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("cgpu_agent.cli.progress._EVERY", 0.0)
    progress = Progress("load", None)
    progress.reach(1_500_000_000, 3_000_000_000)
    assert "load  1.50 GB of 3.00" in capsys.readouterr().err
    progress.add(500_000_000)
    assert "load  2.00 GB of 3.00" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("transfer",), ("transfer", "bench", "--direction", "up"), ("transfer", "copy")])
def test_what_is_incomplete_is_a_usage_error(ctl: Ctl, words: tuple[str, ...]) -> None:
    ran = ctl(*words)
    assert (ran.code, ran.out) == (USAGE, "")
