"""How long is a step? The part of Adam's update that a format makes, by steps of a training run.

    gain  = sum u_q u / sum u^2          1 where the format's update u_q is as long as the exact u,
                                         but for what is orthogonal to it
    error = sum (u_q - u)^2 / sum u^2

on the streams of `benchmarks.codec.streams`, with a format's own moments fed back, next to float64
Adam. An estimate of least squared error has a gain below 1: it is drawn toward what is known in
common.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks import _io
from benchmarks.codec import streams
from benchmarks.codec.closed_loop import CHUNK, Peer, Tree, exact_adam
from benchmarks.codec.formats import PEERS

SPANS = (0, 20), (20, 100), (100, 200), (200, 500)
PAIRS = (8, 8), (5, 4), (5, 2), (5, 0), (4, 0)
NAMES = "FlashOptim 8-bit", "bitsandbytes 8-bit", "torchao 4-bit"

Step = Callable[[Any, Tree, jax.Array], tuple[Tree, Any]]


def ours(mu: int, nu: int, params: Tree) -> tuple[Step, Any]:
    tx = stquant.scale_by_adam_q(precision=stquant.Fixed(mu, nu))
    return lambda state, g, t: tx.update(g, state), tx.init(params)


def sums(step: Step, state: Any, stream: Tree, exact: Tree) -> np.ndarray:
    """float64[steps, 3]: sums of u_q u, u_q^2 and u^2."""

    @jax.jit
    def run(carry, steps):
        def one(carry, x):
            state, t = carry
            g, u = x
            got, state = step(state, g, t)
            pairs = (got, u), (got, got), (u, u)
            told = [sum(jnp.sum(a[k] * b[k]) for k in g) for a, b in pairs]
            return (state, t + 1), jnp.stack(told)

        return jax.lax.scan(one, carry, steps)

    carry, out = (state, jnp.float32(1)), []
    for first in range(0, streams.STEPS, CHUNK):
        part = jax.tree.map(lambda x, first=first: x[first : first + CHUNK], (stream, exact))
        carry, told = run(carry, part)
        out.append(np.asarray(told, np.float64))
    return np.concatenate(out)


def spans(told: np.ndarray) -> list[dict[str, Any]]:
    """Gain and error over each of the spans of steps."""
    out = []
    for first, last in SPANS:
        along, own, true = told[first:last].sum(axis=0)
        error = (own - 2 * along + true) / true
        out.append({"steps": [first, last], "gain": along / true, "error": error})
    return out


def show(rows: list[dict]) -> Table:
    table = Table("stream", "format", *(f"{first}-{last}" for first, last in SPANS), title="gain")
    for row in rows:
        table.add_row(row["stream"], row["format"], *(f"{x['gain']:.3f}" for x in row["spans"]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", nargs="+", choices=streams.NAMES, default=list(streams.NAMES))
    parser.add_argument("--json", type=Path, default=_io.RESULTS / "gain.json")
    args = parser.parse_args()
    rows: list[dict] = []
    for name in args.streams:
        stream = {k: g for k, g in streams.load(name).items() if g[0].size >= 4096}
        exact = exact_adam(stream)["u"]
        params = {k: jnp.zeros(g.shape[1:]) for k, g in stream.items()}
        known = {item.name: Peer(item) for item in PEERS}
        todo = {f"mu {mu} nu {nu}": functools.partial(ours, mu, nu) for mu, nu in PAIRS}
        todo |= {x: lambda p, peer=known[x]: (peer.step, peer.init(p)) for x in NAMES}
        for label, make in tqdm(todo.items(), desc=name):
            told = spans(sums(*make(params), stream, exact))
            rows.append({"stream": name, "format": label, "spans": told})
            _io.write_json(args.json, {"environment": _io.environment(), "results": rows})
    Console().print(show(rows))


if __name__ == "__main__":
    main()
