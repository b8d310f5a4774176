"""SOLO: Adam with moments of 2 to 4 bits, by two codecs made for an average that moves slowly.

    decode -> rule -> update;  new moments -> blocks of 128 -> codes -> planes

The method of Xu et al., "Pushing the Limits of Low-Bit Optimizers: A Focus on EMA Dynamics",
arXiv 2505.00347. It shares its rule, its bit-planes and its notion of a small leaf with
`scale_by_adam_q`; widths are constant, and its codecs (`stquant_jax.blocks`) its own.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from stquant_jax.blocks import BLOCK, decode_mu, decode_nu, encode_mu, encode_nu, pack, unpack
from stquant_jax.checks import check_hyperparameters, check_mask, check_rate, check_xla_only
from stquant_jax.devices import mesh_of, part_specs, per_device, spec_of, whole_replicas
from stquant_jax.layout import Layout, Leaf, Storage
from stquant_jax.numerics import hash32, narrowed, to_float, widened
from stquant_jax.planes import GROUP, LANES
from stquant_jax.planning import layout_for
from stquant_jax.precision import Fixed
from stquant_jax.rules import Adam
from stquant_jax.sharding import Sharding, Whereabouts

# Half the median gap between neighbouring levels of the dynamic map of so many bits, to the digits
# the paper's table of momenta was made with.
HALF_GAP = {2: 0.275, 3: 0.135, 4: 0.067, 5: 0.034, 6: 0.017, 7: 0.008, 8: 0.004}


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


def scale_by_solo(
    b1: jax.typing.ArrayLike = 0.8,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    bits: tuple[int, int] = (4, 2),
    quantile: float = 0.1,
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale updates by Adam, its moments stored as SOLO does.

    .. math::
      m_t = \beta_1 Q^{-1}(m_{t-1}) + (1 - \beta_1) g_t, \quad
      v_t = \beta_2 Q^{-1}(v_{t-1}) + (1 - \beta_2) g_t^2, \quad
      u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    in float32; only what is stored is rounded. Blocks are 128 consecutive elements of a leaf. m
    takes the nearest level of a dynamic-exponent map, scaled by the block's largest \|m\|. v takes
    a power of alpha times the block's largest v, D, by stochastic rounding of its logarithm:

    .. math::
      c = \mathrm{clip}\left(\left\lfloor \frac{\log (v / D)}{\log \alpha} + U[0, 1) \right\rfloor,
      0, N\right), \quad \alpha = x_p^{1 / N}, \quad N = 2^b - 1, \quad Q^{-1}(c) = D \alpha^c

    with x_p the p-quantile of the positive v / D. A block of zeros reads as zeros, one that is not
    finite as NaN. There is no level at zero for the zeros of other blocks: they read as the lowest.
    Updates have the gradients' shapes and dtypes.

    Stored are bits[0] + bits[1] for an element and three float32 for a block: at (4, 2) 3.375 bits
    per element of state.

    Args:
      b1: decay of the first moment, 0 <= b1 < 1, and b1**2 < b2; `solo_momentum` has the advised
        ones.
      b2: decay of the second moment, 0 <= b2 < 1.
      eps: added to the root of the second moment.
      bits: of a code of m, and of one of v; each 2, 3 or 4.
      quantile: p, a float strictly between 0 and 1; in the paper 0.05 to 0.3 do well.
      storage: which leaves stay exact, seed of the rounding; backend None or "xla".
      sharding: see `scale_by_adam_q`. Blocks are those of a device's own part of a leaf, so that
        bits depend on the division.

    Returns:
      A gradient transformation whose state is a `ScaleBySoloState`.

    Raises:
      ValueError: an argument out of range; at ``init``, parameters that are not real floating
        arrays; at ``update``, gradients of other shapes than the state's.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from stquant_jax import scale_by_solo
      >>> tx = scale_by_solo(bits=(4, 2))
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((256, 512))}, state)
      >>> bool(abs(updates["kernel"] - 1).max() < 1e-5)
      True
      >>> sum(x.nbytes for x in jax.tree.leaves(state)) * 8 / (2 * 256 * 512)
      3.3751220703125

    References:
      Xu et al., `SOLO <https://arxiv.org/abs/2505.00347>`_, 2025.
    """
    _check_arguments(b1, b2, eps, bits, quantile, storage)
    rule = Adam()
    whereabouts = Whereabouts(sharding)

    def empty(layout: Layout, here: Sharding | None, treedef: Any) -> ScaleBySoloState:
        def local():
            return jnp.zeros((), jnp.int32), [_zeros(leaf, bits) for leaf in layout.leaves]

        specs = P(), [_specs(leaf) for leaf in layout.leaves]
        make = per_device(local, mesh_of(here), (), specs)
        count, leaves = make() if here is None else jax.jit(make)()
        return _state(count, treedef, leaves)

    def init(params: optax.Params) -> ScaleBySoloState:
        if _is_placeholder(params):  # no field is a tree of arrays shaped like them
            fields: Any = ScaleBySoloState._fields
            return ScaleBySoloState(*fields)
        here = whereabouts.at_init(params)
        layout = layout_for(params, Fixed(), storage, here)
        return empty(layout, here, jax.tree.structure(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySoloState]:
        del params, extra_args
        here = whereabouts.at_update(updates)
        layout = layout_for(updates, Fixed(), storage, here)
        grads, treedef = jax.tree.flatten(narrowed(updates))
        _check_state(state, jax.eval_shape(partial(empty, layout, here, treedef)))
        trees = [treedef.flatten_up_to(tree) for tree in state[1:]]
        old = [_Stored(*parts) for parts in zip(*trees, strict=True)]
        count = jnp.asarray(optax.safe_increment(state.count))
        scalars = rule.prepare(b1, b2, eps, 0.0, count)

        def local(grads, old, count, scalars):
            directions, leaves = [], []
            for i, (leaf, grad, stored) in enumerate(zip(layout.leaves, grads, old, strict=True)):
                g, (m, v) = grad.astype(jnp.float32), _decode(leaf, stored, bits)
                m, v = rule.accumulate(g, m, v, scalars)
                directions.append(rule.direction(g, m, v, scalars).astype(grad.dtype))
                key = hash32(jnp.uint32(storage.seed) ^ hash32(jnp.uint32(2 * i + 1)))
                key = hash32(count.astype(jnp.uint32) ^ key)
                leaves.append(_encode(leaf, m, v, bits, quantile, key))
            return directions, leaves

        parts, own = part_specs(layout), [_specs(leaf) for leaf in layout.leaves]
        run = per_device(local, mesh_of(here), (parts, own, P(), P()), (parts, own))
        directions, leaves = run(grads, old, count, scalars)
        directions = jax.tree.unflatten(treedef, whole_replicas(directions, layout, here))
        return widened(directions, updates), _state(count, treedef, leaves)

    return optax.GradientTransformationExtraArgs(init, update)


def solo_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.8,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    bits: tuple[int, int] = (4, 2),
    quantile: float = 0.1,
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw` with its state stored as SOLO does (arXiv 2505.00347).

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, bits, quantile, storage, sharding: see `scale_by_solo`.
      weight_decay, mask: see `optax.adamw`.

    Raises:
      ValueError: as `scale_by_solo`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from stquant_jax import solo_adamw, solo_momentum
      >>> params = {"kernel": jnp.ones((256, 512)), "bias": jnp.zeros(512)}
      >>> tx = solo_adamw(1e-3, b1=solo_momentum(2, reference_bits=5), bits=(2, 2))
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
    """
    check_rate("learning_rate", learning_rate)
    check_rate("weight_decay", weight_decay)
    check_mask(mask)
    return optax.chain(
        scale_by_solo(
            b1, b2, eps, bits=bits, quantile=quantile, storage=storage, sharding=sharding
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def solo_momentum(bits: int, reference: float = 0.9, reference_bits: int = 8) -> float:
    r"""The largest b1 for which m's rounding at ``bits`` hurts no more than at the reference.

    .. math::
      \frac{\beta'}{1 - \beta'} r(b') \le \frac{\beta}{1 - \beta} r(b)

    with r(b) half the median gap between levels, to the paper's three digits (arXiv 2505.00347).

    Args:
      bits: of m, from 2 to 8.
      reference: a b1 known to do well at ``reference_bits``.
      reference_bits: from 2 to 8.

    Raises:
      ValueError: an argument out of range.

    Examples:
      >>> from stquant_jax import solo_momentum
      >>> [round(solo_momentum(bits), 3) for bits in (4, 3, 2)]
      [0.35, 0.211, 0.116]
    """
    for name, value in (("bits", bits), ("reference_bits", reference_bits)):
        if not isinstance(value, int) or value not in HALF_GAP:
            raise ValueError(f"{name}={value!r}: expected an integer from 2 to 8")
    if not isinstance(reference, (int, float)) or not 0 <= reference < 1:
        raise ValueError(f"reference={reference!r}: expected a number, 0 <= reference < 1")
    odds = reference / (1 - reference) * HALF_GAP[reference_bits] / HALF_GAP[bits]
    return odds / (1 + odds)


def swamping_bound(bits: int) -> float:
    """The b2 from which on v would stand still with linear levels, however small the gradients.

    Without gradient v loses a share 1 - b2 of itself in a step. From ``b2 = 1 - 1 / (2 * (2**bits -
    1))`` on, even the largest level loses less than the half step that rounding to the nearest
    gives back. That is why SOLO's levels are logarithmic and its rounding stochastic
    (arXiv 2505.00347).

    Args:
      bits: of v, a positive integer.

    Raises:
      ValueError: ``bits`` is not a positive integer.

    Examples:
      >>> from stquant_jax import swamping_bound
      >>> [round(swamping_bound(bits), 3) for bits in (4, 3, 2)]
      [0.967, 0.929, 0.833]
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or bits < 1:
        raise ValueError(f"bits={bits!r}: expected a positive integer")
    return 1 - 1 / (2 * (2**bits - 1))


# --- a leaf's moments in the state ---


class _Stored(NamedTuple):
    """One leaf of each tree of a `ScaleBySoloState`."""

    mu: Any
    mu_scale: Any
    nu: Any
    nu_scale: Any
    nu_alpha: Any

    @classmethod
    def exact(cls, m: jax.Array, v: jax.Array) -> "_Stored":
        return cls(m, optax.MaskedNode(), v, optax.MaskedNode(), optax.MaskedNode())


def _state(count: jax.Array, treedef: Any, leaves: list[_Stored]) -> ScaleBySoloState:
    columns = ([leaf[k] for leaf in leaves] for k in range(len(_Stored._fields)))
    return ScaleBySoloState(count, *(treedef.unflatten(column) for column in columns))


def _zeros(leaf: Leaf, bits: tuple[int, int]) -> _Stored:
    if not leaf.tiles:
        return _Stored.exact(*(jnp.zeros(leaf.shape, jnp.float32) for _ in bits))
    blocks = math.ceil(leaf.size / BLOCK)
    mu, nu = (jnp.zeros((b, math.ceil(blocks / GROUP), LANES), jnp.uint32) for b in bits)
    mu_scale, nu_scale, nu_alpha = (jnp.full(blocks, x, jnp.float32) for x in (0, 0, 1))
    return _Stored(mu, mu_scale, nu, nu_scale, nu_alpha)


def _specs(leaf: Leaf) -> _Stored:
    """How a leaf's arrays are divided."""
    part: Any = spec_of(leaf.axes)
    if not leaf.tiles:
        return _Stored.exact(part, part)
    words, scale = spec_of(((), leaf.all_axes)), spec_of((leaf.all_axes,))
    return _Stored(words, scale, words, scale, scale)


def _decode(leaf: Leaf, old: _Stored, bits: tuple[int, int]) -> list[jax.Array]:
    """m and v, float32[*shape]."""
    if not leaf.tiles:
        return [old.mu, old.nu]
    mu, nu = (unpack(x, len(old.mu_scale)) for x in (old.mu, old.nu))
    m, v = decode_mu(mu, old.mu_scale, bits[0]), decode_nu(nu, old.nu_scale, old.nu_alpha)
    return [x.reshape(-1)[: leaf.size].reshape(leaf.shape) for x in (m, v)]


def _encode(
    leaf: Leaf, m: jax.Array, v: jax.Array, bits: tuple[int, int], quantile: float, key: jax.Array
) -> _Stored:
    if not leaf.tiles:
        return _Stored.exact(m, v)
    m, v = (jnp.pad(x.reshape(-1), (0, -leaf.size % BLOCK)).reshape(-1, BLOCK) for x in (m, v))
    element = jnp.arange(m.size, dtype=jnp.uint32).reshape(m.shape) + _part_number(leaf) * m.size
    noise = to_float(hash32(element ^ key) >> 8) * 2.0**-24
    mu, mu_scale = encode_mu(m, bits[0])
    nu, nu_scale, nu_alpha = encode_nu(v, bits[1], quantile, noise)
    return _Stored(pack(mu, bits[0]), mu_scale, pack(nu, bits[1]), nu_scale, nu_alpha)


def _part_number(leaf: Leaf) -> jax.Array:
    """uint32[]: of all parts that a leaf is divided into, the one on the device that asks."""
    number = jnp.uint32(0)
    for names in leaf.axes:
        if names:
            number = number * lax.axis_size(names) + jnp.uint32(lax.axis_index(names))
    return number


# --- checks ---


def _is_placeholder(params: Any) -> bool:
    """Not parameters, but what `optax.tree_utils.tree_map_params` gives to ``init`` to see where
    they end up in the state."""
    seen: list[Any] = []

    def init(placeholder: Any) -> Any:
        seen.append(placeholder)
        return ()

    optax.tree_utils.tree_map_params(init, lambda x: x, ())
    return isinstance(params, type(seen[0]))


def _check_arguments(b1: Any, b2: Any, eps: Any, bits: Any, quantile: Any, storage: Any) -> None:
    check_hyperparameters(b1, b2, eps, 0.0)
    pair = isinstance(bits, tuple | list) and len(bits) == 2
    if not (pair and all(isinstance(b, int) and 2 <= b <= 4 for b in bits)):
        raise ValueError(f"bits={bits!r}: expected a pair, of m and of v, each 2, 3 or 4")
    if not (isinstance(quantile, float) and 0 < quantile < 1):
        raise ValueError(
            f"quantile={quantile!r}: expected a float strictly between 0 and 1; with "
            "optax.inject_hyperparams pass static_args='quantile'"
        )
    if not isinstance(storage, Storage):
        raise ValueError(f"storage={storage!r}: expected a stquant.Storage")
    check_xla_only(storage, "SOLO")


def _check_state(state: Any, want: ScaleBySoloState) -> None:
    """Raise ValueError at the first array that is not as these gradients need it."""
    if not isinstance(state, ScaleBySoloState):
        raise ValueError(
            f"state is {type(state).__name__}: expected the ScaleBySoloState that init returned"
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
