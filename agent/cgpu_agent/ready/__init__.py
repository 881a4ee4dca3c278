"""``cgpu-ready``: the one part of the agent that runs as root. It sets and clears the GPUs' ready state."""
