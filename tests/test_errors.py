"""Every message names the argument, the value it got, and what is accepted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stquant_jax as stquant
from stquant_jax import Budget, Fixed, Storage, scale_by_adam_q
from stquant_jax.conversion.resize import resize
from stquant_jax.inspection.metrics import metrics
from tests import common

TX = scale_by_adam_q(precision=Fixed(5, 4))
PARAMS = common.zeros({"tile": (128, 32), "bias": (40,)})


def from_optax(*options):
    return stquant.from_optax(optax.scale_by_adam().init(PARAMS), PARAMS, *options)


# What is called, and what its message must hold.
ARGUMENTS = [
    (lambda: Fixed(mu=1), "mu=1", "from 2 to 8"),
    (lambda: Fixed(mu=9), "mu=9", "from 2 to 8"),
    (lambda: Fixed(mu=4.5), "mu=4.5", "integer"),
    (lambda: Fixed(mu=True), "mu=True", "integer"),
    (lambda: Fixed(nu=-1), "nu=-1", "from 0 to 8"),
    (lambda: Fixed(nu=9), "nu=9", "from 0 to 8"),
    (lambda: Fixed(window=5), "window=5", "1, 2, 3, 4, 6, 8"),
    (lambda: Budget(0), "bits=0", "above 0"),
    (lambda: Budget(-1.0), "bits=-1.0", "above 0"),
    (lambda: Budget(33), "bits=33", "at most 32"),
    (lambda: Budget(float("nan")), "bits=nan", "above 0"),
    (lambda: Budget("5"), "bits='5'", "number"),
    (lambda: Budget(interval=0), "interval=0", "at least 1, or None"),
    (lambda: Budget(interval=2.5), "interval=2.5", "number of steps"),
    (lambda: Budget(warmup=-1), "warmup=-1", "0 or more"),
    (lambda: Budget(hysteresis=1.0), "hysteresis=1.0", "from 0 to below 1"),
    (lambda: Budget(hysteresis=-0.1), "hysteresis=-0.1", "from 0 to below 1"),
    (lambda: Budget(max_distortion=0), "max_distortion=0", "above 0"),
    (lambda: Budget(max_distortion="low"), "max_distortion='low'", "None or a number"),
    (lambda: Storage(min_size=-1), "min_size=-1", "at least 0"),
    (lambda: Storage(min_size=0.5), "min_size=0.5", "integer"),
    (lambda: Storage(row_alignment=0), "row_alignment=0", "at least 1"),
    (lambda: Storage(seed=-1), "seed=-1", "at least 0"),
    (lambda: Storage(seed=2**32), f"seed={2**32}", "below 2**32"),
    (lambda: Storage(backend="cuda"), "backend='cuda'", "'xla'"),
    (lambda: scale_by_adam_q(b1=1.0), "b1=1.0", "0 <= b1 < 1"),
    (lambda: scale_by_adam_q(b1=-0.1), "b1=-0.1", "0 <= b1 < 1"),
    (lambda: scale_by_adam_q(b2=1), "b2=1", "0 <= b2 < 1"),
    (lambda: scale_by_adam_q(b2=1 - 1e-9), "b2=0.999999999", "float32"),
    (lambda: scale_by_adam_q(eps=-1e-8), "eps=-1e-08", "at least 0"),
    (lambda: scale_by_adam_q(eps=np.inf), "eps=inf", "finite"),
    (lambda: scale_by_adam_q(eps_root=np.nan), "eps_root=nan", "finite"),
    (lambda: scale_by_adam_q(b1=0.999, b2=0.99), "b1=0.999 with b2=0.99", "b1**2 < b2"),
    (lambda: scale_by_adam_q(b1=0.0, b2=0.999999), "b2=0.999999", "at most 256"),
    (lambda: scale_by_adam_q(b1=jnp.bfloat16(0.9)), "b1 arrived as bfloat16", "float32"),
    (lambda: scale_by_adam_q(b2=np.float16(0.999)), "b2 arrived as float16", "float32"),
    (lambda: scale_by_adam_q(b1=jnp.ones(2)), "b1 has shape (2,)", "scalar"),
    (lambda: scale_by_adam_q(precision=5.0), "precision=5.0", "stquant.Budget"),
    (lambda: scale_by_adam_q(storage="xla"), "storage='xla'", "stquant.Storage"),
    (
        lambda: scale_by_adam_q(storage=Storage(backend="pallas_tpu", row_alignment=4)),
        "row_alignment=4",
        "multiple of 8",
    ),
    (lambda: Storage(interpret=True), "interpret=True", "'pallas_tpu' or 'pallas_gpu'"),
    (lambda: Storage(backend="pallas_tpu", interpret="yes"), "interpret='yes'", "True"),
    (lambda: stquant.adamw(1e-3, b1=2.0), "b1=2.0", "0 <= b1 < 1"),
    (lambda: stquant.plan(PARAMS, precision=4), "precision=4", "stquant.Fixed"),
    (lambda: stquant.plan(PARAMS, Budget(0.5)), "bits=0.5", "smallest budget that fits"),
    (lambda: from_optax(5.0), "precision=5.0", "stquant.Fixed"),
    (lambda: from_optax(Fixed(5, 4), "xla"), "storage='xla'", "stquant.Storage"),
    (lambda: from_optax(Budget(0.5)), "bits=0.5", "smallest budget that fits"),
]


@pytest.mark.parametrize(("call", "got", "accepted"), ARGUMENTS, ids=[x[1] for x in ARGUMENTS])
def test_arguments(call, got, accepted):
    with pytest.raises(ValueError) as error:
        call()
    assert got in str(error.value)
    assert accepted in str(error.value)


@pytest.mark.parametrize(
    ("leaf", "got"),
    [
        (jnp.zeros((64, 64), jnp.int32), "dtype int32"),
        (jnp.zeros((64, 64), jnp.complex64), "dtype complex64"),
        (jnp.zeros(3, bool), "dtype bool"),
        (0.5, "is float"),
        ("text", "is str"),
    ],
)
@pytest.mark.parametrize("call", [TX.init, stquant.plan], ids=["init", "plan"])
def test_leaves(call, leaf, got):
    """The path says which one."""
    with pytest.raises(ValueError) as error:
        call({"layer": [jnp.zeros(4), leaf]})
    assert "'layer.1'" in str(error.value)
    assert got in str(error.value)
    assert "expected" in str(error.value)


@pytest.mark.parametrize(
    "other",
    [
        {"tile": (128, 64), "bias": (40,)},
        {"tile": (128, 32), "bias": (41,)},
        {"tile": (128, 32)},
        {"tile": (128, 32), "bias": (40,), "more": (64, 64)},
    ],
    ids=str,
)
def test_gradients_of_another_model(other):
    with pytest.raises(ValueError, match="expected gradients of the tree and shapes given to init"):
        TX.update(common.zeros(other), TX.init(PARAMS))


@pytest.mark.parametrize("storage", [Storage(row_alignment=8), Storage(min_size=0)])
def test_state_of_another_storage(storage):
    state = TX.init(PARAMS)
    with pytest.raises(ValueError, match="the same storage"):
        scale_by_adam_q(precision=Fixed(5, 4), storage=storage).update(PARAMS, state)
    with pytest.raises(ValueError, match="the same storage"):
        stquant.report(state, PARAMS, Fixed(5, 4), storage)
    with pytest.raises(ValueError, match="the same storage"):
        stquant.to_optax(state, PARAMS, Fixed(5, 4), storage)
    with pytest.raises(ValueError, match="the same storage"):
        resize(state, PARAMS, Fixed(6, 4), storage)


@pytest.mark.parametrize("precision", [Budget(7.0), stquant.STQuant(6.5)], ids=str)
def test_state_of_another_budget(precision):
    """Its rows are not for this policy to move bits in: said, also under jit."""
    tx, state = scale_by_adam_q(precision=precision), TX.init(PARAMS)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=r"arena has 9 rows, .*: expected .*stquant\.resize"):
            update(PARAMS, state)


def test_other_exact_pins():
    """Leaves that are exact to the one and not to the other: said, wherever they are read."""
    state, pinned = TX.init(PARAMS), Fixed(5, 4, pins={"tile": "exact"})
    for call in (stquant.report, stquant.to_optax, resize):
        with pytest.raises(ValueError, match="the same pins to 'exact'"):
            call(state, PARAMS, pinned)


READERS = {
    "report": lambda state: stquant.report(state, PARAMS),
    "to_optax": lambda state: stquant.to_optax(state, PARAMS),
    "metrics": metrics,
    "resize": lambda state: resize(state, PARAMS, Fixed(5, 4)),
}


def test_update_of_another_kind():
    for state in (optax.scale_by_adam().init(PARAMS), optax.chain(TX).init(PARAMS)):
        with pytest.raises(ValueError, match=f"state is {type(state).__name__}: expected"):
            TX.update(PARAMS, state)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_state_of_another_kind(read):
    """One state must be in what is given: not none, not two."""
    state = optax.scale_by_adam().init(PARAMS)
    with pytest.raises(ValueError, match="state is ScaleByAdamState: expected .* not none"):
        read(state)
    with pytest.raises(ValueError, match="state is tuple: expected .* not 2"):
        read(optax.chain(TX, optax.scale(2.0), TX).init(PARAMS))


@pytest.mark.parametrize("read", [READERS["report"], READERS["resize"]], ids=["report", "resize"])
def test_traced_state(read):
    with pytest.raises(ValueError, match="state is traced: .* outside jit"):
        jax.jit(read)(TX.init(PARAMS))


GOOD = optax.scale_by_adam().init(PARAMS)


def changed(**moments):
    return GOOD._replace(**{k: getattr(GOOD, k) | v for k, v in moments.items()})


MOMENTS = [
    (optax.sgd(0.1).init(PARAMS), ("state is tuple", "optax.ScaleByAdamState", "not none")),
    ((GOOD, GOOD), ("state is tuple", "one of it", "not 2")),
    (TX.init(PARAMS), ("ScaleByAdamQState", "not none")),
    (changed(mu={"more": jnp.zeros(3)}), ("state.mu", "['more']", "expected the tree")),
    (GOOD._replace(nu={"bias": jnp.zeros(40)}), ("state.nu", "['tile']", "expected the tree")),
    (GOOD._replace(mu=tuple(GOOD.mu.values())), ("state.mu", "expected the tree")),
    (changed(mu={"bias": jnp.zeros(41)}), ("mu['bias']", "(41,)", "expected (40,)")),
    (changed(nu={"tile": jnp.zeros((32, 128))}), ("nu['tile']", "(32, 128)", "(128, 32)")),
    (changed(mu={"bias": jnp.zeros(40, int)}), ("mu['bias']", "int32", "real floating")),
    (changed(nu={"bias": jnp.zeros(40, complex)}), ("nu['bias']", "complex64", "real floating")),
    (changed(nu={"tile": GOOD.nu["tile"].at[3, 3].set(-1)}), ("nu['tile']", "negative")),
]


@pytest.mark.parametrize(("state", "parts"), MOMENTS, ids=[" ".join(x[1]) for x in MOMENTS])
def test_moments_of_optax(state, parts):
    with pytest.raises(ValueError) as error:
        stquant.from_optax(state, PARAMS, Fixed(5, 4))
    assert all(part in str(error.value) for part in parts), error.value


def test_traced_moments():
    with pytest.raises(ValueError, match="state is traced: .* call from_optax outside jit"):
        jax.jit(lambda state: stquant.from_optax(state, PARAMS))(GOOD)


@pytest.mark.parametrize("read", [stquant.from_optax, stquant.report, stquant.to_optax, resize])
def test_storage_in_the_place_of_a_policy(read):
    with pytest.raises(ValueError, match=r"precision=Storage\(.*: expected a policy"):
        read(TX.init(PARAMS), PARAMS, Storage())


def test_low_precision_hyperparameters():
    """`inject_hyperparams` casts to the parameters' dtype, where 0.999 is 1: said, not done."""
    params = common.zeros({"w": (64, 64)}, jnp.bfloat16)
    tx = optax.inject_hyperparams(stquant.adamw)(1e-3, precision=Fixed(5, 4))
    with pytest.raises(ValueError, match="hyperparam_dtype=jnp.float32"):
        tx.update(params, tx.init(params), params)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this JAX has what the kernels need")
def test_gpu_kernels_need_a_newer_jax():
    with pytest.raises(ValueError, match="pallas_gpu.*cannot run.*jax 0.11.*'xla'"):
        scale_by_adam_q(storage=Storage(backend="pallas_gpu"))
