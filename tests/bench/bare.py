"""What the daemon is compared with: a grpc.aio server with the handler that the daemon serves too, and nothing else.

With ``door`` it stands behind a front door, but without the gate: for telling the cost of the two apart.
"""

from __future__ import annotations

import asyncio
import os
import sys

import grpc
from grpc_health.v1 import health, health_pb2_grpc


async def main(address: str, *, door: bool) -> None:
    """Serve until stdin closes."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    inner = address
    if door:
        os.mkdir(f"{address}.d", 0o700)  # noqa: PTH102 - nothing else runs yet
        inner = f"{address}.d/s"
    server.add_insecure_port(f"unix:{inner}")
    await server.start()
    if door:
        # Only where it is wanted: the memory of the bare server is measured as well.
        from cgpu_agent.rpc.addresses import bind_listener
        from cgpu_agent.rpc.admission import DoorLimits
        from cgpu_agent.rpc.environment import self_check_environment
        from cgpu_agent.rpc.frontdoor import FrontDoor
        from cgpu_agent.rpc.identify import Identifier

        identifier = Identifier(self_check_environment())
        FrontDoor([bind_listener(address, 0o600)], inner, identifier, limits=DoorLimits(max_per_uid=1024)).start()
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], door="door" in sys.argv[2:]))
