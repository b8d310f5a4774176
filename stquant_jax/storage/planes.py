"""Bit-planes: the codes of a tile as rows of 128 words, one bit of every code a row.

A tile is 32 x 128 codes: axis -2 runs along a group, axis -1 along the lanes. Bit ``j`` of word
``w`` in plane ``p`` is bit ``p`` of the code of element (j, w), so a group is one word of every
plane, and a code of any width costs exactly its bits.

Both directions are an 8x8 bit transpose: eight words, one per plane, hold four 8x8 blocks of bits
side by side (plane x position, one block per byte). Transposed, each word holds four whole codes,
one per byte. Three butterfly
stages on eight words do that for 32 codes at once: 2 integer operations per code, whatever the
width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

GROUP = 32  # elements that share a scale: the bits of a word
LANES = 128  # groups side by side in a tile
TILE = GROUP * LANES
PLANES = 8  # the widest code, in bits

_BUTTERFLY = ((4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555))


def transpose8x8(words: Sequence[jax.Array]) -> list[jax.Array]:
    """Swap bit r of every byte of word p with bit p of the same byte of word r: eight planes to
    eight words of whole codes, and back."""
    words = list(words)
    for stride, mask in _BUTTERFLY:
        for i in range(PLANES):
            if not i & stride:
                low, high = words[i], words[i + stride]
                swap = ((low >> stride) ^ high) & jnp.uint32(mask)
                words[i], words[i + stride] = low ^ (swap << stride), high ^ swap
    return words


def codes_of(words: jax.Array) -> jax.Array:
    """uint32[..., 8, 128] transposed words -> uint32[..., 32, 128] codes: byte q of word r is the
    code of element 8 q + r."""
    return jnp.concatenate([(words >> shift) & jnp.uint32(0xFF) for shift in (0, 8, 16, 24)], -2)


def code_in(words: jax.Array, i: jax.Array) -> jax.Array:
    """The code of element i in words i & 7, transposed."""
    return (words >> (i >> 3 << 3).astype(jnp.uint32)) & jnp.uint32(0xFF)


def words_of(codes: jax.Array) -> jax.Array:
    """uint32[..., 32, 128] codes below 256 -> uint32[..., 8, 128] words, `codes_of` undone."""
    quarter = [codes[..., 8 * q : 8 * q + 8, :] << (8 * q) for q in range(4)]
    return quarter[0] | quarter[1] | quarter[2] | quarter[3]


def unpack(planes: jax.Array) -> jax.Array:
    """uint32[8, ..., 128] planes, those above the width zero -> uint32[..., 32, 128] codes."""
    return codes_of(jnp.stack(transpose8x8([planes[p] for p in range(PLANES)]), axis=-2))


def pack(codes: jax.Array) -> jax.Array:
    """uint32[..., 32, 128] codes below 256 -> uint32[8, ..., 128] planes, `unpack` undone."""
    words = words_of(codes)
    return jnp.stack(transpose8x8([words[..., r, :] for r in range(PLANES)]))
