"""The workload's SDK."""
