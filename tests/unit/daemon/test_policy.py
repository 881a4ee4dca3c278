"""The policy in force is the one that the configuration names, or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgpu_agent.cedar.files import default_policy
from cgpu_agent.daemon.config import Config
from cgpu_agent.daemon.policy import load_policy
from cgpu_agent.domain.policy import Policy
from cgpu_agent.errors import Misuse


def refusal(path: Path) -> str:
    with pytest.raises(Misuse) as caught:
        load_policy(Config(policy=str(path)))
    assert caught.value.slug == "BAD_POLICY"
    return caught.value.message


def test_without_a_file_the_built_in_policy_holds() -> None:
    assert load_policy(Config()).digest == Policy.default().digest


def test_a_file_takes_the_place_of_the_built_in_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.cedar"
    path.write_text(default_policy() + "// mine\n")
    assert load_policy(Config(policy=str(path))).digest != Policy.default().digest


def test_a_file_that_is_missing_is_not_replaced_by_the_built_in_policy(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "absent")
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff", "is not UTF-8 text"),
        (b"//" + b" " * (256 << 10), "larger than"),
        (b"(" * 100_000, "line 1, policy #1: is nested deeper"),
        (b"\n\npermit(principal, action, resource);", "line 3, policy #1: has no @id"),
    ],
)
def test_a_bad_file_is_refused_with_its_path_and_place(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "policy.cedar"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(str(path))
    assert said in message
