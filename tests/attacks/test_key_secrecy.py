"""No released key, and nothing that opens one, turns up anywhere but with the workload that may have it.

One agent with three brokers, two of them stand-ins in the world behind ``cgpu-egress``: each is made to fail in the
ways that put a secret within reach of an error, and then everything that others can see is searched.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc import jwk

from cgpu_agent.api.v1 import keys_pb2, keys_pb2_grpc
from cgpu_agent.backends.base import MAX_SECRET, ReleasedKey
from cgpu_agent.backends.keys.openbao import OpenBao
from cgpu_agent.client import Agent, AgentError, calls
from cgpu_agent.client.unwrap import Receiver
from cgpu_agent.domain.release import Delivery
from cgpu_agent.wire.audit import EMPTY, follow
from fixtures.caller import GONE, caller, through
from fixtures.daemon import PATIENCE, Daemon, booted_daemon
from fixtures.egress import Egress, Pki, _request, allowing, http, running_egress, serving
from fixtures.kbs import ORIGIN, Kbs, encrypted
from fixtures.openbao import PATH, SECRET, DirectHttp, Vm, keep, needs_openbao, running_broker
from fixtures.policies import permit

pytestmark = pytest.mark.swtpm

ME: Final = f"principal.uid == {os.geteuid()}"
EVERYTHING: Final = permit("key.get", ME) + permit("key.get_plain", ME)


def spellings(secret: bytes) -> Iterator[bytes]:
    """The forms in which text can hold it."""
    yield secret
    yield from (secret.hex().encode(), secret.hex().upper().encode())
    yield repr(secret)[2:-1].encode()
    for shift in range(3):
        # Within base64 of something longer: the digits that do not depend on the bytes around it.
        code = base64.b64encode(bytes(shift) + secret)[(0, 2, 3)[shift] : (shift + len(secret)) // 3 * 4]
        yield from (code, code.replace(b"+", b"-").replace(b"/", b"_"))


def found_in(data: bytes, secrets: Mapping[str, bytes]) -> list[str]:
    return [name for name, secret in secrets.items() if any(form in data for form in spellings(secret))]


@pytest.mark.parametrize(
    "spell",
    [
        bytes,
        lambda secret: secret.hex().encode(),
        lambda secret: secret.hex().upper().encode(),
        lambda secret: repr(b"before" + secret).encode(),
        *(lambda secret, n=n: base64.b64encode(b"x" * n + secret + b"after") for n in range(4)),
        *(lambda secret, n=n: base64.urlsafe_b64encode(b"x" * n + secret + b"y" * n) for n in range(4)),
    ],
)
def test_the_search_finds_what_it_looks_for(spell: Callable[[bytes], bytes]) -> None:
    secret = os.urandom(32)
    assert found_in(b"words " + spell(secret) + b" words", {"it": secret, "other": os.urandom(32)}) == ["it"]


@dataclass
class World:
    """All that keys come from. ``bearers``: what lets whoever has it speak to a broker; all of it random.

    Attributes:
        secrets: by broker.
        entries: of OpenBao, by path: status and body.
        cut: whether answers stop one byte before their end.
    """

    folder: Path
    daemon: Daemon
    secrets: dict[str, bytes]
    kbs: Kbs
    entries: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    bearers: list[bytes] = field(default_factory=list)
    cut: bool = False
    said: list[bytes] = field(default_factory=list)

    def bearer(self) -> str:
        self.bearers.append(os.urandom(18).hex().encode())
        return self.bearers[-1].decode()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, Any, bytes]:
        if path.startswith("/kbs/"):
            return asyncio.run(
                self.kbs.request(method, ORIGIN + path, headers=headers, body=body, timeout=1, limit=1)
            )
        if path == "/v1/nonce":
            return 200, {}, json.dumps({"audience": "me", "expires": 1 << 31, "nonce": os.urandom(32).hex()}).encode()
        if path == "/v1/verify":
            return 200, {}, f"e30.{self.bearer()}.c2ln".encode()
        if path == "/v1/auth/jwt/login":
            return 200, {}, json.dumps({"auth": {"client_token": f"s.{self.bearer()}"}}).encode()
        if path == "/v1/auth/token/revoke-self":
            return 204, {}, b""
        status, content = self.entries[path.removeprefix("/v1/kv/data/")]
        return status, {}, content

    def serve(self, tls: ssl.SSLContext) -> Callable[[socket.socket], None]:
        def handle(sock: socket.socket) -> None:
            with tls.wrap_socket(sock, server_side=True) as stream:
                head, _, body = _request(stream).partition(b"\r\n\r\n")
                first, *lines = head.decode("ascii").split("\r\n")
                method, path, _ = first.split(" ")
                status, headers, content = self.answer(
                    method, path, dict(line.split(": ", 1) for line in lines), body
                )
                whole = http(content, status, *(f"{name}: {value}" for name, value in headers.items()))
                stream.sendall(whole[:-1] if self.cut and "resource" in path else whole)

        return handle

    def start(self, egress: Egress, port: int, ca: Path) -> None:
        daemon, url = self.daemon, f"https://127.0.0.1:{port}"
        keys = [("credential", "one.key"), ("credential", "large.key")]
        keys += [("trustee", f"default/key/{name}") for name in ("one", "large")]
        keys += [("openbao", name) for name in self.entries]
        daemon.grants = EVERYTHING
        daemon.tables["tpm"] = daemon.tables["tpm"].replace('"ecc"', '"rsa"')  # the only one Trustee knows
        daemon.configure()
        daemon.config.write_text(
            daemon.config.read_text()
            + f'[egress]\nsocket = "{egress.socket}"\n[trustee]\nurl = "{url}"\nca_file = "{ca}"\n'
            + f'[openbao]\naddresses = ["{url}"]\nrole = "r"\nverifier = "{url}"\naudience = "me"\nca_file = "{ca}"\n'
            + "".join(f'[[key]]\nid = "{kind}/{path}"\nbroker = "{kind}"\npath = "{path}"\n' for kind, path in keys)
        )
        daemon.start()

    def refused(self, key: str, recipient: bytes | None = None) -> str:
        """Why, in a word; everything that was said goes to ``said``."""
        request = keys_pb2.GetKeyRequest(key=key, recipient=Receiver().recipient if recipient is None else recipient)
        options = (("grpc.default_authority", "localhost"),)
        with (
            grpc.insecure_channel(f"unix:{self.daemon.socket}", options=options) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            keys_pb2_grpc.KeysStub(channel).Get(request, timeout=PATIENCE)
        error: Any = caught.value
        trailers = dict(error.trailing_metadata())
        self.said += [str(error).encode(), repr(error).encode(), repr(trailers).encode()]
        self.said += [error.debug_error_string().encode(), trailers["grpc-status-details-bin"]]
        return str(error.details())


def entry(value: str) -> bytes:
    return json.dumps({"data": {"data": {"key": value}, "metadata": {"version": 1}}}).encode()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    secrets = {kind: os.urandom(32) for kind in ("credential", "trustee", "openbao")}
    mine = secrets["openbao"]
    leak = json.dumps({"errors": [mine.hex(), base64.b64encode(mine).decode()]}).encode()
    entries = {
        "one": (200, entry(base64.b64encode(mine).decode())),
        "large": (200, entry(base64.b64encode(mine * (MAX_SECRET // 32 + 1)).decode())),
        "odd": (200, entry(f"{mine.hex()}!")),
        "malformed": (200, b'{"data": ' + leak),
        "denied": (403, leak),
        "absent": (404, leak),
        "unknown": (418, leak),
    }
    kbs, pki = Kbs(resources={"default/key/one": secrets["trustee"]}), Pki(tmp_path)
    kbs.resources["default/key/large"] = secrets["trustee"] * (MAX_SECRET // 32 + 1)
    with booted_daemon() as daemon:
        credentials = daemon.folder / "credentials"
        credentials.mkdir(mode=0o700)
        (credentials / "one.key").write_bytes(secrets["credential"])
        (credentials / "large.key").write_bytes(secrets["credential"] * (MAX_SECRET // 32 + 1))
        daemon.environment["CREDENTIALS_DIRECTORY"] = str(credentials)
        made = World(tmp_path, daemon, secrets, kbs, entries)
        with (
            serving(made.serve(pki.server("127.0.0.1"))) as (server,),
            running_egress(tmp_path, allowing(f'"127.0.0.1:{server.port}"')) as egress,
        ):
            made.start(egress, server.port, pki.file)
            yield made


def test_secrets_are_nowhere_but_with_the_workload(world: World) -> None:
    daemon, kbs, secrets = world.daemon, world.kbs, world.secrets
    got = {}
    with daemon.client() as agent:
        for kind, path in (("credential", "one.key"), ("trustee", "default/key/one"), ("openbao", "one")):
            for plain in (False, True):
                key = agent.get_key(f"{kind}/{path}", plain=plain)
                assert key.secret == secrets[kind]
                world.said.append(repr(key).encode())
            got[kind] = f"{kind}/{path}"

    assert "credential" in world.refused("credential/large.key")
    x25519 = bytes.fromhex("302a300506032b656e032100")
    other = rsa.generate_private_key(65537, 2048).public_key()
    for recipient in (
        b"0\x00",
        secrets["credential"],
        other.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        x25519 + bytes(32),  # a point of low order
    ):
        assert "P-256 key" in world.refused("credential/one.key", recipient)

    for path in ("large", "odd", "malformed", "denied", "absent", "unknown"):
        assert "OpenBao" in world.refused(f"openbao/{path}")

    mine = secrets["trustee"]
    stranger = jwk.ECKey.generate_key("P-256").as_dict(private=False)
    assert "Trustee" in world.refused("trustee/default/key/large")
    for answer in (
        (200, {}, mine),
        (200, {}, json.dumps({"key": mine.hex()}).encode()),
        (200, {}, base64.b64encode(mine * 1000)),
        (200, {"x-secret": mine.hex()}, b""),
        (200, {}, encrypted(stranger, mine)),
        (401, {}, json.dumps({"type": "https://x/", "detail": mine.hex()}).encode()),
        (500, {}, mine.hex().encode()),
    ):
        kbs.on_answer["resource"] = lambda _, answer=answer: answer
        assert "Trustee" in world.refused(got["trustee"])
    del kbs.on_answer["resource"]
    world.cut = True
    assert "Trustee" in world.refused(got["trustee"])

    world.said.append(repr(daemon.admin().get_status()).encode())
    world.said.append(Path(f"/proc/{daemon.pid}/cmdline").read_bytes())
    with suppress(PermissionError):  # root's alone, see below
        world.said.append(Path(f"/proc/{daemon.pid}/environ").read_bytes())
    assert daemon.stop() == 0
    looked_for = {**secrets, **{f"bearer {number}": each for number, each in enumerate(world.bearers)}}
    for number, (cookie, session) in enumerate(kbs.sessions.items()):
        looked_for |= {f"cookie {number}": cookie.encode(), f"token {number}": (session.token or cookie).encode()}
    assert len(looked_for) > 40
    files = [path for folder in (daemon.folder, world.folder) for path in folder.rglob("*") if path.is_file()]
    assert {"journal", "audit.jsonl"} <= {path.name for path in files}
    for path in files:
        if path.parent.name != "credentials":
            assert found_in(path.read_bytes(), looked_for) == [], path
    for words in world.said:
        assert found_in(words, looked_for) == [], words


@needs_openbao
def test_no_word_of_a_real_openbaos_broker_holds_a_token_or_key(tmp_path: Path) -> None:
    with running_broker(tmp_path) as (verifier, bao, config, cas):
        sent = DirectHttp(cas)
        broker = OpenBao(config, sent)
        keep(bao)
        said = [repr(broker), repr(asyncio.run(broker.release(PATH, Vm(verifier), timeout=PATIENCE)))]
        bao.put("/kv/data/models/llama", {"data": {"key": "not base64, and a secret: " + SECRET.hex()}})
        for path in (PATH, "models/other"):
            with pytest.raises(AgentError) as caught:
                asyncio.run(broker.release(path, Vm(verifier), timeout=PATIENCE))
            said += traceback.format_exception(caught.value)
    logins = [each for each in sent.sent if each.url.endswith("/login")]
    tokens = {str(json.loads(each.answer)["auth"]["client_token"]) for each in logins}
    secrets = {"key": SECRET} | {token: token.encode() for token in tokens}
    secrets |= {f"jwt {number}": json.loads(each.body)["jwt"].encode() for number, each in enumerate(logins)}
    assert len(secrets) == 7
    assert found_in("".join(said).encode(), secrets) == []


def test_no_object_that_holds_a_secret_says_it() -> None:
    secret = os.urandom(32)
    for each in (
        ReleasedKey(secret, 1),
        Delivery(b"context", secret, wrapped=False),
        calls.Delivery(b"context", None, secret),
        calls.Key(secret, "key", "broker", 1, 2),
    ):
        assert found_in(f"{each!r} {each}".encode(), {"it": secret}) == []


@contextmanager
def releasing(*wrap: str, files: Callable[[Path], None] | None = None) -> Iterator[tuple[Daemon, bytes]]:
    """A daemon with a key, started by another command, and the key."""
    secret = os.urandom(32)
    with booted_daemon() as daemon:
        credentials = daemon.folder / "credentials"
        credentials.mkdir(mode=0o700)
        (credentials / "one.key").write_bytes(secret)
        if files is not None:
            files(credentials)
        daemon.environment |= {"CREDENTIALS_DIRECTORY": str(credentials), "PYTHONPATH": os.pathsep.join(sys.path)}
        daemon.wrap = wrap
        daemon.grants = EVERYTHING
        daemon.configure()
        keys = "".join(
            f'[[key]]\nid = "{path.stem}"\nbroker = "credential"\npath = "{path.name}"\n'
            for path in credentials.iterdir()
        )
        daemon.config.write_text(daemon.config.read_text() + keys)
        daemon.start()
        yield daemon, secret


def test_who_dies_while_the_broker_works_leaves_the_key_to_nobody() -> None:
    """Somebody else holds the connection by then, and is not who asked."""
    with releasing(files=lambda folder: os.mkfifo(folder / "slow.key", 0o600)) as (daemon, _), ExitStack() as stack:
        ours, theirs = map(stack.enter_context, socket.socketpair())
        maker = stack.enter_context(
            caller((), {}, socket=daemon.socket, uid=None, via=theirs.fileno(), pass_fds=(theirs.fileno(),))
        )
        stack.callback(maker.kill)
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        with through(fd) as path, Agent(path) as heir, ThreadPoolExecutor(1) as pool:
            asked = pool.submit(heir.get_key, "slow", plain=True)
            with (daemon.folder / "credentials" / "slow.key").open("wb") as broker:  # waits until it is read
                maker.kill()
                maker.wait()
                broker.write(os.urandom(32))
            with pytest.raises(AgentError) as caught:
                asked.result(PATIENCE)
            assert caught.value.slug in GONE
        assert daemon.stop() == 0
        log = follow((daemon.folder / "state" / "audit.jsonl").read_bytes(), EMPTY)[0]
        (ended,) = (record.data["code"] for record in log if record.event == "call-ended")
        assert ended in ("CANCELLED", "PERMISSION_DENIED")


# -- memory

UNPRIVILEGED: Final = (
    ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all") if os.geteuid() == 0 else ()
)
"""As under the unit: no capabilities. A root that has them all may read everything, and is trusted (A1)."""

SPY: Final = """
import ctypes, json, os, sys
pid, found = int(sys.argv[1]), []
for name in ("environ", "maps", "mem"):
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            if name == "mem":
                file.seek(int(open(f"/proc/{pid}/maps").readline().split("-")[0], 16))
            file.read(16)
        found.append(name)
    except OSError:
        pass
libc = ctypes.CDLL(None)
if libc.ptrace(16, pid, None, None) == 0:
    os.waitpid(pid, 0x40000000)
    libc.ptrace(17, pid, None, None)
    found.append("ptrace")
print(json.dumps(found))
"""


def spied(pid: int) -> list[str]:
    """What another process of our uid can get at."""
    answer = subprocess.run([*UNPRIVILEGED, sys.executable, "-c", SPY, str(pid)], capture_output=True, check=True)
    return list(json.loads(answer.stdout))


def test_others_of_its_uid_do_not_get_at_its_memory() -> None:
    with subprocess.Popen(
        [*UNPRIVILEGED, sys.executable, "-c", "print('here', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as open_to_all:
        assert open_to_all.stdout is not None
        assert open_to_all.stdout.readline() == b"here\n"
        control = spied(open_to_all.pid)
        open_to_all.kill()
    if not control:
        pytest.skip("this machine keeps processes of one uid apart anyway (kernel.yama.ptrace_scope)")
    with releasing(*UNPRIVILEGED) as (daemon, secret):
        with daemon.client() as agent:
            assert agent.get_key("one", plain=True).secret == secret
        assert spied(daemon.pid) == []
        assert daemon.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV], ids=lambda number: number.name)
def test_it_leaves_no_core(tmp_path: Path, number: signal.Signals) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith(("|", "/")):
        pytest.skip(f"cores go elsewhere on this machine, out of this test's sight: {pattern}")
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    wrap = ("sh", "-c", 'cd "$0" && ulimit -c "$1" && shift && exec "$@"', str(tmp_path))
    wrap += ("unlimited" if hard == resource.RLIM_INFINITY else str(hard // 512),)
    control = subprocess.run([*wrap, sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"], check=False)
    assert control.returncode == -number
    if not any(path.stat().st_size for path in tmp_path.iterdir()):
        pytest.skip("this machine writes no cores at all")
    for path in tmp_path.iterdir():
        path.unlink()
    with releasing(*wrap) as (daemon, secret):
        with daemon.client() as agent:
            assert agent.get_key("one", plain=True).secret == secret
        assert daemon.process is not None
        daemon.process.send_signal(number)
        assert daemon.process.wait(PATIENCE) == -number
    assert list(tmp_path.iterdir()) == []
