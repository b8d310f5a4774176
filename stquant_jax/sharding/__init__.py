"""Which device has which part of which leaf, and what each does with its own.

It imports storage. Read first: specs.
"""
