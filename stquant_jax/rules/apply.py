"""The update applied to the parameters: p' = p + rate * (u + decay * p), rounded once.

`apply_block` is elementwise, and every backend runs it; the rest lays out what it needs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stquant_jax.rules.rounding import stochastic
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.noise import keys_of, rounding_bits
from stquant_jax.storage.places import Place, exact_elements, start_of
from stquant_jax.storage.planes import GROUP
from stquant_jax.storage.settings import Storage
from stquant_jax.storage.tiling import from_tiles


class Apply(NamedTuple):
    """What a step needs to apply its updates.

    Attributes:
      params: one array per leaf, of any real floating dtype of at most 32 bits.
      rate: float32[], minus the learning rate.
      decay: float32[leaves], the weight decay of each; 0 where it is masked.
      stochastic: round bfloat16 parameters stochastically. Static.
    """

    params: list[jax.Array]
    rate: jax.Array
    decay: jax.Array
    stochastic: bool

    def split(self, layout: Layout) -> tuple["Apply", "Apply"]:
        """Of all leaves -> of the quantized ones, and of the exact ones."""
        quantized, exact = (
            self._replace(
                params=[self.params[i] for i in which], decay=self.decay[np.array(which, int)]
            )
            for which in layout.split(range(len(self.params)))
        )
        return quantized, exact

    def rounds(self, param: jax.Array) -> bool:
        """Whether a leaf needs the bits of `rounding_bits`."""
        return self.stochastic and param.dtype == jnp.bfloat16

    @property
    def rounded(self) -> list[bool]:
        """The same of each leaf."""
        return [self.rounds(param) for param in self.params]


def apply_block(
    p: jax.Array, u: jax.Array, rate: jax.Array, decay: jax.Array, bits: jax.Array | None = None
) -> jax.Array:
    """New parameters in p's dtype, from an update in float32: elementwise, any shape.

    The arithmetic is in float32.

    Args:
      rate, decay: float32 scalars.
      bits: uint32, uniform; with them p, which is then bfloat16, is rounded stochastically.
    """
    wide = p.astype(jnp.float32)
    # Where nothing decays, a parameter that is infinite stays so: 0 times infinity is not a number.
    new = wide + rate * (u + jnp.where(decay == 0, 0.0, decay * wide))
    return new.astype(p.dtype) if bits is None else stochastic(new, bits)


def apply_wide(
    p: jax.Array,
    u: jax.Array,
    rate: jax.Array,
    decay: jax.Array,
    rounds: jax.Array,
    bits: jax.Array | None,
) -> jax.Array:
    """`apply_block` where parameters of several dtypes are float32: so is the result, but such as
    bfloat16 holds where it ``rounds`` by the bits, which are None if nothing does."""
    new = apply_block(p, u, rate, decay)
    return new if bits is None else jnp.where(rounds, stochastic(new, bits).astype(p.dtype), new)


def apply_quantized(
    layout: Layout, storage: Storage, count: jax.Array, updates: list[jax.Array], apply: Apply
) -> list[jax.Array]:
    """The quantized leaves' new parameters: what any backend's step returns in place of updates."""
    return [
        apply_leaf(layout, storage, count, i, p, u, apply)
        for i, (p, u) in enumerate(zip(apply.params, updates, strict=True))
    ]


def apply_leaf(
    layout: Layout,
    storage: Storage,
    count: jax.Array,
    index: int,
    p: jax.Array,
    u: jax.Array,
    apply: Apply,
) -> jax.Array:
    """New parameters of the quantized leaf of this index, in step ``count``, 1 at least."""
    bits = None
    if apply.rounds(p):
        leaf = layout.quantized[index]
        place = Place.of(leaf, start_of(leaf.cut))
        # From tile 0 on, which XLA does not know: or it may hash positions when it compiles.
        group, _ = place.of_tiles((count < 1).astype(jnp.int32), leaf.tiles, ragged=False)
        element = jnp.arange(GROUP, dtype=jnp.uint32)[None, :, None]
        keys = keys_of(storage.seed, jnp.int32(index), count)
        bits = from_tiles(rounding_bits(keys, group, element), leaf)
    return apply_block(p, u, apply.rate, apply.decay[index], bits)


def apply_exact(
    layout: Layout, storage: Storage, count: jax.Array, update: jax.Array, apply: Apply
) -> list[jax.Array]:
    """The exact leaves' new parameters. For the noise their vector is one more leaf, the last."""
    group, element = jnp.divmod(exact_elements(layout.exact), GROUP)
    bits = rounding_bits(
        keys_of(storage.seed, jnp.int32(len(layout.quantized)), count), group, element
    )
    parts = zip(
        apply.params,
        layout.split_exact(update),
        apply.decay,
        layout.split_exact(bits),
        strict=True,
    )
    return [
        apply_block(p, u, apply.rate, decay, noise if apply.rounds(p) else None)
        for p, u, decay, noise in parts
    ]
