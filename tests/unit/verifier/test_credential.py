"""A credential opens in the TPM with that EK and that AK, and nowhere else."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cgpu_agent.errors import AgentError, HostileInput, Misuse
from cgpu_agent.verifier.credential import make_credential
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.wire.tpm import ALG_AES, ALG_CFB, ObjectAttributes, Public, RsaKey, parse_public
from fixtures.attest import AK_ATTRIBUTES, Signer, ecc_key, public_area, rsa_key, u16

EK_ATTRIBUTES = (
    ObjectAttributes.FIXED_TPM
    | ObjectAttributes.FIXED_PARENT
    | ObjectAttributes.SENSITIVE_DATA_ORIGIN
    | ObjectAttributes.USER_WITH_AUTH
    | ObjectAttributes.RESTRICTED
    | ObjectAttributes.DECRYPT
)
AES128_CFB = u16(ALG_AES) + u16(128) + u16(ALG_CFB)
NAME = b"\0\x0b" + hashlib.sha256(b"an AK").digest()

ECC_EK = parse_public(public_area(ecc_key().public_key(), attributes=EK_ATTRIBUTES, symmetric=AES128_CFB))
RSA_EK = parse_public(public_area(rsa_key().public_key(), attributes=EK_ATTRIBUTES, symmetric=AES128_CFB))


def slug_of(call: Callable[[], object], error: type[AgentError] = HostileInput) -> str:
    with pytest.raises(error) as caught:
        call()
    return caught.value.slug


class TestForm:
    @pytest.mark.parametrize(("ek", "size"), [(ECC_EK, 68), (RSA_EK, 256)])
    def test_has_the_sizes_of_its_parts(self, ek: Public, size: int) -> None:
        id_object, encrypted = make_credential(ek, NAME, b"s" * 20)
        assert id_object[:2] == u16(32)
        assert len(id_object) == 2 + 32 + 2 + 20
        assert len(encrypted) == size

    def test_never_repeats_and_never_shows_the_secret(self) -> None:
        for ek in (ECC_EK, RSA_EK):
            made = [make_credential(ek, NAME, b"s" * 32) for _ in range(8)]
            assert len({each[0] for each in made}) == len({each[1] for each in made}) == 8
            assert all(b"ssss" not in each[0] for each in made)

    def test_the_rsa_seed_comes_from_the_given_source(self) -> None:
        first, second = (make_credential(RSA_EK, NAME, b"secret", random=lambda size: b"r" * size) for _ in range(2))
        assert first[0] == second[0]
        assert first[1] != second[1]

    @pytest.mark.parametrize("secret", [b"", bytes(33)])
    def test_refuses_a_secret_that_no_tpm_would_open(self, secret: bytes) -> None:
        assert slug_of(lambda: make_credential(ECC_EK, NAME, secret), Misuse) == "BAD_SECRET"

    @pytest.mark.parametrize(
        "name",
        [b"", b"\0\x0b", NAME[:-1], NAME + b"\0", b"\0\4" + bytes(20), b"\0\x0c" + bytes(32), b"\0\x10" + bytes(32)],
    )
    def test_refuses_what_is_no_name(self, name: bytes) -> None:
        assert slug_of(lambda: make_credential(ECC_EK, name, b"secret")) == "BAD_NAME"

    @pytest.mark.parametrize(
        "changed",
        [
            {"attributes": EK_ATTRIBUTES & ~ObjectAttributes.RESTRICTED},
            {"attributes": EK_ATTRIBUTES & ~ObjectAttributes.DECRYPT},
            {"attributes": EK_ATTRIBUTES & ~ObjectAttributes.FIXED_TPM},
            {"attributes": EK_ATTRIBUTES | ObjectAttributes.SIGN},
            {"symmetric": None, "symmetric_bits": None, "symmetric_mode": None},
            {"symmetric": 0x0013},
            {"symmetric_mode": 0x0042},
            {"symmetric_bits": 64},
            {"name_alg": "sha1"},
        ],
    )
    def test_refuses_a_key_that_is_no_ek(self, changed: dict[str, object]) -> None:
        ek = replace(ECC_EK, **changed)  # type: ignore[arg-type]
        assert slug_of(lambda: make_credential(ek, NAME, b"secret")) == "EK_NOT_SUITABLE"

    def test_refuses_an_ak_in_the_place_of_the_ek(self) -> None:
        ak = parse_public(Signer(ecc_key()).public())
        assert slug_of(lambda: make_credential(ak, NAME, b"secret")) == "EK_NOT_SUITABLE"

    def test_refuses_an_ek_off_its_curve(self) -> None:
        point = ecc_key().public_key().public_numbers()
        ek = replace(ECC_EK, key=replace(ECC_EK.key, x=point.x))  # type: ignore[call-arg]
        assert slug_of(lambda: make_credential(ek, NAME, b"secret")) == "BAD_KEY"


@dataclass(frozen=True)
class SoftwareTpm:
    """A swtpm through tpm2-pytss: creates keys, activates credentials."""

    esapi: Any

    def create(self, algorithm: str, attributes: int, name_alg: str) -> tuple[object, bytes]:
        """A primary key in the endorsement hierarchy: (handle, TPMT_PUBLIC)."""
        from tpm2_pytss import ESYS_TR, TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMA_OBJECT

        template = TPM2B_PUBLIC.parse(algorithm, objectAttributes=TPMA_OBJECT(attributes), nameAlg=name_alg)
        made = self.esapi.create_primary(TPM2B_SENSITIVE_CREATE(), template, ESYS_TR.ENDORSEMENT)
        return made[0], made[1].marshal()[2:]

    def open(self, ak: object, ek: object, id_object: bytes, encrypted: bytes) -> bytes:
        """TPM2_ActivateCredential."""
        from tpm2_pytss import TPM2B_ENCRYPTED_SECRET, TPM2B_ID_OBJECT

        opened = self.esapi.activate_credential(ak, ek, TPM2B_ID_OBJECT(id_object), TPM2B_ENCRYPTED_SECRET(encrypted))
        return bytes(opened)


@pytest.fixture(scope="module")
def tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftwareTpm]:
    if shutil.which("swtpm") is None:
        pytest.skip("swtpm is not installed")
    pytss = pytest.importorskip("tpm2_pytss", reason="tpm2-pytss is not installed")
    folder = tmp_path_factory.mktemp("swtpm")
    socket = folder / "sock"
    process = subprocess.Popen(
        [
            "swtpm", "socket", "--tpm2",
            "--server", f"type=unixio,path={socket},mode=0600",
            "--ctrl", f"type=unixio,path={socket}.ctrl,mode=0600",
            "--tpmstate", f"dir={folder},mode=0600",
            "--flags", "not-need-init,startup-clear",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(1000):
            if Path(f"{socket}.ctrl").exists():
                break
            time.sleep(0.01)
        with pytss.ESAPI(f"swtpm:path={socket}") as esapi:
            yield SoftwareTpm(esapi)
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture(scope="module", params=["rsa2048:aes128cfb", "ecc256:aes128cfb", "ecc384:aes256cfb"])
def ek(request: pytest.FixtureRequest, tpm: SoftwareTpm) -> Iterator[tuple[object, Public]]:
    name_alg = "sha384" if request.param.startswith("ecc384") else "sha256"
    handle, public = tpm.create(request.param, EK_ATTRIBUTES, name_alg)
    yield handle, parse_public(public)
    tpm.esapi.flush_context(handle)


@pytest.fixture(scope="module")
def ak(tpm: SoftwareTpm) -> Iterator[tuple[object, bytes]]:
    handle, public = tpm.create("ecc256:ecdsa-sha256:null", AK_ATTRIBUTES, "sha256")
    name = load_attestation_key(public).name
    assert name is not None
    yield handle, name
    tpm.esapi.flush_context(handle)


@pytest.mark.swtpm
class TestActivation:
    def test_opens_a_secret_of_any_size(
        self, tpm: SoftwareTpm, ek: tuple[object, Public], ak: tuple[object, bytes]
    ) -> None:
        for size in (1, 16, 32):
            secret = hashlib.sha256(bytes([size])).digest()[:size]
            assert tpm.open(ak[0], ek[0], *make_credential(ek[1], ak[1], secret)) == secret

    def test_refuses_another_name_an_altered_blob_and_another_ek(
        self, tpm: SoftwareTpm, ek: tuple[object, Public], ak: tuple[object, bytes]
    ) -> None:
        from tpm2_pytss import TSS2_Exception

        good = make_credential(ek[1], ak[1], b"secret")
        other_name = make_credential(ek[1], NAME, b"secret")
        altered = (good[0][:-1] + bytes([good[0][-1] ^ 1]), good[1])
        stranger = RSA_EK if isinstance(ek[1].key, RsaKey) else ECC_EK
        other_ek = make_credential(stranger, ak[1], b"secret")
        for id_object, encrypted in (other_name, altered, other_ek):
            with pytest.raises(TSS2_Exception):
                tpm.open(ak[0], ek[0], id_object, encrypted)
        assert tpm.open(ak[0], ek[0], *good) == b"secret"

    def test_public_areas_are_read_as_the_tpm_names_them(
        self, tpm: SoftwareTpm, ek: tuple[object, Public], ak: tuple[object, bytes]
    ) -> None:
        for handle, name in ((ek[0], ek[1].name), ak):
            read = tpm.esapi.read_public(handle)
            assert bytes(read[1]) == name


def test_a_p384_ek_gets_a_point_padded_to_its_curve() -> None:
    key = ecc_key(ec.SECP384R1())
    ek = parse_public(
        public_area(
            key.public_key(),
            attributes=EK_ATTRIBUTES,
            symmetric=u16(ALG_AES) + u16(256) + u16(ALG_CFB),
            name_alg="sha384",
        )
    )
    for _ in range(4):
        assert len(make_credential(ek, NAME, b"secret")[1]) == 2 * (2 + 48)
