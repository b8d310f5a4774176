"""Derivatives stop at an update: rounding has none, and what JAX would make of one is wrong."""

from typing import Any

import jax


class NotDifferentiableError(TypeError):
    """An update of quantized state was differentiated.

    Codes are rounded: their derivative is zero almost everywhere, and none where it is not. What
    can be done instead: `jax.lax.stop_gradient` on the gradients that enter the update, and on
    learning rates and decays (first-order meta-learning), or Optax's own optimizer where a
    derivative has to pass through.
    """


@jax.custom_jvp
def constant(tree: Any) -> Any:
    """The same values; an error where they are differentiated."""
    return tree


@constant.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise NotDifferentiableError(
        "the update of a stquant optimizer cannot be differentiated, since its state is rounded: "
        "expected jax.lax.stop_gradient on the gradients, parameters and hyperparameters that "
        "enter it, or Optax's own optimizer where a derivative has to pass through the update"
    )
