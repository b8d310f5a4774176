"""nu's codec: energy kept, drift unbiased, shrinkage in the update alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stquant_jax import codecs
from tests import oracle

WIDTHS = range(9)
WINDOWS = (1, 2, 3, 4, 6, 8)
GROUPS = 128
VALID = np.ones((1, 32, GROUPS), np.float32)


@jax.jit
def decode(codes_, scale, row, width, window):
    return codecs.decode_second(codes_, scale, row, VALID, codecs.lattice(width, window))


@jax.jit
def encode(v, codes_, scale, row, turn, width, window, dither, coin, shrinkage):
    lat = codecs.lattice(width, window)
    lat = lat._replace(shrinkage=jnp.where(shrinkage < 0, lat.shrinkage, shrinkage))
    old = codecs.decode_second(codes_, scale, row, VALID, lat)
    return codecs.encode_second(v, old, row, turn, VALID, lat, dither, coin)


def draw(width, seed=0, lowest=20_000, highest=40_000):
    """Random codes, scales and rows of a tile."""
    random = np.random.default_rng(seed)
    return (
        jnp.asarray(random.integers(0, 2**width, (1, 32, GROUPS)), jnp.uint32),
        jnp.asarray(random.integers(lowest, highest, (1, 1, GROUPS)), jnp.uint32),
        jnp.asarray(random.integers(0, 40, (1, 32, 1)), jnp.float32),
    )
