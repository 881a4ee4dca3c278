"""Azure's instance metadata service: plain HTTP to the host, so nothing of it counts but what others signed."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Final

from cgpu_agent.cli.https import NoRedirect
from cgpu_agent.errors import Misuse, Unavailable
from cgpu_agent.wire.tdx import MAX_QUOTE
from cgpu_agent.wire.thim import MAX_ANSWER, Certification, parse_certification, parse_quote_answer

SECONDS: Final = 30


class MetadataService:
    """The service.

    Args:
        url: ``http://HOST[:PORT]``.

    Raises:
        Misuse: ``BAD_URL``.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith("http://"):
            raise Misuse("BAD_URL", "the metadata service speaks plain http")
        self._url: Final = url.rstrip("/")
        # The address is of this machine's host alone: a proxy would ask its own.
        self._opener: Final = urllib.request.build_opener(NoRedirect, urllib.request.ProxyHandler({}))

    def certification(self) -> Certification:
        """AMD's certificates of this processor. Raises ``Unavailable`` (``NO_METADATA``), ``HostileInput``."""
        return parse_certification(self._ask("/metadata/THIM/amd/certification", None))

    def td_quote(self, tdreport: bytes) -> bytes:
        """A TD quote over ``tdreport``. Raises as ``certification``."""
        text = base64.urlsafe_b64encode(tdreport).rstrip(b"=").decode()
        return parse_quote_answer(self._ask("/acc/tdquote", json.dumps({"report": text}).encode()), MAX_QUOTE)

    def _ask(self, path: str, body: bytes | None) -> bytes:
        headers = {"Metadata": "true", "Content-Type": "application/json"}
        try:
            request = urllib.request.Request(self._url + path, body, headers)  # noqa: S310 - the scheme was checked
            with self._opener.open(request, timeout=SECONDS) as answer:
                data: bytes = answer.read(MAX_ANSWER + 1)
                return data
        except urllib.error.HTTPError as error:
            error.close()
            raise Unavailable("NO_METADATA", f"{self._url}{path} answers with HTTP status {error.code}") from None
        except (OSError, ValueError, HTTPException) as error:
            raise Unavailable("NO_METADATA", f"{self._url} does not answer: is this an Azure VM?") from error
