"""The policy language of both sides: Cedar, bounded before it is parsed and failing closed when it is asked.

``text`` bounds and splits policy text, ``engine`` validates it and decides. The schemas and the default policy lie
beside them as package data.
"""
