"""Evidence of a confidential GPU VM for the workloads in it, and its verification."""

__version__ = "0.1.0"
