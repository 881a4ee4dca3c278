"""Takes all connections and leases that the agent gives, as many users, and holds them until its own input ends.

Runs inside a container on the package's libraries:  crowd.py CONNECTIONS CONNECTIONS_PER_UID LEASES LEASES_PER_UID
Prints one line of JSON: what each user is told while all is taken, and what one more of them is.
"""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, "/usr/lib/cgpu-agent")

from cgpu_agent.client import Agent, AgentError
from cgpu_agent.client.lease import LeasedMemory

FIRST_UID = 20000
PLACE = "/run/cgpu-agent"


def lease():
    """A lease that holds all that one can: it came with a sealed object."""
    with Path("/etc/os-release").open("rb") as source:
        return LeasedMemory(f"{PLACE}/lease.sock", 1, source, 30.0)


def connect():
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(f"{PLACE}/agent.sock")
    return sock


def told(attempt):
    """What the caller is told."""
    try:
        attempt()
    except AgentError as error:
        return f"{error.slug}: {error.message}"
    return "served"


def become(uid):
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def member(pipe, uid, connections, leases):
    become(uid)
    agent = Agent(timeout=30.0)
    agent.get_identity()
    held = [connect() for _ in range(connections - 1)] + [lease() for _ in range(leases)]
    pipe.send(len(held))
    pipe.recv()
    pipe.send(told(agent.get_identity))
    pipe.recv()


def one_more(pipe, uid):
    become(uid)
    pipe.send({"call": told(Agent(timeout=5.0).get_identity), "lease": told(lease)})


def start(target, uid, *arguments):
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.Process(target=target, args=(theirs, uid, *arguments), daemon=True).start()
    theirs.close()
    return ours


def main(connections, connections_per_uid, leases, leases_per_uid):
    members = []
    for number in range(connections // connections_per_uid):
        own = min(leases_per_uid, max(0, leases - number * leases_per_uid))
        members.append(start(member, FIRST_UID + number, connections_per_uid, own))
    for pipe in members:
        pipe.recv()
    more = start(one_more, FIRST_UID + len(members)).recv()
    for pipe in members:
        pipe.send("ask")
    print(json.dumps({"members": [pipe.recv() for pipe in members], "one more": more}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    main(*map(int, sys.argv[1:]))
