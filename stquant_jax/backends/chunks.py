"""Where chunks of gradients and parameters come from, and where what is made of them goes.

A chunk lies in one of many arrays, of which a traced index picks one: to read it there is a branch
for each, to write it a loop for each that turns once or not at all.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stquant_jax.backends import windows
from stquant_jax.backends.loops import in_place_at, in_place_if, put
from stquant_jax.backends.staging import Small, Staging
from stquant_jax.codecs import Hold
from stquant_jax.rules.apply import Apply, apply_wide
from stquant_jax.storage.layout import Layout


class Arrays(NamedTuple):
    """What is updated in place of gradients, or parameters where updates are applied."""

    direct: list[jax.Array]  # large leaves, read and written where they lie
    staged: list[jax.Array]  # a bucket of small ones, float32[tiles, 32, 128]


class Chunks:
    """Of all quantized leaves.

    Leaves have an order of their own, bucket by bucket: first those that are in none. Bucket n has
    ``order[starts[n]]`` up to ``order[starts[n + 1]]``.
    """

    def __init__(self, layout: Layout, grads: list[jax.Array], apply: Apply | None, hold: Hold):
        self._grads, self._apply, self._hold = grads, apply, hold
        self._leaves, self._staging = layout.quantized, Staging(layout)
        buckets = [self._staging.direct, *self._staging.buckets]
        self.order = jnp.array(sum(buckets, []), jnp.int32)
        self.starts = jnp.array(np.cumsum([0, *map(len, buckets)]), jnp.int32)
        self.buckets = len(buckets)
        source = {i: n for n, i in enumerate(self._staging.direct)}
        last = len(source)
        every = range(len(self._leaves))
        self._source = jnp.array([source.get(i, last) for i in every], jnp.int32)
        self._first = jnp.array([self._staging.first_tile.get(i, 0) for i in every], jnp.int32)
        self._bands = jnp.array([leaf.bands for leaf in self._leaves], jnp.int32)
        rounded = apply.rounded if apply else []
        self._rounds, self.rounded = jnp.array(rounded), any(rounded)

    def divided(self) -> tuple[Arrays, Small]:
        """What is updated: large leaves and buffers, and small leaves by their index."""
        leaves = self._grads if self._apply is None else self._apply.params
        staged = [self._staging.buffer() for _ in range(1 if self._apply is None else 2)]
        direct = [leaves[i] for i in self._staging.direct]
        small = {i: leaves[i] for bucket in self._staging.buckets for i in bucket}
        return Arrays(direct, staged if small else []), small

    def together(self, arrays: Arrays, small: Small) -> list[jax.Array]:
        """The leaves in their order."""
        leaves = small | dict(zip(self._staging.direct, arrays.direct, strict=True))
        return [leaves[i] for i in range(len(leaves))]

    def load(self, bucket: jax.Array, small: Small, arrays: Arrays) -> Arrays:
        """With a bucket's leaves in the buffers."""
        inputs = [small] if self._apply is None else [dict(enumerate(self._grads)), small]
        pairs = zip(arrays.staged, inputs, strict=False)
        staged = [self._staging.load(bucket - 1, x, leaves) for x, leaves in pairs]
        return arrays._replace(staged=staged)

    def unload(self, bucket: jax.Array, small: Small, arrays: Arrays) -> Small:
        """With a bucket's leaves out of the last buffer."""
        if not arrays.staged:
            return small
        return self._staging.unload(bucket - 1, small, arrays.staged[-1])

    def spot(self, leaf: jax.Array, tile: jax.Array) -> windows.Spot:
        """Where a chunk of a leaf is that begins with this tile."""
        return windows.Spot.of(tile, self._bands[leaf])

    def read(
        self, leaf: jax.Array, spot: windows.Spot, size: int, arrays: Arrays
    ) -> list[jax.Array]:
        """A chunk of the gradient, and of the parameter: float32[size, 32, 128]."""
        at = self._first[leaf] + spot.tile

        def direct(n, i):
            here = [arrays.direct[n]] if self._apply is None else [self._grads[i], arrays.direct[n]]
            found = [windows.read(x, self._leaves[i], spot, size, self._hold) for x in here]
            return [x.astype(jnp.float32) for x in found]

        def staged():
            return [lax.dynamic_slice_in_dim(x, at, size) for x in arrays.staged]

        branches = [partial(direct, n, i) for n, i in enumerate(self._staging.direct)]
        branches += [staged] if arrays.staged else []
        return lax.switch(self._source[leaf], branches)

    def applied(
        self, leaf: jax.Array, p: jax.Array, update: jax.Array, bits: jax.Array | None
    ) -> jax.Array:
        """A chunk of new parameters, as of `apply_wide`."""
        assert self._apply is not None
        rate, decay = self._apply.rate, self._apply.decay[leaf]
        return apply_wide(p, update, rate, decay, self._rounds[leaf], bits)

    def write(self, leaf: jax.Array, spot: windows.Spot, new: jax.Array, arrays: Arrays) -> Arrays:
        """With a chunk of updates, or parameters."""
        at, source, which = self._first[leaf] + spot.tile, self._source[leaf], self._staging.direct

        def one(n, x):
            return windows.write(x, self._leaves[which[n]], spot, new, self._hold)

        direct, staged = in_place_at(source, one, arrays.direct), list(arrays.staged)
        if staged:
            here = source == len(which)
            staged[-1] = in_place_if(here, lambda now, x: put(x, new, at), staged[-1])
        return Arrays(direct, staged)
