"""Who may do what: asks the Cedar policy about a caller, in the words of ``cedar/agent.cedarschema``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Final

from cgpu_agent.cedar.engine import Decision, Entity, Policies
from cgpu_agent.cedar.files import agent_schema, default_policy
from cgpu_agent.domain.caller import Caller

__all__ = ["OPEN", "Action", "Decision", "Facts", "Policy", "workload"]

_THIS_VM: Final = Entity("CGpu::Vm", "this", {})
_ID_MAX: Final = 0xFFFFFFFF
_KEPT_DECISIONS: Final = 1024
_KEPT_GROUPS: Final = 64


class Action(str, Enum):
    """What a caller may ask for; the values are the ids of the schema's actions."""

    IDENTITY = "boot.identity"
    PLATFORM = "boot.platform"
    QUOTE = "boot.quote"
    RAW_QUOTE = "boot.raw_quote"
    PCRS = "boot.pcrs"
    EVENT_LOG = "boot.event_log"
    MEASURE = "boot.measure"
    ACTIVATE_CREDENTIAL = "boot.activate_credential"
    EVIDENCE = "evidence.get"
    GPU_LIST = "gpu.list"
    GPU_WATCH = "gpu.watch"
    GPU_REPORT = "gpu.report"
    GPU_RAW_REPORT = "gpu.raw_report"
    GPU_ATTEST = "gpu.attest"
    GPU_TRANSFER = "gpu.transfer"
    KEY_LIST = "key.list"
    KEY_GET = "key.get"
    KEY_PLAIN = "key.get_plain"
    KEY_OPEN = "key.open"
    KEY_LOAD = "key.load"


OPEN: Final = frozenset(
    {
        Action.IDENTITY,
        Action.PLATFORM,
        Action.QUOTE,
        Action.PCRS,
        Action.EVENT_LOG,
        Action.EVIDENCE,
        Action.GPU_LIST,
        Action.GPU_WATCH,
        Action.GPU_REPORT,
        Action.KEY_LIST,
    }
)
"""Actions that tell a caller about the VM, or speak only in the caller's own name. All others are sensitive."""


OF_KEYS: Final = frozenset({Action.KEY_GET, Action.KEY_PLAIN, Action.KEY_OPEN, Action.KEY_LOAD})
"""Actions whose resource is a ``Key``; that of all others is the machine."""


@dataclass(frozen=True, slots=True)
class GpuName:
    """A GPU as policy sees it: the driver's name of it, and the identity (UEID) in its certificates."""

    uuid: str = ""
    ueid: str = ""


NO_GPU: Final = GpuName()


@dataclass(frozen=True, slots=True)
class Key:
    """A key as policy sees it: its id, who keeps it, and the group that the operator put it in.

    Attributes:
        gpu: into whose memory ``key.load`` would have an object opened.
    """

    id: str
    broker: str
    group: str = ""
    gpu: GpuName = NO_GPU

    @property
    def entity(self) -> Entity:
        """As a resource."""
        return Entity("CGpu::Key", self.id, {"broker": self.broker, "group": self.group})


@dataclass(frozen=True, slots=True)
class Facts:
    """What the agent knows of the machine when it decides; the defaults are what it knows before it knows anything.

    Attributes:
        state: of the agent, as ``Core.state`` has it.
        endorsed: the platform AK has a certificate.
        boot_log: the firmware's event log is there.
        gpus: ``not-asked``, or as ``GpuView.state`` has it: ``none``, ``ready`` or ``not-ready``.
        gpus_simulated: a root other than NVIDIA's vouches for some GPU that is trusted.
    """

    state: str = "starting"
    endorsed: bool = False
    boot_log: bool = False
    gpus: str = "not-asked"
    gpus_simulated: bool = False

    def context(self) -> dict[str, Any]:
        """The complete record of the schema's ``Facts``."""
        boot = {"state": self.state, "endorsed": self.endorsed, "boot_log": self.boot_log}
        return {"boot": boot, "gpus": self.gpus, "gpus_simulated": self.gpus_simulated}


def workload(caller: Caller) -> Entity:
    """The caller as a principal. Its id is a digest: no name that a workload could choose is ever taken for one."""
    by_pidfd = caller.identity_strength == "pidfd"
    return Entity(
        "CGpu::Workload",
        caller.digest().hex(),
        {
            "uid": caller.uid,
            "gid": caller.gid,
            "groups": caller.groups or (),
            "groups_known": caller.groups is not None,
            "has_unit": caller.unit is not None,
            "unit": caller.unit or "",
            "has_container": caller.container is not None,
            "container": caller.container or "",
            "cgroup": caller.cgroup or "",
            "has_exe": caller.exe_at_identify is not None,
            "exe_at_identify": caller.exe_at_identify or "",
            "identity_strength": caller.identity_strength,
            "root": caller.uid == 0 and by_pidfd and caller.container is None,
        },
    )


class Policy:
    """A policy in force. Immutable, and so are its decisions: they are kept. A reload makes a new one."""

    __slots__ = ("_ask", "_policies", "wants_executable")

    def __init__(self, policies: Policies) -> None:
        self._policies: Final = policies
        self.wants_executable: Final = any(
            word in ("has_exe", "exe_at_identify") for source in policies.sources for word in source.words
        )
        """Whether a rule speaks of the caller's program, so that it must be hashed before deciding."""

        def ask(caller: Caller, action: Action, facts: Facts, key: Key | None) -> Decision:
            context = facts.context()
            if action is Action.KEY_LOAD and key is not None:
                context["gpu"] = {"uuid": key.gpu.uuid, "ueid": key.gpu.ueid}
            return policies.decide(
                principal=workload(caller),
                action=action.value,
                resource=_THIS_VM if key is None else key.entity,
                context=context,
            )

        self._ask: Final = lru_cache(_KEPT_DECISIONS)(ask)

    @classmethod
    def load(cls, text: str, what: str) -> Policy:
        """Take in a policy text; ``what`` names it in messages. Raises ``Misuse`` (``BAD_POLICY``)."""
        return cls(Policies.load(text, agent_schema(), what))

    @classmethod
    def default(cls) -> Policy:
        """What holds where no policy is configured."""
        return cls.load(default_policy(), "the default policy")

    @property
    def digest(self) -> str:
        """SHA-256 hex of the text: what evidence states of the policy."""
        return self._policies.digest

    def decide(self, caller: Caller, action: Action, facts: Facts, key: Key | None = None) -> Decision:
        """Whether the caller may. A caller with ids that no kernel gives out may do nothing.

        Args:
            key: what an action of ``OF_KEYS`` is about; ``None`` for the others.
        """
        if (key is None) is (action in OF_KEYS):
            return Decision(False, (), "the action is about something else")
        groups = caller.groups or ()
        # Before anything is looked up: 1.0 and True would be found as 1.
        if not all(type(number) is int and 0 <= number <= _ID_MAX for number in (caller.uid, caller.gid, *groups)):
            return Decision(False, (), "the caller's ids are not a kernel's")
        ask = self._ask if len(groups) <= _KEPT_GROUPS else self._ask.__wrapped__
        return ask(caller, action, facts, key)
