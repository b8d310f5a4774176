"""Closed-loop error of the update, by bits, for every format on captured gradient streams.

Each format runs Adam over a whole stream with its own moments fed back, next to a float64 Adam in
NumPy that stores nothing lossily. Over steps 151 to 500, the first of them over 1 to 20 and 21 to
150 as well,

    error   = sum |u_q - u|^2 / sum |u|^2        u_q the format's update, u the exact one
    error m = sum |u_m - u|^2 / sum |u|^2        u_m from the format's m and the exact v
    error v = sum |u_q - u_m|^2 / sum |u|^2      what the format's v adds

where the format's m is the one that its update starts from: decoded, then advanced by the step's
gradient. (The exact m over the format's v would not do: where both moments of a format are zero
its update is harmless, while an exact m would be divided by eps.) A one-shot round trip is not
measured: what a format does to the slow second moment only shows after hundreds of steps.

Leaves under 4096 elements are left out: ours, bitsandbytes and torchao keep them in float32.

    python -m benchmarks.codec.closed_loop                all pairs of widths
    python -m benchmarks.codec.closed_loop --pairs 5,4 5,0 two, and other libraries' formats
    python -m benchmarks.codec.closed_loop --pairs 5,4 --windows the same at every window
"""

import argparse
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import _io
from benchmarks.codec import streams
from benchmarks.codec.formats import B1, B2, EPS, PEERS, Format

EARLY, FIRST = 20, 150  # steps before which the moments are still filling up
CHUNK = 50  # steps per compiled call
ERRORS = "error", "error_m", "error_v", "error_1_20", "error_21_150"
WIDTHS = tuple((mu, nu) for mu in range(2, 9) for nu in range(9))
WINDOWS = (1, 2, 3, 4)

Tree = dict[str, Any]


class Peer:
    """A format of `formats.PEERS`, leaf by leaf."""

    def __init__(self, item: Format):
        self.item = item

    def init(self, params: Tree) -> Tree:
        return {path: self.item.init(leaf.shape) for path, leaf in params.items()}

    def bits(self, state: Tree, params: Tree) -> float:
        total = sum(self.item.bits(leaf.shape) * leaf.size for leaf in params.values())
        return total / sum(leaf.size for leaf in params.values())

    def step(self, state: Tree, g: Tree, t: jax.Array) -> tuple[Tree, Tree]:
        out = {path: self.item.step(state[path], g[path], t) for path in g}
        return {path: out[path][0] for path in g}, {path: out[path][1] for path in g}

    def mu(self, state: Tree, params: Tree) -> Tree:
        return {path: self.item.moments(state[path])[0] for path in params}


class Arena:
    """`stquant_jax.scale_by_adam_q` at fixed widths, through the public API.

    Widths are data in the state and only the arena's rows give its shape, so one compiled loop
    serves all pairs: a narrow pair's arena is filled up to the rows of the widest.
    """

    def __init__(self):
        import stquant_jax as stquant

        self.library = stquant

    def _transform(self, mu: int, nu: int, window: int | None):
        return self.library.scale_by_adam_q(
            b1=B1,
            b2=B2,
            eps=EPS,
            precision=self.library.Fixed(mu=mu, nu=nu, window=window),
            storage=self.library.Storage(min_size=0),
        )

    @cached_property
    def _widest(self):
        return self._transform(8, 8, None)

    def init(self, params: Tree, mu: int, nu: int, window: int | None):
        return self._transform(mu, nu, window).init(params)

    def fill(self, state, params: Tree):
        rows = jax.eval_shape(self._widest.init, params).arena.shape[0]
        return state._replace(arena=jnp.pad(state.arena, ((0, rows - len(state.arena)), (0, 0))))

    def bits(self, state, params: Tree) -> float:
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        return 8 * stored / (2 * sum(leaf.size for leaf in params.values()))

    def step(self, state, g: Tree, t: jax.Array):
        return self._widest.update(g, state)

    def mu(self, state, params: Tree) -> Tree:
        return self.library.to_optax(state, params).mu


def exact_adam(stream: Tree) -> Tree:
    """float64 Adam: the exact update and v of every step, kept as float32[steps, *shape]."""
    out = {"u": {}, "v": {}}
    for path, gradients in stream.items():
        out["u"][path], out["v"][path] = np.empty((2, *gradients.shape), np.float32)
        m, v = np.zeros((2, *gradients.shape[1:]))
        for i, g in enumerate(gradients.astype(np.float64)):
            m = B1 * m + (1 - B1) * g
            v = B2 * v + (1 - B2) * g**2
            out["u"][path][i], out["v"][path][i] = _update(m, v, i + 1, np), v
    return out


def _update(m, v, t, np=jnp):
    return m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS)


@partial(jax.jit, static_argnums=0)
def _run(loop: Peer | Arena, state, steps: Tree, first: jax.Array):
    """Runs a chunk of steps; the new state and float32[steps, 4] squared norms of each step."""

    def step(carry, x):
        state, t = carry
        g, exact = x["g"], x["u"]
        m = loop.mu(state, g)
        update, state = loop.step(state, g, t)
        only_m = {k: _update(B1 * m[k] + (1 - B1) * g[k], x["v"][k], t) for k in g}
        pairs = (update, exact), (only_m, exact), (update, only_m)
        norms = [sum(jnp.sum((a[k] - b[k]) ** 2) for k in g) for a, b in pairs]
        energy = sum(jnp.sum(leaf**2) for leaf in exact.values())
        return (state, t + 1), jnp.stack([*norms, energy])

    (state, _), norms = jax.lax.scan(step, (state, first), steps)
    return state, norms


def measure(loop: Peer | Arena, state, steps: Tree) -> dict[str, float]:
    """Error, error of m and error of v of one format over a stream; the error of its beginning."""
    norms = []
    for start in range(0, len(next(iter(steps["u"].values()))), CHUNK):
        chunk = jax.tree.map(lambda a, start=start: a[start : start + CHUNK], steps)
        state, part = _run(loop, state, chunk, jnp.float32(start + 1))
        norms.append(np.asarray(part, np.float64))
    norms = np.concatenate(norms)
    error, m, v, energy = norms[FIRST:].sum(axis=0)
    told = {"error": error / energy, "error_m": m / energy, "error_v": v / energy}
    for name, part in (("error_1_20", norms[:EARLY]), ("error_21_150", norms[EARLY:FIRST])):
        error, _, _, energy = part.sum(axis=0)
        told[name] = error / energy
    return told


def front(rows: list[dict]) -> list[dict]:
    """The rows that no other row of as few bits beats, from the smallest to the most exact."""
    best: list[dict] = []
    for row in sorted(rows, key=lambda row: (row["bits"], row["error"])):
        if not best or row["error"] < best[-1]["error"]:
            best.append(row)
    return best


def show(rows: list[dict], stream: str) -> Table:
    """All formats on one stream by bits; ours that none of ours beats in bold."""
    best = front([row for row in rows if "mu" in row])
    header = "format", "bits", "error", "of m", "of v", "steps 1-20", "21-150"
    table = Table(*header, title=f"update error on {stream}")
    for row in sorted(rows, key=lambda row: row["bits"]):
        errors = [f"{row[key]:.3g}" for key in ERRORS]
        style = "bold" if row in best else "" if "mu" in row else "cyan"
        table.add_row(row["format"], f"{row['bits']:.3f}", *errors, style=style)
    return table


def plot(rows: list[dict], path: Path) -> None:
    """Error against bits, a panel per stream: ours as points and their front, the others named."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["stream"] for row in rows))
    size = (5 * len(names), 4.5)
    _, panels = plt.subplots(1, len(names), figsize=size, squeeze=False, sharey=True)
    for panel, name in zip(panels[0], names, strict=True):
        here = [row for row in rows if row["stream"] == name and row["format"] != "fp32"]
        ours = [row for row in here if "mu" in row and not row["window"]]
        if ours:
            best = front(ours)
            panel.plot(*_points(ours), ".", color="lightgray", zorder=0)
            line = {"drawstyle": "steps-post", "color": "black", "markersize": 3}
            panel.plot(*_points(best), "o-", **line, label="stquant_jax")
        for i, row in enumerate(row for row in here if "mu" not in row):
            panel.plot(*_points([row]), "Xsd^vP*"[i % 7], markersize=8, label=row["format"])
        panel.set(yscale="log", title=name, xlabel="bits per state element, all in")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("update error, closed loop")
    panels[0][-1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def _points(rows: list[dict]) -> tuple[list[float], list[float]]:
    return [row["bits"] for row in rows], [row["error"] for row in rows]


def _pair(text: str) -> tuple[int, int]:
    mu, nu = map(int, text.split(","))
    if (mu, nu) not in WIDTHS:
        raise argparse.ArgumentTypeError(f"{text}: widths of mu are 2..8, of nu 0..8")
    return mu, nu


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, peers = parser.add_argument, [item.name for item in PEERS]
    add("--streams", nargs="+", default=list(streams.NAMES), choices=streams.NAMES)
    add("--pairs", nargs="*", type=_pair, default=WIDTHS, metavar="MU,NU", help="default: all")
    add("--windows", action="store_true", help=f"each pair also at windows {WINDOWS}")
    add("--peers", nargs="*", default=peers, choices=peers, help="default: all")
    add("--resume", action="store_true", help="keep what the JSON file holds, measure the rest")
    add("--json", type=Path, default=_io.RESULTS / "codec.json")
    add("--plot", type=Path, default=_io.RESULTS / "codec.png")
    streams.add_arguments(parser)
    return parser.parse_args()


def main():
    args = _arguments()
    windows = (None, *WINDOWS) if args.windows else (None,)
    widths = [(mu, nu, w) for mu, nu in args.pairs for w in (windows if nu else (None,))]
    rows = _io.read_json(args.json).get("results", []) if args.resume else []
    done = {(row["stream"], row["seed"], row["format"]) for row in rows}
    arena = Arena() if widths else None

    for name in args.streams:
        stream = streams.load(name, seed=args.seed, cache=args.cache)
        stream = {path: g for path, g in stream.items() if g[0].size >= args.min_size}
        params = {path: jnp.zeros(g.shape[1:]) for path, g in stream.items()}
        steps = {"g": stream, **exact_adam(stream)}

        todo = [(item.name, Peer(item), {}) for item in PEERS if item.name in args.peers]
        for mu, nu, window in widths:
            label = f"mu {mu} nu {nu}" + (f" window {window}" if window else "")
            todo.append((label, arena, {"mu": mu, "nu": nu, "window": window}))
        todo = [entry for entry in todo if (name, args.seed, entry[0]) not in done]

        for label, loop, setting in tqdm(todo, desc=name):
            start, state = time.perf_counter(), loop.init(params, **setting)
            row = {"stream": name, "seed": args.seed, "format": label, **setting}
            row["bits"] = loop.bits(state, params)
            if loop is arena:
                state = arena.fill(state, params)
            row |= measure(loop, state, steps)
            rows.append(row | {"seconds": round(time.perf_counter() - start, 2)})
            _io.write_json(args.json, {"environment": _io.environment(), "results": rows})
        here = [row for row in rows if (row["stream"], row["seed"]) == (name, args.seed)]
        Console().print(show(here, name))
    plot([row for row in rows if row["seed"] == args.seed], args.plot)


if __name__ == "__main__":
    main()
