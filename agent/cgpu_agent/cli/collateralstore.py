"""A directory of collateral, in the form that the agent reads, into which nothing goes that would do harm there.

Names are made here, of checked values and a digest, and no file is ever written over another. Reference values are
never deleted, and an issue older than one that is there is not taken: the verifier would not use it, and whoever
hands it out now is behind, or wants us to be. What is deleted is an OCSP response that a newer, verified one
replaces: a daily fetch would fill the store, and the verifier refuses answers whose signer's certificate has ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from cgpu_agent.cli import output
from cgpu_agent.cli.files import write_new
from cgpu_agent.errors import AgentError, HostileInput, Misuse
from cgpu_agent.verifier.collateral import MAX_RIMS, signed_at
from cgpu_agent.verifier.collateralfolder import KINDS, MAX_FILES, collateral_paths, read_bounded
from cgpu_agent.verifier.revocation import load_crl, load_ocsp
from cgpu_agent.verifier.rim import VerifiedRim
from cgpu_agent.wire.rim import Rim, RimDocument, parse_rim


@dataclass(frozen=True, slots=True)
class Item:
    """What became of one thing that was to go into the store.

    Attributes:
        kind: ``rim``, ``crl``, ``ocsp``, ``device`` (evidence that says what is needed), ``file`` (none of these).
        name: of a file, a RIM, a certificate.
        result: ``read`` (a device), ``stored``, ``unchanged`` (it was there), ``revoked`` (stored, and it revokes),
            ``refused``.
        file: its name in the store.
        slug, detail: why it was refused; what a device needs.
    """

    kind: str
    name: str
    result: str
    file: str | None = None
    slug: str | None = None
    detail: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """As the commands' JSON has it."""
        return asdict(self)


def attempt(kind: str, name: str, work: Callable[[], Item]) -> Item:
    """Do one thing of several, of which none may end the others; say on stderr what became of it."""
    try:
        item = work()
    except AgentError as error:
        item = Item(kind, name, "refused", None, error.slug, error.message)
    slug = "" if item.slug is None else f" [{item.slug}]"
    output.progress(f"{item.kind} {item.name}: {item.result}: {item.detail or item.file}{slug}")
    return item


class Store:
    """The directory, made when the first file goes into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _rims(self) -> Iterator[tuple[Path, RimDocument, datetime]]:
        """The manifests that can be read, and when they were signed; others are for ``collateral list`` to name."""
        for path in self._of_kind("rims"):
            try:
                document = parse_rim(read_bounded(path))
                moment = signed_at(document)
            except AgentError:
                continue
            yield path, document, moment

    def keep_rim(self, document: RimDocument, verified: VerifiedRim) -> tuple[Path, bool]:
        """Store a manifest that was verified; where it is, and whether that is new.

        Raises:
            HostileInput: ``OLDER_ISSUE``, ``AMBIGUOUS_RIM``: another of the same moment; ``TOO_MANY_RIMS``.
            Misuse: as ``_write``.
        """
        rim, moment = verified.rim, signed_at(document)
        found = list(self._rims())
        for path, other, its_moment in found:
            if other.data == document.data:
                return path, False
            if subject_of(other.claimed) != subject_of(rim):
                continue
            if its_moment > moment:
                raise HostileInput("OLDER_ISSUE", f"signed {moment.date()}, and {path.name} is a newer issue of it")
            if its_moment == moment:
                raise HostileInput("AMBIGUOUS_RIM", f"signed at the moment of {path.name}, and different")
        if len(found) >= MAX_RIMS:
            raise HostileInput("TOO_MANY_RIMS", f"the store holds {MAX_RIMS} RIMs")
        return self._write("_".join(subject_of(rim)), ".xml", document.data)

    def keep_crl(self, data: bytes) -> tuple[Path, bool]:
        """Store a CRL, DER or PEM, whose signature is judged where it is used. Raises as ``load_crl``, ``_write``."""
        return self._write("crl", ".crl", load_crl(data).public_bytes(Encoding.DER))

    def keep_ocsp(self, data: bytes) -> tuple[Path, bool]:
        """The same of an OCSP response. Raises as ``load_ocsp`` and ``_write``."""
        load_ocsp(data)
        return self._write("ocsp", ".ocsp", data)

    def replace_ocsp(self, data: bytes) -> tuple[Path, bool]:
        """Store a verified response to one question; drop older ones about the certificate, but none that revokes."""
        kept = self.keep_ocsp(data)
        (newest,) = load_ocsp(data).responses
        for path in self._of_kind("ocsp"):
            try:
                others = list(load_ocsp(read_bounded(path)).responses)
                about_it = bool(others) and all(_replaces(newest, each) for each in others)
            except (AgentError, ValueError, TypeError):
                continue
            if about_it and path != kept[0]:
                path.unlink(missing_ok=True)
        return kept

    def _of_kind(self, kind: str) -> list[Path]:
        return [path for path in collateral_paths(self.folder) if KINDS[path.suffix] == kind]

    def _write(self, stem: str, suffix: str, data: bytes) -> tuple[Path, bool]:
        """Raises ``Misuse``: ``CANNOT_WRITE``, and what ``collateral_paths`` raises."""
        path = self.folder / f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
        if not path.exists() and len(collateral_paths(self.folder)) >= MAX_FILES:
            raise Misuse("TOO_MANY_FILES", f"{self.folder} holds {MAX_FILES} files, and more would not be read")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Misuse("CANNOT_WRITE", f"{self.folder}: {error.strerror}") from error
        return path, write_new(path, data)


def subject_of(rim: Rim) -> tuple[str, str, str]:
    """What a manifest is about: of two with one subject, one is an older issue. Fit for a file's name."""
    return rim.product, rim.edition, rim.version.upper()


def _replaces(newer: ocsp.OCSPSingleResponse, older: ocsp.OCSPSingleResponse) -> bool:
    def about(single: ocsp.OCSPSingleResponse) -> tuple[object, ...]:
        named = single.hash_algorithm.name, single.issuer_name_hash, single.issuer_key_hash
        return *named, single.serial_number

    return (
        older.certificate_status is not ocsp.OCSPCertStatus.REVOKED
        and about(newer) == about(older)
        and older.this_update_utc <= newer.this_update_utc
    )
