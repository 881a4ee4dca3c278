"""Azure's secure key release: an attestation token for this request, then the key, wrapped to a key inside the TPM.

Each release attests anew: a token lives for hours, and whoever has it and may use the vault needs no VM any more.
The TPM's key decrypts the service's answer and the vault's, once each, and is forgotten. Neither service sees a GPU:
that the key leaves only while the GPUs are trusted is this agent's decision alone (``sees_gpus``).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol, TypeVar

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap_with_padding
from cryptography.hazmat.primitives.serialization import load_der_private_key

from cgpu_agent.backends.base import (
    Attester,
    BrokerKind,
    LoadedKey,
    PlatformReport,
    ReleasedKey,
    Tpm,
    TpmCommands,
)
from cgpu_agent.backends.keys.https import Https
from cgpu_agent.errors import AgentError, Denied, DeviceFault, HostileInput, Misuse, Unavailable
from cgpu_agent.wire.der import trim_der
from cgpu_agent.wire.hcl import AK_CERTIFICATE_INDEX, parse_hcl
from cgpu_agent.wire.keyrelease import (
    API_VERSION,
    MECHANISMS,
    KeyPath,
    WrappedKey,
    encode_release,
    parse_release,
)
from cgpu_agent.wire.keyrelease import MAX_ANSWER as MAX_RELEASE
from cgpu_agent.wire.maarequest import (
    GUEST_PATH,
    KEYS_PATH,
    LINUX_PCRS,
    TRANSPORT_AAD,
    GuestOs,
    GuestTpm,
    Isolation,
    SealedToken,
    encode_request,
    parse_answer,
)
from cgpu_agent.wire.maarequest import MAX_ANSWER as MAX_SEALED
from cgpu_agent.wire.tpm import PcrSelection, Quoted, parse_attest, pcr_digest, pcr_policy

T = TypeVar("T")

_PCRS: Final = PcrSelection.of("sha256", LINUX_PCRS)
_USER_DATA: Final = b"cgpu/maa/1"
_MAX_JWKS: Final = 1 << 20
_RETRY: Final = 5.0
_LONGEST_RETRY: Final = 600
_LATER: Final = frozenset({408, 429})
_MAX_BEARER: Final = 20_000
_ORIGIN = re.compile(r"https://[0-9a-z]([0-9a-z.-]{0,251}[0-9a-z])?")
_BEARER = re.compile(r"[0-9A-Za-z._~+/-]{1,16384}=*")
"""RFC 6750, 2.1."""


class Judge(Protocol):
    """Decides whether to believe an answer; see ``verifier.azurekeys.AzureJudge``."""

    def token(self, token: bytes, jwks: bytes, *, nonce: str, key: bytes) -> bool: ...

    def release(self, jws: bytes, path: KeyPath, *, nonce: str, mechanism: str) -> WrappedKey: ...


AccessToken = Callable[[], Awaitable[str]]
"""A bearer token of the vault's audience, raising ``AgentError``."""


def token_file(path: Path) -> AccessToken:
    """A token that a unit beside the agent keeps fresh in a file.

    The metadata service that gives a VM's managed identity its tokens speaks plain HTTP on a link-local address,
    which nothing behind ``cgpu-egress`` reaches, by design.
    """

    def read() -> str:
        try:
            with path.open("rb") as file:
                return file.read(_MAX_BEARER).decode("ascii").rstrip("\n")
        except (OSError, UnicodeDecodeError):
            raise Unavailable(
                "NO_ACCESS_TOKEN", "there is no access token for the vault", retry_after=_RETRY
            ) from None

    return lambda: asyncio.to_thread(read)


@dataclass(frozen=True, slots=True)
class AzureKeys:
    """Where keys come from.

    Attributes:
        attestation: the attestation service, ``https://HOST``.
        vault: vault or Managed HSM, ``https://HOST``.
        guest: what the VM says it runs.
        boot_log: the firmware's log; empty where there is none.
        mechanism: one of ``wire.keyrelease.MECHANISMS``.
        ak_handle: where the platform AK is.

    Raises:
        Misuse: ``BAD_ARGUMENT``.
    """

    attestation: str
    vault: str
    guest: GuestOs
    boot_log: bytes = field(default=b"", repr=False)
    mechanism: str = "RSA_AES_KEY_WRAP_256"
    ak_handle: int = 0x81000003

    def __post_init__(self) -> None:
        if not all(_ORIGIN.fullmatch(url) for url in (self.attestation, self.vault)):
            raise Misuse("BAD_ARGUMENT", "attestation service and vault are https://HOST, in lower case")
        if self.mechanism not in MECHANISMS:
            raise Misuse("BAD_ARGUMENT", f"the mechanism is none of {', '.join(MECHANISMS)}")


class AzureBroker:
    """``KeyBroker`` over Azure's attestation service and a vault.

    A path is ``NAME`` or ``NAME/VERSION``; with a version an older or newer one is refused. A released ``oct`` key is
    its bytes, an RSA or EC key its PKCS #8 in DER. Versions are random numbers: ``generation`` is the first 63 bits
    of one, which tells generations apart and puts them in no order.

    Args:
        https: connects to both.
        tpm: the VM's vTPM, with the platform AK that Azure certified.
        judge: for the same service and vault as ``keys``.
        keys: where keys come from.
        access_token: see ``AccessToken``.
    """

    kind: BrokerKind = "azure"
    sees_gpus = False

    def __init__(self, https: Https, tpm: Tpm, judge: Judge, keys: AzureKeys, access_token: AccessToken) -> None:
        self._https: Final = https
        self._tpm: Final = tpm
        self._judge: Final = judge
        self._keys: Final = keys
        self._access_token: Final = access_token

    async def release(self, path: str, attester: Attester, *, timeout: float) -> ReleasedKey:
        """See ``KeyBroker``.

        Also ``PCRS_CHANGING``, ``NO_AK_CERTIFICATE`` and ``NO_PLATFORM`` (``Unavailable``), ``DeviceFault`` from the
        TPM, and ``HostileInput`` where what TPM or platform say breaks its format.
        """
        try:
            named = KeyPath.parse(path)
        except HostileInput:
            raise Unavailable("KEY_ABSENT", "a vault has no key of such a name") from None
        try:
            return await asyncio.wait_for(self._release(named, attester, timeout), timeout)
        except asyncio.TimeoutError:
            raise _unreachable(_RETRY) from None

    def close(self) -> None:
        """Nothing is held between releases."""

    async def _release(self, path: KeyPath, attester: Attester, timeout: float) -> ReleasedKey:
        nonce = secrets.token_hex(32)
        user_data = hashlib.sha512(_USER_DATA + nonce.encode("ascii")).digest()
        isolation = _isolation(await attester.platform(user_data))
        key, shown = await self._tpm.run(self._show, timeout=timeout)
        token = await self._attest(key, shown, isolation, nonce, timeout)
        wrapped = await self._ask_vault(path, token, nonce, timeout)
        return await self._unwrap(key, wrapped, timeout)

    def _show(self, tpm: TpmCommands) -> tuple[LoadedKey, GuestTpm]:
        """The key of this release, and what the TPM says of it and of the boot; one TPM job."""
        # Azure renews the certificate under a running VM, so it is read each time.
        certificate, ak = tpm.nv_read(AK_CERTIFICATE_INDEX), tpm.persistent_public(self._keys.ak_handle)
        try:
            der = trim_der(certificate or b"")
        except HostileInput:
            der = b""
        if not der or ak is None:
            raise Unavailable("NO_AK_CERTIFICATE", "this TPM holds no platform AK with Azure's certificate")
        values = tpm.pcr_read(_PCRS)
        key = tpm.create_decryption_key(pcr_policy(_PCRS, values))
        certify = tpm.certify(key, self._keys.ak_handle, b"")
        quote = tpm.quote(self._keys.ak_handle, b"", _PCRS)
        quoted = parse_attest(quote.attest).attested
        if not isinstance(quoted, Quoted) or quoted.pcr_digest != pcr_digest(values, _PCRS.pcrs, "sha256"):
            raise _changing()
        return key, GuestTpm(
            ak=ak,
            ak_certificate=der,
            quote=quote.attest,
            quote_signature=quote.signature,
            pcrs=values,
            key=key.public,
            certify=certify.attest,
            certify_signature=certify.signature,
        )

    async def _attest(
        self, key: LoadedKey, shown: GuestTpm, isolation: Isolation | None, nonce: str, timeout: float
    ) -> bytes:
        """A token that the service made for this request, about this VM and this key."""
        body = encode_request(self._keys.guest, shown, isolation, boot_log=self._keys.boot_log, nonce=nonce)
        service = self._keys.attestation
        answer = await self._ask("POST", service + GUEST_PATH, {}, body, timeout, MAX_SEALED, absent=False)
        sealed = _believed("the attestation service", lambda: parse_answer(answer))
        token = _opened(sealed, await self._decrypt(key, sealed.wrapped_key, None, timeout))
        jwks = await self._ask("GET", service + KEYS_PATH, {}, b"", timeout, _MAX_JWKS, absent=False)
        vouched = _believed(
            "the attestation service", lambda: self._judge.token(token, jwks, nonce=nonce, key=key.public)
        )
        if not vouched:
            raise Denied("KEY_REFUSED", "the attestation service does not vouch for this VM")
        return token

    async def _ask_vault(self, path: KeyPath, token: bytes, nonce: str, timeout: float) -> WrappedKey:
        bearer = await self._access_token()
        if _BEARER.fullmatch(bearer) is None:
            raise Unavailable("BROKER_ANSWER", "what was given as access to the vault is no bearer token")
        mechanism = self._keys.mechanism
        answer = await self._ask(
            "POST",
            f"{self._keys.vault}{path.url}/release?api-version={API_VERSION}",
            {"Authorization": f"Bearer {bearer}"},
            encode_release(token.decode("ascii"), nonce, mechanism),
            timeout,
            MAX_RELEASE,
            absent=True,
        )
        return _believed(
            "the vault",
            lambda: self._judge.release(parse_release(answer), path, nonce=nonce, mechanism=mechanism),
        )

    async def _unwrap(self, key: LoadedKey, wrapped: WrappedKey, timeout: float) -> ReleasedKey:
        kek = await self._decrypt(key, wrapped.kek, MECHANISMS[self._keys.mechanism], timeout)
        try:
            secret = aes_key_unwrap_with_padding(kek, wrapped.key)
            if wrapped.der:
                load_der_private_key(secret, password=None)
        except (InvalidUnwrap, UnsupportedAlgorithm, ValueError, TypeError):
            raise _unreadable("the vault", "BAD_WRAP") from None
        return ReleasedKey(secret, int(wrapped.version, 16) >> 65)

    async def _decrypt(self, key: LoadedKey, ciphertext: bytes, oaep: str | None, timeout: float) -> bytes:
        try:
            return await self._tpm.run(lambda tpm: tpm.rsa_decrypt(key, _PCRS, ciphertext, oaep), timeout=timeout)
        except DeviceFault as fault:
            if fault.slug == "TPM_AUTH":
                raise _changing() from fault
            if fault.slug == "TPM_ERROR":
                raise _unreadable("Azure", "BAD_WRAP") from fault
            raise

    async def _ask(
        self,
        method: Literal["GET", "POST"],
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        timeout: float,
        limit: int,
        *,
        absent: bool,
    ) -> bytes:
        """The body of a good answer. ``absent``: 404 says that there is no such key."""
        said = {"Accept": "application/json", "Content-Type": "application/json", **headers}
        try:
            status, told, answer = await self._https.request(
                method, url, headers=said, body=body, timeout=timeout, limit=limit
            )
        except AgentError as error:
            raise _unreachable(error.retry_after or _RETRY, f" ({error.slug})") from error
        if status == 200:
            return answer
        if status in _LATER or status >= 500:
            raise _unreachable(_retry_after(told))
        if absent and status == 404:
            raise Unavailable("KEY_ABSENT", "the vault has no such key")
        if status in (401, 403) or (status == 400 and not absent):
            who = "the vault does not release the key" if absent else "the attestation service refuses this VM"
            raise Denied("KEY_REFUSED", f"{who} (HTTP status {status})")
        raise Unavailable("BROKER_ANSWER", f"an answer with HTTP status {status}, which means nothing here")


def _isolation(report: PlatformReport) -> Isolation | None:
    if report.kind == "azure-trusted-launch":
        return None
    if report.kind not in ("azure-cvm-snp", "azure-cvm-tdx") or report.report is None:
        raise Unavailable("NO_PLATFORM", "the attestation service takes platforms of Azure only")
    pem = "".join(ssl.DER_cert_to_PEM_cert(der) for der in report.certificates)
    proof = report.td_quote if report.kind == "azure-cvm-tdx" else pem.encode("ascii")
    if not proof:
        raise Unavailable("NO_PLATFORM", "nobody fetched what proves the platform's report: cgpuctl platform fetch")
    return Isolation(parse_hcl(report.report), proof)


def _opened(sealed: SealedToken, key: bytes) -> bytes:
    try:
        return AESGCM(key).decrypt(sealed.iv, sealed.ciphertext, TRANSPORT_AAD)
    except (ValueError, InvalidTag):
        raise _unreadable("the attestation service", "BAD_WRAP") from None


def _believed(who: str, judge: Callable[[], T]) -> T:
    """What the judge says. Of a refusal only the slug is told: its words may hold what the other side sent."""
    try:
        return judge()
    except HostileInput as error:
        raise _unreadable(who, error.slug) from error


def _retry_after(headers: Mapping[str, str]) -> float:
    """RFC 9110, 10.2.3, the form in seconds; anything else counts as not said."""
    text = headers.get("retry-after", "")
    return float(min(int(text), _LONGEST_RETRY)) if re.fullmatch(r"[0-9]{1,9}", text) else _RETRY


def _unreachable(retry_after: float, why: str = "") -> Unavailable:
    return Unavailable("BROKER_UNREACHABLE", f"Azure does not answer now{why}", retry_after=retry_after)


def _unreadable(who: str, slug: str) -> Unavailable:
    return Unavailable("BROKER_ANSWER", f"the answer of {who} is not believed ({slug})")


def _changing() -> Unavailable:
    return Unavailable("PCRS_CHANGING", "a PCR changed while the key was asked for", retry_after=_RETRY)
