"""A caller in a process of its own: becomes who it is told to be, connects, says JSON lines."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import grpc._channel  # loaded now: another uid may not be able to read the interpreter's files

SERVICE = "kit.Kit"


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


def become(options: dict[str, Any]) -> None:
    """Change groups, gid and uid for good; with ``namespace``, then be root of a user namespace of one's own."""
    if "uid" in options:
        os.setgroups(options.get("groups", []))
        os.setgid(options.get("gid", options["uid"]))
        os.setuid(options["uid"])
    if options.get("namespace"):
        uid, gid = os.getuid(), os.getgid()
        # A process that changed its uid does not own its /proc files; without that it cannot write its maps.
        ctypes.CDLL(None).prctl(4, 1)
        if ctypes.CDLL(None).unshare(0x10000000) != 0:
            raise OSError("no user namespace")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        assert os.getuid() == os.getgid() == 0


def named_relay(target: str, name: str) -> str:
    """Listen for this process's own channel and pass it on from a socket bound to ``name``: grpc cannot bind."""
    upstream = socket.socket(socket.AF_UNIX)
    upstream.bind(name)
    upstream.connect(target)
    listener = socket.socket(socket.AF_UNIX)
    local = f"\0relay-{os.getpid()}"
    listener.bind(local)
    listener.listen(1)

    def copy(source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            sink.sendall(data)

    def serve() -> None:
        downstream, _ = listener.accept()
        threading.Thread(target=copy, args=(downstream, upstream), daemon=True).start()
        copy(upstream, downstream)

    threading.Thread(target=serve, daemon=True).start()
    return f"unix-abstract:{local[1:]}"


def channel_to(options: dict[str, Any]) -> grpc.Channel:
    target = options[options.get("to", "public")]
    name = options.get("bind")
    return grpc.insecure_channel(named_relay(target, name) if name else f"unix:{target}")


def ask(channel: grpc.Channel, method: str) -> Any:
    """The answer, or the refusal as ``[code, details]``."""
    try:
        return json.loads(channel.unary_unary(f"/{SERVICE}/{method}")(b"", timeout=30))
    except grpc.RpcError as error:
        return [error.code().name, error.details()]


def who(options: dict[str, Any]) -> None:
    """Say what the server answers. Option ``method``."""
    with channel_to(options) as channel:
        say(ask(channel, options.get("method", "Who")))
        if options.get("stay"):
            sys.stdin.readline()


def change_uid(options: dict[str, Any]) -> None:
    """Connect as one user, go on as another."""
    with channel_to(options) as channel:
        say(ask(channel, "Who"))
        os.setuid(options["then"])
        say(ask(channel, "Who"))


def raw(options: dict[str, Any]) -> None:
    """Open ``count`` connections, become uid ``then`` if given; say how many the server closed, when asked."""
    sockets = []
    for _ in range(options.get("count", 1)):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(options[options.get("to", "public")])
        except OSError as error:
            say(error.strerror)
            return
        sock.setblocking(False)
        sockets.append(sock)
    if "then" in options:
        os.setuid(options["then"])
    say("connected")
    for _ in sys.stdin:
        say(sum(is_closed(sock) for sock in sockets))


def send(options: dict[str, Any]) -> None:
    """Have ``size`` bytes echoed, say how many came back; with ``every``, again and again after so many seconds."""
    with channel_to(options) as channel:
        while True:
            say(len(channel.unary_unary(f"/{SERVICE}/Echo")(bytes(options["size"]), timeout=60)))
            if "every" not in options:
                return
            time.sleep(options["every"])


def is_closed(sock: socket.socket) -> bool:
    try:
        # grpc greets first, so anything may be waiting before the end.
        while sock.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


def hold(options: dict[str, Any]) -> None:
    """Start a stream and wait. With ``heir``, leave the connection to a child first, which says when it ended."""
    with channel_to(options) as channel:
        stream = channel.unary_stream(f"/{SERVICE}/Hold")(b"")
        next(stream)
        if "heir" in options:
            fd = next(
                fd
                for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]
                if is_connection(fd, options["public"])
            )
            subprocess.Popen([sys.executable, __file__, "heir", json.dumps({**options, "fd": fd})], pass_fds=[fd])
            sys.stdin.readline()
        say("holding")
        signal.pause()


def is_connection(fd: int, address: str) -> bool:
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            return sock.getpeername() == address
    except OSError:
        return False


def heir(options: dict[str, Any]) -> None:
    """Hold an inherited connection until it ends, and write down that it did."""
    sock = socket.socket(fileno=options["fd"])
    sock.setblocking(True)
    Path(options["heir"]).write_text("holding")
    # Nothing may be read while the parent still needs it; the end of the connection shows without reading.
    poll = select.poll()
    poll.register(sock, 0)
    poll.poll()
    Path(options["heir"]).write_text("ended")


def execute(options: dict[str, Any]) -> None:
    """Connect, then become another program that keeps the connection."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(options["public"])
    os.set_inheritable(sock.fileno(), True)
    say("connected")
    sys.stdin.readline()
    os.execv("/bin/sleep", ["sleep", "1000"])


def names(options: dict[str, Any]) -> None:
    """Read the door's connection names, which every uid can see, and try to take one."""
    prefix = str(Path(options["inner"]).parent) + "/"
    found = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if prefix in line]
    name = next(name for name in found if name != options["inner"])
    try:
        socket.socket(socket.AF_UNIX).bind(name)
    except OSError as error:
        say([name, error.strerror])
    else:
        say([name, "bound"])


VERBS = {
    "who": who,
    "change-uid": change_uid,
    "raw": raw,
    "send": send,
    "hold": hold,
    "heir": heir,
    "exec": execute,
    "names": names,
}

if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    become(settings)
    VERBS[sys.argv[1]](settings)
