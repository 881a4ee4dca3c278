"""Proto package cgpu.agent.v1."""
