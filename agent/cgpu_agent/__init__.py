"""Evidence, key release and encrypted transfer buffers for workloads in a confidential GPU VM."""

__version__ = "0.1.0"
