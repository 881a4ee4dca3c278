"""Every TPM command, on a real emulated TPM, judged by our own parsers and an independent crypto library."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from tpm2_pytss import ESYS_TR, TPM2B_PUBLIC, utils

from cgpu_agent.backends.base import AkAlgorithm, LoadedKey
from cgpu_agent.backends.tpm import keys, raw
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.esapi import Esapi, Handle
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.errors import DeviceFault, Misuse
from cgpu_agent.wire.tpm import (
    ALG_RSAES,
    Certified,
    EccKey,
    KeyBlob,
    ObjectAttributes,
    PcrSelection,
    Quoted,
    RsaKey,
    extend,
    parse_attest,
    parse_public,
    parse_signature,
    pcr_digest,
    pcr_policy,
)
from fixtures.sealedkeys import set_owner_auth

pytestmark = pytest.mark.swtpm

PLATFORM_AK = 0x81000003
AUTH = bytes(range(32))
ALL_PCRS = PcrSelection.of("sha256", range(24))
BOOT_PCRS = PcrSelection.of("sha256", range(8))
OWN_SIGNING = (
    ObjectAttributes.FIXED_TPM
    | ObjectAttributes.FIXED_PARENT
    | ObjectAttributes.SENSITIVE_DATA_ORIGIN
    | ObjectAttributes.USER_WITH_AUTH
    | ObjectAttributes.NO_DA
    | ObjectAttributes.RESTRICTED
    | ObjectAttributes.SIGN
)


@pytest.fixture
def commands(swtpm: Swtpm) -> Iterator[Commands]:
    opened = Commands(swtpm.transport())
    yield opened
    assert not opened.stale, "a test left the context in need of a new one"
    assert left_over(opened) == []
    opened.close()


def left_over(commands: Commands) -> list[bytes]:
    lists = [commands._esapi.capability(1, kind, 64) for kind in (0x80000000, 0x02000000, 0x03000000)]
    return [found for found in lists if found != b"\0\0\0\1\0\0\0\0"]


def agent_ak(commands: Commands, auth: bytes = AUTH) -> LoadedKey:
    return commands.load_agent_ak(commands.create_agent_ak(auth), auth)


def verify(public: bytes, attest: bytes, signature: bytes) -> None:
    """Raises unless ``signature`` is the key's over ``attest``."""
    key, found = parse_public(public).key, parse_signature(signature)
    if isinstance(key, EccKey):
        ecc = ec.EllipticCurvePublicNumbers(key.x, key.y, ec.SECP256R1()).public_key()
        ecc.verify(found.signature, attest, ec.ECDSA(hashes.SHA256()))
    else:
        numbers = rsa.RSAPublicNumbers(key.exponent, key.modulus)
        numbers.public_key().verify(found.signature, attest, padding.PKCS1v15(), hashes.SHA256())


def test_names_the_emulator(commands: Commands) -> None:
    info = commands.info()
    assert (info.manufacturer, info.vendor) == ("IBM", "SW   TPM")
    assert info.firmware_version > 1 << 32


def test_reads_a_running_clock(commands: Commands, swtpm: Swtpm) -> None:
    first = commands.clock()
    swtpm.kill()
    swtpm.start()
    assert commands.clock().reset_count == first.reset_count + 1


def test_random_bytes_are_as_many_as_asked_for(commands: Commands) -> None:
    assert [len(commands.random(count)) for count in (1, 16, 32)] == [1, 16, 32]
    assert commands.random(32) != commands.random(32)


@pytest.mark.parametrize("count", [-1, 0, 33])
def test_refuses_another_amount_of_randomness(commands: Commands, count: int) -> None:
    with pytest.raises(Misuse):
        commands.random(count)


def test_reads_more_pcrs_than_fit_one_answer(commands: Commands) -> None:
    expected = dict.fromkeys(range(24), bytes(32)) | dict.fromkeys(range(17, 23), b"\xff" * 32)
    assert commands.pcr_read(ALL_PCRS) == expected


def test_extends_a_pcr(commands: Commands) -> None:
    commands.pcr_extend(13, b"a" * 32)
    commands.pcr_extend(13, b"b" * 32)
    expected = extend("sha256", extend("sha256", bytes(32), b"a" * 32), b"b" * 32)
    assert commands.pcr_read(PcrSelection.of("sha256", [13])) == {13: expected}


def test_replayed_boot_reaches_the_bank_its_digests_name(commands: Commands, swtpm: Swtpm) -> None:
    swtpm.replay_boot([(7, b"x" * 48)])
    assert commands.pcr_read(PcrSelection.of("sha384", [7]))[7] == extend("sha384", bytes(48), b"x" * 48)
    assert commands.pcr_read(PcrSelection.of("sha256", [7]))[7] == bytes(32)


@pytest.mark.parametrize(("index", "digest"), [(-1, bytes(32)), (24, bytes(32)), (13, bytes(31)), (13, bytes(48))])
def test_refuses_a_wrong_extend(commands: Commands, index: int, digest: bytes) -> None:
    with pytest.raises(Misuse):
        commands.pcr_extend(index, digest)


def test_refuses_to_read_no_pcr(commands: Commands) -> None:
    with pytest.raises(Misuse):
        commands.pcr_read(PcrSelection("sha256", ()))


@pytest.mark.parametrize("algorithm", ["rsa", "ecc"])
def test_platform_ak_persists_with_the_attributes_of_an_ak(commands: Commands, algorithm: AkAlgorithm) -> None:
    assert commands.persistent_public(PLATFORM_AK) is None
    public = commands.create_platform_ak(PLATFORM_AK, algorithm)
    assert commands.persistent_public(PLATFORM_AK) == public
    assert parse_public(public).attributes == OWN_SIGNING


def test_platform_ak_never_replaces_a_key(commands: Commands) -> None:
    public = commands.create_platform_ak(PLATFORM_AK, "ecc")
    with pytest.raises(DeviceFault) as caught:
        commands.create_platform_ak(PLATFORM_AK, "rsa")
    assert caught.value.slug == "TPM_ERROR"
    assert "0x14c" in caught.value.message
    assert commands.persistent_public(PLATFORM_AK) == public


@pytest.mark.parametrize("handle", [0, 0x80000000, 0x01C101D0, 0x82000000])
def test_refuses_a_handle_that_cannot_persist(commands: Commands, handle: int) -> None:
    with pytest.raises(Misuse):
        commands.persistent_public(handle)
    with pytest.raises(Misuse):
        commands.create_platform_ak(handle, "ecc")


@pytest.mark.parametrize("algorithm", ["rsa", "ecc"])
def test_quote_by_the_platform_ak_verifies(commands: Commands, algorithm: AkAlgorithm) -> None:
    public = commands.create_platform_ak(PLATFORM_AK, algorithm)
    commands.pcr_extend(13, b"m" * 32)
    signed = commands.quote(PLATFORM_AK, b"q" * 48, ALL_PCRS)
    verify(public, signed.attest, signed.signature)
    attest = parse_attest(signed.attest)
    values = commands.pcr_read(ALL_PCRS)
    assert attest.extra_data == b"q" * 48
    assert attest.attested == Quoted((ALL_PCRS,), pcr_digest(values, ALL_PCRS.pcrs, "sha256"))


def test_quote_by_the_agent_ak_verifies(commands: Commands) -> None:
    key = agent_ak(commands)
    assert parse_public(key.public).attributes == OWN_SIGNING
    signed = commands.quote(key, b"", ALL_PCRS)
    verify(key.public, signed.attest, signed.signature)
    assert parse_attest(signed.attest).extra_data == b""


def test_reset_count_is_told_plainly_to_both_keys(commands: Commands, swtpm: Swtpm) -> None:
    commands.create_platform_ak(PLATFORM_AK, "ecc")
    blob = commands.create_agent_ak(AUTH)
    swtpm.restart()
    key = commands.load_agent_ak(blob, AUTH)
    quotes = [parse_attest(commands.quote(by, b"n", ALL_PCRS).attest) for by in (PLATFORM_AK, key)]
    clock = commands.clock()
    assert {quote.clock_info.reset_count for quote in quotes} == {clock.reset_count}
    assert {quote.clock_info.restart_count for quote in quotes} == {clock.restart_count}
    assert {quote.firmware_version for quote in quotes} == {commands.info().firmware_version}


def test_certify_names_the_agent_ak(commands: Commands) -> None:
    platform = commands.create_platform_ak(PLATFORM_AK, "rsa")
    key = agent_ak(commands)
    signed = commands.certify(key, PLATFORM_AK, b"boot" * 8)
    verify(platform, signed.attest, signed.signature)
    attest = parse_attest(signed.attest)
    assert isinstance(attest.attested, Certified)
    assert attest.attested.name == parse_public(key.public).name
    assert attest.extra_data == b"boot" * 8


def test_agent_ak_loads_again_after_a_reset(commands: Commands, swtpm: Swtpm) -> None:
    blob = commands.create_agent_ak(AUTH)
    swtpm.kill()
    swtpm.start()
    signed = commands.quote(commands.load_agent_ak(blob, AUTH), b"n", ALL_PCRS)
    verify(blob.public, signed.attest, signed.signature)


def test_two_agent_aks_have_two_names(commands: Commands) -> None:
    first, second = commands.create_agent_ak(AUTH), commands.create_agent_ak(AUTH)
    assert parse_public(first.public).name != parse_public(second.public).name


@pytest.mark.parametrize("auth", [b"", bytes(15), bytes(33)])
def test_refuses_an_auth_that_is_no_secret(commands: Commands, auth: bytes) -> None:
    with pytest.raises(Misuse):
        commands.create_agent_ak(auth)
    with pytest.raises(Misuse):
        commands.load_agent_ak(KeyBlob(b"", b""), auth)


@pytest.mark.parametrize("part", ["public", "private"])
def test_refuses_a_key_blob_that_was_altered(commands: Commands, part: str) -> None:
    blob = commands.create_agent_ak(AUTH)
    content = bytearray(getattr(blob, part))
    content[-1] ^= 1
    with pytest.raises(DeviceFault) as caught:
        commands.load_agent_ak(dataclasses.replace(blob, **{part: bytes(content)}), AUTH)
    assert caught.value.slug == "TPM_ERROR"


@pytest.mark.parametrize("public", [b"", b"\x00\x23", b"\xff" * 600, bytes(70_000)])
def test_refuses_a_key_blob_that_is_none(commands: Commands, public: bytes) -> None:
    with pytest.raises(Misuse) as caught:
        commands.load_agent_ak(KeyBlob(public, bytes(100)), AUTH)
    assert caught.value.slug == "TPM_ARGUMENT"


def test_refuses_more_qualifying_data_than_every_tpm_takes(commands: Commands) -> None:
    commands.create_platform_ak(PLATFORM_AK, "ecc")
    key = agent_ak(commands)
    with pytest.raises(Misuse):
        commands.quote(PLATFORM_AK, bytes(49), ALL_PCRS)
    with pytest.raises(Misuse):
        commands.certify(key, PLATFORM_AK, bytes(49))


def test_quote_by_an_absent_key_is_an_error(commands: Commands) -> None:
    with pytest.raises(DeviceFault) as caught:
        commands.quote(PLATFORM_AK, b"n", ALL_PCRS)
    assert caught.value.slug == "TPM_ERROR"


def test_reads_an_nv_index_longer_than_one_command(commands: Commands, swtpm: Swtpm) -> None:
    content = bytes(range(256)) * 6
    swtpm.provision_nv(0x01C101D0, content, size=2048)
    assert commands.nv_read(0x01C101D0) == content.ljust(2048, b"\0")


def test_reads_a_certificate_where_the_owner_has_a_password(commands: Commands, swtpm: Swtpm) -> None:
    swtpm.provision_nv(0x01C00002, b"of the EK")
    set_owner_auth(swtpm, b"secret")
    assert commands.nv_read(0x01C00002) == b"of the EK"


def test_an_index_that_somebody_gave_an_auth_value_costs_no_try(commands: Commands, swtpm: Swtpm) -> None:
    """Only the owner asks for it: with a wrong auth value the TPM would count towards its lockout."""
    owner_and_auth_read = 1 << 1 | 1 << 17 | 1 << 18
    swtpm.execute(raw.nv_define(0x01800001, 8, owner_and_auth_read, raw.OWNER))
    swtpm.execute(raw.nv_write(0x01800001, bytes(8), 0, raw.OWNER))
    assert commands.nv_read(0x01800001) == bytes(8)
    set_owner_auth(swtpm, b"secret")
    with pytest.raises(DeviceFault) as caught:
        commands.nv_read(0x01800001)
    assert caught.value.slug == "TPM_AUTH"


def test_absent_nv_index_reads_as_none(commands: Commands) -> None:
    assert commands.nv_read(0x01C101D0) is None


def test_unwritten_nv_index_reads_as_none(commands: Commands, swtpm: Swtpm) -> None:
    owner_read_write = 1 << 1 | 1 << 17
    swtpm.execute(raw.nv_define(0x01800001, 32, owner_read_write, raw.OWNER))
    assert commands.nv_read(0x01800001) is None


def test_nv_index_closed_to_the_owner_is_an_error(commands: Commands, swtpm: Swtpm) -> None:
    platform_only = 1 << 0 | 1 << 16 | 1 << 30
    swtpm.execute(raw.nv_define(0x01400001, 8, platform_only, raw.PLATFORM))
    swtpm.execute(raw.nv_write(0x01400001, bytes(8), 0, raw.PLATFORM))
    with pytest.raises(DeviceFault) as caught:
        commands.nv_read(0x01400001)
    assert caught.value.slug == "TPM_AUTH"


def test_refuses_an_index_outside_nv(commands: Commands) -> None:
    with pytest.raises(Misuse):
        commands.nv_read(PLATFORM_AK)
    with pytest.raises(Misuse):
        commands.nv_write(PLATFORM_AK, b"1")


def test_an_index_is_defined_and_written(commands: Commands) -> None:
    for content in (b"first".ljust(64, b"."), b"other".ljust(64, b".")):
        commands.nv_write(0x01400002, content)
        assert commands.nv_read(0x01400002) == content


def test_an_index_of_another_size_keeps_its_content(commands: Commands) -> None:
    commands.nv_write(0x01400002, bytes(64))
    with pytest.raises(DeviceFault) as caught:
        commands.nv_write(0x01400002, b"\1" * 32)
    assert caught.value.slug == "TPM_ERROR"
    assert commands.nv_read(0x01400002) == bytes(64)


@pytest.mark.parametrize("size", [0, 1025])
def test_refuses_to_write_what_is_no_single_write(commands: Commands, size: int) -> None:
    with pytest.raises(Misuse):
        commands.nv_write(0x01400002, bytes(size))


@pytest.mark.parametrize("algorithm", ["rsa", "ecc"])
def test_credential_is_activated_only_by_the_tpm_it_was_made_for(commands: Commands, algorithm: AkAlgorithm) -> None:
    ak = parse_public(commands.create_platform_ak(PLATFORM_AK, "rsa"))
    ek = commands.ek_public(algorithm)
    assert parse_public(ek).name == parse_public(commands.ek_public(algorithm)).name
    target = TPM2B_PUBLIC.unmarshal(keys.sized(ek))[0]
    blob, secret = utils.make_credential(target, b"the secret", ak.name)
    assert commands.activate_credential(PLATFORM_AK, algorithm, bytes(blob), bytes(secret)) == b"the secret"

    blob, secret = utils.make_credential(target, b"the secret", b"\x00\x0b" + bytes(32))
    with pytest.raises(DeviceFault) as caught:
        commands.activate_credential(PLATFORM_AK, algorithm, bytes(blob), bytes(secret))
    assert caught.value.slug == "TPM_ERROR"


def test_persistent_ek_is_preferred_also_when_it_takes_a_password(commands: Commands) -> None:
    """As P-384 EKs of the high range do; their certificate names them, not the default template's key."""
    template = bytearray(keys.endorsement_key("ecc", b"another key"))
    template[4:8] = (int.from_bytes(template[4:8], "big") | ObjectAttributes.USER_WITH_AUTH).to_bytes(4, "big")
    with commands._primary(bytes(template)) as (handle, public):
        commands._esapi.evict_control(handle, keys.EK_HANDLES["ecc"])
    assert commands.ek_public("ecc") == public
    ak = parse_public(commands.create_platform_ak(PLATFORM_AK, "ecc"))
    blob, secret = utils.make_credential(TPM2B_PUBLIC.unmarshal(keys.sized(public))[0], b"s", ak.name)
    assert commands.activate_credential(PLATFORM_AK, "ecc", bytes(blob), bytes(secret)) == b"s"


def test_another_key_at_the_handle_of_the_ek_is_passed_over(commands: Commands) -> None:
    expected = commands.ek_public("ecc")
    commands.create_platform_ak(keys.EK_HANDLES["ecc"], "ecc")
    assert commands.ek_public("ecc") == expected


def test_template_and_nonce_of_the_manufacturer_make_the_ek(commands: Commands, swtpm: Swtpm) -> None:
    default = commands.ek_public("ecc")
    swtpm.provision_nv(keys.EK_NONCE_INDICES["ecc"], b"nonce")
    with_nonce = commands.ek_public("ecc")
    swtpm.provision_nv(keys.EK_TEMPLATE_INDICES["ecc"], keys.endorsement_key("ecc"))
    assert with_nonce != default
    assert commands.ek_public("ecc") == default


@pytest.mark.parametrize(("blob", "secret"), [(b"", b""), (bytes(500), bytes(64)), (bytes(40), bytes(70_000))])
def test_refuses_a_credential_that_is_none(commands: Commands, blob: bytes, secret: bytes) -> None:
    commands.create_platform_ak(PLATFORM_AK, "ecc")
    with pytest.raises((Misuse, DeviceFault)):
        commands.activate_credential(PLATFORM_AK, "ecc", blob, secret)


def test_opening_flushes_what_others_left(swtpm: Swtpm) -> None:
    other = Esapi(swtpm.transport(), command_timeout=10)
    other.create_primary(keys.storage_parent())
    other.start_policy_session(0x000B)
    opened = Commands(swtpm.transport())
    assert left_over(opened) == []
    opened.close()
    other.close()


def encrypt(key: LoadedKey, secret: bytes, oaep: str | None) -> bytes:
    """As somebody does who has the public key alone."""
    public = parse_public(key.public).key
    assert isinstance(public, RsaKey)
    chosen = {"sha1": hashes.SHA1(), "sha256": hashes.SHA256(), "sha384": hashes.SHA384()}
    scheme = (
        padding.PKCS1v15()
        if oaep is None
        else padding.OAEP(padding.MGF1(chosen[oaep]), algorithm=chosen[oaep], label=None)
    )
    return rsa.RSAPublicNumbers(public.exponent, public.modulus).public_key().encrypt(secret, scheme)


@pytest.mark.parametrize("oaep", [None, "sha1", "sha256", "sha384"])
def test_decryption_key_opens_what_was_encrypted_to_it(commands: Commands, oaep: str | None) -> None:
    key = commands.create_decryption_key(pcr_policy(BOOT_PCRS, commands.pcr_read(BOOT_PCRS)))
    assert left_over(commands) == [], "it lives in its saved context only"
    secret = bytes(31) + b"\1" if oaep else b"\1" + bytes(31)
    assert commands.rsa_decrypt(key, BOOT_PCRS, encrypt(key, secret, oaep), oaep) == secret


def test_decryption_key_is_what_the_attestation_service_certifies(commands: Commands) -> None:
    commands.create_platform_ak(PLATFORM_AK, "rsa")
    policy = pcr_policy(BOOT_PCRS, commands.pcr_read(BOOT_PCRS))
    key = commands.create_decryption_key(policy)
    public = parse_public(key.public)
    assert public.auth_policy == policy
    assert public.scheme is None
    assert public.attributes == (
        ObjectAttributes.FIXED_TPM
        | ObjectAttributes.FIXED_PARENT
        | ObjectAttributes.SENSITIVE_DATA_ORIGIN
        | ObjectAttributes.NO_DA
        | ObjectAttributes.DECRYPT
    )
    certified = parse_attest(commands.certify(key, PLATFORM_AK, b"").attest).attested
    assert isinstance(certified, Certified)
    assert certified.name == public.name
    # The null hierarchy's: nobody can make it persistent.
    assert certified.qualified_name == b"\0\x0b" + hashlib.sha256(b"\x40\0\0\7" + public.name).digest()


def test_no_two_decryption_keys_are_one(commands: Commands) -> None:
    policy = pcr_policy(BOOT_PCRS, commands.pcr_read(BOOT_PCRS))
    assert commands.create_decryption_key(policy).public != commands.create_decryption_key(policy).public


def test_decryption_key_ends_when_a_pcr_changes(commands: Commands) -> None:
    key = commands.create_decryption_key(pcr_policy(BOOT_PCRS, commands.pcr_read(BOOT_PCRS)))
    ciphertext = encrypt(key, AUTH, "sha256")
    commands.pcr_extend(8, bytes(32))
    assert commands.rsa_decrypt(key, BOOT_PCRS, ciphertext, "sha256") == AUTH, "PCR 8 is none of its"
    commands.pcr_extend(7, bytes(32))
    with pytest.raises(DeviceFault) as caught:
        commands.rsa_decrypt(key, BOOT_PCRS, ciphertext, "sha256")
    assert caught.value.slug == "TPM_AUTH"


def test_decryption_key_takes_its_own_pcrs_only(commands: Commands) -> None:
    key = commands.create_decryption_key(pcr_policy(BOOT_PCRS, commands.pcr_read(BOOT_PCRS)))
    with pytest.raises(DeviceFault) as caught:
        commands.rsa_decrypt(key, PcrSelection.of("sha256", [16]), encrypt(key, AUTH, "sha256"), "sha256")
    assert caught.value.slug == "TPM_AUTH"


def test_decryption_key_takes_no_password(commands: Commands) -> None:
    key = commands.create_decryption_key(pcr_policy(BOOT_PCRS, commands.pcr_read(BOOT_PCRS)))
    with commands._key(key) as handle, pytest.raises(DeviceFault) as caught:
        commands._esapi.rsa_decrypt(handle, encrypt(key, AUTH, None), keys.u16(ALG_RSAES), Handle(ESYS_TR.PASSWORD))
    assert caught.value.slug == "TPM_AUTH"


@pytest.mark.parametrize("oaep", [None, "sha256"])
def test_refuses_to_decrypt_what_is_no_ciphertext(commands: Commands, oaep: str | None) -> None:
    key = commands.create_decryption_key(pcr_policy(BOOT_PCRS, commands.pcr_read(BOOT_PCRS)))
    for ciphertext, kind in ((bytes(255), Misuse), (bytes(257), Misuse), (b"\1" * 256, DeviceFault)):
        with pytest.raises(kind):
            commands.rsa_decrypt(key, BOOT_PCRS, ciphertext, oaep)


def test_refuses_a_policy_of_another_size(commands: Commands) -> None:
    """An empty one would be met by nobody, or on a TPM with other rules by all."""
    with pytest.raises(Misuse):
        commands.create_decryption_key(b"")
