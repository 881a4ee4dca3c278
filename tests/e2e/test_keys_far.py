"""Keys from brokers in the world: daemon, cgpu-egress, TLS, broker, each a process or a server of its own.

The broker is a stand-in for Trustee; a real OpenBao's turn is in ``test_keys_openbao.py``.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from cgpu_agent.client import AgentError
from cgpu_agent.wire.audit import EMPTY, follow
from fixtures.daemon import PATIENCE, Daemon, booted_daemon
from fixtures.egress import Egress, Pki, Server, WebService, allowing, running_egress, serving
from fixtures.kbs import ORIGIN, Answer, Kbs
from fixtures.policies import permit

pytestmark = pytest.mark.swtpm

SECRET = os.urandom(16).hex().encode()
PERMIT = permit("key.get", f'principal.uid == {os.geteuid()} && resource.broker == "trustee"')


@dataclass
class Far:
    """All of it. ``allow``: what egress lets through, written anew by a test before ``start``."""

    daemon: Daemon
    kbs: Kbs
    server: Server
    pki: Pki

    def start(self, egress: Egress, ca: Path | None = None) -> None:
        daemon = self.daemon
        daemon.grants = PERMIT
        daemon.tables["tpm"] = daemon.tables["tpm"].replace('"ecc"', '"rsa"')  # the only one Trustee knows
        daemon.configure()
        daemon.config.write_text(
            daemon.config.read_text()
            + f'[egress]\nsocket = "{egress.socket}"\n'
            + f'[trustee]\nurl = "https://127.0.0.1:{self.server.port}"\nca_file = "{ca or self.pki.file}"\n'
            + '[[key]]\nid = "far"\nbroker = "trustee"\npath = "default/key/far"\n'
            + '[[key]]\nid = "none"\nbroker = "trustee"\npath = "default/key/none"\n'
        )
        daemon.start()

    def refused(self, key: str = "far") -> AgentError:
        with self.daemon.client() as agent, pytest.raises(AgentError) as caught:
            agent.get_key(key)
        return caught.value

    @property
    def here(self) -> str:
        return allowing(f'"127.0.0.1:{self.server.port}"')


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Far]:
    kbs, pki = Kbs(resources={"default/key/far": SECRET}), Pki(tmp_path)

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        return asyncio.run(kbs.request(method, ORIGIN + path, headers=headers, body=body, timeout=1, limit=1))

    with serving(WebService(pki.server("127.0.0.1"), answer)) as (server,), booted_daemon() as daemon:
        yield Far(daemon, kbs, server, pki)


def test_a_key_from_far_away(far: Far, tmp_path: Path) -> None:
    with running_egress(tmp_path, far.here) as egress:
        far.start(egress)
        with far.daemon.client() as agent:
            key = agent.get_key("far")
            assert (key.secret, key.broker, key.generation) == (SECRET, "trustee", 1)
        assert far.refused("none").slug == "KEY_ABSENT"
        far.kbs.need_gpus = 1
        assert far.refused().slug == "KEY_REFUSED"
        assert far.daemon.stop() == 0
    kept = [path.read_bytes() for path in far.daemon.folder.rglob("*") if path.is_file()]
    assert not any(SECRET in data for data in kept)
    log = follow((far.daemon.folder / "state" / "audit.jsonl").read_bytes(), EMPTY)[0]
    assert [each.data["key"] for each in log if each.event == "key"] == ["far"]


def test_what_stands_in_the_way_is_said(far: Far, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with running_egress(tmp_path, allowing('"192.0.2.1:443"')) as egress:
        far.start(egress)
        error = far.refused()
        assert (error.slug, "EGRESS_DENIED" in error.message) == ("BROKER_UNREACHABLE", True)
        far.daemon.stop()
    far.start(egress)
    assert "EGRESS_UNREACHABLE" in far.refused().message
    far.daemon.stop()
    with running_egress(tmp_path / "b", far.here) as egress:
        far.start(egress, ca=Pki(tmp_path, "other").file)
        assert "EGRESS_TLS" in far.refused().message
    assert far.server.connections == 1
    assert far.kbs.log == []


def test_a_broker_that_hangs_holds_up_nobody_else(far: Far, tmp_path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def hang(answer: Answer) -> Answer:
        reached.set()
        go_on.wait(PATIENCE)
        return answer

    far.kbs.on_answer["auth"] = hang
    with running_egress(tmp_path, far.here) as egress:
        far.start(egress)

        async def go() -> bytes:
            async with far.daemon.async_client() as agent:
                slow = asyncio.create_task(agent.get_key("far"))
                await asyncio.to_thread(reached.wait, PATIENCE)
                await agent.get_evidence(os.urandom(32), "relying-party.example")
                assert not slow.done()
                go_on.set()
                return (await slow).secret

        assert asyncio.run(go()) == SECRET
