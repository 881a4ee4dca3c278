"""A GPU made of software, in a process of its own: it speaks real SPDM with real signatures, and protects nothing.

Its certificates end in a root that it made up, from which every verifier concludes that it is simulated.
"""
