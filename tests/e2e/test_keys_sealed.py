"""A real daemon with keys sealed to its TPM, made by the operator; an approved boot and trusted GPUs open them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.client import AgentError
from cgpu_agent.wire.audit import EMPTY, follow
from cgpu_agent.wire.keyring import LATCH_HANDLE, OPEN
from fixtures.daemon import PATIENCE, Daemon, booted_daemon
from fixtures.owner import FLEET, GROUP, Owner
from fixtures.policies import permit
from fixtures.softwaregpu import GpuProcess, running_gpus, using

pytestmark = pytest.mark.swtpm

SECRET = os.urandom(16)
PERMIT = permit("key.get", f'principal.uid == {os.geteuid()} && resource.broker == "sealed"')
KEYS = """
[[key]]
id = "models/llama"
broker = "sealed"
path = "llama"

[[key]]
id = "models/absent"
broker = "sealed"
path = "absent"
"""


class Vm:
    """The VM, its owner and its operator."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.owner = Owner()
        self.approvals = daemon.folder / "approvals"
        self.approvals.mkdir()
        self.authority = daemon.folder / "owner.pub"
        key = load_der_public_key(self.owner.spki)
        self.authority.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        daemon.grants = PERMIT
        self.configure()

    def configure(self) -> None:
        self.daemon.configure()
        added = f'[sealed]\napprovals = "{self.approvals}"\n{KEYS}'
        self.daemon.config.write_text(self.daemon.config.read_text() + added)

    def approve(self, epoch: int = 99) -> None:
        tpm = Commands(self.daemon.tpm.transport())
        try:
            approval = self.owner.approve(tpm, epoch=epoch, pcrs=(0, 7))
        finally:
            tpm.close()
        (self.approvals / "boot.json").write_bytes(approval.encode())

    def ctl(self, *words: str, stdin: bytes = b"") -> str:
        """``cgpuctl key ...`` of the operator."""
        done = subprocess.run(
            [sys.executable, "-m", "cgpu_agent.cli.main", "key", *words, "--socket", self.daemon.admin_socket],
            input=stdin,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def get(self, key: str = "models/llama") -> bytes:
        with self.daemon.client() as agent:
            return agent.get_key(key).secret

    def refused(self, key: str = "models/llama") -> str:
        with self.daemon.client() as agent, pytest.raises(AgentError) as caught:
            agent.get_key(key)
        return caught.value.slug

    @property
    def latch(self) -> bytes | None:
        """By the TPM itself, which only one can use at a time: the agent is not running."""
        tpm = Commands(self.daemon.tpm.transport())
        try:
            index = tpm.sealing.nv_public(LATCH_HANDLE)
            return None if index is None else tpm.sealing.nv_content(index)
        finally:
            tpm.close()

    def changes(self) -> list[str]:
        log = follow((self.daemon.folder / "state" / "audit.jsonl").read_bytes(), EMPTY)[0]
        return [str(each.data["change"]) for each in log if each.event == "sealed-keys"]


@pytest.fixture
def vm() -> Iterator[Vm]:
    with booted_daemon() as daemon:
        yield Vm(daemon)


def made(vm: Vm) -> None:
    vm.approve()
    vm.daemon.start()
    vm.ctl("init", "--authority", str(vm.authority), "--fleet", FLEET)
    vm.ctl("import", "llama", "--group", GROUP, "--secret", "-", stdin=SECRET)
    wait_open(vm)


def wait_open(vm: Vm, *, is_open: bool = True) -> None:
    end = time.monotonic() + PATIENCE
    admin = vm.daemon.admin()
    while admin.show_sealed_keys().open != is_open:
        assert time.monotonic() < end
        time.sleep(0.1)
    admin.close()


def test_the_operator_makes_keys_and_the_workload_gets_them(vm: Vm) -> None:
    vm.approve()
    vm.daemon.start()
    assert vm.refused() == "NO_KEYS"
    vm.ctl("init", "--authority", str(vm.authority), "--fleet", FLEET)
    vm.ctl("import", "llama", "--group", GROUP, "--secret", "-", stdin=SECRET)
    wait_open(vm)
    assert vm.get() == SECRET
    assert vm.refused("models/absent") == "KEY_ABSENT"
    assert "generation" in vm.ctl("rotate", "llama")
    rotated = vm.get()
    assert rotated != SECRET
    assert len(rotated) == 32
    assert "latch      open" in vm.ctl("show")
    vm.ctl("remove", "llama")
    assert vm.refused() == "KEY_ABSENT"
    assert vm.daemon.stop() == 0
    assert vm.changes() == ["create", "add", "rotate", "remove"]
    assert SECRET not in b"".join(path.read_bytes() for path in vm.daemon.folder.rglob("*") if path.is_file())


def test_keys_outlive_the_agent_and_the_latch_does_not(vm: Vm) -> None:
    made(vm)
    assert vm.daemon.stop() == 0
    assert vm.latch != OPEN
    vm.daemon.start()
    wait_open(vm)
    vm.daemon.kill()
    assert vm.latch == OPEN  # nobody was left to close it; the next start does, before anything else
    (vm.approvals / "boot.json").unlink()
    vm.daemon.start()
    assert vm.refused() in ("KEY_NOT_APPROVED", "KEY_LATCH_CLOSED", "KEY_INDEX_LOST")
    assert vm.daemon.shows("sealed keys: no approval")
    vm.approve()
    vm.daemon.reload()
    wait_open(vm)
    assert vm.get() == SECRET


def test_an_epoch_that_is_over_opens_nothing(vm: Vm) -> None:
    made(vm)
    assert vm.get() == SECRET
    vm.ctl("epoch", "100")
    assert vm.refused() == "KEY_APPROVAL_OLD"
    vm.approve(epoch=100)
    vm.daemon.reload()
    assert vm.get() == SECRET


def test_an_old_disk_is_refused_until_the_operator_adopts_it(vm: Vm) -> None:
    made(vm)
    store = vm.daemon.folder / "state" / "keys" / "keys"
    old = store.read_bytes()
    vm.ctl("rotate", "llama")
    store.write_bytes(old)
    assert vm.refused() == "KEYS_MISMATCH"
    vm.ctl("adopt", "--authority", str(vm.authority))
    wait_open(vm)
    assert vm.get() == SECRET


def test_the_operator_is_told_what_is_wrong(vm: Vm) -> None:
    vm.daemon.start()
    admin = vm.daemon.admin()
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("NO_KEYS", admin.show_sealed_keys),
        ("NO_KEYS", lambda: admin.add_sealed_key("a", "g")),
        ("BAD_KEY", lambda: admin.create_sealed_keys(b"no key", FLEET)),
        ("KEY_NAME", lambda: admin.create_sealed_keys(vm.owner.spki, "../x")),
        ("KEY_NOT_APPROVED", lambda: admin.create_sealed_keys(vm.owner.spki, FLEET)),
    ]
    for slug, call in wrong:
        assert slug_of(call) == slug
    vm.approve()
    vm.daemon.reload()
    admin.create_sealed_keys(vm.owner.spki, FLEET, replace_lost=True)
    admin.add_sealed_key("a", GROUP)
    wrong = [
        ("KEYS_EXIST", lambda: admin.create_sealed_keys(vm.owner.spki, FLEET)),
        ("KEYS_MISMATCH", lambda: admin.adopt_sealed_keys(Owner().spki)),
        ("KEY_EXISTS", lambda: admin.add_sealed_key("a", GROUP)),
        ("KEY_NAME", lambda: admin.add_sealed_key("A/b", GROUP)),
        ("KEY_NAME", lambda: admin.add_sealed_key("b", "latch")),
        ("KEY_UNKNOWN", lambda: admin.rotate_sealed_key("b")),
        ("KEY_UNKNOWN", lambda: admin.remove_sealed_key("a", 99)),
        ("TPM_ARGUMENT", lambda: admin.add_sealed_key("b", GROUP, b"x" * 129)),
        ("EPOCH_TOO_FAR", lambda: admin.raise_epoch(1 << 40)),
    ]
    for slug, call in wrong:
        assert slug_of(call) == slug
    assert [key.key for key in admin.show_sealed_keys().keys] == ["a"]
    admin.close()


def slug_of(call: Callable[[], object]) -> str:
    with pytest.raises(AgentError) as caught:
        call()
    return caught.value.slug


@pytest.fixture
def gpus() -> Iterator[GpuProcess]:
    with running_gpus() as process:
        files = using(process, lambda client: client.collateral(timeout=PATIENCE))
        folder = process.socket.parent / "export"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        yield process


def test_the_latch_follows_the_gpus(vm: Vm, gpus: GpuProcess) -> None:
    export = gpus.socket.parent / "export"
    vm.daemon.tables["gpu"] = (
        f'backend = "software:{gpus.socket}"\nallow_simulated = true\ncollateral = "{export}"\n'
        f'device_roots = ["{export}/device-root.pem"]\nrim_roots = ["{export}/rim-root.pem"]'
    )
    vm.configure()
    made(vm)
    assert vm.get() == SECRET
    using(gpus, lambda client: client.misbehave("dev-tools", gpu=1, timeout=PATIENCE))
    wait_open(vm, is_open=False)
    assert vm.refused() == "KEY_LATCH_CLOSED"
