"""What hundreds and thousands of steps make of the moments: everything fed back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stquant_jax as stquant
from tests import common

SHAPE = (128, 32)  # one tile, its groups along the rows of the leaf
CHUNK = 100


@pytest.fixture(scope="module", autouse=True)
def optimized():
    """Thousands of steps take longer than to compile them as users do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@partial(jax.jit, static_argnames="shape")
def _chunk(carry, scales, key, hyper, shape):
    """Steps on Gaussian gradients of these scales; the squared lengths of m and v, row by row."""
    tx = stquant.scale_by_adam_q(*hyper, precision=stquant.Fixed(8, 8))

    def step(carry, x):
        state, m, v = carry
        scale, key = x
        g = {"w": scale * jax.random.normal(key, shape)}
        _, state = tx.update(g, state)
        m = hyper[0] * m + (1 - hyper[0]) * g["w"]
        v = hyper[1] * v + (1 - hyper[1]) * g["w"] ** 2
        q = stquant.to_optax(state, g)
        squares = {"m": m, "q": q.mu["w"], "error": q.mu["w"] - m}
        sums = {name: jnp.sum(x**2, -1) for name, x in squares.items()}
        return (state, m, v), sums | {"v": v.sum(-1), "v_q": q.nu["w"].sum(-1)}

    return jax.lax.scan(step, carry, (scales, jax.random.split(key, CHUNK)))


def run(mu, nu, scales, b1=0.9, b2=0.999, shape=SHAPE):
    """The last state and {quantity: float64[steps, rows]}; scales [steps] or [steps, columns]."""
    state = common.init({"w": jnp.zeros(shape)}, mu, nu)
    carry, hyper = (state, *jnp.zeros((2, *shape))), np.float32([b1, b2, 1e-8])
    scales = np.reshape(scales, (-1, CHUNK, 1, np.shape(scales)[1] if np.ndim(scales) > 1 else 1))
    chunks = []
    for i, scale in enumerate(scales * np.ones(shape[1], np.float32)):
        carry, sums = _chunk(carry, jnp.float32(scale), jax.random.key(i), hyper, shape)
        chunks.append(sums)
    return carry[0], {
        name: np.concatenate([sums[name] for sums in chunks]).astype(float) for name in chunks[0]
    }


@pytest.mark.parametrize("b1", [0.0, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("mu", range(2, 9))
@pytest.mark.thorough
def test_stability(mu, b1):
    """Without gradients m fades as b1**t: on average to the percent, and no group strays far."""
    for nu in (0, 2, 8):
        _, sums = run(mu, nu, [1] * CHUNK + [0] * 2 * CHUNK, b1)
        m = sums["q"][CHUNK - 1 :]
        assert np.all(m[0] > 0)
        ideal = np.maximum(b1 ** np.arange(2 * CHUNK + 1.0), 2.0**-10)[:, None] ** 2
        assert np.all(m.sum(1) <= 1.1 * ideal[:, 0] * m[0].sum())
        # A group's length is a martingale of scales rounded at random, 1/24 octave each.
        assert np.all(m <= 4 * ideal * m[0])
        if b1 <= 0.9:
            assert not m[-1].any()
        else:  # nor does it fade too early
            assert m[-1].sum() >= 0.7 * ideal[-1] * m[0].sum()


FADE = np.repeat([1, 1e-3], [500, 4500])
GROW = np.repeat([1, 1e3], [500, 4500])
RETURN = np.repeat([1, 1e-3, 1], [500, 4000, 500])
# Energy of m's error over that of m, on average over the steps.
M_ERROR = {(2, 0): 0.55, (4, 3): 0.12, (5, 4): 0.04, (8, 8): 0.02}


@pytest.mark.parametrize(("mu", "nu"), M_ERROR)
@pytest.mark.parametrize("scales", [FADE, GROW, RETURN], ids=["fade", "grow", "return"])
@pytest.mark.thorough
def test_tracking(mu, nu, scales):
    """Nothing freezes: v and m follow a gradient that fades or grows a thousandfold.

    v falls by 0.0007 octaves a step, less than half a step of its scale: rounded to the nearest it
    would stay where it was.
    """
    _, sums = run(mu, nu, scales)
    octaves = np.log2(sums["v_q"] / sums["v"])[CHUNK:]
    assert np.max(np.abs(octaves)) < 0.5
    assert np.max(np.abs(octaves.mean(1))) < 0.05
    error = (sums["error"].sum(1) / sums["m"].sum(1))[CHUNK:]
    assert error.mean() < M_ERROR[mu, nu]
    assert error.max() < 3 * M_ERROR[mu, nu]


@pytest.mark.thorough
def test_padding_moves_no_rows():
    """Where all elements are alike, so are the rows of ragged bands, however long it goes on."""
    state, _ = run(5, 4, np.ones(1000), shape=(60, 256))
    rows = np.asarray(state.nu_row).reshape(-1, 32)
    bands = rows[:, :28]  # rows that hold elements in every tile
    assert np.max(bands) < 64


@pytest.mark.parametrize("octaves", [3, 7, 9.5])
@pytest.mark.thorough
def test_rows_reach_deep(octaves):
    """Elements far below their group, at one place of all groups: 8 octaves of row, then the codes.

    They come down as slowly as v forgets the first step, by b2**t.
    """
    scale = np.ones((7000, 32))
    scale[:, [3, 11, 12]] = 2.0**-octaves
    state, _ = run(5, 8, scale, b2=0.995)
    rows = np.asarray(state.nu_row)
    assert np.all(rows[[3, 11, 12]] >= min(255, 32 * octaves - 48))
    moments = common.decode(state, {"w": jnp.zeros(SHAPE)})
    deep = np.asarray(moments.nu["w"])[:, [3, 11, 12]]
    assert abs(0.5 * np.log2(deep.mean()) + octaves) < 0.1
