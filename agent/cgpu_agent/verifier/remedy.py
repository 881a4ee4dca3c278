"""What would have to be different for a policy to answer otherwise: found by asking it again, not by reading it.

Cedar names the rules that decided, and says nothing of those that did not hold. So the facts are improved as far as
they go, and every improvement that the answer does not need is taken back. What remains is enough, and none of it is
idle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from cgpu_agent.verifier.facts import Facts


@dataclass(frozen=True, slots=True)
class _Improvement:
    advice: str
    facts: dict[str, Any]


_IMPROVEMENTS: Final = (
    _Improvement("an AK certificate below a root you trust (--ak-root)", {"endorsement": "ak-certificate"}),
    _Improvement("lowest versions for the processor's firmware (--floor)", {"platform_floor": "kept"}),
    _Improvement("a TPM that is not a simulator's", {"simulated": False}),
    _Improvement('the VM named by you (--ak-name, or "instances" in the reference)', {"instance": "pinned"}),
    _Improvement("a firmware log", {"boot_log": "explained"}),
    _Improvement("Secure Boot on, as the firmware log proves it", {"secure_boot": "enabled"}),
    _Improvement("firmware that is not in debug mode", {"debug": "off"}),
    _Improvement("a reference (--reference) that the evidence matches", {"reference": "match"}),
    _Improvement("a reference that pins more PCRs (cgpuctl reference make --pcr)", {"reference_pcrs": range(16)}),
    _Improvement(
        "a reference that pins the kernel command line and whatever else it can",
        {"reference_pins": ("agent-build", "command-line", "instance", "secure-boot-authorities")},
    ),
    _Improvement("GPUs that NVIDIA vouches for", {"gpu_simulated": False}),
    _Improvement("NVIDIA's reference values for the GPUs (--rim, --collateral)", {"gpu_measurements": "match"}),
    _Improvement("fresh CRLs or OCSP responses for the GPUs (--crl, --ocsp)", {"gpu_revocation": "checked"}),
    _Improvement("lowest versions for the GPUs (--min-driver, --min-vbios)", {"gpu_floor": "kept"}),
    _Improvement("confidential-computing mode on, on every GPU", {"gpu_cc": "on", "gpu_production": "yes"}),
    _Improvement("developer tools off, on every GPU", {"gpu_dev_tools": "off"}),
    _Improvement("GPUs that the agent itself trusts and holds ready", {"gpu_ready": True}),
    _Improvement(
        "a root file system with dm-verity, demanded by the command line", {"agent_coverage": "verity-root"}
    ),
)


def remedies(facts: Facts, allows: Callable[[Facts], bool]) -> tuple[str, ...] | None:
    """The least change of facts that makes a policy allow what it denies, in words.

    Args:
        facts: as they are.
        allows: asks the policy.

    Returns:
        One phrase for each fact that has to change; ``None`` when none of those known here would help: the policy
        asks for something else, of the caller for example.
    """
    needed = [each for each in _IMPROVEMENTS if _improve(facts, [each]) != facts]
    if not allows(_improve(facts, needed)):
        return None
    for each in tuple(needed):
        without = [other for other in needed if other is not each]
        if allows(_improve(facts, without)):
            needed = without
    return tuple(each.advice for each in needed)


def _improve(facts: Facts, improvements: list[_Improvement]) -> Facts:
    for each in improvements:
        changes = {
            name: getattr(facts, name) | frozenset(value) if isinstance(getattr(facts, name), frozenset) else value
            for name, value in each.facts.items()
        }
        facts = replace(facts, **changes)
    return facts
