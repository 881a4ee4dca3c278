"""Others in this VM use the same TPM, and a device can answer late: neither may speak in the agent's name."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Iterator

import pytest

from cgpu_agent.backends.base import LoadedKey, TpmCommands
from cgpu_agent.backends.tpm import keys
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.owner import TpmOwner
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.backends.tpm.transport import Device, open_tpm
from cgpu_agent.errors import DeviceFault, Misuse
from cgpu_agent.wire.tpm import Certified, PcrSelection, parse_attest, parse_public
from fixtures.fake_tpm import GET_RANDOM_4, GET_RANDOM_8, PacketTpm, random_answer

PLATFORM_AK = 0x81000003
SECRET = b"known to the agent alone"
PCRS = PcrSelection.of("sha256", range(24))


ENDORSEMENT = (0x4000000B).to_bytes(4, "big")


def qualified(parent: bytes, name: bytes) -> bytes:
    """Qualified name of an object (Part 1, 16): the hash alg, then the digest over the parent's and its own name."""
    return b"\x00\x0b" + hashlib.sha256(parent + name).digest()


@dataclasses.dataclass
class Scene:
    agent: Commands
    other: Commands
    key: LoadedKey


@pytest.fixture
def scene(swtpm: Swtpm) -> Iterator[Scene]:
    """The agent with its AK, and another user of the same TPM who got hold of the key's saved context."""
    agent, other = Commands(swtpm.transport()), Commands(swtpm.transport())
    agent.create_platform_ak(PLATFORM_AK, "ecc")
    blob = agent.create_agent_ak(SECRET)
    yield Scene(agent, other, agent.load_agent_ak(blob, SECRET))
    agent.close()
    other.close()


@pytest.mark.swtpm
@pytest.mark.parametrize("guess", [b"", b"\0" * 16, SECRET[:-1], SECRET + b"x"])
def test_agent_ak_signs_for_nobody_without_its_auth(scene: Scene, guess: bytes) -> None:
    stolen = dataclasses.replace(scene.key, auth=guess)
    with pytest.raises(DeviceFault) as caught:
        scene.other.quote(stolen, b"forged manifest", PCRS)
    assert caught.value.slug == "TPM_AUTH"
    with pytest.raises(DeviceFault) as caught:
        scene.other.certify(stolen, PLATFORM_AK, b"n")
    assert caught.value.slug == "TPM_AUTH"
    assert scene.agent.quote(scene.key, b"manifest", PCRS).attest


@pytest.mark.swtpm
def test_key_of_the_same_template_and_auth_has_another_name(scene: Scene) -> None:
    twin = scene.other.create_agent_ak(SECRET)
    assert parse_public(twin.public).name != parse_public(scene.key.public).name


@pytest.mark.swtpm
def test_private_part_of_the_agent_ak_loads_under_no_other_public(scene: Scene) -> None:
    blob = scene.agent.create_agent_ak(SECRET)
    twin = scene.other.create_agent_ak(b"known to the attacker")
    with pytest.raises(DeviceFault) as caught:
        scene.other.load_agent_ak(dataclasses.replace(twin, public=blob.public), b"known to the attacker")
    assert caught.value.slug == "TPM_ERROR"


@pytest.mark.swtpm
def test_signature_of_the_platform_ak_names_another_signer(scene: Scene) -> None:
    forged = parse_attest(scene.other.quote(PLATFORM_AK, b"forged manifest", PCRS).attest)
    genuine = parse_attest(scene.agent.quote(scene.key, b"manifest", PCRS).attest)
    assert forged.qualified_signer != genuine.qualified_signer


@pytest.mark.swtpm
def test_certificate_shows_the_agent_ak_below_a_parent_of_the_endorsement_hierarchy(scene: Scene) -> None:
    """A primary could be made twice with one Name and two auths; the qualified name shows that this is none."""
    attested = parse_attest(scene.agent.certify(scene.key, PLATFORM_AK, b"n").attest).attested
    with scene.other._primary(keys.storage_parent()) as (_, public):
        parent = qualified(ENDORSEMENT, parse_public(public).name)
    name = parse_public(scene.key.public).name
    assert attested == Certified(name, qualified(parent, name))


@pytest.mark.swtpm
def test_auth_never_stands_in_an_error(scene: Scene) -> None:
    with pytest.raises(DeviceFault) as caught:
        scene.other.quote(dataclasses.replace(scene.key, auth=b"wrong guess"), b"n", PCRS)
    assert "wrong guess" not in f"{caught.value!r} {caught.value.__cause__!r}"
    assert repr(SECRET) not in repr(scene.key)


def test_late_answer_is_never_the_next_commands_answer() -> None:
    tpm = PacketTpm()
    device = Device(tpm.descriptor)
    with pytest.raises(DeviceFault) as caught:
        device.transact(GET_RANDOM_8, time.monotonic() + 0.01)
    assert caught.value.slug == "TPM_TIMEOUT"
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        tpm.send(random_answer(GET_RANDOM_8))
    with pytest.raises(DeviceFault) as caught:
        device.transact(GET_RANDOM_4, time.monotonic() + 5)
    assert caught.value.slug == "TPM_IO"
    tpm.close()


def test_owner_opens_the_device_anew_after_a_late_answer() -> None:
    """The first descriptor never answers; its answer to 8 bytes must not reach the job that asks for 4."""
    silent, healthy = PacketTpm(), PacketTpm()
    descriptors = iter([silent.descriptor, healthy.descriptor])

    async def scenario(asked: list[int]) -> None:
        owner = TpmOwner(lambda: Device(next(descriptors)))

        def draw(count: int) -> object:
            def job(tpm: TpmCommands) -> bytes:
                asked.append(count)
                return tpm.random(count)

            return job

        try:
            with pytest.raises(DeviceFault) as caught:
                await owner.run(draw(8), timeout=0.05)  # type: ignore[arg-type]
            assert caught.value.slug == "TPM_TIMEOUT"
            assert silent.receive() == GET_RANDOM_8
            assert await owner.run(draw(4), timeout=30) == b"\4" * 4  # type: ignore[arg-type]
        finally:
            owner.close()

    asked: list[int] = []
    with healthy.answering(random_answer):
        asyncio.run(scenario(asked))
    assert asked == [8, 4]
    silent.close()
    healthy.close()


def test_raw_device_without_isolation_is_refused() -> None:
    with pytest.raises(Misuse) as caught:
        open_tpm("device:/dev/tpm0")
    assert "/dev/tpmrm0" in caught.value.message


def test_nothing_of_others_is_flushed_on_a_shared_device() -> None:
    """On a device the first command is the job's own: no list of handles, no flush, no startup."""
    tpm = PacketTpm()
    seen = []

    def respond(command: bytes) -> bytes:
        seen.append(command)
        return random_answer(command)

    with tpm.answering(respond):
        commands = Commands(Device(tpm.descriptor))
        commands.random(4)
        commands.close()
    assert seen == [GET_RANDOM_4]
    tpm.close()
