"""What several tests share: one compiled update for all widths and decays, and its gradients."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import stquant_jax as stquant

# Every kind of leaf: exact, folded, tiled with a ragged last band (and a chunk and two tiles long),
# flat with a ragged end, tiled.
SHAPES = {
    "bias": (40,),
    "embed": (160, 64),
    "ragged": (60, 640),
    "stack": (3, 3, 40, 36),
    "tile": (128, 32),
}
TILE = {"tile": (128, 32)}
# For processes with an environment of their own: they compile as quickly as these tests do.
FLAGS = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
QUICK = {name: os.environ[name] for name in FLAGS if name in os.environ}


def zeros(shapes=SHAPES, dtype=jnp.float32):
    return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}


def gaussian(shapes=SHAPES, seed=0, spread=1.0, dtype=np.float32):
    """Gaussian gradients; log-normal scales along the first and last axis, alike for every seed."""
    random, fixed = np.random.default_rng(seed), np.random.default_rng(1)

    def draw(shape):
        ends = shape[:1], shape[-1:]
        rows, columns = (np.exp(spread * fixed.standard_normal(n)) for n in ends)
        rows = rows.reshape(*rows.shape, *(1,) * (len(shape) - 1))
        return (1e-3 * random.standard_normal(shape) * rows * columns).astype(dtype)

    return {name: draw(shape) for name, shape in shapes.items()}


def init(params, mu=5, nu=4, window=None):
    """A state of these widths in an arena with room for the widest: all share one program."""
    state = stquant.scale_by_adam_q(precision=stquant.Fixed(mu, nu, window)).init(params)
    widest = stquant.scale_by_adam_q(precision=stquant.Fixed(8, 8))
    return state._replace(arena=jnp.zeros_like(widest.init(params).arena))


def update(grads, state, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, *, nesterov=False):
    """One step, compiled once for a tree: widths are data in the state, decays are traced."""
    return _update(grads, state, np.float32([b1, b2, eps, eps_root]), nesterov)


@partial(jax.jit, static_argnums=3)
def _update(grads, state, hyper, nesterov):
    tx = stquant.scale_by_adam_q(*hyper, nesterov=nesterov, precision=stquant.Fixed(8, 8))
    return tx.update(grads, state)


decode = jax.jit(stquant.to_optax)


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))
