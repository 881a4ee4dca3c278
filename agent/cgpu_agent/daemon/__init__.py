"""Wiring and life cycle."""
