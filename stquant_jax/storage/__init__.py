"""Bits in memory: how a leaf becomes tiles, what its elements are called, where its codes lie.

It imports nothing of the package. Read first: layout, then planes and arena.
"""
