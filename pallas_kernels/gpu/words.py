"""Codes of a tile in shared memory: word r of a lane holds those of elements r, r + 8, r + 16 and
r + 24, one a byte. Turned over, by three butterfly stages in registers, they are the bit-planes of
the arena.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gpu.folding import QUARTERS
from stquant_jax.storage.arena import Span
from stquant_jax.storage.numerics import to_code
from stquant_jax.storage.planes import PLANES, code_in, transpose8x8


def load(arena: Any, slot: Span, home: jax.Array, words: Any) -> None:
    """Planes to words, zeros above the width.

    All eight rows are asked for at once, in place of one after the other as the width says; what is
    not stored is read again from ``home``, a row that is needed anyway.
    """
    planes = []
    for p in range(PLANES):
        stored = p < slot.width
        row = arena[jnp.where(stored, slot.first + p * slot.stride, home)]
        planes.append(jnp.where(stored, row, jnp.uint32(0)))
    for r, word in enumerate(transpose8x8(planes)):
        words[r] = word


def store(arena: Any, slot: Span, words: Any) -> None:
    """Words to planes, as many as the width says."""
    for p, plane in enumerate(transpose8x8([words[r] for r in range(PLANES)])):

        @pl.when(p < slot.width)
        def put(p=p, plane=plane):
            arena[slot.first + p * slot.stride] = plane


def codes(words: Any, r: jax.Array) -> list[jax.Array]:
    """Codes uint32[128] of elements r, r + 8, r + 16 and r + 24."""
    word = words[r]
    return [(word >> (8 * q)) & jnp.uint32(0xFF) for q in QUARTERS]


def put_codes(words: Any, r: jax.Array, parts: list[jax.Array]) -> None:
    a, b, c, d = (part << (8 * q) for q, part in enumerate(parts))
    words[r] = (a | b) | (c | d)


def put_whole(words: Any, r: jax.Array, parts: list[jax.Array], lowest: jax.Array) -> None:
    """`put_codes` of whole float32 less ``lowest``, two of which fit into another's digits."""
    a, b, c, d = parts
    low, high = (to_code(x + 256.0 * y, 257.0 * lowest) for x, y in ((a, b), (c, d)))
    words[r] = low | (high << 16)


def code_at(words: Any, i: jax.Array) -> jax.Array:
    """The code of element i."""
    return code_in(words[i & 7], i)
