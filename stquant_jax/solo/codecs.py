"""SOLO's codecs: blocks of 128 consecutive elements, float32[blocks, 128] to codes and scales.

The first moment takes the nearest level of a dynamic-exponent map, the second a power of alpha,
both relative to the block's largest. Xu et al., arXiv 2505.00347. Codes are uint32 of the block's
shape, scales float32[blocks]: 0 for a block of zeros, NaN for one that is not finite.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stquant_jax.storage import planes
from stquant_jax.storage.numerics import TINY, or_nan, to_float
from stquant_jax.storage.planes import GROUP, LANES

BLOCK = LANES  # consecutive elements that share a scale


def dynamic_map(bits: int) -> np.ndarray:
    """Signed levels of a dynamic exponent, float32[2**bits], increasing (arXiv 1511.04561).

    Decade i of bits - 1 is that of 10**(i - bits + 2) and holds the middles of 2**i equal cells, of
    both signs; 0 and 1 complete the map.
    """
    levels = [0.0, 1.0]
    for i in range(bits - 1):
        edges = np.linspace(0.1, 1, 2**i + 1) * 10.0 ** (i - bits + 2)
        middles = (edges[1:] + edges[:-1]) / 2
        levels += [*middles, *-middles]
    return np.sort(levels).astype(np.float32)


def encode_mu(m: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Codes and scales: the nearest level of the map."""
    y, scale = _normalize(m, 0)
    levels = dynamic_map(bits)
    middles = jnp.asarray((levels[1:] + levels[:-1]) / 2)
    codes = jnp.searchsorted(middles, y, side="right", method="compare_all")
    return codes.astype(jnp.uint32), scale


def decode_mu(codes: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    return jnp.asarray(dynamic_map(bits))[codes] * scale[:, None]


def encode_nu(
    v: jax.Array, bits: int, quantile: float, noise: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, scales and alphas of v >= 0; ``noise`` is uniform on [0, 1), of v's shape."""
    last = 2**bits - 1
    y, scale = _normalize(v, 1)
    # The quantile of the positive values, padding and other zeros being no sample: of those in
    # order, a weighted mean of the two next to its rank.
    positive = y >= TINY
    rank = quantile * (jnp.sum(positive, axis=-1, keepdims=True, dtype=jnp.float32) - 1)
    n = min(int(quantile * (BLOCK - 1)) + 2, BLOCK)
    smallest = -lax.top_k(-jnp.where(positive, y, 1), n)[0]
    place = jnp.arange(n, dtype=jnp.float32)[None]
    weights = jnp.maximum(1 - jnp.abs(place - rank), 0)
    alpha = jnp.sum(smallest * weights, axis=-1, keepdims=True) ** (1 / last)
    # Where alpha is 1 all codes mean the same, and any will do that is a number.
    steps = jnp.log(jnp.maximum(y, TINY)) / jnp.minimum(jnp.log(alpha), -TINY)
    codes = jnp.clip(jnp.floor(steps + noise), 0, last)
    return codes.astype(jnp.uint32), scale, alpha[:, 0]


def decode_nu(codes: jax.Array, scale: jax.Array, alpha: jax.Array) -> jax.Array:
    return scale[:, None] * alpha[:, None] ** to_float(codes)


def _normalize(x: jax.Array, blank: float) -> tuple[jax.Array, jax.Array]:
    """x by the largest magnitude of its block, and that: 0 where it is below 2**-126, NaN where it
    is not finite or above 2**126, the reciprocal of which is flushed to zero. Then x is blank."""
    size = jnp.abs(x)
    bounded = jnp.all(size <= 1 / TINY, axis=-1, keepdims=True)  # XLA's max may pass over a NaN
    scale = jnp.max(size, axis=-1, keepdims=True)
    alive = bounded & (scale >= TINY)
    y = jnp.where(alive, x, blank) / jnp.where(alive, scale, 1)
    return y, or_nan(jnp.where(alive, scale, 0), bounded)[:, 0]


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """uint32[blocks, 128] -> uint32[bits, tiles, 128]."""
    rows = jnp.pad(codes, ((0, -len(codes) % GROUP), (0, 0)))
    return planes.pack(rows.reshape(-1, GROUP, LANES))[:bits]


def unpack(words: jax.Array, blocks: int) -> jax.Array:
    rows = planes.unpack(jnp.pad(words, ((0, planes.PLANES - len(words)), (0, 0), (0, 0))))
    return rows.reshape(-1, LANES)[:blocks]
