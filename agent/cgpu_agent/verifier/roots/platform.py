"""Whom the verifier believes about a vTPM's platform, by default: root keys, and the code that may own a vTPM.

Constants only. Root keys are SHA-256 digests of their SubjectPublicKeyInfo, so that a re-issued certificate of the
same key is still one. Which public fact each is stands beside it; whoever trusts others makes ``PlatformPins`` anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cgpu_agent.wire.snp import Product

_h = bytes.fromhex

AMD_ROOTS: Final[Mapping[bytes, Product]] = {
    # ARK-Milan, RSA-4096, valid 2020-10-22 to 2045-10-22: https://kdsintf.amd.com/vcek/v1/Milan/cert_chain
    _h("9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9"): "milan",
    # ARK-Genoa, RSA-4096, valid 2022-01-26 to 2047-01-26: https://kdsintf.amd.com/vcek/v1/Genoa/cert_chain
    _h("429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831"): "genoa",
    # ARK-Turin, RSA-4096, valid 2023-05-15 to 2048-05-15: https://kdsintf.amd.com/vcek/v1/Turin/cert_chain
    _h("4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08"): "turin",
}
"""AMD's root keys, one a product: a key of one product vouches for no other."""

INTEL_ROOTS: Final = frozenset(
    {
        # Intel SGX Root CA, P-256, valid 2018-05-21 to 2049-12-31; TDX uses the same. The key stands in the source of
        # Intel's quote verification library, the certificate at
        # https://certificates.trustedservices.intel.com/IntelSGXRootCA.der
        _h("a0af031289f5d5d4132f9186068a7fc13628633ba235777472e29b6b6c67a49e"),
    }
)

AZURE_VTPM_ROOTS: Final = frozenset(
    {
        # Azure Virtual TPM Root Certificate Authority 2023, Microsoft Corporation, RSA-4096, valid 2023-06-01 to
        # 2048-06-01: http://www.microsoft.com/pkiops/certs/ under that name (caIssuers of the CAs below it).
        _h("5cbc52672ae101263c2976736044a964c1182ce9412c39937183baddcccb8cdf"),
    }
)

SNP_ID_KEYS: Final[Mapping[bytes, str]] = {
    # SHA-384 of the key with which Microsoft signs the id blocks of its paravisor. The processor enforces at launch
    # that the block names the measurement, so the key stands for every image that Microsoft signed: hence a floor for
    # the guest SVN. The first is on Confidential VMs of 2025 and 2026; the second is in Microsoft's sample tokens of
    # Azure Attestation (x-ms-sevsnpvm-idkeydigest) and in Constellation's defaults; the third on VMs of 2023.
    _h(
        "942fd93ebde6ea7a96efadeafc60f1c6b3d10e703b1dafd7555b92f7f3d32d0e006767648cba5b102af3d65756af4177"
    ): "Azure paravisor, current",
    _h(
        "0356215882a825279a85b300b0b742931d113bf7e32dde2e50ffde7ec743ca491ecdd7f336dc28a6e0b2bb57af7a44a3"
    ): "Azure paravisor, 2023 to 2025",
    _h(
        "934f68bd8ba01938eec21475c872e3a942b60c59fafc6df9e9a76ee66bc47f2d09c676f61c0315c578da26085fb13a71"
    ): "Azure paravisor, early 2023",
}

_NO_ATTRIBUTES: Final = bytes(8)
_SEPT_VE_DISABLE: Final = (1 << 28).to_bytes(8, "little")

TD_PARAVISORS: Final[Mapping[bytes, frozenset[bytes]]] = {
    # MRTD of Azure's paravisor -> the TD attributes it was seen with, in published quotes below Intel's root whose
    # report data bind an HCL report's claims. Microsoft signs such values itself, and these are the better source:
    # https://<region>.thim.azure.net/endorsement/tdx/mrtds
    # December 2025, published in flashbots/attested-tls:
    _h("12bdbc1609ef066db7a9ec7b26d7509346f4ca46e846274096cb25939b1e711944061ca19a30c6743f1e599148eee451"): frozenset(
        {_SEPT_VE_DISABLE}
    ),
    # 2024, published in confidential-containers/trustee:
    _h("024a32b070383331181619fa387cb4d55d1e38879f989933055ccad5bc2db795d1737b66205949d15469dc8c1ba7ab7b"): frozenset(
        {_NO_ATTRIBUTES}
    ),
}

TD_MODULES: Final[Mapping[bytes, str]] = {
    # MRSEAM of Intel's TDX modules: the first is that of release 1.5.08 in the public allow-lists of other verifiers,
    # the second stands in Intel Trust Authority's documentation of Azure tokens.
    _h(
        "49b66faa451d19ebbdbe89371b8daf2b65aa3984ec90110343e9e2eec116af08850fa20e3b1aa9a874d77a65380ee7e6"
    ): "TDX module 1.5.08",
    _h(
        "360304d34a16aace0a18e09ad2d07d2b9fd3c174378e5bf108388079827f89ff62acc5f8c473dd40706324834e202946"
    ): "TDX module of Azure, 2024",
}

INTEL_QE_SIGNER: Final = _h("dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5")
"""MRSIGNER of Intel's quoting enclaves, as in the enclave identity that Intel's provisioning service signs."""
INTEL_TD_QE_PRODUCT: Final = 2
"""ISVPRODID of the one for TDs, from the same document."""


@dataclass(frozen=True, slots=True)
class PlatformPins:
    """What a relying party believes; by default what ships.

    Attributes:
        amd_roots, intel_roots, azure_vtpm_roots: digests of root keys.
        snp_id_keys: digest of a key that signs paravisors -> name of these.
        snp_measurements: single measurements of paravisors, -> name.
        td_paravisors: MRTD -> the TD attributes (8 bytes) it may run with.
        td_modules: MRSEAM -> name.
    """

    amd_roots: Mapping[bytes, Product]
    intel_roots: frozenset[bytes]
    azure_vtpm_roots: frozenset[bytes]
    snp_id_keys: Mapping[bytes, str]
    snp_measurements: Mapping[bytes, str]
    td_paravisors: Mapping[bytes, frozenset[bytes]]
    td_modules: Mapping[bytes, str]

    @property
    def processor_roots(self) -> frozenset[bytes]:
        """Digests of the root keys of all makers of processors."""
        return frozenset(self.amd_roots) | self.intel_roots


SHIPPED: Final = PlatformPins(
    amd_roots=AMD_ROOTS,
    intel_roots=INTEL_ROOTS,
    azure_vtpm_roots=AZURE_VTPM_ROOTS,
    snp_id_keys=SNP_ID_KEYS,
    snp_measurements={},
    td_paravisors=TD_PARAVISORS,
    td_modules=TD_MODULES,
)
