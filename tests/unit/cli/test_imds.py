"""The metadata service's client, before a service and before what is none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cgpu_agent.cli.imds import MetadataService
from cgpu_agent.errors import HostileInput, Misuse, Unavailable
from fixtures.imds import metadata_service, quote_answer


@contextmanager
def answering(data: bytes) -> Iterator[str]:
    """A server that says this to whoever connects."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener.accept()[0] as stream:
            stream.recv(65536)
            stream.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        thread.join(10)
        listener.close()


def test_certificates_and_quotes_come_back() -> None:
    with metadata_service(quote=lambda report: quote_answer(report[::-1])) as url:
        service = MetadataService(f"{url}/")
        assert len(service.certification().certificates) == 3
        assert service.td_quote(b"\xfb\xff\x00report") == b"troper\x00\xff\xfb"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 500 No\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_service_is_said(data: bytes) -> None:
    with answering(data) as url, pytest.raises(Unavailable) as caught:
        MetadataService(url).certification()
    assert caught.value.slug == "NO_METADATA"


def test_is_sent_nowhere_else() -> None:
    with metadata_service() as elsewhere:
        there = f"HTTP/1.1 302 Found\r\nLocation: {elsewhere}/metadata/THIM/amd/certification\r\n\r\n"
        with answering(there.encode()) as url, pytest.raises(Unavailable):
            MetadataService(url).certification()


@pytest.mark.parametrize("body", [b"", b"{}", b"x" * (1 << 20)])
def test_what_is_no_answer_is_refused(body: bytes) -> None:
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + body) as url, pytest.raises(HostileInput):
        MetadataService(url).certification()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(Unavailable):
        MetadataService(f"http://127.0.0.1:{port}").certification()


@pytest.mark.parametrize("url", ["https://169.254.169.254", "file:///etc/passwd", "169.254.169.254", ""])
def test_refuses_other_urls(url: str) -> None:
    with pytest.raises(Misuse):
        MetadataService(url)


def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with metadata_service() as url:
        assert MetadataService(url).certification().tcb
