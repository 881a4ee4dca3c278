"""How keys and those who keep them are named: in configuration, policy, evidence and deliveries alike."""

from __future__ import annotations

import re
from typing import Final

MAX_KEY_ID: Final = 128
KEY_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
"""The agent's ids of keys."""
BROKER: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
