"""The evidence bundle: strict JSON <-> frozen dataclasses (docs/evidence-format.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.gpuinventory import MAX_DEVICES, GpuWords, parse_words
from cgpu_agent.wire.manifest import MAX_LOG, MAX_MANIFEST
from cgpu_agent.wire.merkle import MAX_LEAVES
from cgpu_agent.wire.platformwords import PlatformWords, parse_platform
from cgpu_agent.wire.statement import MAX_STATEMENT
from cgpu_agent.wire.strictjson import Fields, b64

FORMAT: Final = "cgpu-evidence/1"

MAX_BUNDLE = 16 << 20
MAX_BOOT_LOG = 4 << 20
MAX_CERTIFICATE = 8192


@dataclass(frozen=True, slots=True)
class SignedAttest:
    """TPMS_ATTEST and TPMT_SIGNATURE."""

    attest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Bundle:
    """Everything a relying party needs to check one statement, in one file.

    Attributes:
        statement, manifest: the exact signed bytes.
        leaf_index, inclusion_path: place of the statement in the manifest's tree.
        quote: TPM2_Quote by the agent's AK over the SHA-256 bank.
        agent_ak: TPMT_PUBLIC; ``agent_ak_certify``: TPM2_Certify of it by the platform AK.
        platform_ak: TPMT_PUBLIC; ``platform_ak_certificate``: DER, or ``None``.
        ek_certificates: DER, informative.
        pcrs: values of the quoted PCRs.
        boot_log, systemd_log, agent_log: the logs whose digests the manifest holds.
        gpus: the devices' own words, in the order of the manifest's records; ``None`` where it has none.
        platform: the hardware report below the vTPM, or ``None``.
    """

    statement: bytes
    manifest: bytes
    leaf_index: int
    inclusion_path: tuple[bytes, ...]
    quote: SignedAttest
    agent_ak: bytes
    agent_ak_certify: SignedAttest
    platform_ak: bytes
    platform_ak_certificate: bytes | None
    ek_certificates: tuple[bytes, ...]
    pcrs: Mapping[int, bytes]
    boot_log: bytes | None
    systemd_log: bytes | None
    agent_log: bytes
    gpus: tuple[GpuWords, ...] | None = None
    platform: PlatformWords | None = None

    def encode(self) -> bytes:
        def signed(pair: SignedAttest) -> dict[str, str]:
            return {"attest": b64(pair.attest), "signature": b64(pair.signature)}

        def optional(data: bytes | None) -> str | None:
            return None if data is None else b64(data)

        return strictjson.dumps(
            {
                "agent_ak": {"certify": signed(self.agent_ak_certify), "public": b64(self.agent_ak)},
                "ek_certificates": [b64(der) for der in self.ek_certificates],
                "format": FORMAT,
                "gpus": None if self.gpus is None else [words.to_json() for words in self.gpus],
                "inclusion_path": [node.hex() for node in self.inclusion_path],
                "leaf_index": self.leaf_index,
                "logs": {
                    "agent": b64(self.agent_log),
                    "boot": optional(self.boot_log),
                    "systemd": optional(self.systemd_log),
                },
                "manifest": b64(self.manifest),
                "pcrs": {str(index): value.hex() for index, value in sorted(self.pcrs.items())},
                "platform": None if self.platform is None else self.platform.to_json(),
                "platform_ak": {
                    "certificate": optional(self.platform_ak_certificate),
                    "public": b64(self.platform_ak),
                },
                "quote": signed(self.quote),
                "statement": b64(self.statement),
            }
        )


class BundleFrame:
    """A bundle encoded once for a whole batch: only statement, leaf and path differ from caller to caller.

    Args:
        shared: any bundle of the batch.
    """

    _HOLES: Final = (b'"inclusion_path":[]', b'"leaf_index":0', b'"statement":""')

    def __init__(self, shared: Bundle) -> None:
        rest = replace(shared, statement=b"", leaf_index=0, inclusion_path=()).encode()
        self._parts: list[bytes] = []
        for hole in self._HOLES:  # each once and in this order: keys are sorted, and base64 holds no quotes
            before, _, rest = rest.partition(hole)
            self._parts.append(before)
        self._parts.append(rest)

    def fill(self, statement: bytes, leaf_index: int, inclusion_path: Sequence[bytes]) -> bytes:
        """The bundle of one caller, byte for byte what ``Bundle.encode`` gives."""
        nodes = ",".join(f'"{node.hex()}"' for node in inclusion_path)
        holes = (f'"inclusion_path":[{nodes}]', f'"leaf_index":{leaf_index}', f'"statement":"{b64(statement)}"')
        first, second, third, last = self._parts
        return b"".join((first, holes[0].encode(), second, holes[1].encode(), third, holes[2].encode(), last))


def _signed(fields: Fields, name: str) -> SignedAttest:
    entry = fields.fields(name)
    pair = SignedAttest(entry.base64("attest", 1024), entry.base64("signature", 1024))
    entry.end()
    return pair


def _pcrs(fields: Fields) -> dict[int, bytes]:
    entries = fields.fields("pcrs")
    values: dict[int, bytes] = {}
    for name in entries.keys():  # noqa: SIM118 - a method of ours, not a dict's
        if not re.fullmatch(r"0|1[0-9]?|2[0-3]?|[3-9]", name):
            raise entries.fail("a key is not a PCR index of 0-23")
        values[int(name)] = entries.hex(name, 32, 32)
    return values


def parse_bundle(data: bytes) -> Bundle:
    """Parse a bundle file; statement and manifest stay bytes.

    Raises:
        HostileInput: ``BAD_FORMAT`` for another or unknown format, ``TOO_LARGE``, ``BAD_JSON``, ``DUPLICATE_KEY``,
            ``UNKNOWN_KEY``, ``BAD_FIELD``.
    """
    fields = Fields(strictjson.loads(data, "bundle", MAX_BUNDLE), "bundle")
    if fields.raw("format") != FORMAT:
        raise HostileInput("BAD_FORMAT", f"bundle: the format is not {FORMAT!r}; another version made this file")
    agent_ak, platform_ak, logs = fields.fields("agent_ak"), fields.fields("platform_ak"), fields.fields("logs")
    bundle = Bundle(
        statement=fields.base64("statement", MAX_STATEMENT),
        manifest=fields.base64("manifest", MAX_MANIFEST),
        leaf_index=fields.integer("leaf_index", 0, MAX_LEAVES - 1),
        inclusion_path=tuple(
            fields.decode_hex(node, "inclusion_path", 32, 32) for node in fields.items("inclusion_path", 16)
        ),
        quote=_signed(fields, "quote"),
        agent_ak=agent_ak.base64("public", 1024),
        agent_ak_certify=_signed(agent_ak, "certify"),
        platform_ak=platform_ak.base64("public", 1024),
        platform_ak_certificate=(
            None if platform_ak.absent("certificate") else platform_ak.base64("certificate", MAX_CERTIFICATE)
        ),
        ek_certificates=tuple(
            fields.decode_base64(der, "ek_certificates", MAX_CERTIFICATE)
            for der in fields.items("ek_certificates", 4)
        ),
        pcrs=_pcrs(fields),
        boot_log=None if logs.absent("boot") else logs.base64("boot", MAX_BOOT_LOG),
        systemd_log=None if logs.absent("systemd") else logs.base64("systemd", MAX_LOG),
        agent_log=logs.base64("agent", MAX_LOG),
        gpus=None
        if fields.absent("gpus")
        else tuple(parse_words(Fields(item, "bundle.gpus")) for item in fields.items("gpus", MAX_DEVICES)),
        platform=None if fields.absent("platform") else parse_platform(fields.fields("platform")),
    )
    for part in (agent_ak, platform_ak, logs, fields):
        part.end()
    return bundle
