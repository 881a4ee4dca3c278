"""The world outside. Backends collect; they never judge."""
