"""The two AKs: the platform's, which the cloud vouches for, and the agent's own, which alone signs manifests.

Anyone with TPM access may use the platform AK (its auth is empty). The agent's AK has an auth value that only the
agent knows, is certified by the platform AK once per boot, and its Name is the first record of the agent log. So
nobody else can have words signed as the agent's, and a second "agent" in the same boot cannot come first.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.backends.base import AkAlgorithm, LoadedKey, Signed, TpmCommands, TpmInfo
from cgpu_agent.domain.agentlog import AgentLog
from cgpu_agent.domain.store import Store
from cgpu_agent.errors import HostileInput, Unavailable
from cgpu_agent.verifier.certificate import load_certificate
from cgpu_agent.verifier.keys import certificate_key, load_attestation_key, same_key
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.bundle import MAX_CERTIFICATE
from cgpu_agent.wire.der import trim_der
from cgpu_agent.wire.extradata import agent_ak_qualifying_data
from cgpu_agent.wire.hcl import AK_CERTIFICATE_INDEX
from cgpu_agent.wire.strictjson import Fields, b64
from cgpu_agent.wire.tpm import Certified, ClockInfo, KeyBlob, parse_attest, parse_public

_STATE = "agent-ak"

EK_CERTIFICATE_INDICES = (0x01C00002, 0x01C0000A, 0x01C00016)
"""NV indices of EK certificates: RSA-2048, ECC P-256, ECC P-384 (TCG EK Credential Profile 2.5, 2.2.1.4)."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of this boot and who vouches for them."""

    platform_ak_handle: int
    platform_ak: bytes
    platform_ak_certificate: bytes | None
    agent_ak: LoadedKey
    agent_ak_certify: Signed
    ek_certificates: tuple[bytes, ...]
    clock: ClockInfo
    tpm: TpmInfo

    @property
    def agent_ak_name(self) -> bytes:
        return parse_public(self.agent_ak.public).name

    @property
    def platform_ak_name(self) -> bytes:
        return parse_public(self.platform_ak).name


@dataclass(frozen=True, slots=True)
class _State:
    """The agent's AK as kept for this boot."""

    boot_id: str
    reset_count: int
    restart_count: int
    blob: KeyBlob
    auth: bytes
    certify: Signed

    def encode(self) -> bytes:
        return strictjson.dumps(
            {
                "auth": self.auth.hex(),
                "boot_id": self.boot_id,
                "certify": {"attest": b64(self.certify.attest), "signature": b64(self.certify.signature)},
                "private": b64(self.blob.private),
                "public": b64(self.blob.public),
                "reset_count": self.reset_count,
                "restart_count": self.restart_count,
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> _State:
        """Read it back. Raises ``HostileInput``."""
        fields = Fields(strictjson.loads(data, "AK state", 8192), "AK state")
        certify = fields.fields("certify")
        state = cls(
            fields.text("boot_id", 36),
            fields.integer("reset_count", 0, 0xFFFFFFFF),
            fields.integer("restart_count", 0, 0xFFFFFFFF),
            KeyBlob(fields.base64("public", 1024), fields.base64("private", 1024)),
            fields.hex("auth", 32, 32),
            Signed(certify.base64("attest", 1024), certify.base64("signature", 1024)),
        )
        certify.end()
        fields.end()
        return state


def _platform_ak(tpm: TpmCommands, handle: int, create: AkAlgorithm | None) -> bytes:
    found = tpm.persistent_public(handle)
    if found is not None:
        return found
    if create is None:
        raise Unavailable("NO_PLATFORM_AK", f"no platform AK at handle 0x{handle:08x} and none may be made")
    return tpm.create_platform_ak(handle, create)


def _certificate(tpm: TpmCommands, index: int) -> bytes | None:
    raw = tpm.nv_read(index)
    if not raw:
        return None
    try:
        return trim_der(raw)
    except HostileInput:
        return None  # an index that holds no certificate endorses nothing; the verifier says "none"


def _saved(store: Store) -> _State | None:
    data = store.read(_STATE)
    try:
        return None if data is None else _State.parse(data)
    except HostileInput as error:
        raise Unavailable("AGENT_AK", "the agent's AK of this boot cannot be read; evidence is refused") from error


def _make_agent_ak(tpm: TpmCommands, handle: int, boot_id: str, clock: ClockInfo) -> _State:
    auth = secrets.token_bytes(32)
    blob = tpm.create_agent_ak(auth)
    loaded = tpm.load_agent_ak(blob, auth)
    name = parse_public(blob.public).name
    certify = tpm.certify(loaded, handle, agent_ak_qualifying_data(name))
    attested = parse_attest(certify.attest).attested
    if not isinstance(attested, Certified) or attested.name != name:
        raise Unavailable("AGENT_AK", "the TPM certified another key than the agent's")
    return _State(boot_id, clock.reset_count, clock.restart_count, blob, auth, certify)


def establish(
    tpm: TpmCommands,
    store: Store,
    log: AgentLog,
    *,
    boot_id: str,
    platform_ak_handle: int,
    create: AkAlgorithm | None,
) -> Keys:
    """Find or make both AKs and open the agent log; one TPM job, safe to run again.

    Args:
        boot_id: the kernel's boot id: keys of an earlier boot are discarded.
        create: algorithm for a platform AK to make where none is found; ``None`` = refuse instead.

    Raises:
        Unavailable: ``TPM_RESET_DETECTED`` (the TPM was reset under this kernel: what it holds is not this boot's),
            ``AGENT_LOG_DIVERGED``, ``AGENT_AK``, ``NO_PLATFORM_AK``.
        DeviceFault: from the TPM.
    """
    clock = tpm.clock()
    platform_ak = _platform_ak(tpm, platform_ak_handle, create)
    state = _saved(store)
    if state is not None and state.boot_id != boot_id:
        state = None
        for stale in ("agent-log", "agent-log-intent", _STATE):
            store.remove(stale)
    counters = (clock.reset_count, clock.restart_count)
    if state is not None and (state.reset_count, state.restart_count) != counters:
        raise tpm_was_reset()
    log.open(tpm)
    if state is None:
        if log.records:
            raise Unavailable(
                "AGENT_AK", "the agent log is there but its AK is lost; evidence is refused until reboot"
            )
        state = _make_agent_ak(tpm, platform_ak_handle, boot_id, clock)
        # Kept before it is measured: a crash in between leaves a key that the log's first record can still name.
        store.write(_STATE, state.encode())
    name = parse_public(state.blob.public).name
    if not log.records:
        log.measure(tpm, "agent", first_record(name))
    elif log.records[0].content != first_record(name):
        raise Unavailable("AGENT_AK", "the agent log names another AK; evidence is refused until reboot")
    certificates = [_certificate(tpm, index) for index in EK_CERTIFICATE_INDICES]
    return Keys(
        platform_ak_handle=platform_ak_handle,
        platform_ak=platform_ak,
        platform_ak_certificate=_certificate(tpm, AK_CERTIFICATE_INDEX),
        agent_ak=tpm.load_agent_ak(state.blob, state.auth),
        agent_ak_certify=state.certify,
        ek_certificates=tuple(der for der in certificates if der is not None),
        clock=clock,
        tpm=tpm.info(),
    )


def with_certificate(keys: Keys, certificate: bytes) -> Keys:
    """The same keys with another certificate of the platform AK (DER or PEM).

    Raises ``HostileInput``: ``AK_CERTIFICATE_MISMATCH`` (it is another key's), ``TOO_LARGE`` (for a bundle), and what
    ``load_certificate`` raises.
    """
    found = load_certificate(certificate)
    if not same_key(certificate_key(found), load_attestation_key(keys.platform_ak).key):
        raise HostileInput("AK_CERTIFICATE_MISMATCH", "the configured AK certificate is for another key than the AK")
    der = found.public_bytes(Encoding.DER)
    if len(der) > MAX_CERTIFICATE:
        raise HostileInput("TOO_LARGE", f"the configured AK certificate has more than {MAX_CERTIFICATE} bytes")
    return replace(keys, platform_ak_certificate=der)


def renewed(tpm: TpmCommands, keys: Keys) -> Keys:
    """The same keys with the platform AK's certificate that is in NV now; one that does not fit changes nothing."""
    certificate = _certificate(tpm, AK_CERTIFICATE_INDEX)
    if certificate is None or certificate == keys.platform_ak_certificate:
        return keys
    try:
        return with_certificate(keys, certificate)
    except HostileInput:
        return keys


def first_record(agent_ak_name: bytes) -> bytes:
    """Content of the agent log's first record: it names the AK that signs this boot's manifests."""
    return strictjson.dumps({"agent_ak_name": agent_ak_name.hex(), "event": "agent-ak"})


def tpm_was_reset() -> Unavailable:
    """The refusal after a reset of the TPM under a running kernel: its PCRs no longer tell this boot."""
    return Unavailable(
        "TPM_RESET_DETECTED",
        "the TPM was reset while this system was running; evidence is refused until reboot",
    )
