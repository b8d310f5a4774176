"""One block, from gradient and codes to update and codes: decode, rule, encode.

Every backend runs this body.
"""

from typing import NamedTuple

import jax

from stquant_jax.codecs import (
    Hold,
    Lattice,
    Levels,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)
from stquant_jax.noise import Dither
from stquant_jax.numerics import to_code, to_float
from stquant_jax.rules import Adam, AdamScalars


class Codes(NamedTuple):
    """A block of quantized moments, all uint32.

    Codes are [..., 32, n], scales [..., 1, n], rows [..., 32, 1].
    """

    mu: jax.Array
    nu: jax.Array
    mu_scale: jax.Array
    nu_scale: jax.Array
    nu_row: jax.Array


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
    hold: Hold,
) -> tuple[jax.Array, Codes]:
    """The update of a float32 block [..., 32, n] and its new codes."""
    row = to_float(old.nu_row)
    second = decode_second(old.nu, old.nu_scale, row, valid, lat, hold)
    mu = decode_first(old.mu, old.mu_scale, second.sigma, lev, hold)
    mu, nu = rule.accumulate(g, mu, second.v, scalars)
    mu, nu = hold((mu, nu))
    new = encode_second(nu, second, row, turn, valid, lat, noise.nu, noise.nu_coin, hold)
    mu_codes, mu_scale = encode_first(
        hold(mu * new.inverse_root), valid, new.presence, lev, noise.mu, noise.mu_coin, hold
    )
    # One element that is not finite shows in its whole group, at once.
    visible = hold(1.0 + 0.0 * new.presence)
    update = rule.direction(g, mu, new.v_used, scalars) * visible
    return update, Codes(
        to_code(mu_codes), to_code(new.codes), mu_scale, new.scale, to_code(new.row)
    )
