"""What a state will hold, holds, and tells of itself.

It imports wrapping, solo and all below. Read first: report.
"""
