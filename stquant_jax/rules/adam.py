"""Update rules: elementwise float algebra on a gradient and its moments, no trees, no bits.

A rule is two functions: ``accumulate`` makes the new moments, ``direction`` the update from them.
Between the two the codec may shrink the second moment toward its group's mean. ``prepare`` turns
hyperparameters and the step count into the scalars that both use, once a step.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from stquant_jax.storage.numerics import Arithmetic


class AdamScalars(NamedTuple):
    b1: jax.Array
    b2: jax.Array
    # 1 - b1 and 1 - b2, of Python floats in double precision as in Optax: of 0.999 float32 keeps
    # 1e-3 to a part in 80,000.
    rest1: jax.Array
    rest2: jax.Array
    eps: jax.Array
    eps_root: jax.Array
    on_mu: jax.Array  # weights of mu and the gradient in the bias-corrected first moment
    on_gradient: jax.Array
    on_nu: jax.Array


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba, 2015), with Nesterov momentum as in Optax (Dozat, 2016).

    mu' = b1 mu + (1 - b1) g,  nu' = b2 nu + (1 - b2) g**2,
    u = mu_hat / (sqrt(nu' / (1 - b2**t) + eps_root) + eps)
    """

    nesterov: bool = False

    def prepare(self, b1, b2, eps, eps_root, count: jax.Array) -> AdamScalars:
        """Scalars of step ``count`` (1 for the first)."""
        b1, b2, rest1, rest2, eps, eps_root = (
            jnp.asarray(x, jnp.float32) for x in (b1, b2, 1 - b1, 1 - b2, eps, eps_root)
        )
        t = count.astype(jnp.float32)
        if self.nesterov:
            on_mu, on_gradient = b1 / (1 - b1 ** (t + 1)), rest1 / (1 - b1**t)
        else:
            on_mu, on_gradient = 1 / (1 - b1**t), jnp.float32(0)
        return AdamScalars(b1, b2, rest1, rest2, eps, eps_root, on_mu, on_gradient, 1 / (1 - b2**t))

    def accumulate(
        self, g: jax.Array, mu: jax.Array, nu: jax.Array, s: AdamScalars
    ) -> tuple[jax.Array, jax.Array]:
        # Terms in Optax's order, for that decides which of them is rounded before the sum.
        return s.rest1 * g + s.b1 * mu, s.rest2 * (g * g) + s.b2 * nu

    def direction(
        self,
        g: jax.Array,
        mu: jax.Array,
        nu: jax.Array,
        s: AdamScalars,
        arithmetic: Arithmetic = Arithmetic(),  # noqa: B008
    ) -> jax.Array:
        mu_hat = s.on_mu * mu + s.on_gradient * g if self.nesterov else s.on_mu * mu
        root = arithmetic.sqrt(nu * s.on_nu + s.eps_root)
        return arithmetic.divide(mu_hat, root + s.eps)
