"""A leaf has one name, as people write it, however its tree spells the keys; and the state of a
tree is that of any other with the same arrays."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import flax.struct
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import stquant_jax as stquant
from tests.conformance.network import jitted

# Flax warns who looks into its boxes.
pytestmark = pytest.mark.filterwarnings("error::DeprecationWarning:stquant_jax")

WIDTH = 64
# Two layers, whose kernels are quantized: in every tree the same arrays, in this order.
SHAPES = {"bias": (WIDTH,), "kernel": (WIDTH, WIDTH)}


@cache
def layers():
    random = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    return [{name: draw(shape) for name, shape in SHAPES.items()} for _ in range(2)]


def model_of(layer):
    return {"layers": [layer(**arrays) for arrays in layers()]}


class NnxModel(nnx.Module):
    def __init__(self):
        self.layers = nnx.List(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)) for _ in layers())
        nnx.update(self, {"layers": dict(enumerate(layers()))})


def nnx_state():
    return nnx.state(NnxModel(), nnx.Param)


class LinenModel(nn.Module):
    boxed: bool

    @nn.compact
    def __call__(self, x):
        for i, arrays in enumerate(layers()):
            made = {}
            for name, value in arrays.items():
                init = lambda *_, value=value: value  # noqa: E731
                made[name] = (
                    nn.with_partitioning(init, (None,) * value.ndim) if self.boxed else init
                )
            dense = nn.Dense(
                WIDTH, kernel_init=made["kernel"], bias_init=made["bias"], name=f"layers_{i}"
            )
            x = dense(x)
        return x


def linen_params(boxed):
    return LinenModel(boxed).init(jax.random.key(0), jnp.ones((1, WIDTH)))["params"]


@hk.transform
def haiku_model(x):
    for i, arrays in enumerate(layers()):
        w, b = (hk.initializers.Constant(arrays[name]) for name in ("kernel", "bias"))
        x = hk.Linear(WIDTH, w_init=w, b_init=b, name=f"layers_{i}")(x)
    return x


class EquinoxLayer(eqx.Module):
    bias: Any
    kernel: Any


class EquinoxModel(eqx.Module):
    layers: list


@flax.struct.dataclass
class FlaxLayer:
    bias: Any
    kernel: Any


@jax.tree_util.register_dataclass
@dataclass
class DataLayer:
    bias: Any
    kernel: Any


@chex.dataclass
class ChexLayer:
    bias: Any
    kernel: Any


class TupleLayer(NamedTuple):
    bias: Any
    kernel: Any


class Row(NamedTuple):
    """A tree, as `init` is given it.

    Attributes:
      make: of no arguments.
      name: of a layer's leaf, by layer and array.
      arrays: what arrays are called.
      pure: what trees, of a state too, are by the time of `update`.
    """

    make: Callable[[], Any]
    name: str = "layers.{}.{}"
    arrays: tuple[str, str] = ("bias", "kernel")
    pure: Callable[[Any], Any] = lambda tree: tree

    @property
    def names(self) -> list[str]:
        return [self.name.format(i, array) for i in range(len(layers())) for array in self.arrays]


ROWS = {
    "dict": Row(lambda: model_of(dict)),
    "FrozenDict": Row(lambda: FrozenDict(model_of(dict))),
    "dict of integers": Row(lambda: {"layers": dict(enumerate(layers()))}),
    "dict of paths": Row(lambda: {("layers", str(i)): x for i, x in enumerate(layers())}),
    "nnx": Row(nnx_state, pure=nnx.as_pure),
    "nnx, boxed": Row(nnx_state),
    "nnx, pure": Row(lambda: nnx.as_pure(nnx_state())),
    "nnx, dict": Row(lambda: nnx.to_pure_dict(nnx_state())),
    "nnx, model": Row(lambda: nnx.split(NnxModel())[1]),
    "Linen": Row(lambda: linen_params(boxed=False), "layers_{}.{}"),
    "Linen, boxed": Row(lambda: linen_params(boxed=True), "layers_{}.{}"),
    "Haiku": Row(
        lambda: haiku_model.init(jax.random.key(0), jnp.ones((1, WIDTH))),
        "layers_{}.{}",
        ("b", "w"),
    ),
    "Equinox": Row(lambda: EquinoxModel(**model_of(EquinoxLayer))),
    "flax.struct": Row(lambda: model_of(FlaxLayer)),
    "dataclass": Row(lambda: model_of(DataLayer)),
    "chex.dataclass": Row(lambda: model_of(ChexLayer)),
    "NamedTuple": Row(lambda: model_of(TupleLayer)),
}


@pytest.fixture(params=ROWS.values(), ids=ROWS)
def row(request):
    return request.param


def paths(tree):
    return [leaf.path for leaf in stquant.plan(tree, stquant.Fixed()).leaves]


def test_plan(row):
    assert paths(row.make()) == paths(row.pure(row.make())) == row.names


def pins_of(row, before):
    """One kernel by its whole name, the others by the end of theirs."""
    return {f"{before}{re.escape(row.names[1])}$": (8, 8), f"{row.arrays[1]}$": (3, 2)}


def test_pins(row):
    """What matches at init matches at update, and wherever a state is told of."""
    precision = stquant.Fixed(pins=pins_of(row, "^"))
    tree, pure = row.make(), row.pure(row.make())
    tx = stquant.scale_by_adam_q(precision=precision)
    state = row.pure(tx.init(tree))
    _, new = jax.eval_shape(tx.update, pure, state, pure)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for told in (stquant.plan(tree, precision), stquant.report(state, pure, precision)):
        widths = {leaf.path: (leaf.mu_width, leaf.nu_width) for leaf in told.leaves}
        assert widths == dict(zip(row.names, [(32, 32), (8, 8), (32, 32), (3, 2)], strict=True))
    numbers = stquant.metrics(state, pure, precision)
    assert [numbers[f"widths/{row.names[k]}/mu"] for k in (1, 3)] == [8, 3]
    assert list(stquant.to_portable(state, pure, precision)["leaves"]) == row.names


def test_pins_of_other_states(row):
    """Their paths are those of the state, which end likewise."""
    tx = stquant.lion(1e-3, precision=stquant.Fixed(pins=pins_of(row, "mu.")))
    tree, pure = row.make(), row.pure(row.make())
    state = row.pure(tx.init(tree))
    jax.eval_shape(tx.update, pure, state, pure)
    numbers = stquant.metrics(state, pure)
    assert [numbers[f"widths/{row.names[k]}/mu"] for k in (1, 3)] == [8, 3]


def adam():
    return jitted(stquant.adam(1e-3, precision=stquant.Fixed(8, 8)))


def lion():
    return jitted(stquant.lion(1e-3))


@cache
def stepped(make, row):
    """All arrays after a step: updates and state."""
    tx, tree = make(), row.make()
    state, pure = row.pure(tx.init(tree)), row.pure(tree)
    return jax.tree.leaves(tx.update(pure, state, pure))


@pytest.mark.parametrize("make", [adam, lion])
def test_arrays(row, make):
    """They do not depend on what leaves are called."""
    chex.assert_trees_all_equal(stepped(make, row), stepped(make, ROWS["dict"]))


class Attention(eqx.Module):
    query: Any
    value: Any


class Gate(nnx.Module):
    def __init__(self, x):
        self.value = nnx.Param(x)


WORDS = {
    "leaf": (lambda x: {"query": x, "value": x}, ["query", "value"]),
    "alone": (lambda x: {"value": x}, ["value"]),
    "branch": (lambda x: {"value": {"kernel": x}}, ["value.kernel"]),
    "attributes": (lambda x: {"a": Attention(x, x)}, ["a.query", "a.value"]),
    "variable": (lambda x: {"a": nnx.state(Gate(x))}, ["a.value"]),
    "brackets": (lambda x: [{"a": (x, [x])}], ["0.a.0", "0.a.1.0"]),
    "root": (lambda x: x, ["(root)"]),
    "root, boxed": (lambda x: nnx.Param(x), ["(root)"]),
}


@pytest.mark.parametrize(("make", "names"), WORDS.values(), ids=WORDS)
def test_words(make, names):
    """A box has no name, but what is called as a box's attribute has."""
    assert paths(make(jnp.ones((WIDTH, WIDTH)))) == names
