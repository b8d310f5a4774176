"""Energy-preserving codecs for the moments of an optimizer, in groups of 32 elements.

What a group's moments do to the update is decided by its energy and by how that energy is split
among its elements. The energy is kept exactly (up to a fine scale), only the split is quantized:
`second` codes the second moment, on a lattice whose formulas are in `lattices`; `first` the first,
relative to the second; `signed` a moment that stands alone.

All functions work on float32 blocks [..., 32, n], the group along axis -2; values per group have
shape [..., 1, n], values per row of a tile [..., 32, 1]. Widths are traced scalars. Scale codes: 0
is a group of zeros, the top code a group that is not finite (it decodes to NaN).

An encoder is a chain of formulas, elementwise or of a group, with reductions in between.
`encode_second` and `encode_first` run it on whole blocks; the GPU kernel runs the same formulas
element by element and makes the reductions itself.
"""

from stquant_jax.codecs.first import (
    MU_NOT_FINITE,
    FirstCode,
    Levels,
    decode_first,
    encode_first,
    error_of,
    levels,
    recode_first,
)
from stquant_jax.codecs.lattices import Lattice, lattice
from stquant_jax.codecs.ops import Hold, Ops, by_halves, group_max, group_sum, lane_sum
from stquant_jax.codecs.second import (
    Second,
    SecondCode,
    decode_second,
    decoded_second,
    encode_second,
    encode_second_anew,
    recode_second,
)
from stquant_jax.codecs.signed import decode_signed, encode_signed

__all__ = [
    "MU_NOT_FINITE",
    "FirstCode",
    "Hold",
    "Lattice",
    "Levels",
    "Ops",
    "Second",
    "SecondCode",
    "by_halves",
    "decode_first",
    "decode_second",
    "decode_signed",
    "decoded_second",
    "encode_first",
    "encode_second",
    "encode_second_anew",
    "encode_signed",
    "error_of",
    "group_max",
    "group_sum",
    "lane_sum",
    "lattice",
    "levels",
    "recode_first",
    "recode_second",
]
