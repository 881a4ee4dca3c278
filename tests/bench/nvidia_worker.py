"""NVIDIA's own Python verifier (nv-local-gpu-verifier), timed from inside its own environment.

Runs there and imports nothing of this project. The verifier is unchanged but for three things: its clock is the day
on which the reference values were current; OCSP responders "answer" at once and without a network; and its logs, for
a file and the terminal, go to the file alone, or are off where a request says so.

A request is a line of JSON on standard input. The answer is a line with the median of the seconds that it took, or
with the folder of its sample evidence.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from OpenSSL import SSL, crypto

ANSWERS, sys.stdout = sys.stdout, Path(os.devnull).open("w")  # noqa: SIM115 - for its logger, to the end
DAY = datetime.datetime(2026, 3, 1)  # noqa: DTZ001 - pyOpenSSL wants UTC without saying so


def on_that_day(make: Callable[..., crypto.X509Store]) -> Callable[..., crypto.X509Store]:
    """Let OpenSSL judge certificates at ``DAY``, whichever way a store of trusted ones comes about."""

    def made(*arguments: object) -> crypto.X509Store:
        store = make(*arguments)
        store.set_time(DAY)
        return store

    return made


crypto.X509Store = on_that_day(crypto.X509Store)
SSL.Context.get_cert_store = on_that_day(SSL.Context.get_cert_store)

from verifier import cc_admin  # noqa: E402
from verifier.attestation import AttestationReport  # noqa: E402
from verifier.cc_admin_utils import CcAdminUtils  # noqa: E402
from verifier.config import GPU_ARCHITECTURE_MAP  # noqa: E402
from verifier.nvml.nvmlHandlerTest import NvmlHandlerTest  # noqa: E402
from verifier.rim import RIM  # noqa: E402

SETTINGS = GPU_ARCHITECTURE_MAP[9]
OPTIONS = {
    "allow_hold_cert": False,
    "ocsp_nonce_disabled": False,
    "ocsp_url": None,
    "rim_service_url": None,
    "service_key": None,
    "test_no_gpu": False,
    "user_mode": True,
    "verbose": False,
}
LISTS = ("hwmodel", "oemid", "ueid", "gpu_driver_attestation_warning_list", "gpu_vbios_attestation_warning_list")


def attest(request: dict[str, object]) -> None:
    """All of it, for several GPUs: evidence from files, ``attest()``, claims."""
    for name in LISTS:  # it keeps the last run's
        getattr(cc_admin, name).clear()
    SETTINGS.__init__()  # type: ignore[misc]
    type(SETTINGS).DRIVER_RIM_PATH = request["driver_rim"]
    evidence = [NvmlHandlerTest(SETTINGS) for _ in range(int(str(request["count"])))]
    options = {**OPTIONS, "driver_rim": request["driver_rim"], "vbios_rim": request["vbios_rim"]}
    passed, _ = cc_admin.attest(options, request["nonce"], evidence)
    require(passed)


def device(request: dict[str, object]) -> None:
    """The device alone: parse the report, load and verify its chain, compare FWID and nonce, verify the signature."""
    given = NvmlHandlerTest(SETTINGS)
    report = AttestationReport(given.get_attestation_report(), SETTINGS)
    fwid = report.get_response_message().get_opaque_data().get_data("OPAQUE_FIELD_ID_FWID").hex()
    chain = given.get_attestation_cert_chain()
    require(CcAdminUtils.verify_gpu_certificate_chain(chain, SETTINGS, fwid)[0])
    require(
        CcAdminUtils.verify_attestation_report(
            attestation_report_obj=report,
            gpu_leaf_certificate=chain[0],
            nonce=bytes.fromhex(str(request["nonce"])),
            driver_version=given.get_driver_version(),
            vbios_version=given.get_vbios_version(),
            settings=SETTINGS,
        )
    )


def rim(request: dict[str, object]) -> None:
    """One manifest: schema, chain, signature and digest."""
    found = RIM(rim_name="vbios", settings=SETTINGS, rim_path=request["vbios_rim"])
    require(found.verify(version=str(request["version"]).lower(), settings=SETTINGS)[0])


def require(passed: object) -> None:
    if passed is not True:
        raise RuntimeError("it did not pass, so its time says nothing")


WORK: dict[str, Callable[[dict[str, object]], None]] = {"attest": attest, "device": device, "rim": rim}


def main() -> None:
    global DAY  # noqa: PLW0603 - its store is made deep inside
    CcAdminUtils.ocsp_certificate_chain_validation = staticmethod(lambda *_: (True, "", "good", None))
    for line in sys.stdin:
        request = json.loads(line)
        if request["work"] == "samples":
            print(json.dumps(SETTINGS.RIM_DIRECTORY_PATH), file=ANSWERS, flush=True)
            continue
        logging.disable(logging.NOTSET if request["logs"] else logging.CRITICAL)
        DAY = datetime.datetime.fromisoformat(request["day"])
        found = []
        for _ in range(request["times"]):
            begun = time.perf_counter()
            WORK[request["work"]](request)
            found.append(time.perf_counter() - begun)
        print(json.dumps(statistics.median(found)), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
