"""Any other optimizer of Optax, its state packed between steps.

It imports engine and all below. Read first: quantize.
"""
