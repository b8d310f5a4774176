"""One block, from gradient and codes to update and codes: decode, rule, encode.

Every backend runs this body.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from stquant_jax.codecs import (
    Lattice,
    Levels,
    Ops,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    lattice,
    levels,
)
from stquant_jax.noise import Dither
from stquant_jax.numerics import to_code, to_float
from stquant_jax.precision import Plan, Sums
from stquant_jax.rules import Adam, AdamScalars

LN2 = 0.6931471805599453
NARROWER = 0.6  # of a window: about the next narrower one


class Codes(NamedTuple):
    """A block of quantized moments, all uint32.

    Codes are [..., 32, n], scales [..., 1, n], rows [..., 32, 1].
    """

    mu: jax.Array
    nu: jax.Array
    mu_scale: jax.Array
    nu_scale: jax.Array
    nu_row: jax.Array


def slot_numbers(plan: Plan) -> tuple[Levels, Lattice]:
    """What codes mean in each leaf's slots: float32[leaves] in every field."""
    nu = plan.widths[1::2], plan.windows[1::2], plan.shrinkage[1::2]
    return levels(plan.widths[0::2]), lattice(*nu)


def update_block(
    rule: Adam,
    scalars: AdamScalars,
    g: jax.Array,
    old: Codes,
    valid: jax.Array,
    lev: Levels,
    lat: Lattice,
    noise: Dither,
    turn: jax.Array,
    ops: Ops,
) -> tuple[jax.Array, Codes, Sums]:
    """The update of a float32 block [..., 32, n], its new codes, and what each lane of the row in
    turn adds to the statistics, [..., 1, n]."""
    hold = ops.hold
    row = to_float(old.nu_row)
    second = decode_second(old.nu, old.nu_scale, row, valid, lat, ops)
    mu = decode_first(old.mu, old.mu_scale, second.sigma, lev, ops)
    mu, nu = rule.accumulate(g, mu, second.v, scalars)
    mu, nu = hold((mu, nu))
    new = encode_second(nu, second, row, turn, valid, lat, noise.nu, noise.nu_coin, ops)
    first = encode_first(
        hold(mu * new.inverse_root), valid, new.presence, lev, noise.mu, noise.mu_coin, ops
    )
    # One element that is not finite shows in its whole group, at once.
    visible = hold(1.0 + 0.0 * new.presence)
    update = rule.direction(g, mu, new.v_used, scalars) * visible

    codes = Codes(
        to_code(first.codes), to_code(new.codes), first.scale, new.scale, to_code(new.row)
    )

    def in_turn(x):
        """What a tile's row in turn has of it: [..., 1, n]."""
        return ops.row(jnp.broadcast_to(x, g.shape), turn)

    sample = Sample(
        present=valid * new.presence == 1.0,
        g=g,
        update=update,
        nu=new.v_used,
        sigma=1.0 / new.inverse_root,
        mu_error=first.error,
        nu_error=new.error,
        spread=new.spread,
        mu_code=first.codes,
        nu_code=new.codes,
    )
    terms = terms_of(hold(jax.tree.map(in_turn, sample)), rule, scalars, lev, lat)
    return update, codes, terms


class Sample(NamedTuple):
    """Elements that statistics are taken of: [..., 1, n]."""

    present: jax.Array
    g: jax.Array
    update: jax.Array
    nu: jax.Array
    sigma: jax.Array  # the root of nu that mu is coded by
    mu_error: jax.Array  # decoded less true, in sigmas
    nu_error: jax.Array  # octaves of sigma
    spread: jax.Array  # octaves of sigma
    mu_code: jax.Array
    nu_code: jax.Array


def no_sums() -> Sums:
    """Statistics of no tiles at all."""
    return Sums(*jnp.zeros((len(Sums._fields), 0), jnp.float32))


def terms_of(x: Sample, rule: Adam, scalars: AdamScalars, lev: Levels, lat: Lattice) -> Sums:
    """What elements add to their tile's sums: nothing in groups that are zero or not finite."""

    def of(values):
        return jnp.where(x.present, values, 0.0)

    mu_error = rule.direction(jnp.zeros_like(x.g), x.mu_error * x.sigma, x.nu, scalars)
    energy = x.update * x.update
    return Sums(
        elements=of(1.0),
        energy=of(energy),
        mu_error=of(mu_error * mu_error),
        nu_error=of(energy * jnp.square(LN2 * x.nu_error)),
        spread=of(energy * jnp.square(LN2 * x.spread)),
        zeros=of(jnp.where(x.mu_code + lev.low + lev.between == 0.0, 1.0, 0.0)),
        saturated=of(jnp.where(x.nu_code >= lat.last, energy, 0.0)),
        narrower=of(jnp.where(x.nu_code >= NARROWER * lat.last, energy, 0.0)),
        gradient=of(jnp.abs(x.g)),
        gradient2=of(x.g * x.g),
        nu=of(x.nu),
    )
