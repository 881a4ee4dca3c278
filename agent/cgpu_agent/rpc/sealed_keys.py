"""The SealedKeys service, for the operator's socket: convert, call the vault, convert; what changed is on record."""

# gRPC names a service's methods and their parameters.
from __future__ import annotations

from typing import Any

from cgpu_agent.api.v1 import sealed_keys_pb2, sealed_keys_pb2_grpc
from cgpu_agent.domain.core import Core
from cgpu_agent.domain.vault import Vault
from cgpu_agent.errors import HostileInput, Misuse, Unavailable
from cgpu_agent.wire.keyring import KeyInfo
from cgpu_agent.wire.tpmpolicy import authority_public

pb = sealed_keys_pb2


class SealedKeysService(sealed_keys_pb2_grpc.SealedKeysServicer):
    """See protos/cgpu_agent/api/v1/sealed_keys.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def Show(self, request: pb.ShowSealedKeysRequest, context: Any) -> pb.ShowSealedKeysResponse:
        vault = self._vault()

        def found(keys: Any, tpm: Any) -> pb.ShowSealedKeysResponse:
            fleet, authority = keys.owner(tpm)
            return pb.ShowSealedKeysResponse(
                fleet=fleet,
                authority=authority,
                epoch=keys.epoch(tpm),
                open=keys.latch_is_open(tpm),
                keys=[_told(info) for info in keys.list(tpm)],
                approvals=vault.approvals,
            )

        return await vault.look(found)

    async def Create(self, request: pb.CreateSealedKeysRequest, context: Any) -> pb.CreateSealedKeysResponse:
        _require_authority(request.authority)
        await self._vault().change(
            lambda keys, tpm, approvals: keys.create(
                tpm,
                authority=request.authority,
                fleet=request.fleet,
                approvals=approvals,
                owner_auth=request.owner_auth,
                replace_lost=request.replace_lost,
            ),
            new_latch=True,
        )
        await self._record("create", fleet=request.fleet)
        return pb.CreateSealedKeysResponse()

    async def Adopt(self, request: pb.AdoptSealedKeysRequest, context: Any) -> pb.AdoptSealedKeysResponse:
        _require_authority(request.authority)
        generation = await self._vault().change(
            lambda keys, tpm, approvals: keys.adopt(
                tpm, authority=request.authority, approvals=approvals, owner_auth=request.owner_auth
            ),
            new_latch=True,
        )
        await self._record("adopt", generation=generation)
        return pb.AdoptSealedKeysResponse(generation=generation)

    async def Add(self, request: pb.AddSealedKeyRequest, context: Any) -> pb.SealedKeyInfo:
        now = int(self._core.clock.time())
        info = await self._vault().change(
            lambda keys, tpm, approvals: keys.add(
                tpm, request.key, request.group, approvals, created=now, secret=request.secret or None
            )
        )
        await self._record("add", key=info.id, generation=info.generation, group=info.group)
        return _told(info)

    async def Rotate(self, request: pb.RotateSealedKeyRequest, context: Any) -> pb.SealedKeyInfo:
        now = int(self._core.clock.time())
        info = await self._vault().change(
            lambda keys, tpm, approvals: keys.rotate(
                tpm, request.key, approvals, created=now, secret=request.secret or None
            )
        )
        await self._record("rotate", key=info.id, generation=info.generation)
        return _told(info)

    async def Remove(self, request: pb.RemoveSealedKeyRequest, context: Any) -> pb.RemoveSealedKeyResponse:
        await self._vault().change(
            lambda keys, tpm, approvals: keys.remove(
                tpm, request.key, approvals, generation=request.generation or None
            )
        )
        await self._record("remove", key=request.key, generation=request.generation)
        return pb.RemoveSealedKeyResponse()

    async def RaiseEpoch(self, request: pb.RaiseEpochRequest, context: Any) -> pb.RaiseEpochResponse:
        epoch = await self._vault().change(lambda keys, tpm, _: keys.raise_epoch(tpm, request.minimum))
        await self._record("raise-epoch", epoch=epoch)
        return pb.RaiseEpochResponse(epoch=epoch)

    def _vault(self) -> Vault:
        core = self._core
        _ = core.boot  # not before the latch was closed, and that is on record
        if core.vault is None or core.audit is None:
            raise Unavailable("AUDIT_UNAVAILABLE", "no audit log is kept, and this call needs its record")
        return core.vault

    async def _record(self, change: str, **what: str | int) -> None:
        assert self._core.audit is not None  # noqa: S101 - ``_vault`` has looked
        await self._core.audit.record("sealed-keys", {"change": change, **what})


def _require_authority(spki: bytes) -> None:
    try:
        authority_public(spki)
    except HostileInput as error:
        raise Misuse(error.slug, error.message) from None


def _told(info: KeyInfo) -> pb.SealedKeyInfo:
    return pb.SealedKeyInfo(key=info.id, generation=info.generation, group=info.group, created=info.created)
