"""Backends for GPUs: see ``backends.base.Gpus``."""
