"""Which statistics of a leaf tell how many bits it needs: candidates, and the choice of a few.

Candidates are recorded along a training run beside the measured distortion of every slot; greedy
forward selection then keeps the few that predict it best. `STQuant` scores slots by them.

>>> import numpy as np
>>> random = np.random.default_rng(0)
>>> candidates = {name: random.lognormal(size=200) for name in ("a", "b", "c")}
>>> distortion = candidates["b"] ** 2 / candidates["a"]
>>> choice = select(candidates, distortion, k=2)
>>> choice.names, np.round(choice.coefficients, 6).tolist(), round(choice.r_squared[-1], 6)
(('b', 'a'), [2.0, -1.0], 1.0)
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stquant_jax.precision.statistics import Sums

_TINY = 1e-30
# Least dispersion that is told from none: float32 sums of squares carry no smaller one.
_LEAST_CV = 1e-3


class Signals(NamedTuple):
    """One leaf's arrays at one step, or pytrees of them."""

    gradient: Any
    previous: Any  # gradient, of the step before
    mu: Any  # after the step
    nu: Any
    update: Any


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def _cv(x: jax.Array) -> jax.Array:
    """Coefficient of variation, std / mean, of positive values."""
    return jnp.std(x) / jnp.maximum(jnp.mean(x), _TINY)


def _over(a: jax.Array, b: jax.Array) -> jax.Array:
    return a / jnp.maximum(b, _TINY)


# Positive float32 scalars. Their logarithms are what counts, so ratios of two need no entry.
CANDIDATES: Mapping[str, Callable[[Signals], jax.Array]] = {
    "rms": lambda x: _rms(x.gradient),
    "cv": lambda x: _cv(jnp.abs(x.gradient)),
    "second_moment": lambda x: jnp.sqrt(jnp.mean(x.nu)),
    "update": lambda x: _rms(x.update),
    "momentum": lambda x: _rms(x.mu),
    "kurtosis": lambda x: _over(_rms(jnp.square(x.gradient)), jnp.mean(jnp.square(x.gradient))),
    "crest": lambda x: _over(jnp.max(jnp.abs(x.gradient)), _rms(x.gradient)),
    "max_over_mean": lambda x: _over(jnp.max(jnp.abs(x.gradient)), jnp.mean(jnp.abs(x.gradient))),
    "mu_dispersion": lambda x: _cv(jnp.abs(x.mu)),
    "nu_dispersion": lambda x: _cv(x.nu),
    "update_dispersion": lambda x: _cv(jnp.abs(x.update)),
    "change": lambda x: _over(_rms(x.gradient - x.previous), _rms(x.gradient)),
    # one more in both counts: never zero
    "sparsity": lambda x: (
        (1 + jnp.sum(jnp.abs(x.gradient) < 0.1 * _rms(x.gradient))) / (1 + x.gradient.size)
    ),
}

# The candidates that follow from the sums of the fused step, where they average squares and
# magnitudes over steps: float32[leaves], no pass over the arrays.
OF_SUMS: Mapping[str, Callable[[Sums], jax.Array]] = {
    "rms": lambda s: jnp.sqrt(_over(s.gradient2, s.elements)),
    "cv": lambda s: jnp.sqrt(
        jnp.maximum(_over(s.gradient2 * s.elements, jnp.square(s.gradient)) - 1, _LEAST_CV**2)
    ),
    "second_moment": lambda s: jnp.sqrt(_over(s.nu, s.elements)),
    "update": lambda s: jnp.sqrt(_over(s.energy, s.elements)),
}


def record(signals: Signals) -> jax.Array:
    """float32[leaves, candidates]: all `CANDIDATES`, in their order, of all leaves.

    Args:
      signals: pytrees of the same structure, whose leaves' order is that of the result.
    """
    leaves = zip(*(jax.tree.leaves(tree) for tree in signals), strict=True)
    rows = ([f(Signals(*leaf)) for f in CANDIDATES.values()] for leaf in leaves)
    return jnp.stack([jnp.stack(row) for row in rows]).astype(jnp.float32)


class Selection(NamedTuple):
    """What `select` found.

    Attributes:
      names: of the features, the most telling first.
      r_squared: of the fit by the first, the first two, ...
      coefficients: octaves of the target per octave of each feature, in the last fit.
      bound: R^2 is at least this part of what the best features of this number reach.
    """

    names: tuple[str, ...]
    r_squared: tuple[float, ...]
    coefficients: tuple[float, ...]
    bound: float


def select(features: Mapping[str, np.ndarray], target: np.ndarray, k: int) -> Selection:
    r"""Greedy forward selection: each time the feature that raises R^2 most.

    R^2 is that of least squares of the target's logarithm on the standardised logarithms of the
    features. It is not submodular, but nearly so where features are nearly uncorrelated: greedy
    selection of a set U reaches

    .. math::
      R^2(U) \ge (1 - e^{-\gamma}) \max_{|S| \le k} R^2(S), \qquad
      \gamma \ge \min_{|S| \le k} \lambda_{\min}(C_{U \cup S}),

    with C the features' correlation matrix (Das and Kempe, theorem 3.2 and lemma 2.4). The right
    side is computed. It is 1 - 1/e where features are uncorrelated and near 0 where some are
    nearly multiples of others, whatever they predict.

    Args:
      features: name -> float[n], positive; ones that never vary are left out.
      target: float[n], positive.
      k: features to select, at least 1. Fewer come back if no further one adds anything.

    Raises:
      ValueError: values that are not positive and finite, lengths that differ, k out of range.

    References:
      Das and Kempe, `Submodular meets spectral <https://arxiv.org/abs/1102.3975>`_, 2011.
    """
    if not isinstance(k, int) or not 1 <= k <= len(features):
        raise ValueError(f"k={k!r}: expected a number of features from 1 to {len(features)}")
    y = _octaves("target", target)
    columns = {}
    for name, values in features.items():
        x = _octaves(f"features[{name!r}]", values)
        if x.shape != y.shape:
            raise ValueError(f"features[{name!r}] of shape {x.shape}: expected {y.shape}")
        if np.std(x) > 1e-9 * (1 + np.max(np.abs(x))):
            columns[name] = x
    chosen: list[str] = []
    scores: list[float] = []
    for _ in range(k):
        tried = {n: _fit([columns[m] for m in (*chosen, n)], y)[1] for n in columns.keys() - chosen}
        best = max(sorted(tried), key=tried.__getitem__, default=None)
        if best is None or tried[best] <= (scores[-1] if scores else 0.0) + 1e-12:
            break
        chosen.append(best)
        scores.append(tried[best])
    coefficients, _ = _fit([columns[name] for name in chosen], y)
    return Selection(
        tuple(chosen), tuple(scores), tuple(coefficients.tolist()), _bound(columns, chosen, k)
    )


def regress(
    features: Mapping[str, np.ndarray], target: np.ndarray, names: Sequence[str]
) -> tuple[tuple[float, ...], float]:
    """Coefficients and R^2 of the fit of `select` by given features."""
    columns = [_octaves(f"features[{name!r}]", features[name]) for name in names]
    coefficients, r_squared = _fit(columns, _octaves("target", target))
    return tuple(coefficients.tolist()), r_squared


def _octaves(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError(f"{name}: expected one axis of positive, finite values")
    return np.log2(values)


def _fit(columns: Sequence[np.ndarray], y: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares with an intercept: coefficients, and the part of y's variance explained."""
    y = y - np.mean(y)
    total = float(np.sum(np.square(y)))
    if not columns or total == 0:
        return np.zeros(len(columns)), 0.0
    x = np.stack([column - np.mean(column) for column in columns], axis=1)
    scale = np.maximum(np.std(x, axis=0), _TINY)
    coefficients = np.linalg.lstsq(x / scale, y, rcond=None)[0]
    rest = y - (x / scale) @ coefficients
    return coefficients / scale, 1 - float(np.sum(np.square(rest))) / total


def _bound(columns: Mapping[str, np.ndarray], chosen: Sequence[str], k: int) -> float:
    if not chosen:
        return 1.0  # nothing to predict, or nothing that predicts
    others = [name for name in columns if name not in chosen]
    names = [*chosen, *others]
    correlation = np.corrcoef([columns[name] for name in names]).reshape(len(names), len(names))
    first = range(len(chosen))
    sets = itertools.combinations(range(len(chosen), len(names)), min(k, len(others)))
    smallest = [
        np.linalg.eigvalsh(correlation[np.ix_(s, s)])[0] for s in ([*first, *s] for s in sets)
    ]
    return 1 - float(np.exp(-max(min(smallest), 0.0)))
