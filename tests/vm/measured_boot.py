"""One VM, its owner and its relying party: real measured boots, and what a host changes about them.

Run by ``make test-vm``; not among the other tests, because a boot takes a minute. The CA that certified the EK of the
emulated TPM stands for the operator's own, so that the default policy decides on all else as it would in the world.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from fixtures.owner import FLEET, GROUP, Owner
from fixtures.verifier import Verifier, running
from vm import image, machine
from vm.machine import Boot, Machine

AUDIENCE = "vm-test"
SECRET = os.urandom(32)
TOOLS = ("qemu-system-x86_64", "swtpm", "swtpm_setup", "mmdebstrap", "sbsign", "objcopy", "mcopy", "mke2fs", "sfdisk")
PCRS = ("--pcr", "9", "--pcr", "11")

PRELUDE = """
say() { name=$1; shift; "$@" >results/$name 2>&1; echo $? >results/$name.rc; }
until_true() {
    end=$(($(date +%s) + 600))
    until "$@" >/dev/null 2>&1; do
        [ $(date +%s) -lt $end ] || { echo "never: $*"; return; }
        sleep 1
    done
}
certified() { cgpuctl status | grep -q '(certificate)'; }
cp /sys/kernel/security/tpm0/binary_bios_measurements results/eventlog
say failed systemctl --failed --plain --no-legend
say unit systemctl show cgpu-agent -p ActiveState -p NRestarts -p User
"""
ENROL = """
for device in /sys/class/net/e*; do device=${device##*/}; done
ip link set $device up
ip address add 10.0.2.15/24 dev $device
systemd-socket-activate -l 127.0.0.1:8440 /lib/systemd/systemd-socket-proxyd 10.0.2.2:$(cat port) &
say enrol cgpuctl ak enrol --url http://127.0.0.1:8440 -o /etc/cgpu-agent/ak.der
systemctl reload cgpu-agent
until_true certified
say status cgpuctl status
"""
SEAL = """
tpm2_changeauth -T device:/dev/tpmrm0 -c owner "$(cat owner-auth)"
chmod 600 owner-auth secret
install -D -m 644 approval.json /etc/cgpu-agent/approvals/approval.json
systemctl reload cgpu-agent
until_true cgpuctl key init --authority owner.pub --fleet FLEET --owner-auth owner-auth
say import cgpuctl key import llama --group GROUP --secret secret
"""
OPENS = """
until_true cgpuctl key get models/llama -o results/key
"""
STAYS_SHUT = """
sleep 20
"""
OUT_OF_MEMORY = """
group=/sys/fs/cgroup/system.slice/cgpu-agent.service
bounds() { (cd $group && grep . memory.max memory.swap.max pids.max); }
anew() { systemctl is-active --quiet cgpu-agent && [ $(systemctl show --value -p NRestarts cgpu-agent) = 1 ]; }
say bounds bounds
echo 32M >$group/memory.max
until_true anew
say bounds-anew bounds
say ended journalctl --boot --unit=cgpu-agent --output=cat
"""
EVIDENCE = """
say key.said cgpuctl key get models/llama -o results/key
say evidence cgpuctl evidence get --nonce $(cat nonce) --audience $(cat audience) -o results/bundle.json
"""


@dataclass
class World:
    """The VM, and who deals with it."""

    folder: Path
    vm: Machine
    root: Path
    verifier: Verifier
    owner: Owner

    @property
    def reference(self) -> Path:
        return self.folder / "reference.json"

    def image(
        self, name: str, command_line: str = image.COMMAND_LINE, *, signed: bool = True
    ) -> list[tuple[Path, str]]:
        """Made once: two of them differ by the time of making, which is in PCR 4."""
        uki = self.folder / f"{name}.efi"
        if not uki.exists():
            image.make_uki(self.root, uki, command_line, signed=signed)
        return [(uki, "/EFI/BOOT/BOOTX64.EFI")]

    def boot(
        self, name: str, script: str, files: dict[str, bytes] | None = None, *, starts: bool = True, **how: Any
    ) -> Booted:
        """Boot what is on the disk; keep all that came out. ``starts``: whether anything is expected to."""
        nonce = secrets.token_bytes(32)
        sent = {"nonce": nonce.hex().encode(), "audience": AUDIENCE.encode(), **(files or {})}
        done = self.vm.boot({**sent, "run.sh": (PRELUDE + script + EVIDENCE).encode()}, **how)
        kept = self.folder / name
        kept.mkdir()
        for each, data in {**done.files, "console": done.console, "nonce": nonce.hex().encode()}.items():
            (kept / each).write_bytes(data)
        print(f"{name}: {done.seconds:.0f} s, {done.cpu_seconds:.0f} of the processor; kept in {kept}")
        assert bool(done.files) == starts, f"see {kept}/console"
        return Booted(self, done, kept, nonce)


@dataclass
class Booted:
    """A boot, and what the relying party makes of its evidence."""

    world: World
    boot: Boot
    kept: Path
    nonce: bytes

    def ctl(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """cgpuctl on the relying party's machine, about this boot's evidence."""
        verb = [*words, self.kept / "bundle.json", "--nonce", self.nonce.hex(), "--audience", AUDIENCE]
        trust = ["--ak-root", self.world.verifier.folder / "ca.pem"]
        command = [sys.executable, "-m", "cgpu_agent.cli.main", *map(str, (*verb, *trust))]
        return subprocess.run(command, capture_output=True, text=True)

    def verdict(self, *, expected: bool = True) -> dict[str, Any]:
        """By the default policy; ``expected``: against the reference."""
        reference = ["--reference", self.world.reference] if expected else []
        done = self.ctl("verify", "--json", "--appraise", *reference)
        found: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (found["appraisal"]["status"] not in ("affirming", "warning"))
        (self.kept / "verdict.json").write_text(done.stdout)
        return found

    @property
    def key(self) -> bytes | None:
        return self.boot.files.get("key")


def different(verdict: dict[str, Any]) -> set[str]:
    return {each["what"] for each in verdict["appraisal"]["differences"]}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not on this machine: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("only root can make a root file system")
    root = image.make_root()
    folder = image.BUILD / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    disk = folder / "disk.img"
    image.make_disk(root, disk)
    with tempfile.TemporaryDirectory(prefix="vm-") as short:
        vm = Machine(Path(short), disk)
        (folder / "verifier").mkdir()
        verifier = Verifier(folder / "verifier")
        verifier.tables["enrol"] = (
            f'certificate = "{verifier.folder}/ca.pem"\nkey = "{verifier.folder}/ca.key"\n'
            f'operator_ek_roots = ["{vm.ek_root}"]\nek_intermediates = ["{vm.ek_intermediate}"]\n'
        )
        with running(verifier):
            yield World(folder, vm, root, verifier, Owner())


@pytest.fixture(scope="module")
def enrolled(world: World) -> Booted:
    """The first boot of the VM, as its owner meant it. Its AK is certified beside the TPM's certified EK."""
    image.put_on_esp(world.vm.disk, world.image("good"))
    port = str(world.verifier.port).encode()
    return world.boot("enrolled", ENROL, {"port": port}, firmware=machine.SECURE_BOOT, network=True)


@pytest.fixture(scope="module")
def sealed(world: World, enrolled: Booted) -> Booted:
    """The next boot, which the owner approved by what the first one showed: a key is sealed to the TPM."""
    made = enrolled.ctl("reference", "make", *PCRS, "--command-line", image.COMMAND_LINE, "-o", world.reference)
    assert made.returncode == 0, made.stderr
    key, approval = world.folder / "owner.pem", world.folder / "approval.json"
    key.write_bytes(world.owner.pem)
    words = ["--reference", world.reference, "--fleet", FLEET, "--group", GROUP, "--epoch", "99", "--i-know"]
    sign = [sys.executable, "-m", "cgpu_agent.cli.main", "key", "policy-sign", "--key", key, *words, "-o", approval]
    subprocess.run(list(map(str, sign)), check=True)
    public = load_der_public_key(world.owner.spki).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    sent = {"approval.json": approval.read_bytes(), "owner.pub": public, "secret": SECRET, "owner-auth": b"owned"}
    script = SEAL.replace("FLEET", FLEET).replace("GROUP", GROUP) + OPENS
    return world.boot("sealed", script, sent, firmware=machine.SECURE_BOOT)


def test_the_boot_of_the_agent_is_proven(enrolled: Booted) -> None:
    assert enrolled.boot.text("failed") == ""
    assert set(enrolled.boot.text("unit").split()) == {"ActiveState=active", "NRestarts=0", "User=cgpu-agent"}
    verdict = enrolled.verdict(expected=False)
    assert verdict["result"] == "pass"
    assert verdict["endorsement"]["kind"] == "operator-ek"
    assert verdict["signed"] == {"secure_boot": "enabled"}
    states = {name: found["status"] for name, found in verdict["pcrs"].items()}
    assert {name for name, state in states.items() if state == "explained"} == set("01234567") | {"9", "11", "13"}
    assert states["10"] == "unexplained"
    assert "sysinit, ready" in verdict["pcrs"]["11"]["note"]


def test_an_emulated_tpm_is_called_one(world: World, enrolled: Booted) -> None:
    """What nobody trusts, no perfect quote makes good."""
    words = ["verify", enrolled.kept / "bundle.json", "--nonce", enrolled.nonce.hex(), "--audience", AUDIENCE]
    command = [sys.executable, "-m", "cgpu_agent.cli.main", *map(str, words)]
    done = subprocess.run([*command, "--ak-root", str(world.vm.ek_root)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "UNKNOWN_ISSUER" in done.stdout
    simulated = [*command, "--json", "--simulated-ak-root", str(world.verifier.folder / "ca.pem")]
    assert json.loads(subprocess.run(simulated, capture_output=True, text=True).stdout)["simulated"]


def test_an_approved_boot_opens_sealed_keys(sealed: Booted) -> None:
    assert sealed.key == SECRET
    verdict = sealed.verdict()
    assert verdict["appraisal"]["status"] == "warning"
    assert different(verdict) == set()


def test_shim_and_grub_are_proven_too(world: World, sealed: Booted) -> None:
    """Debian's signed boot loaders and kernel, below Microsoft's key; another boot than the owner approved."""
    image.put_on_esp(world.vm.disk, image.shim_and_grub(world.root, world.folder))
    booted = world.boot("grub", STAYS_SHUT, firmware=machine.SECURE_BOOT_MICROSOFT)
    verdict = booted.verdict(expected=False)
    assert verdict["result"] == "pass"
    assert verdict["signed"] == {"secure_boot": "enabled"}
    explained = {name for name, found in verdict["pcrs"].items() if found["status"] == "explained"}
    assert explained == set("0123456789") | {"13", "14"}
    assert {"pcr-4", "pcr-7", "pcr-9", "pcr-11", "command-line"} <= different(booted.verdict())
    made = booted.ctl("reference", "make", "--pcr", "8", "--pcr", "9")
    assert json.loads(made.stdout)["command_lines"] == [f"/vmlinuz {image.COMMAND_LINE}"]
    assert_shut(booted)


def test_another_command_line_shows_and_opens_nothing(world: World, sealed: Booted) -> None:
    image.put_on_esp(world.vm.disk, world.image("changed", f"{image.COMMAND_LINE} lockdown=none"))
    booted = world.boot("changed", STAYS_SHUT, firmware=machine.SECURE_BOOT)
    verdict = booted.verdict()
    assert verdict["result"] == "pass"  # the evidence is genuine; it is of another boot
    assert verdict["signed"] == {"secure_boot": "enabled"}
    assert verdict["appraisal"]["status"] == "contraindicated"
    assert different(verdict) == {"pcr-4", "pcr-9", "pcr-11", "command-line"}
    assert_shut(booted)


@pytest.mark.parametrize(("name", "signed"), [("insecure", True), ("stripped", False)])
def test_secure_boot_off_shows_and_opens_nothing(world: World, sealed: Booted, name: str, signed: bool) -> None:
    image.put_on_esp(world.vm.disk, world.image("good" if signed else "unsigned", signed=signed))
    booted = world.boot(name, STAYS_SHUT, firmware=machine.NO_SECURE_BOOT)
    verdict = booted.verdict()
    assert verdict["result"] == "pass"
    assert verdict["signed"] == {"secure_boot": "disabled"}
    assert verdict["appraisal"]["status"] == "contraindicated"
    assert {"pcr-4", "pcr-7", "secure-boot-authority"} <= different(verdict)
    assert_shut(booted)


def test_an_unsigned_kernel_does_not_start(world: World, sealed: Booted) -> None:
    image.put_on_esp(world.vm.disk, world.image("unsigned", signed=False))
    booted = world.boot("unsigned", OPENS, firmware=machine.SECURE_BOOT, starts=False)
    assert machine.REFUSED in booted.boot.console


@pytest.fixture(scope="module")
def again(world: World, sealed: Booted) -> Booted:
    """The boot that was meant, once more; in it the agent has too little memory for a moment."""
    image.put_on_esp(world.vm.disk, world.image("good"))
    return world.boot("again", OUT_OF_MEMORY + OPENS, firmware=machine.SECURE_BOOT)


def test_sealed_keys_outlive_reboots_and_what_was_tried_in_between(again: Booted) -> None:
    assert again.key == SECRET
    assert different(again.verdict()) == set()


def test_an_agent_out_of_memory_is_ended_by_the_kernel_and_started_again(again: Booted) -> None:
    bounds = {"memory.max:6442450944", "memory.swap.max:0", "pids.max:640"}
    assert set(again.boot.text("bounds").split()) == bounds
    assert set(again.boot.text("bounds-anew").split()) == bounds
    ended = again.boot.text("ended")
    assert "Failed with result 'oom-kill'" in ended
    keys = [line for line in ended.splitlines() if line.startswith("serving evidence agent_ak=")]
    assert len(keys) == 2
    assert keys[0] == keys[1]


def assert_shut(booted: Booted) -> None:
    assert booted.key is None
    assert "KEY_NOT_APPROVED" in booted.boot.text("key.said")
