"""SOLO: Adam with moments of 2 to 4 bits, by two codecs made for an average that moves slowly.

    decode -> rule -> update;  new moments -> blocks of 128 -> codes -> planes

The method of Xu et al., "Pushing the Limits of Low-Bit Optimizers: A Focus on EMA Dynamics",
arXiv 2505.00347. It shares its rule, its bit-planes and its notion of a small leaf with
`scale_by_adam_q`; widths are constant, and its codecs (`stquant_jax.solo.codecs`) its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from stquant_jax.engine.checks import check_hyperparameters, check_mask, check_rate, check_xla_only
from stquant_jax.engine.differentiation import constant
from stquant_jax.engine.planning import layout_for
from stquant_jax.precision import Fixed
from stquant_jax.rules.adam import Adam, AdamScalars
from stquant_jax.sharding.devices import mesh_of, part_specs, per_device, whole_replicas
from stquant_jax.sharding.specs import Sharding, ShardingResolver
from stquant_jax.solo.state import (
    ScaleBySoloState,
    StoredLeaf,
    check_state,
    decode_leaf,
    encode_leaf,
    specs_of,
    state_of,
    zeros_of,
)
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.numerics import hash32, narrowed, widened
from stquant_jax.storage.settings import Storage


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
    resolver = ShardingResolver(sharding)

    def empty(layout: Layout, here: Sharding | None, treedef: Any) -> ScaleBySoloState:
        def local():
            return jnp.zeros((), jnp.int32), [zeros_of(leaf, bits) for leaf in layout.leaves]

        specs = P(), [specs_of(leaf) for leaf in layout.leaves]
        make = per_device(local, mesh_of(here), (), specs)
        count, leaves = make() if here is None else jax.jit(make)()
        return state_of(count, treedef, leaves)

    def init(params: optax.Params) -> ScaleBySoloState:
        if _is_placeholder(params):  # no field is a tree of arrays shaped like them
            fields: Any = ScaleBySoloState._fields
            return ScaleBySoloState(*fields)
        here = resolver.at_init(params)
        layout = layout_for(params, Fixed(), storage, here)
        return empty(layout, here, jax.tree.structure(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySoloState]:
        del params, extra_args
        here = resolver.at_update(updates)
        layout = layout_for(updates, Fixed(), storage, here)
        grads, treedef = jax.tree.flatten(narrowed(updates))
        check_state(state, jax.eval_shape(partial(empty, layout, here, treedef)))
        trees = [treedef.flatten_up_to(tree) for tree in state[1:]]
        old = [StoredLeaf(*parts) for parts in zip(*trees, strict=True)]
        count = jnp.asarray(optax.safe_increment(state.count))
        scalars = Adam().prepare(b1, b2, eps, 0.0, count)

        arguments = grads, old, count, scalars
        if layout.quantized:
            arguments = constant(arguments)
        directions, leaves = _step(layout, tuple(bits), quantile, storage.seed, here, *arguments)
        directions = jax.tree.unflatten(treedef, directions)
        return widened(directions, updates), state_of(count, treedef, leaves)

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


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))  # as `stquant_jax.engine.transform._step`
def _step(
    layout: Layout,
    bits: tuple[int, int],
    quantile: float,
    seed: int,
    sharding: Sharding | None,
    grads: list[jax.Array],
    old: list[StoredLeaf],
    count: jax.Array,
    scalars: AdamScalars,
) -> tuple[list[jax.Array], list[StoredLeaf]]:
    rule = Adam()

    def local(grads, old, count, scalars):
        directions, leaves = [], []
        for i, (leaf, grad, stored) in enumerate(zip(layout.leaves, grads, old, strict=True)):
            g, (m, v) = grad.astype(jnp.float32), decode_leaf(leaf, stored, bits)
            m, v = rule.accumulate(g, m, v, scalars)
            directions.append(rule.direction(g, m, v, scalars).astype(grad.dtype))
            key = hash32(jnp.uint32(seed) ^ hash32(jnp.uint32(2 * i + 1)))
            key = hash32(count.astype(jnp.uint32) ^ key)
            leaves.append(encode_leaf(leaf, m, v, bits, quantile, key))
        return directions, leaves

    parts, own = part_specs(layout), [specs_of(leaf) for leaf in layout.leaves]
    run = per_device(local, mesh_of(sharding), (parts, own, P(), P()), (parts, own))
    directions, leaves = run(grads, old, count, scalars)
    return whole_replicas(directions, layout, sharding), leaves


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
