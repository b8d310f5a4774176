"""Does moving precision pay? Policies against the best single pair of widths, at equal bytes.

Both run Adam over a stream of captured gradients (`benchmarks.codec.streams`, 2000 steps) with
everything fed back, next to a float64 Adam. From step 501 on, when nu has a memory to speak of,

    error = sum |u_q - u|^2 / sum |u|^2

For every pair (mu, nu) of widths that no pair of fewer bytes beats, a policy gets the bytes of that
pair's whole state, and the few that it keeps of its own. What `stquant.metrics` estimates of each
slot's error (``distortion``) is recorded beside the true error of its leaf over the same 50 steps.

    python -m benchmarks.codec.allocation
    python -m benchmarks.codec.allocation --policies STQuant --resume
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks import _io
from benchmarks.codec import streams
from benchmarks.codec.formats import B1, B2, EPS

STEPS = 2000
FIRST = 500  # steps that are left out of the error
CHUNK = 50  # steps per compiled call
PAIRS = ((4, 0), (5, 0), (5, 2), (5, 3), (5, 4), (5, 5), (6, 6), (7, 7))
POLICIES = {"Budget": stquant.Budget, "STQuant": stquant.STQuant}
STORAGE = stquant.Storage(min_size=0)

Tree = dict[str, Any]


def exact_updates(stream: Tree) -> Tree:
    """float64 Adam's updates, kept as float32[steps, *shape]."""
    out = {}
    for path, gradients in stream.items():
        out[path] = np.empty(gradients.shape, np.float32)
        m, v = np.zeros((2, *gradients.shape[1:]))
        for i, g in enumerate(gradients.astype(np.float64)):
            m = B1 * m + (1 - B1) * g
            v = B2 * v + (1 - B2) * g**2
            out[path][i] = m / (1 - B1 ** (i + 1)) / (np.sqrt(v / (1 - B2 ** (i + 1))) + EPS)
    return out


def transform(precision: stquant.Policy) -> optax.GradientTransformation:
    return stquant.scale_by_adam_q(B1, B2, EPS, precision=precision, storage=STORAGE)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _run(precision: stquant.Policy, state, steps: tuple[Tree, Tree]):
    """A chunk of steps: the state, and float32[2, leaves] of error and energy over the chunk."""
    tx = transform(precision)

    def step(carry, x):
        state, sums = carry
        g, exact = x
        update, state = tx.update(g, state)
        error = jnp.stack([jnp.sum((update[k] - exact[k]) ** 2) for k in g])
        energy = jnp.stack([jnp.sum(exact[k] ** 2) for k in g])
        return (state, sums + jnp.stack([error, energy])), None

    return jax.lax.scan(step, (state, jnp.zeros((2, len(steps[0])))), steps)[0]


def measure(precision: stquant.Policy, stream: Tree, exact: Tree, label: str) -> dict[str, Any]:
    """Error from `FIRST` on, bits, and the history of widths, estimates and errors."""
    params = {path: jnp.zeros(g.shape[1:]) for path, g in stream.items()}
    jax.clear_caches()  # of programs that are not run again: a process can map only so many
    start, state = time.perf_counter(), transform(precision).init(params)
    stored = sum(x.nbytes for x in jax.tree.leaves(state))
    history = []
    for first in tqdm(range(0, STEPS, CHUNK), desc=label, leave=False):
        part = [{k: x[first : first + CHUNK] for k, x in tree.items()} for tree in (stream, exact)]
        state, sums = _run(precision, state, tuple(part))
        told = jax.device_get(stquant.metrics(state))
        history.append({"sums": np.asarray(sums, np.float64), **told})
    late = np.sum([h["sums"] for h in history[FIRST // CHUNK :]], axis=0)
    return {
        "bits": 8 * stored / (2 * sum(p.size for p in params.values())),
        "error": late[0].sum() / late[1].sum(),
        "seconds": round(time.perf_counter() - start, 1),
        "widths": history[-1]["widths"].tolist(),
        "windows": history[-1]["windows"].tolist(),
        "steps": [CHUNK * (i + 1) for i in range(len(history))],
        "error_by_leaf": [_rounded(h["sums"][0] / h["sums"][1]) for h in history],
        "estimate_by_leaf": [_rounded(h["distortion"].reshape(-1, 2).sum(axis=1)) for h in history],
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{x:.3g}") for x in values]


def budget_of(pair: dict[str, Any], policy: type, params: Tree) -> float:
    """The budget that allows the codes of a pair: the bytes of its state, and those that the policy
    keeps of its own. They are few, but on leaves this small would cost a row of the arena."""

    def bytes_of(precision: stquant.Policy) -> int:
        state = jax.eval_shape(transform(precision).init, params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.precision))

    own = bytes_of(policy(pair["bits"] + 1)) - bytes_of(stquant.Fixed())
    elements = 2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    return round(pair["bits"] + 8 * own / elements + 5e-4, 3)


def show(rows: list[dict]) -> Table:
    table = Table("stream", "best pair", "bits", "error", "policy", "error", "pair over policy")
    for row in (row for row in rows if "pair_error" in row):
        pair = row["stream"], row["pair"], f"{row['bits']:.3f}", f"{row['pair_error']:.4g}"
        ratio = f"{row['pair_error'] / row['error']:.2f}"
        table.add_row(*pair, row["policy"], f"{row['error']:.4g}", ratio)
    return table


def plot(rows: list[dict], path: Path) -> None:
    """Error against bits, and estimate against truth: a column for each stream."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["stream"] for row in rows))
    _, panels = plt.subplots(2, len(names), figsize=(4.5 * len(names), 8), squeeze=False)
    for (top, bottom), name in zip(panels.T, names, strict=True):
        here = [row for row in rows if row["stream"] == name]
        for kind, mark in (("Fixed", "s--"), ("STQuant", "^:"), ("Budget", "o-")):
            line = sorted((r["bits"], r["error"]) for r in here if r["policy"] == kind)
            if line:
                top.plot(*zip(*line, strict=True), mark, label=kind, markersize=4)
        top.set(title=name, yscale="log", xlabel="bits per state element, all in")
        for row in (r for r in here if r["policy"] == "Budget"):
            late = slice(len(row["steps"]) // 4, None, 3)
            truth, guess = (np.ravel(row[k][late]) for k in ("error_by_leaf", "estimate_by_leaf"))
            bottom.loglog(truth, guess, ".", markersize=3, label=f"{row['bits']:.2f} bits")
        ends = np.array([3e-4, 0.5])
        bottom.plot(ends, ends, "k-", linewidth=0.8)
        bottom.fill_between(ends, ends / 2, ends * 2, color="lightgray", zorder=0)
        bottom.set(xlabel="true error of a leaf over 50 steps")
        top.grid(alpha=0.3)
    panels[0][0].set_ylabel("error of the update after step 500")
    panels[1][0].set_ylabel("estimated error (gray: within a factor of 2)")
    panels[0][-1].legend(fontsize=8)
    panels[1][-1].legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def _pair(text: str) -> tuple[int, int]:
    mu, nu = map(int, text.split(","))
    return mu, nu


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--streams", nargs="+", default=list(streams.NAMES), choices=streams.NAMES)
    add("--pairs", nargs="+", type=_pair, default=PAIRS, metavar="MU,NU")
    add("--interval", type=int, default=50, help="steps between decisions")
    add("--policies", nargs="+", default=["Budget"], choices=POLICIES)
    add("--resume", action="store_true", help="keep what the JSON file holds, measure the rest")
    add("--json", type=Path, default=_io.RESULTS / "allocation.json")
    add("--plot", type=Path, default=_io.RESULTS / "allocation.png")
    add("--cache", type=Path, default=streams.CACHE, help="folder of the captured streams")
    args = parser.parse_args()

    rows: list[dict] = _io.read_json(args.json).get("results", []) if args.resume else []
    done = {(row["stream"], row["policy"], row["pair"]) for row in rows}
    for name in args.streams:
        stream = streams.load(name, steps=STEPS, cache=args.cache)
        stream = {path: g for path, g in sorted(stream.items()) if g[0].size >= 4096}
        exact = exact_updates(stream)
        params = {path: jnp.zeros(g.shape[1:]) for path, g in stream.items()}

        def add(kind, precision, pair, told, name=name, stream=stream, exact=exact):
            if (name, kind, pair) not in done:
                head = {"stream": name, "policy": kind, "pair": pair, **told}
                rows.append(head | measure(precision, stream, exact, f"{name} {kind} {pair}"))
                _io.write_json(args.json, {"environment": _io.environment(), "results": rows})

        asked = {f"mu {mu} nu {nu}": stquant.Fixed(mu, nu) for mu, nu in args.pairs}
        for label, fixed in asked.items():
            add("Fixed", fixed, label, {})
        pairs = [row for row in rows if row["stream"] == name and row["policy"] == "Fixed"]
        for pair in pairs:
            best = min(p["error"] for p in pairs if p["bits"] <= pair["bits"])
            if pair["pair"] in asked and pair["error"] == best:
                told = {"interval": args.interval, "pair_error": pair["error"]}
                for kind in args.policies:
                    bits = budget_of(pair, POLICIES[kind], params)
                    policy = POLICIES[kind](bits, interval=args.interval)
                    add(kind, policy, pair["pair"], told)
    Console().print(show(rows))
    plot(rows, args.plot)


if __name__ == "__main__":
    main()
