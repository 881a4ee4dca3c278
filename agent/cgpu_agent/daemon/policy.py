"""Reads the policy that the configuration names."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cedar.text import MAX_BYTES
from cgpu_agent.daemon.config import DEFAULT_POLICY, Config
from cgpu_agent.domain.policy import Policy
from cgpu_agent.errors import Misuse


def load_policy(config: Config) -> Policy:
    """The policy in force with ``config``. A file that is missing or bad is an error, never the default instead.

    Raises:
        Misuse: ``BAD_POLICY``, with the file, and the policy and line at fault.
    """
    if config.policy == DEFAULT_POLICY:
        return Policy.default()
    path = Path(config.policy)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Misuse("BAD_POLICY", f"{path} cannot be read: {error.strerror}") from error
    try:
        return Policy.load(text.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise Misuse("BAD_POLICY", f"{path}: is not UTF-8 text") from error
