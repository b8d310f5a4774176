"""To Optax's own state: moments decoded to float32."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from stquant_jax import arena as rows
from stquant_jax import planes
from stquant_jax.checks import check_precision, check_state, find_state
from stquant_jax.codecs import decode_first, decode_second, lattice, levels
from stquant_jax.layout import Leaf, Storage, from_tiles
from stquant_jax.places import Place
from stquant_jax.planes import GROUP
from stquant_jax.planning import layout_for
from stquant_jax.precision import Budget, Policy
from stquant_jax.transform import ScaleByAdamQState


def to_optax(
    state: Any,
    params: Any,
    precision: Policy = Budget(),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
) -> optax.ScaleByAdamState:
    """The moments as float32 trees like ``params``, in the state that `optax.scale_by_adam` uses.

    Args:
      state: a `ScaleByAdamQState`, or an optimizer's state that holds one.
      params: arrays or ShapeDtypeStructs; shapes only.
      precision, storage: those the optimizer was made with; of the former only pins matter.

    Returns:
      `optax.ScaleByAdamState(count, mu, nu)`; groups that were not finite are NaN.

    Raises:
      ValueError: the state was built for other parameters or another storage, or holds no
      `ScaleByAdamQState`, or several.
    """
    check_precision(precision, storage)
    state = find_state(state)
    layout = layout_for(params, precision, storage)
    check_state(state, layout)
    offsets = rows.offsets(state.precision.plan.widths, layout)
    exact = layout.split_exact(state.exact)
    quantized = [
        _decode(state, offsets, i, leaf, first)
        for i, (leaf, first) in enumerate(zip(layout.quantized, layout.first_tile, strict=True))
    ]
    moments = layout.merge(quantized, exact)
    treedef = jax.tree.structure(params)
    mu, nu = (jax.tree.unflatten(treedef, [pair[i] for pair in moments]) for i in range(2))
    return optax.ScaleByAdamState(state.count, mu, nu)


def _decode(
    state: ScaleByAdamQState, offsets: jax.Array, index: int, leaf: Leaf, first: int
) -> tuple[jax.Array, jax.Array]:
    mu_slot, nu_slot = 2 * index, 2 * index + 1
    widths, windows, shrinkage = state.precision.plan

    def codes(slot):
        return planes.unpack(
            rows.read_planes(
                state.arena,
                rows.Span(offsets[slot], widths[slot], jnp.int32(leaf.tiles)),
                leaf.tiles,
            )
        )

    def scale(scales):
        return scales[first : first + leaf.tiles, None].astype(jnp.uint32)

    _, valid = Place.of(leaf).of_tiles(jnp.int32(0), leaf.tiles, leaf.ragged)
    row = (
        state.nu_row[GROUP * first : GROUP * (first + leaf.tiles)]
        .reshape(leaf.tiles, GROUP, 1)
        .astype(jnp.float32)
    )
    lat = lattice(widths[nu_slot], windows[nu_slot], shrinkage[nu_slot])
    second = decode_second(codes(nu_slot), scale(state.nu_scale), row, valid, lat)
    mu = decode_first(codes(mu_slot), scale(state.mu_scale), second.sigma, levels(widths[mu_slot]))
    return from_tiles(mu, leaf), from_tiles(second.v, leaf)
