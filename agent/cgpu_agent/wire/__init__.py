"""Byte formats <-> frozen dataclasses. Standard library only; every parser is length-checked."""
