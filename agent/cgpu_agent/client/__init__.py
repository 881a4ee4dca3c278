"""The workload's SDK.

from cgpu_agent.client import Agent

with Agent() as agent:
    bundle = agent.get_evidence(nonce, audience="https://relying-party.example")
"""

from cgpu_agent.client.aio import AsyncAgent
from cgpu_agent.client.calls import Copy, Identity, Measured, Progress, Quote
from cgpu_agent.client.channels import AsyncChannel, Channel
from cgpu_agent.client.sync import Admin, Agent
from cgpu_agent.errors import AgentError, Denied, DeviceFault, Exhausted, Misuse, Unavailable

__all__ = [
    "Admin",
    "Agent",
    "AgentError",
    "AsyncAgent",
    "AsyncChannel",
    "Channel",
    "Copy",
    "Denied",
    "DeviceFault",
    "Exhausted",
    "Identity",
    "Measured",
    "Misuse",
    "Progress",
    "Quote",
    "Unavailable",
]
