"""One block, from gradient and codes to update and codes: decode, rule, encode.

Every backend runs this body.
"""

from typing import Any, NamedTuple

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
    error_of,
    lattice,
    levels,
)
from stquant_jax.codecs.ops import take_row
from stquant_jax.precision import Plan, Sums
from stquant_jax.rules.adam import Adam, AdamScalars
from stquant_jax.storage.noise import Dither
from stquant_jax.storage.numerics import TINY, Arithmetic, log2, to_code, to_float

LN2 = 0.6931471805599453
NARROWER = 0.6  # of a window: about the next narrower one


class Codes(NamedTuple):
    """A block of quantized moments, all uint32.

    Codes are [..., 32, n], scales [..., 1, n], rows [..., 32, 1].
    """

    mu: jax.Array
    nu: Any  # None where there are none
    mu_scale: jax.Array
    nu_scale: jax.Array
    nu_row: jax.Array


def slot_numbers(plan: Plan, scalars: AdamScalars, count: jax.Array) -> tuple[Levels, Lattice]:
    """What codes mean in each leaf's slots, in step ``count``: float32[leaves] in every field."""
    left = scalars.b2 ** (count - 1).astype(jnp.float32)
    nu = plan.widths[1::2], plan.windows[1::2], plan.shrinkage[1::2]
    return levels(plan.widths[0::2]), lattice(*nu, left)


def update_block(
    rule: Adam,
    scalars: AdamScalars,
    g: jax.Array,
    old: Codes,
    valid: jax.Array,
    lev: Levels,
    lat: Lattice,
    noise: Dither,
    round_row: jax.Array,
    ops: Ops,
) -> tuple[jax.Array, Codes, Sums]:
    """The update of a float32 block [..., 32, n], its new codes, and what each lane of the
    round-robin row adds to the statistics, [..., 1, n].

    Where nu has no codes, which is static, it is another, shorter program.
    """
    hold = ops.hold
    row = to_float(old.nu_row)
    second = decode_second(old.nu, old.nu_scale, row, valid, lat, ops)
    mu = decode_first(old.mu, old.mu_scale, second.root, second.base, lev, ops)
    mu, nu = rule.accumulate(g, mu, second.v, scalars)
    mu, nu = hold((mu, nu))
    dither = noise.nu_row if old.nu is None else noise.nu
    new = encode_second(nu, second, row, round_row, valid, lat, dither, noise.nu_coin, ops)
    e = hold(mu * new.inverse_root)
    first = encode_first(e, valid, new.presence, lev, noise.mu, noise.mu_coin, ops)
    update = rule.direction(g, mu, new.v_used, scalars)

    codes = first.codes, new.codes
    elements = valid, g, update, nu, new.v_used, new.share, new.inverse_root, e, codes
    # What a tile's round-robin row has of it, [..., 1, n]: held, or it is picked in the midst of
    # what is computed of it, which is slow.
    rows = hold(jax.tree.map(lambda x: take_row(jnp.broadcast_to(x, g.shape), round_row), elements))
    valid_, g_, update_, nu_, nu_used, share, inverse_root, e_, (mu_code, nu_code) = rows
    mu_code = to_float(mu_code)
    sample = Sample(
        present=valid_ * new.presence == 1.0,
        g=g_,
        update=update_,
        nu=nu_,
        nu_used=nu_used,
        predicted=new.mean * share,
        inverse_root=inverse_root,
        mu_error=error_of(e_, mu_code, first.scale, lev),
        mu_code=mu_code,
        nu_code=jnp.zeros_like(mu_code) if nu_code is None else to_float(nu_code),
    )
    codes = Codes(first.codes, new.codes, first.scale, new.scale, to_code(new.row))
    return update, codes, terms_of(hold(sample), rule, scalars, lev, lat)


class Sample(NamedTuple):
    """Elements that statistics are taken of: [..., 1, n]."""

    present: jax.Array
    g: jax.Array
    update: jax.Array
    nu: jax.Array  # true
    nu_used: jax.Array  # in the update
    predicted: jax.Array  # what group and row say of it
    inverse_root: jax.Array  # of nu as stored
    mu_error: jax.Array  # decoded less true, over the root of nu as stored
    mu_code: jax.Array
    nu_code: jax.Array


def terms_of(
    x: Sample,
    rule: Adam,
    scalars: AdamScalars,
    lev: Levels,
    lat: Lattice,
    arithmetic: Arithmetic = Arithmetic(),  # noqa: B008
) -> Sums:
    """What elements add to their tile's sums: nothing in groups that are zero or not finite."""

    def of(values):
        return jnp.where(x.present, values, 0.0)

    def log_root(values):
        return 0.5 * LN2 * log2(jnp.clip(values, TINY, 2.0**126))

    error = arithmetic.divide(x.mu_error, x.inverse_root)
    mu_error = rule.direction(jnp.zeros_like(x.g), error, x.nu_used, scalars, arithmetic)
    energy = x.update * x.update
    nu = jnp.maximum(x.nu, TINY)
    nu_error = log_root(nu * x.inverse_root * x.inverse_root)
    spread = log_root(arithmetic.divide(x.predicted, nu))
    return Sums(
        elements=of(1.0),
        energy=of(energy),
        mu_error=of(mu_error * mu_error),
        nu_error=of(energy * jnp.square(nu_error)),
        spread=of(energy * jnp.square(spread)),
        zeros=of(jnp.where(x.mu_code + lev.low + lev.between == 0.0, 1.0, 0.0)),
        saturated=of(jnp.where(x.nu_code >= lat.last, energy, 0.0)),
        narrower=of(jnp.where(x.nu_code >= NARROWER * lat.last, energy, 0.0)),
        gradient=of(jnp.abs(x.g)),
        gradient2=of(x.g * x.g),
        nu=of(x.nu_used),
    )


def terms_of_sample(sample: dict[str, jax.Array], *others: Any) -> Sums:
    """`terms_of`, for kernels, which know `Sample` by the names of its fields."""
    return terms_of(Sample(**sample), *others)
