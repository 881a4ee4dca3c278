"""The public socket never takes somebody else's place, and the private directory is private."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cgpu_agent.errors import AgentError
from cgpu_agent.rpc.addresses import PrivateDirectory, adopt_listener, bind_listener


@pytest.fixture
def public(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path / "agent.sock"


def slug_of(action: Callable[[], object]) -> str:
    with pytest.raises(AgentError) as refused:
        action()
    return refused.value.slug


def bind(path: Path | str) -> Callable[[], object]:
    return lambda: bind_listener(str(path), 0o666)


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_the_mode_does_not_depend_on_the_umask(public: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        listener = bind_listener(str(public), 0o660)
    finally:
        os.umask(before)
    assert public.stat().st_mode & 0o7777 == 0o660
    listener.close()
    listener.close()
    assert not public.exists()


def test_replaces_a_socket_that_nobody_answers(public: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(public))
    bind_listener(str(public), 0o666).close()


def test_leaves_a_socket_that_answers(public: Path) -> None:
    listener = bind_listener(str(public), 0o666)
    assert slug_of(bind(public)) == "SOCKET_IN_USE"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(public))
    listener.close()


def test_leaves_a_socket_whose_queue_is_full(public: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(public))
        busy.listen(0)
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(public))
            assert slug_of(bind(public)) == "SOCKET_IN_USE"
    assert public.is_socket()


@pytest.mark.parametrize("kind", ["file", "folder", "link", "link to nothing"])
def test_leaves_what_is_not_a_socket(public: Path, kind: str) -> None:
    elsewhere = public.parent / "elsewhere"
    if kind == "file":
        public.write_text("precious")
    elif kind == "folder":
        public.mkdir()
    else:
        public.symlink_to(elsewhere)
    if kind == "link":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(elsewhere))
    assert slug_of(bind(public)) == "SOCKET_PATH_TAKEN"
    assert public.is_symlink() == kind.startswith("link")
    assert elsewhere.exists() == (kind == "link")


def test_refuses_a_directory_where_others_write(public: Path) -> None:
    public.parent.chmod(0o777)
    assert slug_of(bind(public)) == "SOCKET_DIRECTORY_UNSAFE"
    public.parent.chmod(0o775)
    assert slug_of(bind(public)) == "SOCKET_DIRECTORY_UNSAFE"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a directory away")
def test_refuses_a_directory_of_another_user(public: Path) -> None:
    os.chown(public.parent, 1234, 1234)
    assert slug_of(bind(public)) == "SOCKET_DIRECTORY_UNSAFE"


def test_refuses_a_directory_that_is_a_link(public: Path) -> None:
    link = public.parent / "link"
    link.symlink_to(public.parent)
    assert slug_of(bind(link / "agent.sock")) == "SOCKET_DIRECTORY_UNSAFE"


@pytest.mark.parametrize("path", ["", "agent.sock", "\0agent", "/a\0b", "/" + "a" * 107])
def test_refuses_paths_that_are_not_plain(path: str) -> None:
    assert slug_of(bind(path)) == "SOCKET_PATH_INVALID"


def test_adopts_listening_unix_stream_sockets_only(public: Path) -> None:
    tcp = socket.socket(socket.AF_INET)
    datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    silent = socket.socket(socket.AF_UNIX)
    with tcp, datagram, silent:
        tcp.listen()
        for sock in (tcp, datagram, silent):
            assert slug_of(lambda sock=sock: adopt_listener(sock)) == "LISTENER_INVALID"
        silent.bind(str(public))
        silent.listen()
        adopt_listener(silent).close()
    assert public.is_socket()


# -- the private directory


def test_accepts_a_directory_of_its_own(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    directory = PrivateDirectory(f"{tmp_path}/grpc.sock")
    names = {directory.fresh_name() for _ in range(1000)}
    assert len(names) == 1000
    assert all(Path(name).parent == tmp_path and len(Path(name).name) == 24 for name in names)


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o755, 0o600, 0o1700])
def test_refuses_a_directory_that_others_enter(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    assert slug_of(lambda: PrivateDirectory(f"{tmp_path}/grpc.sock")) == "SOCKET_DIRECTORY_UNSAFE"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a directory away")
def test_refuses_another_users_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    os.chown(tmp_path, 1234, 1234)
    assert slug_of(lambda: PrivateDirectory(f"{tmp_path}/grpc.sock")) == "SOCKET_DIRECTORY_UNSAFE"


def test_refuses_a_link_or_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    assert slug_of(lambda: PrivateDirectory(f"{tmp_path}/link/grpc.sock")) == "SOCKET_DIRECTORY_UNSAFE"
    assert slug_of(lambda: PrivateDirectory(f"{tmp_path}/missing/grpc.sock")) == "SOCKET_DIRECTORY_UNSAFE"


@pytest.mark.parametrize(
    "inner", ["grpc.sock", "/run/a b/s", "/run/a%20b/s", "/run/\u00e4/s", "/run/a/", f"/{'a' * 84}/s"]
)
def test_refuses_paths_that_grpc_would_not_repeat(inner: str) -> None:
    assert slug_of(lambda: PrivateDirectory(inner)) == "SOCKET_PATH_INVALID"
