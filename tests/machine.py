"""Random runs of an optimizer, and what must hold after every step: for `tests/test_fuzz.py` and
`python -m benchmarks.codec.fuzz`.

Programs are few, since compiling is what takes time: two trees, a handful of policies, decays that
are traced. All else is random: gradients, their order, and what is done between steps.
"""

import pickle
from collections import Counter
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import stquant_jax as stquant
from stquant_jax import Budget, Fixed, STQuant
from tests import common, oracle
from tests import oracle_storage as storage
from tests.test_oracle import read

TREES = {
    "float32": ({"bias": (40,), "flat": (7, 600), "tile": (64, 128)}, jnp.float32),
    "bfloat16": ({"folded": (96, 60), "ragged": (60, 128), "scalar": ()}, jnp.bfloat16),
}
POLICIES: list[stquant.Policy] = [
    Budget(6.5, interval=2, warmup=0, pins={"flat|ragged": (4, 0)}),
    Budget(5.5, interval=3, warmup=5, max_distortion=0.01),
    STQuant(6.0, interval=1, patience=1),
    Fixed(2, 0),
    Fixed(5, 4),
]
# An eps of 0 would make 0 / 0 of a group of zeros, here as in Optax.
HYPER = [(0.9, 0.999, 1e-8), (0.8, 0.9, 1e-12), (0.0, 0.99, 1e-3), (0.95, 0.95, 1e-8)]
SCALES = {"normal": 1e-3, "small": 1e-9, "tiny": 1e-24, "denormal": 1e-40, "large": 1e12}
BAD = {"overflow": 1e30, "infinite": -np.inf, "not a number": np.nan}

LARGEST = 2.0**126  # of a group's energy: beyond, float32 may or may not hold it
STEP, FINE, COARSE = oracle.BASE_STEP, 1 / 24, 1 / 5  # octaves, of nu's scale and of mu's
ULP = 1e-4  # octaves; float32 has 2**-18 of logarithms of up to 63 octaves, and some are summed


@cache
def program(tree: str, precision: stquant.Policy) -> Any:
    """One step and three, with traced hyperparameters."""
    del tree  # JAX compiles one for each

    def step(grads, state, hyper):
        b1, b2, eps = hyper
        return stquant.scale_by_adam_q(b1, b2, eps, precision=precision).update(grads, state)

    def scan(grads, state, hyper):
        return jax.lax.scan(lambda s, _: step(grads, s, hyper)[::-1], state, length=3)[0]

    return jax.jit(step), jax.jit(scan)


def gradient(shape: tuple[int, ...], seed: int, kind: str) -> np.ndarray:
    """Log-normal magnitudes of a random sign; ``sparse``: most rows are zero; bad: one element."""
    random = np.random.default_rng(seed)
    g = random.standard_normal(shape) * np.exp(random.standard_normal(shape[-1:]))
    g = g * SCALES.get(kind, 1e-3) * (0 if kind == "zero" else 1)
    if kind == "sparse":
        g = g * (random.random(shape[:1]) < 0.25).reshape(-1, *[1] * (len(shape) - 1))
    g = np.array(g, np.float32)
    if kind in BAD:
        g.reshape(-1)[random.integers(g.size)] = BAD[kind]
    return g


def described(tree: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def sums(x: np.ndarray) -> np.ndarray:
    return x.sum(-2, keepdims=True)


def counted(operation: Callable) -> Callable:
    @wraps(operation)
    def call(self, **drawn):
        Machine.operations[operation.__name__] += 1
        return operation(self, **drawn)

    return call


class Machine(RuleBasedStateMachine):
    """One optimizer's life."""

    few = False  # programs: one tree, one policy
    operations: Counter[str] = Counter()  # of all runs

    @initialize(
        tree=st.sampled_from(["float32", "bfloat16"]),
        precision=st.sampled_from(POLICIES),
        hyper=st.sampled_from(HYPER),
    )
    def begin(self, tree, precision, hyper):
        if self.few:
            tree, precision = "float32", POLICIES[0]
        shapes, self.dtype = TREES[tree]
        self.tree, self.precision, self.hyper = tree, precision, np.float32(hyper)
        self.params = common.zeros(shapes, self.dtype)
        self.places = {k: storage.place(s) for k, s in shapes.items() if np.prod(s) >= 4096}
        self.state = self.optimizer.init(self.params)

    @property
    def optimizer(self):
        return stquant.scale_by_adam_q(precision=self.precision)

    def grads(self, seed, kinds):
        """A kind of gradient for every leaf."""
        names = zip(self.params, kinds, strict=False)
        return {
            name: jnp.asarray(gradient(self.params[name].shape, seed + i, kind), self.dtype)
            for i, (name, kind) in enumerate(names)
        }

    # --- what is done ---

    kinds = st.lists(
        st.sampled_from(["normal"] * 4 + ["zero", "sparse", *SCALES, *BAD]), min_size=3, max_size=3
    )

    @rule(seed=st.integers(0, 2**16), kinds=kinds)
    @counted
    def update(self, seed, kinds):
        grads, before = self.grads(seed, kinds), self.state
        run, _ = program(self.tree, self.precision)
        updates, self.state = run(grads, before, self.hyper)
        assert described(updates) == described(grads)
        assert int(self.state.count) == int(before.count) + 1
        self.check_step(grads, updates, before)

    @precondition(lambda self: not self.few and self.precision == POLICIES[0])
    @rule(seed=st.integers(0, 2**16), kinds=kinds)
    @counted
    def scan(self, seed, kinds):
        _, run = program(self.tree, self.precision)
        before, self.state = self.state, run(self.grads(seed, kinds), self.state, self.hyper)
        assert int(self.state.count) == int(before.count) + 3

    @rule()
    @counted
    def tell(self):
        told = stquant.metrics(self.state)
        report = stquant.report(self.state, self.params, self.precision)
        assert len(told["widths"]) == len(report.slots) == 2 * len(self.places)
        assert all(np.all(np.isfinite(x)) for x in told.values())
        assert report.total_bytes == common.nbytes(self.state)

    @rule()
    @counted
    def save_and_restore(self):
        """As NumPy arrays, from then on."""
        self.state = pickle.loads(pickle.dumps(jax.device_get(self.state)))

    @rule()
    @counted
    def portable(self):
        """There and back: every bit."""
        saved = stquant.to_portable(self.state, self.params, self.precision)
        again = stquant.from_portable(jax.device_get(saved), self.params, self.precision)
        old, new = self.meant(self.state), self.meant(again)
        jax.tree.map(np.testing.assert_array_equal, new, old)
        self.state = again

    @rule()
    @counted
    def optax(self):
        """There and back: a group keeps its energy, or that it is not finite."""
        exact = stquant.to_optax(self.state, self.params, self.precision)
        assert all(np.all(~(np.asarray(x) < 0)) for x in exact.nu.values())
        before = self.moments(self.state)
        for name, (v, m, inside) in before.items():
            for x, side in ((v, exact.nu), (m, exact.mu)):
                got = storage.to_tiles(np.asarray(side[name], float), self.places[name])
                np.testing.assert_allclose(np.where(inside, got, 0), x, 1e-4, 2.0**-125)
        self.state = stquant.from_optax(exact, self.params, self.precision)
        for name, (v, _, _) in self.moments(self.state).items():
            self.assert_energies(v, before[name][0])

    @precondition(lambda self: not self.few and self.precision in POLICIES[:2])
    @rule()
    @counted
    def resize(self):
        """To the other budget. What only grows keeps its moments, bit for bit."""
        old, before = self.state, self.moments(self.state)
        self.precision = POLICIES[1 - POLICIES.index(self.precision)]
        self.state = stquant.resize(old, self.params, self.precision)
        widths = (np.asarray(s.precision.plan.widths).reshape(-1, 2) for s in (old, self.state))
        same = np.all(np.diff(list(widths), axis=0)[0] >= 0, axis=1)
        for kept, (name, x) in zip(same, self.moments(self.state).items(), strict=True):
            if kept:
                jax.tree.map(np.testing.assert_array_equal, x, before[name])
            self.assert_energies(x[0], before[name][0])

    # --- what must hold ---

    @invariant()
    def state_is_sound(self):
        if not hasattr(self, "state"):
            return
        like = jax.eval_shape(self.optimizer.init, self.params)
        assert described(self.state) == described(like)
        plan, *schedule = self.state.precision
        widths, tiles = np.asarray(plan.widths), [len(x.element) for x in self.places.values()]
        assert set(widths[::2]) <= set(range(2, 9)) and set(widths[1::2]) <= {0, *range(2, 9)}
        assert set(np.asarray(plan.windows)[1::2]) <= {1, 2, 3, 4, 6, 8}
        assert np.sum(widths * np.repeat(tiles, 2)) <= len(self.state.arena)
        for x in jax.tree.leaves((plan.shrinkage, schedule)):
            assert np.all(np.isfinite(x))
        for v, _, _ in self.moments(self.state).values():
            assert not np.any(v < 0)

    def check_step(self, grads, updates, before):
        """Moments after one step are those of float64 Adam from the moments before."""
        b1, b2, _ = map(float, self.hyper)
        old, new = self.moments(before), self.moments(self.state)
        scales = read(self.state, self.places)
        changed = np.not_equal(*(self.formats(x) for x in (before, self.state))).any(-1)
        for (name, (v, m, inside)), (mu_moved, nu_moved) in zip(old.items(), changed, strict=True):
            g, u = (
                storage.to_tiles(np.asarray(x[name], float), self.places[name])
                for x in (grads, updates)
            )
            g, (v_q, m_q, _) = g * inside, new[name]
            with np.errstate(all="ignore"):
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
                squares = np.float32(g) * np.float32(g)
            bad = ~np.isfinite(squares + v).all(-2, keepdims=True)
            unsure = ~bad & (sums(np.where(bad, 0, v)) > LARGEST)
            self.assert_energies(v_q, np.where(bad, np.nan, v), unsure, 1 + nu_moved)
            # What is not finite shows in the update, in its own groups and nowhere else.
            seen = np.isnan(u)
            assert np.array_equal((seen | unsure) & inside, (bad | unsure) & inside)
            if not nu_moved:  # else mu has followed the new roots
                skip = bad | unsure
                self.assert_lengths(m_q, m, v_q, scales[name].mu_scale, skip, 1 + mu_moved)
        self.check_exact(grads, before)

    def assert_energies(self, got, want, unsure=False, times=1):
        """Of groups, to the step of nu's scale, as many times as it was rounded: once more where
        the plan moved. Below 2**-126 they are zero; elements stop there, which shows in groups of
        less than 2**-100."""
        np.testing.assert_array_equal(np.isnan(sums(got)) | unsure, np.isnan(sums(want)) | unsure)
        with np.errstate(all="ignore"):
            off = np.abs(np.log2(sums(got) / sums(want))) / 2
        near = off <= times * STEP + ULP
        assert np.all(near | unsure | ~(sums(want) > 2.0**-100))
        assert not np.any(sums(got)[sums(want) < 0.999 * oracle.TINY])

    def assert_lengths(self, got, want, v, scale, skip, times):
        """Of mu over the stored root of nu: to the step of mu's scale, within its range."""
        with np.errstate(all="ignore"):
            e, e_q = (np.where(v > 0, x / np.sqrt(v), 0) for x in (want, got))
            off = np.abs(np.log2(sums(e_q**2) / sums(e**2))) / 2
        distance = np.abs(scale - oracle.MU_ZERO)
        step = times * np.where(distance < oracle.MU_FINE, FINE, COARSE) + ULP
        inside = ~skip & (scale > 1) & (scale < 254) & (sums(v) > 2.0**-100)
        assert np.all((off <= step) | ~inside)

    def check_exact(self, grads, before):
        """Small leaves are those of float32 Adam, what is not finite included."""
        b1, b2, _ = self.hyper
        names = [name for name in sorted(grads) if name not in self.places]
        g = np.concatenate([np.asarray(grads[k], np.float32).reshape(-1) for k in names])
        mu, nu = np.asarray(before.exact)
        with np.errstate(all="ignore"):
            terms = np.array([[b1 * mu, (1 - b1) * g], [b2 * nu, (1 - b2) * (g * g)]])
            want = terms.sum(1)
        got, finite = np.asarray(self.state.exact), np.isfinite(want)
        np.testing.assert_array_equal(got[~finite], want[~finite])
        # Relative to what is added: of a sum that nearly cancels, little is left to be exact.
        room = 1e-5 * np.abs(terms.astype(float)).sum(1) + 2.0**-124
        off = np.abs(got[finite].astype(float) - want[finite])
        assert np.all(off <= room[finite])

    def formats(self, state):
        """int[leaves, 2, 2]: width and window, of mu and nu."""
        return np.stack(state.precision.plan[:2], axis=-1).reshape(-1, 2, 2)

    def moments(self, state):
        """v, m and where there are elements, of each quantized leaf, in float64."""
        out, plan = {}, state.precision.plan
        for i, (name, codes) in enumerate(read(state, self.places).items()):
            inside = self.places[name].element >= 0
            (mu, nu), window = (
                map(int, plan.widths[2 * i : 2 * i + 2]),
                int(plan.windows[2 * i + 1]),
            )
            sigma = oracle.decode_nu(codes.nu, codes.nu_scale, codes.nu_row, nu, window)
            sigma = np.where(inside, sigma, 0)
            m = oracle.decode_mu(codes.mu, codes.mu_scale, sigma, mu)
            out[name] = sigma**2, np.where(inside, m, 0), inside
        return out

    def meant(self, state):
        """All of a state but for rows that no slot uses, and codes of padding."""
        codes = {
            name: [
                np.where(self.places[name].element >= 0, x, 0) if x.shape[-2:] == (32, 128) else x
                for x in leaf
            ]
            for name, leaf in read(state, self.places).items()
        }
        return codes, state.count, state.exact, state.precision
