"""The order of steps: from gradients and state to updates and state, and the aliases of Adam.

It imports backends and all below. Read first: transform.
"""
