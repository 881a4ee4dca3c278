"""``cgpu-egress``: the agent's only way out. It connects to listed destinations and copies bytes."""
