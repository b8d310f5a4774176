"""Precision policies: how many bits each slot gets, and when that changes.

A policy sees sizes, widths and a few statistics per slot, never the arena. All are frozen
dataclasses: `optax.inject_hyperparams` would turn bare numbers into traced arrays, and shapes
depend on these.
"""

from stquant_jax.precision.budget import Budget
from stquant_jax.precision.policy import Fixed, Plan, Policy, PrecisionState
from stquant_jax.precision.slots import Slots
from stquant_jax.precision.statistics import Sums
from stquant_jax.precision.stquant import STQuant

__all__ = ["Budget", "Fixed", "Plan", "Policy", "PrecisionState", "STQuant", "Slots", "Sums"]
