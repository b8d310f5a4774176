"""Gradients at the ends of float32: tiny, huge, not finite."""

import numpy as np
import pytest

from tests import common

SHAPE = {"w": (64, 256)}  # two bands of two tiles
WIDTHS = [(2, 0), (4, 3), (5, 4), (8, 8)]


def gradient(scale=1.0, seed=0):
    g = np.random.default_rng(seed).standard_normal(SHAPE["w"])
    return (np.sign(g) * np.exp(0.2 * g) * scale).astype(np.float32)


def steps(gradients, mu=5, nu=4, eps=1e-8):
    """Updates of all steps, and the last state."""
    state, updates = common.init(common.zeros(SHAPE), mu, nu), []
    for g in gradients:
        u, state = common.update({"w": g}, state, eps=eps)
        updates.append(np.asarray(u["w"]))
    return updates, state


@pytest.mark.parametrize(("mu", "nu"), WIDTHS)
@pytest.mark.parametrize("exponent", [-50, -40, -20, 20, 40, 60])
def test_scale_does_not_matter(mu, nu, exponent):
    """Powers of two drop out of Adam: only rounding of logarithms tells the runs apart. From 2**-55
    on float32 holds no v of the smallest elements."""
    gradients = [gradient(seed=i) for i in range(4)]
    want, _ = steps(gradients, mu, nu, eps=0.0)
    got, _ = steps([g * 2.0**exponent for g in gradients], mu, nu, eps=0.0)
    for x, y in zip(got, want, strict=True):
        assert np.mean(np.abs(x - y) > 2e-3) < 0.01


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-25, 1e-20])
def test_too_small(scale):
    """A group of less than 2**-126 of energy is zero, the update finite; it wakes up as if new."""
    updates, state = steps([gradient(scale)] * 3)
    moments = common.decode(state, common.zeros(SHAPE))
    assert not np.any(moments.mu["w"]) and not np.any(moments.nu["w"])
    assert not np.any(state.mu_scale) and not np.any(state.nu_scale)
    for u in updates:
        assert np.all(np.abs(u) < 1e-6)
    u, state = common.update({"w": gradient()}, state)
    moments = common.decode(state, common.zeros(SHAPE))
    np.testing.assert_allclose(
        np.mean(moments.nu["w"]), 1e-3 * np.mean(np.square(gradient())), rtol=0.01
    )
    assert np.all(np.isfinite(u["w"]))


@pytest.mark.parametrize("scale", [1e16, 1e17, 1e18])
def test_huge(scale):
    """As long as the squares of a group are finite, so is all."""
    updates, state = steps([gradient(scale, i) for i in range(3)])
    assert all(np.all(np.isfinite(u)) and np.max(np.abs(u)) < 4 for u in updates)
    mean = np.mean(common.decode(state, common.zeros(SHAPE)).nu["w"])
    assert 0.5 < mean / (3e-3 * scale**2) < 2


@pytest.mark.parametrize("bad", [1e20, 1e30, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("mu", "nu"), WIDTHS)
def test_not_finite(mu, nu, bad):
    """One bad element shows at once, in all of its group, for good, and nowhere else."""
    gradients = [gradient(seed=i) for i in range(6)]
    want, _ = steps(gradients, mu, nu)
    gradients[2][7, 3] = bad  # its group is the band's column, rows 0..31
    got, state = steps(gradients, mu, nu)
    spoilt = np.zeros(SHAPE["w"], bool)
    spoilt[:32, 3] = True
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_array_equal(np.isnan(x), spoilt & (i >= 2))
        # Other tiles keep every bit. In its own, rows move with one group less: a little else.
        other = np.ones(SHAPE["w"], bool)
        other[:32, :128] = False
        np.testing.assert_array_equal(x[other], y[other])
        assert np.mean(np.abs(x - y)[~spoilt] > 0.3) < 0.01
    moments = common.decode(state, common.zeros(SHAPE))
    for x in (moments.mu["w"], moments.nu["w"]):
        np.testing.assert_array_equal(np.isnan(x), spoilt)


@pytest.mark.parametrize(("mu", "nu"), WIDTHS)
def test_zero_gradients(mu, nu):
    """Nothing in, nothing out."""
    zero = np.zeros(SHAPE["w"], np.float32)
    updates, state = steps([zero] * 5, mu, nu)
    assert not any(np.any(u) for u in updates)
    assert not np.any(state.mu_scale) and not np.any(state.nu_scale)


@pytest.mark.parametrize(("mu", "nu"), [(4, 0), (5, 4), (8, 8)])
def test_elements_without_gradient(mu, nu):
    """From 4 bits on, what never had a gradient keeps an m of exactly zero among the living."""
    gradients = [gradient(seed=i) for i in range(40)]
    for g in gradients:
        g[::3] = 0
    updates, state = steps(gradients, mu, nu)
    assert not any(np.any(u[::3]) for u in updates)
    m = np.asarray(common.decode(state, common.zeros(SHAPE)).mu["w"])
    assert not np.any(m[::3]) and np.any(m[1::3])


@pytest.mark.parametrize(("mu", "nu"), [(2, 0), (3, 0), (3, 4)])
def test_elements_without_gradient_on_average(mu, nu):
    """Below 4 bits there is no zero among the levels: an m of zero is kept on average."""
    gradients = [gradient(seed=i) for i in range(400)]
    for g in gradients:
        g[::4] = 0
    updates, _ = steps(gradients, mu, nu)
    idle = np.mean([u[::4] for u in updates[50:]], axis=0)  # over time, element by element
    assert abs(np.mean(idle)) < 5 * np.std(idle) / np.sqrt(idle.size)
