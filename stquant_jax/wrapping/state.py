"""The state of `quantize_state`."""

from typing import Any, NamedTuple

import jax
import optax

from stquant_jax.wrapping.store import Store


class Quantized(optax.MaskedNode):
    """In place of an array that is quantized."""


class QuantizedState(NamedTuple):
    """State of `quantize_state`: arrays only.

    Attributes:
      steps: int32[], updates done; the count that others look for is the transformation's own.
      inner: the transformation's own state, an `optax.MaskedNode` in place of what is quantized.
      store: codes and scales of that.
      widths: int32[slots], bits of a code of each array that is quantized, in tree order; those of
        init.
      fingerprint: uint32[], of the shapes and widths that the store's bits mean; 0 where it was
        reset to zeros, as `jax.tree.map(jnp.zeros_like, state)` does it: a fresh state.
    """

    steps: jax.Array
    inner: Any
    store: Store
    widths: jax.Array
    fingerprint: jax.Array
