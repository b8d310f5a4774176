"""From one format, mesh, budget or library to another.

It imports inspection and all below. Read first: portable.
"""
