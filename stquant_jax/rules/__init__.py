"""Symbols of the papers: elementwise algebra on gradients and moments, and updates applied.

It imports storage. Read first: adam.
"""
