"""Where keys come from that the agent may release."""
