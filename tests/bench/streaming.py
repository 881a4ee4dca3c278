"""What transfers are compared with: a gRPC server that puts the bytes streamed to it into memory."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc

SERVICE, METHOD = "bench.Streaming", "Write"
UNBOUNDED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


async def main(address: str, size: int) -> None:
    """Serve until stdin closes; each call brings ``size`` bytes."""
    memory = bytearray(size)

    async def write(messages: AsyncIterator[bytes], _context: object) -> bytes:
        place = 0
        async for message in messages:
            memory[place : place + len(message)] = message
            place += len(message)
        return b""

    server = grpc.aio.server(options=UNBOUNDED)
    handlers = {METHOD: grpc.stream_unary_rpc_method_handler(write)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"unix:{address}")
    await server.start()
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
