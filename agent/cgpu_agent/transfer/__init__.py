"""Encrypted transfers: between private memory and a device's, over a ring that the host sees and edits."""
