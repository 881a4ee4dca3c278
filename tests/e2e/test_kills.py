"""A few rounds of the kill campaign in every test run; the whole of it is ``make kills``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from fixtures.kills import Campaign
from fixtures.killworld import world

pytestmark = pytest.mark.swtpm


def test_whatever_dies_no_key_is_lost_and_none_is_let_go_without_its_record() -> None:
    # A short path: socket addresses have at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kills-", dir="/tmp") as folder, world(Path(folder)) as found:
        campaign = Campaign(found, rounds=12, seed=1)
        for number in range(12):
            campaign.round(number)
        campaign.end()
    assert campaign.released > 12 * len(found.names)
