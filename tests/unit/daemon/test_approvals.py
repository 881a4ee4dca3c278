"""The owner's approvals are read as installed; one that is not good names its file, and none is left out silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgpu_agent.daemon.approvals import MAX_APPROVALS, load_approvals
from cgpu_agent.daemon.brokerconfig import SealedConfig
from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.approval import sign_approval
from cgpu_agent.wire.approval import Approval
from fixtures.owner import FLEET, GROUP, Owner


def approval(epoch: int) -> Approval:
    return sign_approval(Owner(7).pem, fleet=FLEET, groups=[GROUP], pcrs={7: bytes(32)}, epoch=epoch)


def test_approvals_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, epoch in (("b.json", 2), ("a.json", 1), ("notes.txt", 3)):
        (tmp_path / name).write_bytes(approval(epoch).encode())
    assert [each.epoch for each in load_approvals(SealedConfig(str(tmp_path)))] == [1, 2]


def test_without_the_directory_there_are_none(tmp_path: Path) -> None:
    assert load_approvals(SealedConfig(str(tmp_path / "none"))) == ()


@pytest.mark.parametrize("content", [b"", b"{}", b"x" * (1 << 20)])
def test_a_bad_one_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(approval(1).encode())
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(Misuse, match=r"bad\.json") as caught:
        load_approvals(SealedConfig(str(tmp_path)))
    assert caught.value.slug == "BAD_CONFIG"


def test_a_name_that_is_no_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(Misuse, match=r"a\.json"):
        load_approvals(SealedConfig(str(tmp_path)))


def test_there_are_not_too_many(tmp_path: Path) -> None:
    for number in range(MAX_APPROVALS + 1):
        (tmp_path / f"{number}.json").write_bytes(b"")
    with pytest.raises(Misuse, match="more than"):
        load_approvals(SealedConfig(str(tmp_path)))
