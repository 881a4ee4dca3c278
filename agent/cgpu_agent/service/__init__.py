"""The relying party as a small stateless HTTP service."""
