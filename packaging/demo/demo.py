"""The demo, step by step: provision a software TPM as a cloud would, start the daemon, be workload and relying party.

State: ``.demo/state`` links to a short temporary directory (socket paths have a limit); ``stop`` removes both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from authority import certify
from cgpu_agent.api.v1 import gpus_pb2
from cgpu_agent.backends.tpm.owner import TpmOwner
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.backends.tpm.transport import open_tpm
from cgpu_agent.cedar.engine import Policies
from cgpu_agent.cedar.files import appraisal_schema, default_appraisal, default_policy
from cgpu_agent.cli.verify import not_proven
from cgpu_agent.client import Admin, Agent
from cgpu_agent.domain.keys import AK_CERTIFICATE_INDEX
from cgpu_agent.errors import AgentError, Denied
from cgpu_agent.verifier.appraisal import appraise
from cgpu_agent.verifier.approval import sign_approval
from cgpu_agent.verifier.boot import boot_story
from cgpu_agent.verifier.certificate import load_certificates
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.evidence import EvidenceResult, RelyingParty, verify_evidence
from cgpu_agent.verifier.gpucase import GpuParty
from cgpu_agent.verifier.gpuchain import PinnedRoots
from cgpu_agent.verifier.gpufacts import gpu_claims
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.verifier.replay import replay
from cgpu_agent.wire import eventlog

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = ROOT / ".demo" / "state"
RECORDING = ROOT / "tests" / "vectors" / "vm-boot" / "shim-grub-ms-secboot" / "binary_bios_measurements"
AUDIENCE = "https://relying-party.example"
AK_HANDLE = 0x81000003
READY_SECONDS = 60
STEPS = 6
KEY = "demo/model"
GPU_MODULE = "cgpu_agent.backends.gpu.software"
GRANT = f"""
@id("demo-key")
permit (principal is CGpu::Workload, action == CGpu::Action::"key.get", resource == CGpu::Key::"{KEY}")
when {{ principal.uid == {os.geteuid()} && context.gpus == "ready" }};
"""
APPROVED = (0, 4, 7)
"""PCRs of the boot that the owner approves: firmware, loader, Secure Boot."""
PARTS = (("daemon", "cgpu_agent.daemon"), ("gpu", GPU_MODULE), ("swtpm", "swtpm"))
"""Processes of the demo, in the order of their end, and a word of their command lines."""


@contextlib.contextmanager
def step(number: int, title: str) -> Iterator[list[str]]:
    """Print what is being done, then how it ended and how long it took."""
    terminal = sys.stdout.isatty()
    if terminal:
        print(f"[{number}/{STEPS}] {title} ...", end="\r", flush=True)
    begun = time.monotonic()
    results: list[str] = []
    yield results
    print(f"[{number}/{STEPS}] {title}: {'; '.join(results)} ({time.monotonic() - begun:.1f} s)", flush=True)


def running(state: Path, name: str, marker: str) -> int | None:
    """Process id of a part of the demo that still runs; a recycled pid is not ours."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((state / f"{name}.pid").read_text())
        if marker.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def start_tpm(state: Path) -> Swtpm:
    """An empty software TPM, with the recorded boot extended into its PCRs as a firmware would."""
    tpm = Swtpm(state / "t")
    tpm.start()
    (state / "swtpm.pid").write_text(str(tpm.pid))
    log = eventlog.parse(RECORDING.read_bytes(), kind="tpm")
    tpm.replay_boot([(event.pcr, dict(event.digests)["sha256"]) for event in log.events if event.measured])
    return tpm


def provision(tpm: Swtpm, state: Path) -> None:
    """What a cloud has done before the VM starts: a platform AK at its handle, its certificate in NV."""
    owner = TpmOwner(open_tpm(f"swtpm:{tpm.data_socket}"))
    try:
        job = owner.run(lambda commands: commands.create_platform_ak(AK_HANDLE, "rsa"), timeout=60)
        public = asyncio.run(job)
    finally:
        owner.close()
    leaf, root = certify(load_attestation_key(public).spki)
    tpm.provision_nv(AK_CERTIFICATE_INDEX, leaf, size=2048)
    tpm.disable_platform_hierarchy()
    (state / "ak-root.pem").write_bytes(root)


def start_gpus(state: Path) -> None:
    """A simulated GPU, a process of its own: real SPDM messages, its own certificates and reference values."""
    with (state / "gpu.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", GPU_MODULE, "--socket", str(state / "g"), "--export", str(state / "gpu")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    (state / "gpu.pid").write_text(str(process.pid))
    if process.stdout is None or process.stdout.readline().strip() != b"ready":
        sys.exit(f"\nthe software GPU did not start:\n{(state / 'gpu.log').read_text()}")


def gpu_verdict(state: Path) -> str:
    """What the agent makes of its GPUs, once it has looked."""
    deadline = time.monotonic() + READY_SECONDS
    with Agent(str(state / "agent.sock")) as agent:
        while (found := agent.list_gpus()).state == gpus_pb2.GPU_SET_STATE_NOT_READY and time.monotonic() < deadline:
            time.sleep(0.1)
    trusted = sum(gpu.phase == gpus_pb2.GPU_PHASE_TRUSTED for gpu in found.gpus)
    simulated = all(gpu.simulated for gpu in found.gpus)
    return f"{trusted} of {len(found.gpus)} attested (simulated: {str(simulated).lower()}), then opened for work"


def start_daemon(state: Path) -> str:
    """Start cgpu-agent as systemd would, wait until it says that it is ready, return its status line."""
    (state / "private").mkdir(mode=0o700)
    (state / "policy.cedar").write_text(default_policy() + GRANT)
    config = state / "config.toml"
    config.write_text(
        f'runtime_dir = "{state}/private"\nstate_dir = "{state}/state"\npolicy = "{state}/policy.cedar"\n'
        f'[sockets]\napi = "{state}/agent.sock"\nadmin = "{state}/admin.sock"\nlease = "{state}/lease.sock"\n'
        f'[tpm]\ndevice = "swtpm:{state}/t/sock"\n'
        f'[sealed]\napprovals = "{state}/approvals"\n'
        f'[[key]]\nid = "{KEY}"\nbroker = "sealed"\npath = "model"\n'
        f'[logs]\nboot = "{RECORDING}"\n'
        f'[gpu]\nbackend = "software:{state}/g"\nallow_simulated = true\ncollateral = "{state}/gpu"\n'
        f'device_roots = ["{state}/gpu/device-root.pem"]\nrim_roots = ["{state}/gpu/rim-root.pem"]\n'
    )
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(state / "notify"))
    with (state / "journal").open("ab") as journal:
        process = subprocess.Popen(
            [sys.executable, "-m", "cgpu_agent.daemon", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=journal,
            stderr=journal,
            env={**os.environ, "NOTIFY_SOCKET": str(state / "notify")},
            start_new_session=True,
        )
    (state / "daemon.pid").write_text(str(process.pid))
    status, deadline = "", time.monotonic() + READY_SECONDS
    notify.settimeout(0.2)
    with notify:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(TimeoutError):
                for line in notify.recv(4096).decode().splitlines():
                    if line.startswith("STATUS="):
                        status = line.removeprefix("STATUS=")
                    if line == "READY=1":
                        return status
    sys.exit(f"\nthe daemon did not become ready; its journal:\n{(state / 'journal').read_text()}")


def be_the_owner(state: Path) -> None:
    """Approve, off the VM, the boot that was recorded: keys sealed to this TPM may open in it."""
    key = ec.generate_private_key(ec.SECP256R1())
    (state / "owner.pub").write_bytes(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    values = replay(eventlog.parse(RECORDING.read_bytes(), kind="tpm"), "sha256").pcrs
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    approval = sign_approval(
        pem, fleet="demo", groups=["models"], pcrs={index: values[index] for index in APPROVED}, epoch=1
    )
    (state / "approvals").mkdir()
    (state / "approvals" / "boot.json").write_bytes(approval.encode())


def release_a_key(state: Path) -> str:
    """As operator seal a key, as workload get it; what nobody may have is refused."""
    admin = Admin(str(state / "admin.sock"), timeout=READY_SECONDS)
    try:
        if not (state / "state" / "keys" / "keys").exists():
            admin.create_sealed_keys((state / "owner.pub").read_bytes(), "demo")
            admin.add_sealed_key("model", "models")
        deadline = time.monotonic() + READY_SECONDS
        while not admin.show_sealed_keys().open and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        admin.close()
    with Agent(str(state / "agent.sock")) as agent:
        key = agent.get_key(KEY)
        try:
            agent.get_key(KEY, plain=True)
        except Denied as error:
            return f"{len(key.secret)} bytes, wrapped to the workload's own key; in plain: {error.slug}"
    sys.exit("a key left in plain, which no policy permits: this is a bug")


def be_a_workload(state: Path) -> tuple[bytes, bytes, float]:
    """Three lines of SDK: evidence of boot and GPUs for a relying party's nonce."""
    nonce = secrets.token_bytes(32)
    begun = time.perf_counter()
    with Agent(str(state / "agent.sock")) as agent:
        bundle = agent.get_evidence(nonce, audience=AUDIENCE, gpus=True)
    return nonce, bundle, time.perf_counter() - begun


def be_the_relying_party(state: Path, nonce: bytes, bundle: bytes) -> EvidenceResult:
    """Judge the bundle with nothing but the bundle, the nonce, and what the simulators' makers publish."""
    now, made = datetime.now(timezone.utc), state / "gpu"
    gpus = GpuParty(
        now,
        device_roots=PinnedRoots.of(load_certificates((made / "device-root.pem").read_bytes())),
        rim_roots=PinnedRoots.of(load_certificates((made / "rim-root.pem").read_bytes())),
        collateral=Collateral.load(
            rims=[path.read_bytes() for path in sorted(made.glob("*.swidtag"))],
            crls=[path.read_bytes() for path in sorted(made.glob("*.crl"))],
        ),
    )
    roots = load_certificates((state / "ak-root.pem").read_bytes())
    party = RelyingParty(AUDIENCE, nonce, now, simulated_roots=roots, gpu_count=1, gpu_party=gpus)
    return verify_evidence(bundle, party)


def brief(text: str) -> str:
    """One line's worth."""
    return text if len(text) <= 100 else f"{text[:97]}..."


def account(result: EvidenceResult) -> None:
    """What the relying party now knows, in a few lines."""
    if result.statement is None or result.secure_boot is None or result.boot_log is None:
        sys.exit("the verifier gave no account")
    caller = result.statement.caller
    explained = [str(index) for index, found in sorted(result.registers.items()) if found.status == "explained"]
    stages = {stage.name: stage.statements for stage in boot_story(result.boot_log, "sha256").stages}
    loaders = [statement.text.split("; image digest ")[0] for statement in stages["loader-chain"]]
    print("\nWhat the relying party now knows")
    print(f"  Secure Boot    {result.secure_boot.state}: {result.secure_boot.reason}")
    for loader in loaders:
        if "started" in loader:
            print(f"  loader chain   {brief(loader)}")
    for statement in stages["command-line"]:
        print(f"  kernel         {brief(statement.text)}")
    print(
        f"  PCRs explained {', '.join(explained)} by {len(result.boot_log.events)} firmware records and the agent's"
    )
    if result.endorsement is not None:
        print(f"  AK             {result.endorsement.detail}")
    for device in () if result.gpus is None else result.gpus.devices:
        claims = gpu_claims(device)
        print(f"  GPU            {claims['hwmodel']}, driver {claims['driver']}, firmware as its maker published it")
    print(
        f"  who asked      uid {caller['uid']}, pid {caller['pid']}, says the kernel ({caller['identity_strength']})"
    )
    simulated = str(result.simulated).lower()
    print(f"  simulated: {simulated}  by the root that signed, whatever the VM says of itself")
    policy = Policies.load(default_appraisal(), appraisal_schema(), "the default policy")
    appraisal = appraise(result, policy, None)
    print(f"  appraisal      {appraisal.status} by the default policy, which refuses simulators")
    print("What it does not know")
    for gap in not_proven(result, appraisal.coverage):
        print(f"  - {gap}")


def tamper(state: Path, nonce: bytes, bundle: bytes) -> str:
    """Change one hex digit of one PCR value and show what the verifier says."""
    document = json.loads(bundle)
    value = document["pcrs"]["7"]
    document["pcrs"]["7"] = ("0" if value[0] != "0" else "1") + value[1:]
    refusal = be_the_relying_party(state, nonce, json.dumps(document).encode()).refusal
    if refusal is None:
        sys.exit("a tampered bundle was accepted: this is a bug")
    return f"refused at {refusal.id} [{refusal.slug}]"


def start() -> None:
    state = LINK.resolve()
    if not all(running(state, name, marker) for name, marker in PARTS):
        stop(quiet=True)
        state = Path(tempfile.mkdtemp(prefix="cgpu-"))
        LINK.parent.mkdir(exist_ok=True)
        LINK.symlink_to(state)
        with step(1, "Software TPM with a recorded real boot (shim, GRUB, Debian, Secure Boot)") as results:
            tpm = start_tpm(state)
            results.append("48 records replayed into its PCRs")
        with step(2, "What a cloud does before the VM starts") as results:
            provision(tpm, state)
            results.append("platform AK made and certified by a throw-away CA")
        be_the_owner(state)
        with step(3, "A software GPU, and the daemon") as results:
            start_gpus(state)
            start_daemon(state)
            results.append(gpu_verdict(state))
    else:
        print(f"[1-3/{STEPS}] already running from before")
    with step(4, "A workload asks for evidence") as results:
        nonce, bundle, seconds = be_a_workload(state)
        (state / "bundle.json").write_bytes(bundle)
        results.append(f"{len(bundle)} bytes in {seconds * 1000:.0f} ms")
    with step(5, "A relying party judges it offline") as results:
        result = be_the_relying_party(state, nonce, bundle)
        if result.refusal is not None:
            sys.exit(f"\nrefused at {result.refusal.id}: {result.refusal.detail}")
        passed = sum(found.outcome.value == "pass" for found in result.steps)
        results.append(f"ACCEPTED, {passed} of {len(result.steps)} steps passed")
        results.append(f"a tampered copy is {tamper(state, nonce, bundle)}")
    with step(6, "A key that this TPM opens in this boot alone, while the GPU is trusted") as results:
        results.append(release_a_key(state))
    account(result)
    print("\nTry it yourself")
    sockets = f"CGPU_AGENT_SOCKET={state}/agent.sock CGPU_AGENT_ADMIN_SOCKET={state}/admin.sock"
    print(f"  export {sockets} GPU={state}/gpu PATH=$PWD/.venv/bin:$PATH")
    print("  cgpuctl status; cgpuctl boot show; cgpuctl gpu list; cgpuctl doctor")
    print("  cgpuctl key list; cgpuctl key show")
    print("  cgpuctl evidence get -o bundle.json --nonce 00112233445566778899aabbccddeeff")
    print("  cgpuctl verify bundle.json --nonce 00112233445566778899aabbccddeeff --explain --html verdict.html \\")
    print(f"    --simulated-ak-root {state}/ak-root.pem")
    print('  # With the GPUs: "evidence get --gpus", and "verify" with')
    print("  #   --gpus 1 --device-root $GPU/device-root.pem --rim-root $GPU/rim-root.pem \\")
    print("  #   --rim $GPU/driver.swidtag --rim $GPU/vbios.swidtag")
    print("  make demo-stop   # leaves nothing behind")


def stop(*, quiet: bool = False) -> None:
    state = LINK.resolve() if LINK.is_symlink() else None
    if state is not None:
        for name, marker in PARTS:
            end(running(state, name, marker))
        shutil.rmtree(state, ignore_errors=True)
        LINK.unlink()
    shutil.rmtree(LINK.parent, ignore_errors=True)
    if not quiet:
        print("the demo is gone" if state is not None else "the demo is not running")


def end(pid: int | None) -> None:
    """SIGTERM, then SIGKILL for what does not listen."""
    if pid is None:
        return
    for number, patience in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 2.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            stat = Path(f"/proc/{pid}/stat")
            if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return
            time.sleep(0.05)


def main() -> None:
    try:
        {"start": start, "stop": stop}[sys.argv[1] if len(sys.argv) > 1 else "start"]()
    except AgentError as error:
        sys.exit(f"\n{error}")


if __name__ == "__main__":
    main()
