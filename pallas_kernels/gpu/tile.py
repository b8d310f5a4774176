"""A tile of a leaf: where it is, how it comes into shared memory and leaves it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import words
from pallas_kernels.gpu.lanes import lane_index, meet, vector
from stquant_jax.codecs.first import step_of
from stquant_jax.codecs.lattices import decoded_base, root_of_row
from stquant_jax.storage.arena import Span
from stquant_jax.storage.noise import Dither
from stquant_jax.storage.numerics import to_float
from stquant_jax.storage.planes import GROUP, LANES


class Tile:
    """A tile, and the thread's own group of it."""

    def __init__(self, coded, geometry, s, leaf, tile, stored, scratch):
        self.coded, self.geometry, self.s, self.leaf = coded, geometry, s, leaf
        self.stored, self.scratch = stored, scratch
        self.lane = lane_index()
        place = geometry.place._replace(start=s.start)
        self.group, self.left = place.of_lanes(vector(tile), self.lane)
        self.first_group, self.first_left = place.of_lanes(tile, jnp.int32(0))
        self.size = jnp.float32(GROUP)  # elements of a group
        if geometry.ragged:
            self.size = jnp.clip(self.left, 0, GROUP).astype(jnp.float32)
        self.coins = self.noise(jnp.int32(0), self.group)
        self.tile, self.at = tile, s.first_tile + tile
        stride = jnp.int32(geometry.tiles)
        self.mu_slot = Span(s.mu_first + tile, s.mu_width, stride)
        self.nu_slot = Span(s.nu_first + tile, s.nu_width, stride)

    def each(self, do: Callable[[Any], None], matrices: Sequence[Any]) -> None:
        """With the matrix of this tile's leaf. The first branch does nothing: it is lowered twice,
        and what the copy engine needs is made once."""
        if len(matrices) == 1:
            do(matrices[0])
        else:
            doing = [partial(do, matrix) for matrix in matrices]
            lax.switch(self.leaf + 1, [lambda: None, *doing])

    @property
    def corner(self) -> tuple[jax.Array, jax.Array]:
        """Band and lane tile in the leaf's matrix."""
        if self.geometry.staged:
            return self.tile, jnp.int32(0)
        lane_tile = self.tile // self.geometry.bands
        return self.tile - lane_tile * self.geometry.bands, lane_tile

    def noise(self, i: jax.Array, group: jax.Array) -> Dither:
        return Dither(self.s.keys, group, i.astype(jnp.uint32))

    def valid(self, i: jax.Array) -> jax.Array:
        """1 where element i exists, 0 where it is padding."""
        if not self.geometry.ragged:
            return jnp.float32(1)
        return jnp.where(i < self.left, 1.0, 0.0)

    def fetch(self, gradients: Sequence[Any]) -> None:
        """All that is read of global memory, asked for at once."""
        stored, scratch = self.stored, self.scratch
        to = scratch.gradients, *self.corner, scratch.arrived
        self.each(lambda matrix: self.geometry.gradients.fetch(matrix, *to), gradients)
        # A transfer that a barrier counts has 128 bytes or more: rows of the next tiles come along.
        rows = stored.nu_row.at[pl.ds(self.at * GROUP, LANES)]
        plgpu.copy_gmem_to_smem(rows, scratch.row_codes, scratch.arrived)
        home = self.mu_slot.first
        words.load(stored.arena, self.mu_slot, home, scratch.mu_words)
        if self.coded:
            words.load(stored.arena, self.nu_slot, home, scratch.nu_words)
        mu_scale = stored.mu_scale[self.at].astype(jnp.uint32)
        self.base = decoded_base(stored.nu_scale[self.at].astype(jnp.uint32))
        self.step = step_of(mu_scale, self.base, self.s.lev)
        plgpu.barrier_wait(scratch.arrived)
        self.row = to_float(scratch.row_codes[...].astype(jnp.uint32))  # of row i, in lane i
        self.root = root_of_row(self.row)
        meet()  # roots come where codes were
        scratch.roots[...] = self.root
        meet()

    def gradient(self, r: jax.Array, q: int = 0) -> jax.Array:
        """Of element r + 8 q."""
        g = self.geometry.gradients.read(self.scratch.gradients, r, q)
        return g.astype(jnp.float32)

    def fetch_params(self, params: Sequence[Any]) -> None:
        """They may come where the gradients were, whose last use this is, unless the rule asks for
        them again."""
        self.gradient_of_round_row = self.gradient(self.s.round_row)
        if window := self.geometry.params:
            meet()
            to = self.scratch.out, *self.corner, self.scratch.params_arrived
            self.each(lambda matrix: window.fetch(matrix, *to), params)

    def store(self, out: Sequence[Any]) -> None:
        """Updates and rows go out while mu is coded."""
        rows = self.stored.nu_row.at[pl.ds(self.at * GROUP, GROUP)]
        meet()
        held = self.scratch.out, *self.corner
        self.each(lambda matrix: self.geometry.out.store(matrix, *held), out)
        plgpu.copy_smem_to_gmem(self.scratch.row_codes.at[pl.ds(0, GROUP)], rows)

    def write(self, mu_scale: jax.Array, nu_scale: jax.Array) -> None:
        """Codes and scales back to where they were read."""
        words.store(self.stored.arena, self.mu_slot, self.scratch.mu_words)
        if self.coded:
            words.store(self.stored.arena, self.nu_slot, self.scratch.nu_words)
        self.stored.mu_scale[self.at] = mu_scale.astype(jnp.uint8)
        self.stored.nu_scale[self.at] = nu_scale.astype(jnp.uint16)
