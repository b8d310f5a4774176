"""What `benchmarks.quality.training` trains with: Adam, its moments in every format, by name.

All are Optax transformations of gradients into Adam's direction, to be followed by weight decay and
by the learning rate. Reference formats of other libraries are those of `benchmarks.codec.formats`;
leaves of less than 4096 elements stay float32 in all formats but SOLO's own.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import stquant_jax as stquant
from benchmarks.codec import formats

INTERVAL = 50  # of decisions: runs are short
MIN_SIZE = 4096
PEERS = {item.name: item for item in formats.PEERS}
BY_BYTES = {5.0: (5, 4), 4.0: (5, 2), 3.5: (6, 0), 3.0: (5, 0), 2.5: (4, 0)}  # Fixed, all-in bits
SOLO = {(4, 2): 0.8, (2, 2): stquant.solo_momentum(2, reference_bits=5)}  # bits: b1, by its authors


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to keep Adam's state.

    Attributes:
      make: its transformation.
      bits: all-in bits per state element of leaves of these shapes, where the state does not tell.
    """

    make: Callable[[], optax.GradientTransformation]
    bits: Callable[[list[tuple[int, ...]]], float] | None = None

    def bits_of(self, state: Any, params: Any) -> float:
        shapes = [x.shape for x in jax.tree.leaves(params)]
        if self.bits:
            return self.bits(shapes)
        stored = sum(x.nbytes for x in jax.tree.leaves(state))
        return 8 * stored / (2 * sum(map(math.prod, shapes)))


# --- formats of others ---


class PeerState(NamedTuple):
    count: jax.Array
    leaves: tuple


def _stored(item: formats.Format, shape: tuple[int, ...]) -> formats.Format:
    return item if math.prod(shape) >= MIN_SIZE else PEERS["fp32"]


def peer(item: formats.Format) -> Contender:
    """A reference format, leaf by leaf."""

    def init(params):
        leaves = jax.tree.leaves(params)
        states = tuple(_stored(item, x.shape).init(x.shape) for x in leaves)
        return PeerState(jnp.int32(0), states)

    def update(grads, state, params=None):
        leaves, tree = jax.tree.flatten(grads)
        count = state.count + 1
        done = [
            _stored(item, g.shape).step(s, g, count.astype(jnp.float32))
            for g, s in zip(leaves, state.leaves, strict=True)
        ]
        updates, states = zip(*done, strict=True)
        return tree.unflatten(updates), PeerState(count, states)

    def bits(shapes):
        held = sum(math.prod(x) * _stored(item, x).bits(x) for x in shapes)
        return held / sum(map(math.prod, shapes))

    return Contender(lambda: optax.GradientTransformation(init, update), bits)


# --- errors of one kind, put into exact Adam ---


class NoisyState(NamedTuple):
    adam: Any
    noise: Any


def noisy(kind: str, error: float, b1: float = 0.9, b2: float = 0.999) -> Contender:
    """float32 Adam whose update has this error, sum |u' - u|^2 / sum |u|^2, as a codec makes it.

    Of m: what rounding adds at every step dies away with b1, on the scale of the leaf,
    u' = u + sqrt(error) rms(u) z. Of v: a factor of its own for each element, that lasts as long as
    v's memory, u' = u exp(s z - s^2 / 2), s^2 = log(1 + error). z is Gaussian, AR(1).
    """
    adam, decay = optax.scale_by_adam(b1, b2), {"m": b1, "v": b2}[kind]
    spread = math.sqrt(math.log1p(error))

    def init(params):
        key = jax.random.key(0)
        return NoisyState(adam.init(params), _normal(key, params))

    def update(grads, state, params=None):
        exact, adam_state = adam.update(grads, state.adam)
        fresh = _normal(jax.random.fold_in(jax.random.key(1), adam_state.count), grads)
        ar = lambda z, new: decay * z + math.sqrt(1 - decay**2) * new  # noqa: E731
        noise = jax.tree.map(ar, state.noise, fresh)
        if kind == "m":
            rms = lambda u: jnp.sqrt(jnp.mean(u**2))  # noqa: E731
            out = jax.tree.map(lambda u, z: u + math.sqrt(error) * rms(u) * z, exact, noise)
        else:
            out = jax.tree.map(lambda u, z: u * jnp.exp(spread * (z - spread / 2)), exact, noise)
        return out, NoisyState(adam_state, noise)

    return Contender(lambda: optax.GradientTransformation(init, update), lambda shapes: 32.0)


def _normal(key: jax.Array, tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


# --- moments that start anew ---


def refreshed(contender: Contender, every: int) -> Contender:
    """The moments are set to zero, and the count with them, every so many steps; the plan stays."""

    def make():
        tx = contender.make()

        def update(grads, state, params=None):
            again = (state.count > 0) & (state.count % every == 0)
            kept = {"precision": state.precision} if hasattr(state, "precision") else {}
            blank = jax.tree.map(jnp.zeros_like, state)._replace(**kept)
            state = jax.tree.map(lambda a, b: jnp.where(again, a, b), blank, state)
            return tx.update(grads, state, params)

        return optax.GradientTransformation(tx.init, update)

    return dataclasses.replace(contender, make=make)


# --- all of them ---


def exact(b1: float = 0.9) -> Contender:
    return Contender(functools.partial(optax.scale_by_adam, b1))


def stretched(factor: float) -> Contender:
    """float32 Adam whose every step is longer by this factor."""
    return Contender(lambda: optax.chain(optax.scale_by_adam(), optax.scale(factor)))


def ours(precision: stquant.Policy, b1: float = 0.9) -> Contender:
    return Contender(functools.partial(stquant.scale_by_adam_q, b1, precision=precision))


def budget(bits: float, b1: float = 0.9, interval: int | None = INTERVAL) -> Contender:
    return ours(stquant.Budget(bits, interval=interval), b1)


def fixed(mu: int, nu: int) -> Contender:
    return ours(stquant.Fixed(mu, nu))


def solo(bits: tuple[int, int]) -> Contender:
    return Contender(functools.partial(stquant.scale_by_solo, SOLO[bits], bits=bits))


BITS = tuple(BY_BYTES)

# The matrix: every one at every learning rate.
MATRIX: Mapping[str, Contender] = {
    "fp32": exact(),
    **{f"Budget {bits}": budget(bits) for bits in BITS},
    "FlashOptim 8-bit": peer(PEERS["FlashOptim 8-bit"]),
    "bitsandbytes 8-bit": peer(PEERS["bitsandbytes 8-bit"]),
    "torchao 4-bit": peer(PEERS["torchao 4-bit"]),
    **{"SOLO {}/{}".format(*bits): solo(bits) for bits in SOLO},
    "STQuant 5.0": ours(stquant.STQuant(bits=5.0, interval=INTERVAL)),
    **{f"Fixed {mu}/{nu}": fixed(mu, nu) for mu, nu in BY_BYTES.values()},
    # With the b1 of SOLO, which is better on two tasks whatever the format: to be compared with it.
    "fp32, b1 0.8": exact(0.8),
    **{f"Budget {bits}, b1 0.8": budget(bits, 0.8) for bits in (3.0, 2.25)},
}

# What other libraries' formats are held against, and float32 with another b1: ours of fewer bits,
# with as good a b1.
AGAINST = {
    "FlashOptim 8-bit": "Budget 5.0",
    "bitsandbytes 8-bit": "Budget 5.0",
    "torchao 4-bit": "Budget 4.0",
    "SOLO 4/2": "Budget 3.0, b1 0.8",
    "SOLO 2/2": "Budget 2.25, b1 0.8",
    "fp32, b1 0.8": "Budget 2.25, b1 0.8",
}

# Questions of design, each at the best learning rate of float32. Those of the matrix go with them.
# Those of `FINE`, yardsticks of all small differences, have as many seeds as these.
FINE = LENGTH, LITTLE = "a step's length", "little error, and next to none"
QUESTIONS: Mapping[str, Mapping[str, Contender]] = {
    "an error in m, or one in v": {
        f"{kind} off by {error}": noisy(kind, error) for error in (0.1, 0.3, 1.0) for kind in "mv"
    },
    "codes of nu, at equal bytes": {"Fixed 3/1": fixed(3, 1), "Fixed 2/2": fixed(2, 2)},
    "codes of nu, at equal mu": {
        "Fixed 4/1": fixed(4, 1), "Fixed 4/4": fixed(4, 4), "Fixed 4/8": fixed(4, 8)
    },
    "b1": {
        "fp32, b1 0.5": exact(0.5),
        **{f"Budget {bits}, b1 0.5": budget(bits, 0.5) for bits in (3.0, 2.5)},
    },
    "interval": {
        f"Budget 3.5, interval {interval}": budget(3.5, interval=interval)
        for interval in (10, 200, None)
    },
    "moments anew every 100 steps": {
        "fp32, anew": refreshed(exact(), 100),
        "Budget 3.0, anew": refreshed(budget(3.0), 100),
        "Budget 2.5, anew": refreshed(budget(2.5), 100),
    },
    LENGTH: {"fp32, 3% shorter": stretched(0.97), "fp32, 3% longer": stretched(1.03)},
    LITTLE: {"m off by 0.03": noisy("m", 0.03), "Fixed 8/8": fixed(8, 8)},
    "where it breaks": {"Budget 2.0": budget(2.0), "Fixed 2/0": fixed(2, 0)},
}  # fmt: skip
