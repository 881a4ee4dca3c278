"""Trust anchors that ship with the verifier."""
