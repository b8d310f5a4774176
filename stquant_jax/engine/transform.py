"""`scale_by_adam_q`: Optax's `scale_by_adam` with its state in a bit-plane arena. Read this module
first.

    gradients -> tiles -> decode -> rule -> encode -> planes -> arena, updates     every step
    statistics -> tally                                                            every step
    tally -> averages -> policy -> plan -> repack                                  every K steps
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from stquant_jax import backends
from stquant_jax.backends.repack import repack
from stquant_jax.codecs import MU_NOT_FINITE
from stquant_jax.engine.checks import check_hyperparameters, check_precision
from stquant_jax.engine.differentiation import constant
from stquant_jax.engine.planning import capacity_for, layout_for, resumed, rows_for, slots_for
from stquant_jax.engine.state import ScaleByAdamQState, first_state, packed_of, state_specs
from stquant_jax.engine.state_checks import check_arrays, check_policy, check_state
from stquant_jax.precision import Budget, Policy, PrecisionState
from stquant_jax.precision.policy import storable
from stquant_jax.precision.statistics import INTERVAL, ageing
from stquant_jax.precision.tally import add
from stquant_jax.rules.adam import Adam, AdamScalars
from stquant_jax.rules.apply import Apply, apply_exact
from stquant_jax.sharding.devices import mesh_of, part_specs, per_device, whole_replicas
from stquant_jax.sharding.specs import Sharding, ShardingResolver
from stquant_jax.storage import arena as rows
from stquant_jax.storage.layout import Layout
from stquant_jax.storage.numerics import isolated, narrowed, widened
from stquant_jax.storage.places import counted_leaves
from stquant_jax.storage.settings import Storage


class ScaleByAdamQ(optax.GradientTransformationExtraArgs):
    """An Optax transformation, (init, update), with the step that `fused_update` shares.

    ``step(grads, state, apply=None) -> (updates, state)``; with an `Apply` of all leaves, new
    parameters in place of updates.
    """

    step: Callable[..., tuple[Any, ScaleByAdamQState]]


def scale_by_adam_q(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    nesterov: bool = False,
    precision: Policy = Budget(5.0),  # noqa: B008
    storage: Storage = Storage(),  # noqa: B008
    sharding: Sharding | None = None,
) -> ScaleByAdamQ:
    r"""Rescale updates by Adam, its moments stored in a few bits each.

    .. math::
      m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2,
      \quad u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t) + \bar\epsilon} +
      \epsilon}

    as `optax.scale_by_adam` computes it, in float32; between steps m and v lie in a bit-plane arena
    of 2 to 8 bits a code (v: 0 to 8), with a scale for every 32 elements. Updates have the
    gradients' shapes and dtypes.

    Args:
      b1: decay of the first moment, 0 <= b1 < 1, and b1**2 < b2.
      b2: decay of the second moment, 0 <= b2 < 1.
      eps: added to the root of the second moment.
      eps_root: added inside the root.
      nesterov: use Nesterov momentum.
      precision: a policy: `Budget` (bits per state element, everything counted), `STQuant` or
        `Fixed`.
      storage: which leaves stay exact, backend, seed of the rounding.
      sharding: how the parameters are divided among devices. None goes by the arrays: under a mesh
        with Explicit axes they tell it themselves; with Auto axes, those that ``init`` is given
        outside of jit do, and this transformation remembers it.

    Returns:
      A gradient transformation whose state is a `ScaleByAdamQState`. Its ``init`` also accepts
      ShapeDtypeStructs under `jax.eval_shape`. The state has no names: it goes with any tree whose
      leaves need as many tiles, in the same order; `stquant.to_portable` keeps paths and shapes.

    Raises:
      ValueError: a hyperparameter out of range (also when it arrives in a dtype too coarse for it);
        at ``init``, a budget below the floor, complex or integer parameters, a sharding that does
        not fit them; at ``update``, gradients or a state of another model, layout, budget or
        sharding; at both, under jit, arrays on a mesh with Auto axes of which nothing tells how
        they are divided.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, stquant_jax as stquant
      >>> adam = stquant.scale_by_adam_q(precision=stquant.Budget(5.0))
      >>> tx = optax.chain(adam, optax.scale(-1e-3))
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((256, 512))}, state)
      >>> bool(abs(updates["kernel"] + 1e-3).max() < 1e-6)
      True
      >>> sum(x.nbytes for x in jax.tree.leaves(state)) <= 5.0 / 32 * 2 * params["kernel"].nbytes
      True

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015;
      `STQuant <https://arxiv.org/abs/2604.06836>`_, 2026.
    """
    check_hyperparameters(b1, b2, eps, eps_root)
    check_precision(precision, storage)
    if not isinstance(nesterov, bool):
        raise ValueError(f"nesterov={nesterov!r}: expected True or False")
    rule = Adam(nesterov=nesterov)
    backends.resolve(storage)  # raises if it cannot run
    resolver = ShardingResolver(sharding)

    def init(params: optax.Params) -> ScaleByAdamQState:
        here = resolver.at_init(params)
        layout = layout_for(params, precision, storage, here)
        make = _init if here is None else jax.jit(_init, static_argnums=(0, 1, 2))
        return make(layout, precision, mesh_of(here))

    def step(
        grads: optax.Updates, state: Any, apply: Apply | None = None
    ) -> tuple[Any, ScaleByAdamQState]:
        here = resolver.at_update(grads)
        layout = layout_for(grads, precision, storage, here)
        check_arrays(grads, "updates")
        leaves, treedef = jax.tree.flatten(narrowed(grads))
        check_state(state, layout, "gradients")
        slots, capacity = slots_for(layout, precision), capacity_for(layout, precision)
        check_policy(state, layout, capacity, slots, precision)
        leaves, state = jax.tree.map(jnp.asarray, (leaves, state))
        count = jnp.asarray(optax.safe_increment(state.count))
        scalars = rule.prepare(b1, b2, eps, eps_root, count)
        applied = (apply.params, apply.rate, apply.decay) if apply else ()
        program = Program(layout, storage, rule, precision, here, bool(apply and apply.stochastic))
        arguments = leaves, state, count, scalars, *applied
        if layout.quantized:
            arguments = constant(arguments)
        updates, state = _step(program, *arguments)
        return widened(jax.tree.unflatten(treedef, updates), grads), state

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdamQState]:
        del params, extra_args
        return step(updates, state)

    tx = ScaleByAdamQ(init, update)
    tx.step = step
    return tx


@dataclass(frozen=True)
class Program:
    """What a step is compiled for: equal for equal optimizers of equal parameters."""

    layout: Layout
    storage: Storage
    rule: Adam
    precision: Policy
    sharding: Sharding | None
    stochastic: bool


# Compiled once, also where `update` is not: op by op, each loop is compiled at each call.
@partial(jax.jit, static_argnums=0)
def _step(
    program: Program, leaves: list, state: Any, count: jax.Array, scalars: AdamScalars, *applied
) -> tuple[list[jax.Array], ScaleByAdamQState]:
    """Updates of all leaves, or with (params, rate, decay) new parameters, on all devices."""
    layout = program.layout

    def local(leaves, state, count, scalars, *applied):
        to = Apply(*applied, stochastic=program.stochastic) if applied else None
        return _update(program, leaves, state, count, scalars, to)

    parts, own = part_specs(layout), state_specs(layout)
    specs = parts, own, P(), P(), *(parts, P(), P())[: len(applied)]
    run = per_device(local, mesh_of(program.sharding), specs, (parts, own))
    updates, state = run(leaves, state, count, scalars, *applied)
    return whole_replicas(updates, layout, program.sharding), state


def _init(layout: Layout, precision: Policy, mesh: Any) -> ScaleByAdamQState:
    return per_device(partial(first_state, layout, precision), mesh, (), state_specs(layout))()


def _update(
    program: Program,
    leaves: list[jax.Array],
    state: ScaleByAdamQState,
    count: jax.Array,
    scalars: AdamScalars,
    apply: Apply | None,
) -> tuple[list[jax.Array], ScaleByAdamQState]:
    """One device's part of a step."""
    layout, storage, rule = program.layout, program.storage, program.rule
    precision, backend_step = program.precision, backends.resolve(storage)
    quantized, exact = layout.split(leaves)
    to_quantized, to_exact = (None, None) if apply is None else apply.split(layout)
    packed = packed_of(state)
    schedule = resumed(state.precision, layout, precision)
    plan = schedule.plan
    # Numbers known at compile time, or not: in the programs of some shardings they would be folded.
    decays = jnp.where(count > 0, scalars.b1, 0), jnp.where(count > 0, scalars.b2, 0)
    weights = ageing(decays, count)
    quantized, packed, sums = backend_step(
        layout, storage, rule, scalars, count, quantized, packed, plan, weights, to_quantized
    )
    packed, schedule = _refresh(layout, storage, precision, decays, count, packed, sums, schedule)
    exact, moments = _update_exact(
        layout, storage, rule, scalars, count, exact, state.exact, to_exact
    )
    updates = layout.merge(quantized, exact)
    return updates, ScaleByAdamQState(count, *packed, exact=moments, precision=schedule)


def _refresh(
    layout: Layout,
    storage: Storage,
    precision: Policy,
    decays: tuple[jax.Array, jax.Array],
    count: jax.Array,
    packed: rows.Packed,
    sums: jax.Array,
    state: PrecisionState,
) -> tuple[rows.Packed, PrecisionState]:
    """Statistics are tallied. Every ``interval`` steps the tally is taken into what is observed,
    and the policy decides on a new plan, to which the arena is repacked; where plans never change,
    the former is all. Only then do devices meet.
    """
    if not layout.quantized:
        return packed, state
    axes = layout.axes
    state = state._replace(tally=add(state.tally, sums, decays, counted_leaves(layout)))
    due = count % (precision.interval or INTERVAL) == 0
    if precision.interval is None:
        observe = partial(PrecisionState.renewed, count=count, axes=axes)
        return packed, jax.lax.cond(due, observe, lambda state: state, state)
    slots, free = slots_for(layout, precision), rows_for(layout, precision)

    def decide(packed, state):
        state = state.renewed(count, axes)
        choose = partial(precision.decide, slots, free)
        new = isolated(count > 0, choose, state, decays, count)
        fits = storable(new.plan, slots, free)
        plan = jax.tree.map(partial(jnp.where, fits), new.plan, state.plan)
        packed = repack(layout, storage, count, packed, state.plan, plan)
        # Nothing can be raised here: a policy's mistake shows in every update.
        mu_scale = jnp.where(fits, packed.mu_scale, jnp.uint8(MU_NOT_FINITE))
        return packed._replace(mu_scale=mu_scale), new._replace(plan=plan)

    return jax.lax.cond(due, decide, lambda packed, state: (packed, state), packed, state)


def _update_exact(
    layout: Layout,
    storage: Storage,
    rule: Adam,
    scalars: AdamScalars,
    count: jax.Array,
    grads: list[jax.Array],
    moments: jax.Array,
    apply: Apply | None,
) -> tuple[list[jax.Array], jax.Array]:
    """The rule on the small leaves, in float32, all of them as one vector."""
    if not layout.exact_size:
        return grads if apply is None else apply.params, moments
    g = jnp.concatenate([x.astype(jnp.float32).reshape(-1) for x in grads])
    mu, nu = rule.accumulate(g, moments[0], moments[1], scalars)
    update = rule.direction(g, mu, nu, scalars)
    if apply is None:
        parts = layout.split_exact(update)
        updates = [u.astype(x.dtype) for u, x in zip(parts, grads, strict=True)]
    else:
        updates = apply_exact(layout, storage, count, update, apply)
    return updates, jnp.stack([mu, nu])
