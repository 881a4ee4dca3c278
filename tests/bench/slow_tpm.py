"""A TPM as slow at quoting as a cloud's: passes commands on to swtpm, and holds every TPM2_Quote back for a while.

swtpm quotes in about a millisecond, real vTPMs in tens to hundreds. What sharing a quote is worth shows only there.
"""

from __future__ import annotations

import socket
import sys
import threading
import time

_TPM_CC_QUOTE = (0x158).to_bytes(4, "big")
_FRAME = 4096


def serve(listener: socket.socket, target: str, delay: float) -> None:
    """One command a connection, one after the other, as a TPM does it."""
    while True:
        stream, _ = listener.accept()
        with stream, socket.socket(socket.AF_UNIX) as tpm:
            command = stream.recv(_FRAME)
            if command[6:10] == _TPM_CC_QUOTE:
                time.sleep(delay)
            tpm.connect(target)
            tpm.sendall(command)
            stream.sendall(tpm.recv(_FRAME))


def main(address: str, target: str, delay: float) -> None:
    """Serve until stdin closes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    threading.Thread(target=serve, args=(listener, target, delay), daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
