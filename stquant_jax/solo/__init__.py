"""SOLO: Adam at 2 to 4 bits by two codecs of its own.

It imports engine and all below. Read first: transform.
"""
