"""`quantize_state` and the aliases made of it."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

import stquant_jax as stquant
from stquant_jax import Budget, Fixed, Storage
from tests import common

SHAPES = {name: common.SHAPES[name] for name in ("bias", "ragged", "tile")}
PARAMS = common.zeros(SHAPES)
GRADS = [common.gaussian(SHAPES, seed, spread=0.3) for seed in range(4)]


def run(tx, steps=4, params=PARAMS, grads=GRADS):
    """Updates of all steps, and the last state."""
    state, updates = tx.init(params), []
    step = jax.jit(tx.update)
    for i in range(steps):
        update, state = step(grads[i % len(grads)], state, params)
        updates.append(update)
    return updates, state


def off(got, want):
    """Squared error of updates over their energy."""
    pairs = list(zip(*(map(np.asarray, jax.tree.leaves(x)) for x in (got, want)), strict=True))
    return sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)


def adafactor(learning_rate):
    """With leaves small enough to be factored, some of them."""
    return optax.adafactor(learning_rate, momentum=0.9, min_dim_size_to_factor=64)


WRAPPED = {
    "adabelief": (optax.adabelief, 2e-3),
    "adafactor": (adafactor, 5e-3),
    "ademamix": (contrib.ademamix, 2e-3),
    "amsgrad": (optax.amsgrad, 2e-3),
    "lion": (optax.lion, 3e-3),  # signs of what is next to zero
    "muon": (contrib.muon, 1e-4),
    "rmsprop": (partial(optax.rmsprop, momentum=0.9), 1e-3),
    "sgd": (partial(optax.sgd, momentum=0.9, nesterov=True), 1e-4),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.thorough
def test_wrapped_optimizers(name):
    """Updates near Optax's, at 8 bits; the same one parameter at a time."""
    make, bound = WRAPPED[name]
    exact, _ = run(make(1e-3))
    whole, state = run(stquant.quantize_state(make(1e-3), Fixed(8, 8)))
    assert off(whole, exact) < bound
    alone, other = run(stquant.quantize_state(make(1e-3), Fixed(8, 8), leafwise=True))
    chex.assert_trees_all_equal(state.store, other.store)
    assert off(alone[-1], whole[-1]) < 1e-10
    # What is exact is Optax's to the rounding of its program.
    chex.assert_trees_all_close(whole[-1]["bias"], exact[-1]["bias"], rtol=1e-5, atol=1e-9)


def test_aliases_are_quantize_state():
    """Bit for bit, options and all."""
    options = {"b1": 0.8, "weight_decay": 0.1}
    want, state = run(
        stquant.quantize_state(optax.lion(1e-3, **options), Fixed(4, 4), leafwise=True)
    )
    got, other = run(stquant.lion(1e-3, 0.8, weight_decay=0.1, precision=Fixed(4, 4)))
    chex.assert_trees_all_equal((got, state), (want, other))


@pytest.mark.parametrize("width", (0, 3, 8))
@pytest.mark.parametrize("shape", ((128, 32), (300, 257)), ids=str)
def test_nu_is_stored_as_scale_by_adam_q_stores_it(shape, width):
    """The same codec, the same noise, Optax's sums in Optax's order: the same bits, but where a
    compiler rounds a product in the one program and not in the other."""
    shapes, steps, b2 = {"kernel": shape}, 40, 0.99
    grads = [common.gaussian(shapes, seed) for seed in range(steps)]
    rms = stquant.quantize_state(optax.scale_by_rms(b2), Fixed(8, width))
    adam = stquant.scale_by_adam_q(b1=0.0, b2=b2, precision=Fixed(8, width))
    _, ours = run(rms, steps, common.zeros(shapes), grads)
    _, fused = run(adam, steps, common.zeros(shapes), grads)
    tiles = fused.mu_scale.shape[0]
    nu = fused.arena[8 * tiles : (8 + width) * tiles]
    store = ours.store
    pairs = (store.scale, fused.nu_scale), (store.row, fused.nu_row)
    for x, y in (*pairs, (store.arena[: width * tiles], nu)):
        assert np.sum(np.asarray(x) != np.asarray(y)) <= 2e-3 * x.size


@pytest.mark.thorough
def test_adam_as_a_wrapper_is_as_near_as_the_fused_one():
    """mu is measured by its own group here, by nu there: at 8 bits their errors are alike, most of
    which is nu's, whose codec is the same."""
    exact, _ = run(optax.scale_by_adam())
    wrapped, _ = run(stquant.quantize_state(optax.scale_by_adam(), Fixed(8, 8)))
    fused, _ = run(stquant.scale_by_adam_q(precision=Fixed(8, 8)))
    ours, theirs = off(wrapped, exact), off(fused, exact)
    assert theirs < 2e-3 and abs(ours / theirs - 1) < 0.1


@pytest.mark.parametrize("bits", (4.0, 6.0, 8.0))
def test_the_state_takes_the_bytes_it_promises(bits):
    storage = Storage(min_size=64)
    tx = stquant.ademamix(1e-3, precision=Budget(bits), storage=storage)
    state = tx.init(PARAMS)
    reference = common.nbytes(contrib.ademamix(1e-3).init(PARAMS))
    assert common.nbytes(state) <= bits / 32 * reference
    assert common.nbytes(state) > (bits - 1.2) / 32 * reference  # and makes use of them


def test_init_keeps_what_is_not_zero():
    tx = stquant.quantize_state(optax.adagrad(1e-3, initial_accumulator_value=0.1), Fixed(8, 8))
    flat = optax.adagrad(1e-3, initial_accumulator_value=0.1)
    got, _ = run(tx, 1)
    want, _ = run(flat, 1)
    assert off(got, want) < 1e-4


def test_init_of_zeros_computes_nothing():
    """Nor is anything of the size of the parameters ever there."""
    big = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    tx = stquant.adabelief(1e-3)
    memory = jax.jit(tx.init).lower(big).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**16
    shapes = jax.eval_shape(tx.init, big)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes.store, jax.eval_shape(tx.init, big).store)


def test_what_is_not_finite_stays_in_its_group():
    tx = stquant.adabelief(1e-3, precision=Fixed(8, 8))
    state = tx.init(PARAMS)
    grads = jax.tree.map(np.copy, GRADS[0])
    grads["tile"][5, 7] = np.nan
    updates, state = jax.jit(tx.update)(grads, state, PARAMS)
    updates, state = jax.jit(tx.update)(GRADS[1], state, PARAMS)
    bad = np.isnan(updates["tile"])
    assert bad[5, 7] and bad.sum() == 32
    assert not any(np.isnan(updates[name]).any() for name in updates if name != "tile")


def test_a_negative_second_moment_is_not_swallowed():
    """A moment that was taken for unsigned and is not."""
    tx = stquant.quantize_state(optax.trace(0.9), Fixed(8, 8), unsigned="trace")
    updates, state = run(tx, 1)
    updates, _ = jax.jit(tx.update)(GRADS[0], state, PARAMS)  # the program of the first
    assert np.isnan(updates["tile"]).any()


def test_same_bits_in_a_scan():
    tx = stquant.sgd(1e-2, momentum=0.9, precision=Fixed(5, 5))
    state = tx.init(PARAMS)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADS)

    def step(state, grads):
        updates, state = tx.update(grads, state)
        return state, updates

    last, _ = jax.jit(partial(jax.lax.scan, step))(state, stacked)
    for grads in GRADS:
        state, _ = jax.jit(step)(state, grads)
    chex.assert_trees_all_equal(last, state)


def test_leafwise_is_checked():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9))
    tx = stquant.quantize_state(clipped, leafwise=True, precision=Fixed(8, 8))
    with pytest.raises(ValueError, match="leafwise=True.*depends on"):
        tx.update(GRADS[0], tx.init(PARAMS))


def test_state_of_another_plan():
    """An error where it can be read, NaN where it is traced: never other numbers."""
    small = {"x": jnp.zeros((64, 64)), "y": jnp.zeros((64, 64))}
    one = stquant.quantize_state(optax.trace(0.9), Fixed(8, 8, pins={"x": 4, "y": 6}))
    two = stquant.quantize_state(optax.trace(0.9), Fixed(8, 8, pins={"x": 6, "y": 4}))
    _, state = one.update(jax.tree.map(jnp.ones_like, small), one.init(small))
    with pytest.raises(ValueError, match="fingerprint"):
        two.update(small, state)
    updates, _ = jax.jit(two.update)(small, state)
    assert np.isnan(updates["x"]).all() and np.isnan(updates["y"]).all()
    with pytest.raises(ValueError, match=r"state.arena is uint32\[\d+, 128\], but"):
        stquant.quantize_state(optax.trace(0.9), Fixed(8, 8)).update(small, state)


def test_pins_are_found_in_the_states_paths():
    tx = stquant.quantize_state(
        optax.adam(1e-3), Fixed(8, 8, pins={r"\.nu\..*tile": "exact", "ragged": (3, 0)})
    )
    inner = tx.init(PARAMS).inner[0]
    assert isinstance(inner.nu["tile"], jax.Array)
    assert isinstance(inner.mu["tile"], optax.MaskedNode)
    with pytest.raises(ValueError, match="matches no leaf"):
        stquant.quantize_state(optax.adam(1e-3), Fixed(pins={"nothing": 4})).init(PARAMS)


def test_peak_memory_of_one_parameter_at_a_time():
    """Temporaries grow with the largest parameter, not with their number."""
    params = {f"layer{i}": jnp.zeros((512, 512)) for i in range(4)}

    def temporaries(leafwise):
        tx = stquant.quantize_state(optax.trace(0.9), Fixed(8, 8), leafwise=leafwise)
        args = jax.eval_shape(lambda: (params, tx.init(params)))
        step = jax.jit(tx.update, donate_argnums=(0, 1)).lower(*args).compile()
        return step.memory_analysis().temp_size_in_bytes

    one, every = temporaries(True), temporaries(False)
    leaf = 4 * 512 * 512
    assert one < 2 * leaf < every


def test_refusals():
    with pytest.raises(ValueError, match="centered=True: expected False"):
        stquant.rmsprop(1e-3, centered=True)
    for leaf in (jnp.zeros((64, 64), jnp.complex64), jnp.zeros((64, 64), jnp.int32)):
        with pytest.raises(ValueError, match="leaf 'x' has dtype"):
            stquant.lion(1e-3).init({"x": leaf})


def test_on_a_mesh():
    """Moments lie where their parameters do, nothing travels, bits are those of one device."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    specs = {"wide": P("b", "a"), "bias": P("a")}
    grads = common.gaussian({"wide": (256, 512), "bias": (64,)}, spread=0.3)
    divided = {
        name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in grads.items()
    }
    options = {"momentum": 0.9, "precision": Fixed(5, 5)}
    alone, state = run(stquant.sgd(1e-2, **options), 3, grads, [grads])
    sharding = stquant.Sharding(mesh, specs)
    tx = stquant.sgd(1e-2, **options, sharding=sharding)
    there, divided_state = run(tx, 3, divided, [divided])
    chex.assert_trees_all_equal(jax.device_get(there), jax.device_get(alone))
    assert divided_state.store.arena.sharding.spec[0] == ("a", "b")
    assert divided_state.store.arena.shape == state.store.arena.shape
    text = jax.jit(tx.update).lower(divided, divided_state, divided).compile().as_text()
    assert not re.search("all-reduce|all-gather|all-to-all|reduce-scatter|permute", text)
    with pytest.raises(ValueError, match="zero_axis='a'"):
        stquant.sgd(1e-2, 0.9, sharding=stquant.Sharding(mesh, P(), "a"))
