"""Which action each method is, so that policy speaks of actions and a method nobody listed is denied."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import Action, Decision, Facts, Policy

_BOOT = "/cgpu.agent.v1.MeasuredBoot/"
_GPUS = "/cgpu.agent.v1.Gpus/"
_KEYS = "/cgpu.agent.v1.Keys/"
_TRANSFERS = "/cgpu.agent.v1.TransferBuffers/"

ACTIONS: Mapping[str, Action] = {
    _BOOT + "GetIdentity": Action.IDENTITY,
    _BOOT + "GetPlatform": Action.PLATFORM,
    _BOOT + "GetQuote": Action.QUOTE,
    _BOOT + "GetRawQuote": Action.RAW_QUOTE,
    _BOOT + "ReadPcrs": Action.PCRS,
    _BOOT + "GetEventLog": Action.EVENT_LOG,
    _BOOT + "MeasureEvent": Action.MEASURE,
    _BOOT + "ActivateCredential": Action.ACTIVATE_CREDENTIAL,
    "/cgpu.agent.v1.Evidence/GetEvidence": Action.EVIDENCE,
    _GPUS + "List": Action.GPU_LIST,
    _GPUS + "Watch": Action.GPU_WATCH,
    _GPUS + "GetReport": Action.GPU_REPORT,
    _GPUS + "GetRawReport": Action.GPU_RAW_REPORT,
    _GPUS + "Attest": Action.GPU_ATTEST,
    _KEYS + "List": Action.KEY_LIST,
    _TRANSFERS + "OpenChannel": Action.GPU_TRANSFER,
    _TRANSFERS + "Allocate": Action.GPU_TRANSFER,
    _TRANSFERS + "Free": Action.GPU_TRANSFER,
    _TRANSFERS + "Submit": Action.GPU_TRANSFER,
    _TRANSFERS + "LoadSealed": Action.GPU_TRANSFER,
    _TRANSFERS + "Watch": Action.GPU_TRANSFER,
    _TRANSFERS + "Synchronize": Action.GPU_TRANSFER,
    _TRANSFERS + "CloseChannel": Action.GPU_TRANSFER,
    _TRANSFERS + "GetStats": Action.GPU_TRANSFER,
}

BY_KEY = frozenset({_KEYS + "Get", _KEYS + "OpenSealed", _TRANSFERS + "LoadSealed"})
"""Methods that policy decides by what they ask for: the domain asks it, for each key. One that has an action takes
both permits."""

WITHIN_CHANNEL = frozenset(
    _TRANSFERS + name for name in ("Allocate", "Free", "Submit", "Watch", "Synchronize", "CloseChannel", "GetStats")
)
"""Methods that do nothing but for whoever has a channel, which is on record."""

_SEALED = "/cgpu.agent.v1.SealedKeys/"
_ADMIN = "/cgpu.agent.v1.Admin/"
OPERATOR = frozenset(
    {
        _ADMIN + "SetLogLevel",
        *(_SEALED + name for name in ("Create", "Adopt", "Add", "Rotate", "Remove", "RaiseEpoch")),
    }
)
"""Methods of the admin socket that change something."""

_ABOUT_THE_SERVER = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")


def public_authorizer(policy: Callable[[], Policy], facts: Callable[[], Facts]) -> Callable[[Caller, str], Decision]:
    """For the public socket; asks for policy and facts at every call, so that what changes takes effect at once."""

    def authorize(caller: Caller, method: str) -> Decision:
        action = ACTIONS.get(method)
        if action is not None:
            return policy().decide(caller, action, facts())
        if method in BY_KEY:
            return Decision(True, (), "decided by the key")
        if method.startswith(_ABOUT_THE_SERVER):
            return Decision(True, (), "open to everybody")
        return Decision(False, (), "this socket serves no such method")

    return authorize


def admin_authorizer(own_uid: int) -> Callable[[Caller, str], Decision]:
    """For the admin socket, whose file mode already keeps others out: root outside any container, and the agent.

    A container's root is uid 0 too. Where the kernel tells cgroups it must be seen to be in none; where it cannot
    (identity strength ``pid``) the file mode is the only guard.
    """

    def authorize(caller: Caller, method: str) -> Decision:
        outside = caller.cgroup is not None and caller.container is None
        root = caller.uid == 0 and (outside or caller.identity_strength == "pid")
        operator = caller.uid == own_uid or root
        known = method.startswith((_ADMIN, _SEALED, *_ABOUT_THE_SERVER))
        return Decision(operator and known, (), "for the operator alone")

    return authorize
