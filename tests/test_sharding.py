"""States on meshes of eight devices: the same bits as on one, and nothing that travels."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import stquant_jax as stquant
from tests.meshes import CASES, FSDP, SHAPES, TWO, ZERO, Case, gradients

BUDGET = stquant.Budget(5.0, interval=3, warmup=0)
STEPS, HALF = 7, 4  # two changes of plan, one in each half
COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Run(NamedTuple):
    """An optimizer on one mesh, or on none, its step compiled once."""

    case: Case | None
    tx: Any
    program: Any

    def put(self, tree):
        return self.case.put(tree) if self.case else jax.tree.map(jnp.asarray, tree)

    def steps(self, state, first, last):
        """Updates of these steps, and the state after them."""
        updates = []
        for count in range(first, last):
            new, state = self.program(self.put(gradients(count)), state)
            updates.append(jax.device_get(new))
        return updates, state

    def portable(self, state):
        sharding = self.case.sharding if self.case else None
        return stquant.to_portable(state, gradients(0), BUDGET, sharding=sharding)


@functools.cache
def run_of(case: Case | None) -> Run:
    tx = stquant.scale_by_adam_q(precision=BUDGET, sharding=case.sharding if case else None)
    grads = Run(case, tx, None).put(gradients(0))
    step = jax.jit(tx.update, donate_argnums=1)
    return Run(case, tx, step.lower(grads, tx.init(grads)).compile())


@functools.cache
def outcome(case: Case | None):
    """Updates of all steps, the portable state half way, and at the end."""
    run = run_of(case)
    updates, state = run.steps(run.tx.init(run.put(gradients(0))), 0, HALF)
    half = jax.device_get(run.portable(state))
    more, state = run.steps(state, HALF, STEPS)
    return updates + more, half, jax.device_get(run.portable(state))


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@by_case
def test_bits(case):
    """Updates, codes, scales, exact leaves, plans and statistics are those of one device."""
    updates, half, final = outcome(case)
    alone = outcome(None)
    assert_same(updates, alone[0])
    assert_same(half, alone[1])
    assert_same(final, alone[2])
    assert np.any(half["plan"]["widths"] != final["plan"]["widths"]), "no plan has changed"


@pytest.mark.parametrize(
    ("source", "target"),
    [(FSDP, None), (TWO, ZERO), (None, ZERO)],
    ids=lambda case: case.name if case else "one device",
)
def test_restored_on_another_mesh(source, target):
    """Saved half way on one mesh, and gone on with on another, or on none."""
    run, (updates, _, final) = run_of(target), outcome(None)
    half = outcome(source)[1]
    sharding = target.sharding if target else None
    state = stquant.from_portable(half, gradients(0), BUDGET, sharding=sharding)
    more, state = run.steps(state, HALF, STEPS)
    assert_same(more, updates[HALF:])
    assert_same(jax.device_get(run.portable(state)), final)


def computations(program: str) -> dict[str, str]:
    """The bodies of a module's computations, by name."""
    return dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", program, re.M | re.S))


def reached(bodies: dict[str, str], roots: set[str]) -> set[str]:
    seen, todo = set(), list(roots)
    while todo:
        name = todo.pop()
        if name in bodies and name not in seen:
            seen.add(name)
            todo += re.findall(r"%([\w.\-]+)", bodies[name])
    return seen


@by_case
def test_program(case):
    """Devices meet every few steps, under a condition; ZeRO gathers updates, and nothing else."""
    run = run_of(case)
    text, memory = run.program.as_text(), run.program.memory_analysis()
    bodies = computations(text)
    branches = set()
    for body in bodies.values():
        for found in re.findall(r"branch_computations=\{(.*?)\}", body):
            branches |= set(re.findall(r"%([\w.\-]+)", found))
        branches |= set(re.findall(r"(?:true|false)_computation=%([\w.\-]+)", body))
    conditional = reached(bodies, branches)
    always = {
        found
        for name, body in bodies.items()
        if name not in conditional
        for found in re.findall(rf" ({COLLECTIVES})(?:-start)?\(", body)
    }
    assert always == ({"all-gather"} if case.zero_axis else set())
    assert " all-reduce" in text  # of statistics

    state = run.tx.init(run.put(gradients(0)))
    arena = state.arena.addressable_shards[0].data
    assert not re.findall(rf"u32\[{arena.shape[0]},128\]\S* copy\(", text)
    local = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= local - 8  # but for two numbers that nobody reads


@pytest.mark.parametrize("case", [FSDP, ZERO], ids=lambda case: case.name)
@pytest.mark.thorough
def test_shardings_stay(case):
    """From init through update, jit and scan."""
    run = run_of(case)
    want = stquant.state_shardings(
        jax.eval_shape(run.tx.init, gradients(0)), gradients(0), BUDGET, sharding=case.sharding
    )
    grads = run.put(gradients(0))

    def scanned(state):
        return jax.lax.scan(lambda s, _: (run.tx.update(grads, s)[1], None), state, length=2)[0]

    first = run.tx.init(grads)
    states = [first, run.steps(first, 0, 1)[1], jax.jit(run.tx.init)(grads)]
    states.append(jax.jit(scanned)(states[1]))
    for state in states:
        for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.shape, x.sharding)
    updates, _ = run.program(grads, states[-1])
    for name, x in updates.items():
        assert x.sharding.is_equivalent_to(case.of(name), x.ndim)


@pytest.mark.parametrize("zero_axis", [None, "a"])
def test_bytes(zero_axis):
    """`plan` says what lies on each device; ZeRO divides what is replicated."""
    case = ZERO._replace(zero_axis=zero_axis)
    planned = stquant.plan(gradients(0), BUDGET, sharding=case.sharding)
    state = stquant.scale_by_adam_q(precision=BUDGET, sharding=case.sharding).init(
        case.put(gradients(0))
    )
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert planned.total_bytes == here
    assert planned.devices == (8 if zero_axis else 4)
    parts = {leaf.path: leaf.part for leaf in planned.leaves}
    assert parts["wide"] == ((128, 256) if zero_axis else (128, 512))
    now = stquant.report(state, gradients(0), BUDGET, sharding=case.sharding)
    assert now.total_bytes == here
    assert f"each of {planned.devices} devices" in str(planned)


# --- where the sharding comes from ---

WIDE = Case("wide", (8,), "fsdp")


def small(case=WIDE):
    return case.put({"wide": gradients(0)["wide"], "bias": gradients(0)["bias"]})


def test_seen_at_init():
    """Auto axes tell nothing under jit; what init was given is remembered."""
    tx, grads = stquant.scale_by_adam_q(), small()
    state = tx.init(grads)
    assert state.arena.sharding.spec == P("a")
    updates, state = jax.jit(tx.update)(grads, state)
    assert updates["wide"].sharding.is_equivalent_to(WIDE.of("wide"), 2)


def test_told_by_explicit_axes():
    case = WIDE._replace(axis_type=AxisType.Explicit)
    tx, grads = stquant.scale_by_adam_q(), small(case)
    with jax.set_mesh(case.mesh):
        state = jax.jit(tx.init)(grads)
    assert jax.typeof(state.arena).sharding.spec[0] == "a"
    updates, _ = jax.jit(tx.update)(grads, state)
    assert jax.typeof(updates["wide"]) == jax.typeof(grads["wide"])


def test_unknown():
    """Nothing tells it: an error, and no gathering."""
    for f in (stquant.scale_by_adam_q().init, stquant.adamw(1e-3).init):
        with pytest.raises(ValueError, match="sharding=stquant.Sharding"):
            jax.jit(f)(small())
    tx = stquant.scale_by_adam_q()
    with pytest.raises(ValueError, match="sharding=stquant.Sharding"):
        jax.jit(tx.update)(small(), jax.eval_shape(tx.init, gradients(0)))


def test_seen_twice():
    """Two divisions of one tree: an update cannot tell which it is for."""
    tx, grads = stquant.scale_by_adam_q(), small()
    tx.init(grads)
    tx.init(jax.tree.map(np.asarray, grads))
    with pytest.raises(ValueError, match="sharding=stquant.Sharding"):
        jax.jit(tx.update)(grads, tx.init(grads))


def test_moved():
    """Made on one device, parameters and state then put on a mesh: an error, too."""
    tx = stquant.scale_by_adam_q()
    state = tx.init(jax.tree.map(np.asarray, small()))
    state = jax.device_put(state, NamedSharding(WIDE.mesh, P()))
    with pytest.raises(ValueError, match="sharding=stquant.Sharding"):
        jax.jit(tx.update)(small(), state)


MESH = WIDE.mesh


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stquant.Sharding("a", P()), "expected a jax.sharding.Mesh"),
        (lambda: stquant.Sharding(MESH, P("x")), "expected axes of the mesh"),
        (lambda: stquant.Sharding(MESH, P("a", "a")), "each once at most"),
        (lambda: stquant.Sharding(MESH, {"w": "a"}), "expected a PartitionSpec"),
        (lambda: stquant.Sharding(MESH, P(), zero_axis="b"), r"zero_axis='b'.*axes of the mesh"),
        (lambda: stquant.adamw(1e-3, sharding=MESH), "expected None or a stquant.Sharding"),
    ],
)
def test_bad_shardings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"w": P("a"), "b": P("a")}, r"axis 0 of leaf 'b', shape \(100,\).*divisor of 100"),
        ({"w": P("a")}, "nothing for leaf 'b'"),
        ({"w": P("a"), "b": P(None, "a")}, "of 1 axes"),
    ],
)
def test_specs_that_do_not_fit(specs, message):
    tx = stquant.scale_by_adam_q(sharding=stquant.Sharding(MESH, specs))
    with pytest.raises(ValueError, match=message):
        tx.init({"w": jnp.zeros((256, 256)), "b": jnp.zeros(100)})


def test_state_of_another_mesh():
    tx = stquant.scale_by_adam_q(sharding=WIDE.sharding)
    state = stquant.scale_by_adam_q().init(gradients(0))
    with pytest.raises(ValueError, match="8 devices.*the same sharding"):
        tx.update(gradients(0), state)


# --- parts that cut through tiles ---


@pytest.mark.thorough
def test_torn():
    """Laid out part by part, and said so; too small for that, exact. Rows tell less of elements
    that do not lie in tiles of their leaf."""
    grads = {"torn": gradients(0)["wide"][:64, :512], "tiny": gradients(0)["wide"][:64, :128]}
    sharding = stquant.Sharding(MESH, P(None, "a"))
    fixed = stquant.Fixed(6, 4)
    kinds = {x.path: x for x in stquant.plan(grads, fixed, sharding=sharding).leaves}
    assert kinds["torn"].kind == "flat" or kinds["torn"].kind == "folded"
    assert "no whole tiles" in kinds["torn"].reason
    assert kinds["tiny"].kind == "exact" and "no whole tiles" in kinds["tiny"].reason
    tx = stquant.scale_by_adam_q(precision=fixed, sharding=sharding)
    alone, exact = stquant.scale_by_adam_q(precision=fixed), optax.scale_by_adam()
    state, state_alone, state_exact = (t.init(grads) for t in (tx, alone, exact))
    step, step_alone = jax.jit(tx.update), jax.jit(alone.update)
    for _ in range(3):
        updates, state = step(grads, state)
        others, state_alone = step_alone(grads, state_alone)
        want, state_exact = exact.update(grads, state_exact)
    np.testing.assert_allclose(updates["tiny"], want["tiny"], rtol=1e-5)

    def error(x):
        return float(jnp.sum((x["torn"] - want["torn"]) ** 2) / jnp.sum(want["torn"] ** 2))

    assert error(updates) <= 2.5 * error(others)

    portable = stquant.to_portable(state, grads, fixed, sharding=sharding)
    again = stquant.from_portable(portable, grads, fixed, sharding=sharding)
    assert_same(step(grads, again)[0], step(grads, state)[0])
    other = stquant.Sharding(jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,)), P(None, "a"))
    with pytest.raises(ValueError, match="torn|tiny"):
        stquant.from_portable(portable, grads, fixed, sharding=other)


# --- as it is used ---


@pytest.mark.thorough
def test_fused_update():
    """New parameters, rounded at random, are those of one device."""
    case, names = ZERO, ("wide", "flat", "bias")
    params = {name: np.ones(SHAPES[name], jnp.bfloat16) for name in names}
    grads_of = {name: gradients(0)[name] for name in names}
    done = []
    for here in (None, case):
        tx = stquant.adamw(1e-2, sharding=here.sharding if here else None)
        put = here.put if here else (lambda tree: tree)
        p, grads = put(params), put(grads_of)
        step = jax.jit(functools.partial(stquant.fused_update, tx, stochastic_rounding=True))
        p, state = step(grads, tx.init(p), p)
        done.append(jax.device_get(step(grads, state, p)[0]))
        assert not here or p["wide"].sharding.is_equivalent_to(case.of("wide"), 2)
    assert_same(done[0], done[1])


@pytest.mark.thorough
def test_conversions():
    """`resize`, `to_optax` and `from_optax` on a mesh do what they do on one device."""
    case, grads = TWO, {name: gradients(0)[name] for name in ("stack", "flat", "bias")}
    wide = stquant.Budget(6.0, interval=3, warmup=0)
    done = []
    for here in (None, case):
        sharding = here.sharding if here else None
        put = here.put if here else (lambda tree: jax.tree.map(jnp.asarray, tree))
        tx = stquant.scale_by_adam_q(precision=BUDGET, sharding=sharding)
        _, state = jax.jit(tx.update)(put(grads), tx.init(put(grads)))
        state = stquant.resize(state, grads, wide, sharding=sharding)
        told = stquant.to_portable(state, grads, wide, sharding=sharding)
        exact = stquant.to_optax(state, grads, wide, sharding=sharding)
        back = stquant.from_optax(exact, grads, BUDGET, sharding=sharding)
        back = stquant.to_portable(back, grads, BUDGET, sharding=sharding)
        metrics = stquant.metrics(state)
        del metrics["megabytes"]  # of all devices, whose arenas have rows of their own to spare
        done.append(jax.device_get((told, exact, back, metrics)))
    assert_same(done[1], done[0])


def test_solo():
    """Blocks are of a device's own part: those of one device where parts are whole blocks in a row,
    and updates then, but for last bits."""
    names = ("flat", "stack", "bias")  # of which the second is not
    grads = {name: gradients(0)[name] for name in names}
    tx, case = stquant.scale_by_solo(), FSDP
    sharded = stquant.scale_by_solo(sharding=case.sharding)
    state, here = tx.init(grads), sharded.init(case.put(grads))
    step = jax.jit(sharded.update, donate_argnums=1)
    assert not re.search(COLLECTIVES, step.lower(case.put(grads), here).compile().as_text())
    for _ in range(3):
        want, state = jax.jit(tx.update)(grads, state)
        updates, here = step(case.put(grads), here)
    np.testing.assert_allclose(updates["flat"], want["flat"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(updates["bias"], want["bias"], rtol=1e-5)
    assert here.mu["stack"].addressable_shards[0].data.size * 8 == state.mu["stack"].size
    assert np.all(np.isfinite(updates["stack"]))


class MLP(nnx.Module):
    """Two layers whose parameters say how they are divided."""

    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        up, down = (nnx.with_partitioning(init, spec) for spec in ((None, "a"), ("a", None)))
        self.up = nnx.Linear(128, 1024, use_bias=False, kernel_init=up, rngs=rngs)
        self.down = nnx.Linear(1024, 128, use_bias=False, kernel_init=down, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


@pytest.mark.thorough
def test_nnx():
    """nnx.Optimizer, a model made on the mesh, a training step under nnx.jit."""
    with jax.set_mesh(MESH):
        model = MLP(nnx.Rngs(0))
    specs = nnx.get_partition_spec(nnx.state(model, nnx.Param))
    sharding = stquant.Sharding(MESH, specs)
    optimizer = nnx.Optimizer(model, stquant.adamw(1e-3, sharding=sharding), wrt=nnx.Param)
    x = jax.device_put(np.ones((8, 128), np.float32), NamedSharding(MESH, P("a")))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert model.up.kernel.get_value().sharding.spec == P(None, "a")


@pytest.mark.thorough
def test_train_state():
    """The other Flax's TrainState, by what init was given."""
    params = small()
    tx = optax.chain(optax.clip_by_global_norm(1.0), stquant.adamw(1e-2))
    state = TrainState.create(apply_fn=lambda p, x: p, params=params, tx=tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        grads = jax.grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)))(state.params)
        return state.apply_gradients(grads=grads)

    before = float(jnp.sum(params["wide"] ** 2))
    for _ in range(3):
        state = step(state)
    assert float(jnp.sum(state.params["wide"] ** 2)) < before
    assert state.params["wide"].sharding.is_equivalent_to(WIDE.of("wide"), 2)
    assert state.step == 3
