"""cgpuctl: a client plus the offline verifier."""
