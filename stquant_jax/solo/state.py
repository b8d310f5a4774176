"""SOLO's state: a leaf's moments as they are stored, and back."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from stquant_jax.engine.state_checks import RESTORE
from stquant_jax.sharding.devices import spec_of
from stquant_jax.solo.codecs import BLOCK, decode_mu, decode_nu, encode_mu, encode_nu, pack, unpack
from stquant_jax.storage.layout import Leaf
from stquant_jax.storage.numerics import hash32, to_float
from stquant_jax.storage.planes import GROUP, LANES


class ScaleBySoloState(NamedTuple):
    """State of `scale_by_solo`: a count, and five trees of the parameters' structure.

    A leaf of n elements has ceil(n / 128) blocks, and a tile for every 32 of them. Leaves below
    ``storage.min_size`` are exact: they have no scales, but `optax.MaskedNode` in their place.

    Attributes:
      count: int32[], updates done.
      mu: uint32[bits, tiles, 128], the codes of m as bit-planes; if exact, m itself, float32.
      mu_scale: float32[blocks], largest abs(m); NaN in a block that is not finite.
      nu: as mu, for v.
      nu_scale: float32[blocks], largest v, the level of code 0; NaN as above.
      nu_alpha: float32[blocks], the ratio of each level of v to the one above.
    """

    count: jax.Array
    mu: Any
    mu_scale: Any
    nu: Any
    nu_scale: Any
    nu_alpha: Any


class StoredLeaf(NamedTuple):
    """One leaf of each tree of a `ScaleBySoloState`."""

    mu: Any
    mu_scale: Any
    nu: Any
    nu_scale: Any
    nu_alpha: Any

    @classmethod
    def exact(cls, m: jax.Array, v: jax.Array) -> "StoredLeaf":
        return cls(m, optax.MaskedNode(), v, optax.MaskedNode(), optax.MaskedNode())


def state_of(count: jax.Array, treedef: Any, leaves: list[StoredLeaf]) -> ScaleBySoloState:
    columns = ([leaf[k] for leaf in leaves] for k in range(len(StoredLeaf._fields)))
    return ScaleBySoloState(count, *(treedef.unflatten(column) for column in columns))


def zeros_of(leaf: Leaf, bits: tuple[int, int]) -> StoredLeaf:
    if not leaf.tiles:
        return StoredLeaf.exact(*(jnp.zeros(leaf.shape, jnp.float32) for _ in bits))
    blocks = math.ceil(leaf.size / BLOCK)
    mu, nu = (jnp.zeros((b, math.ceil(blocks / GROUP), LANES), jnp.uint32) for b in bits)
    mu_scale, nu_scale, nu_alpha = (jnp.full(blocks, x, jnp.float32) for x in (0, 0, 1))
    return StoredLeaf(mu, mu_scale, nu, nu_scale, nu_alpha)


def specs_of(leaf: Leaf) -> StoredLeaf:
    """How a leaf's arrays are divided."""
    part: Any = spec_of(leaf.axes)
    if not leaf.tiles:
        return StoredLeaf.exact(part, part)
    words, scale = spec_of(((), leaf.all_axes)), spec_of((leaf.all_axes,))
    return StoredLeaf(words, scale, words, scale, scale)


def decode_leaf(leaf: Leaf, old: StoredLeaf, bits: tuple[int, int]) -> list[jax.Array]:
    """m and v, float32[*shape]."""
    if not leaf.tiles:
        return [old.mu, old.nu]
    mu, nu = (unpack(x, len(old.mu_scale)) for x in (old.mu, old.nu))
    m, v = decode_mu(mu, old.mu_scale, bits[0]), decode_nu(nu, old.nu_scale, old.nu_alpha)
    return [x.reshape(-1)[: leaf.size].reshape(leaf.shape) for x in (m, v)]


def encode_leaf(
    leaf: Leaf, m: jax.Array, v: jax.Array, bits: tuple[int, int], quantile: float, key: jax.Array
) -> StoredLeaf:
    if not leaf.tiles:
        return StoredLeaf.exact(m, v)
    m, v = (jnp.pad(x.reshape(-1), (0, -leaf.size % BLOCK)).reshape(-1, BLOCK) for x in (m, v))
    first = _part_number(leaf) * jnp.uint32(m.size % 2**32)  # it seeds noise: it may wrap around
    element = jnp.arange(m.size, dtype=jnp.uint32).reshape(m.shape) + first
    noise = to_float(hash32(element ^ key) >> 8) * 2.0**-24
    mu, mu_scale = encode_mu(m, bits[0])
    nu, nu_scale, nu_alpha = encode_nu(v, bits[1], quantile, noise)
    return StoredLeaf(pack(mu, bits[0]), mu_scale, pack(nu, bits[1]), nu_scale, nu_alpha)


def _part_number(leaf: Leaf) -> jax.Array:
    """uint32[]: of all parts that a leaf is divided into, the one on the device that asks."""
    number = jnp.uint32(0)
    for names in leaf.axes:
        if names:
            number = number * lax.axis_size(names) + jnp.uint32(lax.axis_index(names))
    return number


def check_state(state: Any, want: ScaleBySoloState) -> None:
    """Raise ValueError at the first array that is not as these gradients need it."""
    if not isinstance(state, ScaleBySoloState):
        raise ValueError(
            f"state is {type(state).__name__}: expected the ScaleBySoloState that init returned; "
            f"{RESTORE}"
        )
    flatten = jax.tree_util.tree_leaves_with_path
    got, need = (
        {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in flatten(tree)}
        for tree in (state, want)
    )
    for name in got | need:
        if got.get(name) != need.get(name):
            raise ValueError(
                f"state{name} is {got.get(name)}, but these gradients need {need.get(name)}: "
                "expected gradients of the tree and shapes given to init, the same bits and storage"
            )
