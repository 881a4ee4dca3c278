"""Tries what a sandbox forbids, and prints as JSON how each attempt ended: "done", or the error's name.

Runs inside a unit, on Debian's Python alone. Where nothing forbids them, all attempts succeed and do no harm.
"""

import ctypes
import errno
import json
import mmap
import os
import socket
import sys
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER, CLONE_NEWNS, MS_BIND = 0x10000000, 0x20000, 4096
PR_CAPBSET_READ = 23


def call(name, *arguments):
    """A function of libc; OSError when it fails."""
    if getattr(LIBC, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def apart(attempt):
    """Run an attempt in a child: what it changes ends with it."""
    pid = os.fork()
    if pid == 0:
        try:
            attempt()
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, "in a child")


def write_and_run():
    mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_READ | mmap.PROT_EXEC).close()


def write_to(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def set_uid_bit():
    path = Path(os.environ.get("STATE_DIRECTORY", "/tmp").split(":")[0], "probe")
    path.write_bytes(b"")
    try:
        path.chmod(0o4700)
    finally:
        path.unlink()


def see_foreign_temporary_files():
    if not Path("/tmp/of-somebody-else").exists():
        raise OSError(errno.ENOENT, "a private /tmp")


def connect_to_metadata_service():
    with socket.socket() as sock:
        sock.settimeout(1)
        try:
            sock.connect(("169.254.169.254", 80))
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, "no answer") from None


ATTEMPTS = {
    "write /etc": lambda: write_to("/etc/probe"),
    "write /usr": lambda: write_to("/usr/lib/probe"),
    "write /sys": lambda: write_to("/sys/fs/cgroup/cgroup.subtree_control"),
    "write /proc/sys": lambda: write_to("/proc/sys/net/ipv4/ip_forward"),
    "read /root": lambda: list(Path("/root").iterdir()),
    "foreign /tmp": see_foreign_temporary_files,
    "open /dev/fuse": lambda: os.close(os.open("/dev/fuse", os.O_RDWR)),
    "AF_INET": lambda: socket.socket(socket.AF_INET).close(),
    "AF_NETLINK": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close(),
    "metadata service": connect_to_metadata_service,
    "user namespace": lambda: apart(lambda: call("unshare", CLONE_NEWUSER)),
    "mount": lambda: apart(
        lambda: (call("unshare", CLONE_NEWNS), call("mount", b"/etc", b"/etc", None, MS_BIND, None))
    ),
    "W+X memory": write_and_run,
    "set-uid bit": set_uid_bit,
    "real time": lambda: apart(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))),
    "host name": lambda: socket.sethostname(socket.gethostname()),
    "personality": lambda: apart(lambda: call("personality", 0x0008)),
    "chroot": lambda: apart(lambda: os.chroot("/")),
}


def main():
    ended = {}
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
        except OSError as error:
            ended[name] = errno.errorcode.get(error.errno, str(error.errno))
        else:
            ended[name] = "done"
    bounding = sum(1 << number for number in range(41) if LIBC.prctl(PR_CAPBSET_READ, number, 0, 0, 0) == 1)
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
    )
    facts = {name: status[name] for name in ("CapEff", "CapPrm", "NoNewPrivs", "Seccomp", "Uid", "Groups")}
    json.dump({"ended": ended, "bounding": bounding, **facts}, sys.stdout)


main()
