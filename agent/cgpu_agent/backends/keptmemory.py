"""Memory on lease of an earlier run of the agent: the file's mode says which kind it is, and whether it is whole."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from cgpu_agent.backends.memory import SEALS, SETTLED, SharedMemory
from cgpu_agent.backends.workmemory import WRITABLE, WorkMemory
from cgpu_agent.errors import HostileInput


def adopted(fd: int) -> SharedMemory | WorkMemory:
    """The memory; zeros where the agent was filling it when that run ended. Takes the descriptor.

    Raises:
        HostileInput: ``BAD_KEPT_MEMORY``: the agent never made this.
        Unavailable: ``NO_MEMORY``.
    """
    try:
        found = os.fstat(fd)
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
        if not (sealed and stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_size):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    except OSError as error:
        os.close(fd)
        raise HostileInput("BAD_KEPT_MEMORY", "what was kept is not memory that this agent leased") from error
    mode = stat.S_IMODE(found.st_mode)
    if mode == WRITABLE:
        return WorkMemory(found.st_size, fd)
    memory = SharedMemory(found.st_size, fd)
    if mode != SETTLED:
        memory.wipe()
    return memory
