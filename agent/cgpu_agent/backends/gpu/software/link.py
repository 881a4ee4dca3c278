"""A connection to one endpoint of the software GPUs: a deadline on every message, a name for each failure."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

from cgpu_agent.backends.gpu.software.frames import Frame, Kind, read_frame
from cgpu_agent.errors import DeviceFault, HostileInput
from cgpu_agent.wire import spdm12


class Link:
    """Connects at the first message. After any failure it is broken: make another.

    Args:
        path: the process's socket.
        endpoint: whom to talk to.
    """

    def __init__(self, path: Path, endpoint: int) -> None:
        self._path: Final = path
        self._endpoint: Final = endpoint
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.broken = False

    async def exchange(self, kind: Kind, payload: bytes, deadline: float) -> Frame:
        """Send a payload, return the answer of the same endpoint.

        Args:
            deadline: ``time.monotonic`` moment by which the answer is here.

        Raises:
            DeviceFault: ``GPU_TIMEOUT``, ``GPU_LOST`` (nothing is at this endpoint), ``GPU_DRIVER`` (the process does
                not listen, or hung up), ``GPU_ERROR`` (it does not speak this protocol).
        """
        if self.broken:
            raise DeviceFault("GPU_DRIVER", "the connection to the GPU is broken")
        try:
            limit = max(0.0, deadline - time.monotonic())
            answer = await asyncio.wait_for(self._exchange(Frame(self._endpoint, kind, payload)), limit)
        except (asyncio.TimeoutError, TimeoutError) as error:
            self.close()
            raise DeviceFault("GPU_TIMEOUT", "the GPU did not answer in time", retry_after=1.0) from error
        except (OSError, EOFError) as error:
            self.close()
            raise DeviceFault("GPU_DRIVER", "the GPU's driver does not answer", retry_after=1.0) from error
        except HostileInput as error:
            self.close()
            raise DeviceFault("GPU_ERROR", "the GPU's driver sent something that is no answer") from error
        except BaseException:
            self.close()  # cancelled: an answer may still come, and must not be taken for the next one
            raise
        if answer.endpoint != self._endpoint:
            self.close()
            raise DeviceFault("GPU_ERROR", "another GPU answered")
        if answer.kind is Kind.UNREACHABLE:
            self.close()
            raise DeviceFault("GPU_LOST", "the GPU is gone")
        return answer

    async def spdm(self, message: bytes, deadline: float) -> bytes:
        """Exchange SPDM messages in the clear. Raises as ``exchange``."""
        answer = await self.exchange(Kind.SPDM, message, deadline)
        if answer.kind is not Kind.SPDM:
            self.close()
            raise DeviceFault("GPU_ERROR", "the GPU answered with a sealed message")
        return answer.payload

    async def vendor(self, payload: bytes, deadline: float) -> bytes:
        """Exchange payloads of vendor-defined messages. Raises as ``exchange``."""
        answer = await self.spdm(spdm12.encode_vendor(payload, response=False), deadline)
        try:
            return spdm12.parse_vendor(answer, response=True)
        except HostileInput as error:
            self.close()
            raise DeviceFault("GPU_ERROR", "the GPU refused a request, or answered another") from error

    def close(self) -> None:
        """Hang up. Idempotent."""
        self.broken = True
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _exchange(self, frame: Frame) -> Frame:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(self._path)
        reader, writer = self._streams
        writer.write(frame.encode())
        await writer.drain()
        answer = await read_frame(reader)
        if answer is None:
            raise EOFError
        return answer
