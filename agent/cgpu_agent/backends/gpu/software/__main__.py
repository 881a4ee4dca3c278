"""``python -m cgpu_agent.backends.gpu.software``: see ``device``."""

from __future__ import annotations

import sys

from cgpu_agent.backends.gpu.software.device import main

if __name__ == "__main__":
    sys.exit(main())
