"""The nonces of GPU reports, each made for somebody on one machine, and therefore an answer to nobody else."""

from __future__ import annotations

import hashlib


def gpu_report_nonce(agent_ak_name: bytes, caller_claims: bytes, nonce: bytes) -> bytes:
    """For one caller, 32 bytes.

    SHA-256("cgpu/gpu-report/1" || 00 || AK Name || 00 || u32be(len(claims)) || claims || nonce)

    Args:
        agent_ak_name: Name of the agent's AK, of fixed size.
        caller_claims: the caller as evidence states it.
        nonce: the caller's own, last and therefore unframed.
    """
    claims = len(caller_claims).to_bytes(4, "big") + caller_claims
    return hashlib.sha256(b"cgpu/gpu-report/1\0" + agent_ak_name + b"\0" + claims + nonce).digest()


def gpu_batch_nonce(agent_ak_name: bytes, root: bytes) -> bytes:
    """For a batch of evidence, 32 bytes: SHA-256("cgpu/gpu-nonce/1" || 00 || AK Name || root).

    Args:
        agent_ak_name: Name of the agent's AK, of fixed size.
        root: Merkle root over the statements, which hold every caller's nonce.
    """
    return hashlib.sha256(b"cgpu/gpu-nonce/1\0" + agent_ak_name + root).digest()
