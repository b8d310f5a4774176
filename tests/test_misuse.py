"""Calls that a confused user makes: each is an error that names the argument, what it got and what
is accepted. What is not an error does what the documentation says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import stquant_jax as stquant
from stquant_jax import Budget, Fixed, Sharding, Storage, STQuant
from stquant_jax import quantize_state as quantize
from stquant_jax import scale_by_adam_q as quantized
from tests import common

FIXED = Fixed(5, 4)
PARAMS = common.zeros({"tile": (128, 32), "bias": (40,)})
OTHER = common.zeros({"kernel": (128, 64)})
TX = quantized(precision=FIXED)
STATE = jax.jit(TX.init)(PARAMS)  # one program, where each operation would be one
ADAM = stquant.adam(1e-3, precision=FIXED)
ADAMW = stquant.adamw(1e-3, precision=FIXED)
OPTAX = optax.scale_by_adam().init(PARAMS)
SOLO = stquant.scale_by_solo()
LION = optax.lion(1e-3)
QUANTIZED = quantize(optax.scale_by_adam(), Fixed(8, 8))
HELD = jax.jit(QUANTIZED.init)(PARAMS)
PORTABLE = stquant.to_portable(STATE, PARAMS, FIXED)
SHAPES = jax.eval_shape(lambda: PARAMS)
STATE_SHAPES = jax.eval_shape(TX.init, PARAMS)
MESH = jax.make_mesh((4, 2), ("a", "b"))
MOVING = common.zeros({"kernel": (256, 128)})


@dataclasses.dataclass(frozen=True)
class Listed(Fixed):
    """A policy with a field that cannot be hashed."""

    stages: list = dataclasses.field(default_factory=list)


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def update(**changed):
    return lambda: TX.update(PARAMS, STATE._replace(**changed))


def schedule(**changed):
    return update(precision=STATE.precision._replace(**changed))


def moved(state_of, precision):
    """A state of one policy, given to another."""
    return lambda: quantized(precision=precision).update(
        MOVING, quantized(precision=state_of).init(MOVING)
    )


def plan(specs, zero_axis=None, mesh=MESH):
    return lambda: stquant.plan(PARAMS, FIXED, sharding=Sharding(mesh, specs, zero_axis))


def from_optax(**changed):
    return lambda: stquant.from_optax(OPTAX._replace(**changed), PARAMS, FIXED)


def restored(**changed):
    return lambda: stquant.from_portable(PORTABLE | changed, PARAMS, FIXED)


def fused(tx=ADAM, grads=PARAMS, state=None, params=PARAMS, **options):
    state = ADAM.init(PARAMS) if state is None else state
    return lambda: stquant.fused_update(tx, grads, state, params, **options)


def plot(history):
    return lambda: stquant.report(STATE, PARAMS, FIXED).plot("widths.png", history)


# What is called, and what the message holds.
MISUSE = [
    # policies
    (lambda: Fixed(pins=None), "pins=None", "expected a mapping"),
    (lambda: Budget(pins=5), "pins=5", "expected a mapping"),
    (lambda: STQuant(pins="bias"), "pins='bias'", "expected a mapping"),
    (lambda: Fixed(pins={b"bias": 5}), "pins={b'bias': 5}", "expected a mapping"),
    (lambda: Fixed(pins={"bias": None}), "pins['bias']=None", "'exact'"),
    (lambda: Fixed(pins={"bias": [5, 4]}), "pins['bias']=[5, 4]", "a pair"),
    (lambda: Fixed(pins={"bias": np.ones(2)}), "pins['bias']=array", "a pair"),
    (lambda: Fixed(5, 4, {"bias": "exact"}), "window={'bias'", "None or one of"),
    (lambda: Fixed(window=True), "window=True", "None or one of"),
    (lambda: Fixed(window=3.0), "window=3.0", "None or one of"),
    (lambda: Fixed(mu=np.int32(5)), "mu=np.int32(5)", "integer width"),
    (lambda: Budget(None), "bits=None", "a number of bits"),
    (lambda: Budget(jnp.float32(5)), "bits=Array(5.", "a number of bits"),
    (lambda: Budget(interval=2**31), "interval=2147483648", "below 2**31"),
    (lambda: Budget(warmup=2**40), f"warmup={2**40}", "below 2**31"),
    (lambda: STQuant(patience=2**40), f"patience={2**40}", "below 2**31"),
    (lambda: STQuant(factors=None), "factors=None", "expected a mapping"),
    (lambda: quantized(precision=None), "precision=None", "stquant.Budget(5.0)"),
    (lambda: quantized(precision=Budget), "precision=<class", "stquant.Budget(5.0)"),
    (lambda: quantized(precision=stquant.Policy()), "precision=<", "stquant.Budget(5.0)"),
    (lambda: quantized(precision=Listed()), "cannot be hashed", "frozen dataclass"),
    # storage
    (lambda: Storage("xla"), "min_size='xla'", "integer"),
    (lambda: Storage(seed=jax.random.key(0)), "seed=Array", "integer"),
    (lambda: Storage(backend="XLA"), "backend='XLA'", "'pallas_tpu'"),
    (lambda: quantized(storage=None), "storage=None", "stquant.Storage"),
    # hyperparameters
    (lambda: quantized(None), "b1=None", "expected a number"),
    (lambda: quantized("0.9"), "b1='0.9'", "expected a number"),
    (lambda: quantized([0.9]), "b1=[0.9]", "expected a number"),
    (lambda: quantized(0.9j), "b1=0.9j", "expected a number"),
    (lambda: quantized(lambda t: 0.9), "b1=<function", "optax.inject_hyperparams"),
    (lambda: quantized(jnp.complex64(0.9)), "b1=Array", "expected a number"),
    (lambda: quantized(True), "b1=1.0", "0 <= b1 < 1"),
    (lambda: quantized(b2=0), "b2=0.0", "b1**2 < b2"),
    (lambda: quantized(eps=1e60), "eps=1e+60", "in float32"),
    (lambda: quantized(nesterov="yes"), "nesterov='yes'", "True or False"),
    (lambda: stquant.adam("fast"), "learning_rate='fast'", "a number or a schedule"),
    (lambda: stquant.adam(jnp.ones(3)), "learning_rate=Array", "a number or a schedule"),
    (lambda: stquant.adamw(1e-3, weight_decay=None), "weight_decay=None", "a schedule"),
    (lambda: stquant.adamw(1e-3, mask="bias"), "mask has 'bias'", "True and False"),
    (lambda: stquant.solo_adamw("fast"), "learning_rate='fast'", "a number or a schedule"),
    (lambda: stquant.solo_adamw(1e-3, mask={"w": 1}), "mask has 1", "True and False"),
    (lambda: stquant.scale_by_solo(b1=None), "b1=None", "expected a number"),
    (lambda: stquant.solo_momentum([4]), "bits=[4]", "from 2 to 8"),
    (lambda: stquant.solo_momentum(4, None), "reference=None", "expected a number"),
    # parameters
    (lambda: TX.init({"w": [1.0, 2.0]}), "'w.0' is float", "expected an array"),
    (lambda: TX.init(jax.random.key(0)), "dtype key<fry>", "real floating"),
    (lambda: TX.init([jnp.zeros(4, jnp.int4)]), "dtype int4", "real floating"),
    (lambda: TX.init({"a.b": PARAMS, "a": {"b": PARAMS}}), "'a.b.bias' is there 2", "that differ"),
    (lambda: stquant.plan(ADAM, FIXED), "leaf 'init' is function", "expected an array"),
    # update: gradients
    (lambda: TX.update(STATE, PARAMS), "leaf 'count' has dtype int32", "real floating"),
    (lambda: TX.update(None, STATE), "these gradients need 0", "gradients of the tree"),
    (lambda: TX.update({**PARAMS, "bias": None}, STATE), "gradients need 1, 1", "the tree"),
    (lambda: TX.update({"tile": 1.0, "bias": 2.0}, STATE), "'bias' is float", "an array"),
    (lambda: TX.update(cast(PARAMS, bool), STATE), "dtype bool", "real floating"),
    (lambda: TX.update(SHAPES, STATE), "updates has ShapeDtypeStructs", "expected arrays"),
    # update: states
    (lambda: TX.update(PARAMS, None), "state is NoneType", "ScaleByAdamQState"),
    (lambda: TX.update(PARAMS, PORTABLE), "state is dict", "ScaleByAdamQState"),
    (lambda: TX.update(PARAMS, SOLO.init(PARAMS)), "state is ScaleBySoloState", "AdamQState"),
    (update(count=jnp.float32(5)), "state['count'] is float32[]", "expected int32[]"),
    (update(count=jnp.zeros(3, int)), "state['count'] is int32[3]", "expected int32[]"),
    (update(count=None), "state['count'] is missing", "expected int32[]"),
    (update(count=jnp.int32(-5)), "state.count is -5", "a number of updates"),
    (update(arena=None), "of other arrays", "what init and update return"),
    (update(arena=STATE.arena[:4]), "plan takes 9 rows", "which has 4"),
    (update(arena=STATE.arena[:, :64]), "uint32[9, 64]", "uint32[9, 128]"),
    (update(arena=cast(STATE.arena, float)), "arena is float32[9, 128]", "stquant.to_optax"),
    (update(mu_scale=cast(STATE.mu_scale, float)), "float32[1, 128]", "uint8[1, 128]"),
    (update(nu_scale=STATE.nu_scale[:, :3]), "uint16[1, 3]", "uint16[1, 128]"),
    (update(nu_row=STATE.nu_row[:3]), "uint8[3]", "uint8[32]"),
    (update(exact=cast(STATE.exact, jnp.bfloat16)), "bfloat16[2, 40]", "float32[2, 40]"),
    (lambda: TX.update(PARAMS, cast(STATE, jnp.bfloat16)), "is bfloat16[9", "uint32"),
    (update(precision=None), "of other arrays", "what init and update return"),
    (schedule(tally=()), "is missing: expected", "what init and update return"),
    (schedule(plan=STATE.precision.plan._replace(widths=jnp.full(2, 9))), "18 rows", "has 9"),
    (moved(Budget(5.0), STQuant(5.0)), "octaves is missing", "stquant.resize"),
    (moved(STQuant(5.0), Budget(5.0)), "octaves is float32[4, 1]", "stquant.resize"),
    (moved(FIXED, Budget(5.5)), "arena has 72 rows", "stquant.resize"),
    (moved(STQuant(5.0), STQuant(5.0, factors={"rms": (1, 1)})), "float32[4, 1]", "float32[1, 1]"),
    # fused_update
    (fused(tx=TX, state=STATE), "tx is ScaleByAdamQ", "stquant.adam or stquant.adamw"),
    (fused(tx=LION, state=LION.init(PARAMS)), "tx is GradientTransf", "stquant.adamw"),
    (fused(tx=None), "tx is NoneType", "stquant.adamw"),
    (fused(state=STATE), "state is ScaleByAdamQState", "tuple of 2 states"),
    (fused(state=ADAMW.init(PARAMS)), "state is tuple", "tuple of 2 states"),
    (fused(params=None), "params=None", "expected the parameters"),
    (fused(params=SHAPES), "params has ShapeDtypeStructs", "expected arrays"),
    (fused(params=OTHER), "params is another tree", "one like it"),
    (fused(grads=None), "these gradients need 0", "expected gradients"),
    (fused(stochastic_rounding=1), "stochastic_rounding=1", "True or False"),
    # plan, report, metrics
    (lambda: stquant.report(STATE_SHAPES, PARAMS, FIXED), "ShapeDtypeStructs", "arrays"),
    (lambda: stquant.report(PARAMS, STATE, FIXED), "state is dict", "ScaleByAdamQState"),
    (lambda: stquant.report(STATE, OTHER, FIXED), "params need 2", "the tree"),
    (lambda: stquant.report(STATE, PARAMS, FIXED, Storage(), MESH), "sharding=Mesh", "Sharding"),
    (lambda: stquant.metrics(STATE_SHAPES), "state has ShapeDtypeStructs", "expected arrays"),
    (lambda: stquant.metrics(PARAMS), "state is dict", "not none"),
    (lambda: stquant.metrics((STATE, STATE)), "state is tuple", "not 2"),
    (lambda: stquant.metrics(STATE, OTHER | PARAMS), "2 slots, but params need 4", "mask="),
    (lambda: stquant.plan(PARAMS, mask="bias"), "mask has 'bias'", "True and False"),
    (plot(stquant.metrics(STATE)), "history is dict", "a list of what stquant.metrics"),
    (plot([{"count": 1}]), "history is list (KeyError('widths'))", "a list of what"),
    (plot(5), "history is int", "a list of what"),
    # resize
    (lambda: stquant.resize(STATE, PARAMS, 6.0), "precision=6.0", "stquant.Budget(5.0)"),
    (lambda: stquant.resize(STATE, OTHER, FIXED), "params need 2", "the tree"),
    (lambda: stquant.resize(STATE_SHAPES, PARAMS, FIXED), "ShapeDtypeStructs", "arrays"),
    (lambda: stquant.resize(STATE, PARAMS, Budget(0.1)), "bits=0.1", "smallest budget"),
    # Optax and back
    (from_optax(count=None), "state.count is None", "a number of updates"),
    (from_optax(count=-5), "state.count is -5", "a number of updates"),
    (from_optax(count=jnp.float32(5)), "state.count is 5.0", "a number of updates"),
    (from_optax(count=2**40), f"state.count is {2**40}", "below 2**31"),
    (from_optax(mu=None), "state.mu is unlike params", "['tile']"),
    (from_optax(**jax.eval_shape(lambda: OPTAX)._asdict()), "ShapeDtypeStructs", "arrays"),
    (lambda: stquant.from_optax(STATE, PARAMS), "ScaleByAdamQState", "optax.ScaleByAdamState"),
    (lambda: stquant.from_optax(OPTAX, None, FIXED), "unlike params", "['bias']"),
    (lambda: stquant.to_optax(OPTAX, PARAMS), "state is ScaleByAdamState", "AdamQState"),
    (lambda: stquant.to_optax(STATE_SHAPES, PARAMS, FIXED), "ShapeDtypeStructs", "arrays"),
    (lambda: stquant.to_optax(STATE, PARAMS, FIXED, mu_dtype=int), "mu_dtype=<", "floating"),
    (lambda: stquant.to_optax(STATE, PARAMS, FIXED, mu_dtype="fast"), "mu_dtype='fast'", "None"),
    # portable and back
    (lambda: stquant.to_portable(PORTABLE, PARAMS, FIXED), "state is dict", "AdamQState"),
    (lambda: stquant.to_portable(STATE, OTHER, FIXED), "params need 2", "the tree"),
    (jax.jit(lambda: stquant.to_portable(TX.init(PARAMS), PARAMS, FIXED)), "traced", "outside"),
    (jax.jit(lambda: restored(count=jnp.int32(1) + 0)()), "portable is traced", "outside"),
    (lambda: stquant.from_portable(STATE, PARAMS), "portable is", "what to_portable returned"),
    (lambda: stquant.from_portable((PORTABLE,) * 2, PARAMS), "not 2", "one of it"),
    (lambda: stquant.from_portable(PORTABLE, PARAMS, Fixed(4, 4)), "takes 9 rows", "has 8"),
    (lambda: stquant.from_portable(PORTABLE, OTHER, FIXED), "'bias'", "nothing of that name"),
    (restored(stquant_version="x"), "version x", "expected 1"),
    (restored(stquant_version=None), "portable is of version None", "expected 1"),
    (restored(plan=None), "portable['plan']['shrinkage'] is missing", "expected float32[2]"),
    (restored(leaves={}), "['leaves']['bias']['checksum'] is missing", "expected uint32[]"),
    (restored(**STATE_SHAPES._asdict()), "ShapeDtypeStructs", "expected arrays"),
    # shardings
    (lambda: quantized(sharding=MESH), "sharding=Mesh", "stquant.Sharding"),
    (lambda: quantized(sharding=P()), "sharding=P", "stquant.Sharding"),
    (lambda: Sharding(P(), MESH), "mesh=P", "jax.sharding.Mesh"),
    (lambda: Sharding(None, P()), "mesh=None", "jax.sharding.Mesh"),
    (lambda: Sharding(MESH, "a"), "has str at '(root)'", "a PartitionSpec"),
    (lambda: Sharding(MESH, P(5)), "P(5,) at '(root)'", "axes of the mesh"),
    (lambda: Sharding(MESH, P(P.UNCONSTRAINED)), "UNCONSTRAINED", "axes of the mesh"),
    (lambda: Sharding(MESH, P("a", "a")), "P('a', 'a')", "each once at most"),
    (lambda: Sharding(MESH, {"w": P("c")}), "P('c',) at 'w'", "('a', 'b')"),
    (lambda: Sharding(MESH, P("a"), 5), "zero_axis=5", "axes of the mesh"),
    (lambda: Sharding(MESH, P("a"), ("b", "b")), "zero_axis=('b', 'b')", "each once at most"),
    (plan({"tile": P("a")}), "nothing for leaf 'bias'", "expected a PartitionSpec"),
    (plan(P(None, "a")), "for leaf 'bias' of 1 axes", "no more entries"),
    (plan(P(("a", "b")), mesh=jax.make_mesh((3, 1), ("a", "b"))), "'bias'", "a divisor of 40"),
    (lambda: stquant.state_shardings(STATE, PARAMS, FIXED, sharding=P()), "=P", "Sharding"),
    (lambda: stquant.state_shardings(PARAMS, PARAMS), "state is dict", "ScaleByAdamQState"),
    # quantize_state
    (lambda: quantize(optax.lion), "tx=<function lion", "optax.GradientTransformation"),
    (lambda: quantize(LION, 8.0), "precision=8.0", "stquant.Budget(5.0)"),
    (lambda: quantize(LION, storage="xla"), "storage='xla'", "stquant.Storage"),
    (lambda: quantize(LION, storage=Storage(backend="pallas_tpu")), "pallas_tpu", "'xla' or None"),
    (lambda: quantize(LION, sharding=MESH), "sharding=Mesh", "stquant.Sharding"),
    (lambda: quantize(LION, unsigned=None), "unsigned=None", "regular expression"),
    (lambda: quantize(LION, unsigned=b"nu"), "unsigned=b'nu'", "regular expression"),
    (lambda: quantize(LION, leafwise=1), "leafwise=1", "True or False"),
    (lambda: quantize(LION, Budget(0.5)).init(PARAMS), "bits=0.5", "smallest budget"),
    (lambda: quantize(LION, Fixed(pins={"x": 3})).init(PARAMS), "pins['x']", "'0.mu.tile'"),
    (lambda: QUANTIZED.init({"w": 1.0}), "leaf 'w' is float", "expected an array"),
    (lambda: QUANTIZED.update(PARAMS, STATE), "ScaleByAdamQState", "the QuantizedState"),
    (lambda: QUANTIZED.update(PARAMS, OPTAX), "ScaleByAdamState", "the QuantizedState"),
    (lambda: QUANTIZED.update(OTHER, HELD), "state.inner is another tree", "['kernel']"),
    (lambda: QUANTIZED.update(SHAPES, HELD), "updates has ShapeDtypeStructs", "arrays"),
    (lambda: QUANTIZED.update(PARAMS, HELD._replace(steps=None)), "state.steps", "int32[]"),
    (lambda: QUANTIZED.update(PARAMS, HELD._replace(steps=1.5)), "state.steps", "int32[]"),
    (lambda: QUANTIZED.update(PARAMS, cast(HELD, jnp.bfloat16)), "arena is bfloat16[", "uint32"),
    (lambda: stquant.report(HELD, PARAMS), "state is QuantizedState", "ScaleByAdamQState"),
    (lambda: stquant.lion(1e-3, precision=5.0), "precision=5.0", "stquant.Budget(5.0)"),
    # SOLO
    (lambda: stquant.scale_by_solo(sharding=MESH), "sharding=Mesh", "stquant.Sharding"),
    (lambda: SOLO.init({"w": 1.0}), "leaf 'w' is float", "expected an array"),
    (lambda: SOLO.update(PARAMS, STATE), "ScaleByAdamQState", "ScaleBySoloState"),
]


@pytest.mark.parametrize(
    ("call", "got", "accepted"), MISUSE, ids=[f"{i} {x[1]}" for i, x in enumerate(MISUSE)]
)
def test_misuse(call, got, accepted):
    with pytest.raises(ValueError) as error:
        call()
    assert got in str(error.value), error.value
    assert accepted in str(error.value), error.value


# --- no errors ---


def test_state_of_numpy():
    """As a checkpointer may restore it, outside of jit too."""
    state = jax.device_get(STATE)
    want, got = (TX.update(PARAMS, x) for x in (STATE, state))
    jax.tree.map(np.testing.assert_array_equal, got, want)


DTYPES = [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float16, jnp.bfloat16, jnp.float32]


@pytest.mark.thorough
def test_leaves():
    """Of any real floating dtype, scalars, empty ones, None: updates are like them, and finite."""
    tile = common.gaussian({"tile": (128, 32)}, spread=0.1)["tile"] * 1e3
    grads = {dtype.__name__: jnp.asarray(tile, dtype) for dtype in DTYPES}
    grads |= {"scalar": jnp.float32(2), "numpy": np.float32(3), "empty": jnp.zeros((0, 5))}
    updates, _ = TX.update(grads | {"none": None}, TX.init(grads | {"none": None}))
    assert updates.pop("none") is None
    for name, u in updates.items():
        assert (u.shape, u.dtype) == (grads[name].shape, grads[name].dtype)
        # The first step of Adam is a sign, up to what is lost by codes and dtypes.
        g, u = (np.asarray(x, np.float32) for x in (grads[name], u))
        assert np.all(np.abs(u) < 2) and np.all(u * g >= 0)
    fused = stquant.adam(1e-3, precision=FIXED)
    params, _ = stquant.fused_update(fused, grads, fused.init(grads), grads)
    assert all(params[name].dtype == g.dtype for name, g in grads.items())


@pytest.mark.parametrize("precision", [Budget(), STQuant(), FIXED], ids=lambda x: type(x).__name__)
def test_no_leaves(precision):
    tx = quantized(precision=precision)
    updates, state = tx.update({}, tx.init({}))
    assert updates == {} and int(state.count) == 1


def test_negative_zero():
    grads = jax.tree.map(lambda x: -jnp.zeros_like(x), PARAMS)
    updates, state = TX.update(grads, STATE)
    assert not any(np.any(u) for u in updates.values())
    assert not np.any(state.mu_scale) and not np.any(state.nu_scale)


@pytest.mark.thorough
def test_last_count():
    """It stays there, and updates go on."""
    grads, state = common.gaussian(), common.init(common.zeros())
    _, state = common.update(grads, state)
    state = state._replace(count=jnp.int32(2**31 - 1))
    for _ in range(2):
        updates, state = common.update(grads, state, nesterov=False)
        assert int(state.count) == 2**31 - 1
        assert all(np.all(np.isfinite(u)) for u in updates.values())


@pytest.mark.parametrize("mask", [None, {"bias": False, "tile": False}], ids=["decays", "masked"])
def test_infinite_parameters(mask):
    """They stay infinite where they do not decay, applied by `fused_update` or by Optax; where they
    do, infinity less infinity is not a number."""
    params = jax.tree.map(lambda x: x.at[..., :2].set(jnp.inf).at[..., 1].mul(-1), PARAMS)
    grads = jax.tree.map(jnp.ones_like, params)
    tx = stquant.adamw(1e-3, weight_decay=0.1, mask=mask, precision=FIXED)
    got, _ = stquant.fused_update(tx, grads, tx.init(params), params)
    want = optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])
    for name, x in got.items():
        np.testing.assert_allclose(x, want[name], 1e-6)
        if mask:
            np.testing.assert_array_equal(x[..., :2], params[name][..., :2])


def test_rates():
    """What is not finite shows: nothing is put in its place."""
    tx = stquant.adam(float("nan"), precision=FIXED)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS))
    assert all(np.all(np.isnan(u)) for u in updates.values())
    assert np.all(np.isfinite(state[0].exact))


def test_names_are_not_stored():
    """A state goes with any tree of the same leaves in the same order; a portable one has paths."""
    leaves = [PARAMS["bias"], PARAMS["tile"]]
    updates, _ = TX.update(leaves, STATE)
    assert [x.shape for x in updates] == [x.shape for x in leaves]
    with pytest.raises(ValueError, match=r"\['0'\]\['checksum'\] is missing"):
        stquant.from_portable(PORTABLE, leaves, FIXED)
