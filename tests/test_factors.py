"""Candidate statistics by their definitions, and greedy selection against all subsets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stquant_jax.precision.factors import (
    CANDIDATES,
    OF_SUMS,
    Signals,
    record,
    regress,
    select,
)
from stquant_jax.precision.statistics import Sums


def signals(seed=0, shapes=((40, 30), (700,))):
    random = np.random.default_rng(seed)

    def draw(scale=1.0):
        return [np.float32(scale * random.standard_normal(shape)) for shape in shapes]

    return Signals(draw(1e-3), draw(1e-3), draw(1e-4), [x**2 for x in draw(1e-3)], draw())


def test_candidates_by_their_definitions():
    x = signals()
    table = np.asarray(jax.jit(record)(x))
    assert table.shape == (2, len(CANDIDATES))
    for row, g, mu, nu, update in zip(table, x.gradient, x.mu, x.nu, x.update, strict=True):
        g, mu, nu, update = (np.float64(a) for a in (g, mu, nu, update))
        found = dict(zip(CANDIDATES, row, strict=True))
        size = np.abs(g)
        expected = {
            "rms": np.sqrt(np.mean(g**2)),
            "cv": np.std(size) / np.mean(size),
            "second_moment": np.sqrt(np.mean(nu)),
            "update": np.sqrt(np.mean(update**2)),
            "momentum": np.sqrt(np.mean(mu**2)),
            "kurtosis": np.sqrt(np.mean(g**4)) / np.mean(g**2),
            "crest": np.max(size) / np.sqrt(np.mean(g**2)),
            "max_over_mean": np.max(size) / np.mean(size),
            "nu_dispersion": np.std(nu) / np.mean(nu),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)
        # of independent gradients, and of magnitudes below a tenth of a normal deviation
        assert found["change"] == pytest.approx(np.sqrt(2), rel=0.1)
        assert found["sparsity"] == pytest.approx(0.08, abs=0.03)


def test_candidates_of_nothing_are_finite():
    zeros = jax.tree.map(np.zeros_like, signals())
    assert np.all(np.isfinite(record(zeros)))


def test_those_of_sums_agree():
    x = signals()
    table = np.asarray(record(x))
    fields = {name: np.zeros(2, np.float32) for name in Sums._fields}
    fields |= {
        "elements": np.array([a.size for a in x.gradient], np.float32),
        "energy": np.array([np.sum(a**2) for a in x.update]),
        "gradient": np.array([np.sum(np.abs(a)) for a in x.gradient]),
        "gradient2": np.array([np.sum(a**2) for a in x.gradient]),
        "nu": np.array([np.sum(a) for a in x.nu]),
    }
    sums = Sums(**{name: jnp.asarray(value) for name, value in fields.items()})
    for name, factor in OF_SUMS.items():
        column = table[:, list(CANDIDATES).index(name)]
        np.testing.assert_allclose(factor(sums), column, rtol=1e-4, err_msg=name)


def r_squared(features, target, names):
    """By projection on an orthonormal basis, not by least squares."""
    x = np.log(np.stack([features[name] for name in names], axis=1))
    y = np.log(target)
    basis, sizes, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    basis = basis[:, sizes > 1e-9 * max(sizes[0], 1e-30)]
    y = y - y.mean()
    return np.sum((basis.T @ y) ** 2) / np.sum(y**2)


@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(0, 2))
def test_greedy_against_all_subsets(seed, k, mixing):
    """Never better than the best set, never worse than the bound says."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((40, 6))
    x = x + mixing * x @ random.standard_normal((6, 6))
    y = x @ random.standard_normal(6) + random.standard_normal(40)
    features = {str(i): np.exp(column) for i, column in enumerate(x.T)}
    found = select(features, np.exp(y), k)
    scores = [r_squared(features, np.exp(y), s) for s in itertools.combinations(features, k)]
    assert found.bound * max(scores) - 1e-9 <= found.r_squared[-1] <= max(scores) + 1e-9
    assert 0 <= found.bound <= 1 - np.exp(-1) + 1e-9
    assert list(found.r_squared) == sorted(found.r_squared)
    np.testing.assert_allclose(found.r_squared[-1], r_squared(features, np.exp(y), found.names))
    np.testing.assert_allclose(
        found.r_squared[-1], regress(features, np.exp(y), found.names)[1], rtol=1e-9
    )


def test_orthogonal_features_are_recovered():
    """There greedy is exact, and its bound is that of submodular functions."""
    random = np.random.default_rng(0).standard_normal((64, 8))
    basis, _ = np.linalg.qr(np.concatenate([np.ones((64, 1)), random], axis=1))
    features = {f"x{i}": np.exp2(column) for i, column in enumerate(basis.T[1:])}
    target = features["x2"] ** 3 / features["x5"] ** 2 * features["x7"]
    found = select(features, target, 3)
    assert found.names == ("x2", "x5", "x7")
    np.testing.assert_allclose(found.coefficients, (3, -2, 1), rtol=1e-9)
    np.testing.assert_allclose(found.r_squared, np.array([9, 13, 14]) / 14, rtol=1e-9)
    assert found.bound == pytest.approx(1 - np.exp(-1))


def test_degenerate_features():
    random = np.random.default_rng(0)
    a, b = random.lognormal(size=(2, 50))
    features = {"constant": np.full(50, 3.0), "a": a, "again": a.copy(), "b": b}
    found = select(features, a * b, 4)
    assert set(found.names) == {"a", "b"} and found.r_squared[-1] == pytest.approx(1)
    assert found.bound == pytest.approx(0, abs=1e-6)
    nothing = select(features, np.ones(50), 2)
    assert nothing.names == () and nothing.coefficients == ()
    assert select({"constant": np.ones(50)}, a, 1).names == ()


@pytest.mark.parametrize(
    ("features", "target", "k", "message"),
    [
        ({"a": np.ones(3)}, np.ones(3), 2, r"k=2: expected .* 1 to 1"),
        ({"a": np.ones(3)}, np.ones(3), 0, r"k=0"),
        ({"a": np.zeros(3)}, np.ones(3), 1, r"features\['a'\].*positive"),
        ({"a": np.ones(3)}, np.array([1, np.nan, 1]), 1, r"target.*finite"),
        ({"a": np.ones(4)}, np.ones(3), 1, r"features\['a'\] of shape \(4,\)"),
    ],
)
def test_errors(features, target, k, message):
    with pytest.raises(ValueError, match=message):
        select(features, target, k)
