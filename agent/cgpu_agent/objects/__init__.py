"""Sealed objects: sealing and opening them, for the agent and for the owner of a model alike."""
