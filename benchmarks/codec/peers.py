"""Optimizers of other libraries and ours on the same gradients, step by step, against float64 Adam.

Not formats written from formulas, as in `benchmarks.codec.closed_loop`, but the libraries
themselves: every optimizer is built and stepped as its users do it, on a CPU, and fed a captured
stream. Parameters are zero before each step and the learning rate is 1, so that p = -u after it,
without rounding. The error is `benchmarks.codec.closed_loop`'s, over steps 151 to 500,

    error = sum |u_q - u|^2 / sum |u|^2        u_q the optimizer's update, u the exact one

and every optimizer has the same b1, b2 and eps. Leaves under 4096 elements are left out, as there:
but for FlashOptim and SOLO all keep them in float32.

What shares a scale depends on the order of a kernel's axes. PyTorch's kernels are [out, in], the
streams' are [in, out] as in JAX: PyTorch's optimizers are measured with either, and the formats of
`benchmarks.codec.formats` are to be compared with them as in JAX.

`bits held` counts all that an optimizer's state holds, per moment and element. `bits` leaves out of
the libraries' states what does not grow with the model, their tables of levels and counters, which
weigh much in a model this small; ours has no such discount.

    pip install torch torchao bitsandbytes flashoptim-jax solow
    python -m benchmarks.codec.peers                all that the JSON file lacks, or has untimed
    python -m benchmarks.codec.peers --untimed      errors and bytes only, on a machine that is busy
    python -m benchmarks.codec.peers --only "SOLO 4/2" one of them

A library that is lacking has a row that says so, and a row measured elsewhere is kept. Seconds are
of one Python process, on leaves of 4096 to 16384 elements: they say little about a large model.
"""

import argparse
import datetime
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks import _io
from benchmarks.codec import closed_loop as codec
from benchmarks.codec import formats, streams
from benchmarks.codec.formats import B1, B2, EPS

STREAMS = "gpt", "vit"
CONSTANT = "step", "count", "qmap", "qmap1", "qmap2", "ecc"  # parts that do not grow with a model
# The libraries' bits among them: who has less error at equal bytes?
BUDGETS = 2.375, 2.5, 3.0, 3.375, 3.5, 4.0, 4.25, 5.0, 6.5, 8.0, 8.125, 8.5
PAIRS = (2, 0), (5, 0), (5, 4), (6, 6), (8, 8)

Tree = dict[str, Any]


class Optimizer(Protocol):
    """One that can be stepped; only `step` is timed."""

    def feed(self, g: Tree) -> None:
        """Gradients of the next step, and parameters of zero."""

    def step(self) -> None: ...

    def update(self) -> Tree:
        """Of the last step, without the learning rate's sign."""

    def parts(self) -> list[tuple[str, int]]:
        """Name and bytes of every array in the state, each array once."""


class Torch:
    """An optimizer of PyTorch's, on kernels [in, out] as they come or turned to [out, in]."""

    def __init__(self, make: Callable[..., Any], params: Tree, turned: bool):
        import torch

        torch.manual_seed(0)
        self.torch, self.turned = torch, turned
        shapes = {path: self._turn(path, x).shape for path, x in params.items()}
        self.params = {k: torch.nn.Parameter(torch.zeros(shape)) for k, shape in shapes.items()}
        options = {"lr": 1.0, "betas": (B1, B2), "eps": EPS, "weight_decay": 0.0}
        self.optimizer = make(list(self.params.values()), **options)

    def _turn(self, path, x):
        return x.T if self.turned and path.endswith("kernel") else x

    def feed(self, g):
        for path, p in self.params.items():
            p.data.zero_()
            p.grad = self.torch.from_numpy(self._turn(path, g[path]).copy())

    def step(self):
        self.optimizer.step()

    def update(self):
        return {path: -self._turn(path, p.detach().numpy()) for path, p in self.params.items()}

    def parts(self):
        return torch_parts(self.optimizer.state.values())


class Jax:
    """`step(state, g, t) -> updates, state`, jitted, its state donated."""

    def __init__(self, state: Any, step: Callable[..., Any]):
        self.state, self.t = state, 0
        self.jitted = jax.jit(step, donate_argnums=0)

    def feed(self, g):
        self.t += 1
        self.g = jax.block_until_ready(jax.device_put(g))

    def step(self):
        out = self.jitted(self.state, self.g, jnp.float32(self.t))
        self.updates, self.state = jax.block_until_ready(out)

    def update(self):
        return {path: np.asarray(u) for path, u in self.updates.items()}

    def parts(self):
        leaves = jax.tree_util.tree_leaves_with_path(self.state)
        return [(str(getattr(path[0], "name", path[0])), x.nbytes) for path, x in leaves]


def torch_parts(states: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    """Parts of the state dicts of all parameters; one tensor may be made of several."""
    found = {}
    for state in states:
        for name, x in state.items():
            inner = [(key, getattr(x, key)) for key in getattr(x, "tensor_attrs", ())]
            for key, array in inner or [(name, x)]:
                if hasattr(array, "nbytes"):  # bitsandbytes counts steps in a Python integer
                    found[id(array)] = key, array.nbytes  # and all leaves share its tables
    return list(found.values())


@dataclass(frozen=True)
class Contender:
    name: str
    kind: str  # "ours", "library", or "reference": a format of `benchmarks.codec.formats`
    make: Callable[[Tree], Optimizer]
    packages: tuple[str, ...] = ("jax", "optax")
    format: str | None = None  # a library's in `benchmarks.codec.formats`
    about: str = ""  # what was done to make it run


def _torchao(name: str, params: Tree, turned: bool = False) -> Optimizer:
    import torchao.optim

    return Torch(getattr(torchao.optim, name), params, turned)


def _bitsandbytes(nearest: bool, params: Tree, turned: bool = False) -> Optimizer:
    import bitsandbytes as bnb
    from bitsandbytes.backends.cpu import ops

    loop = Torch(bnb.optim.AdamW8bit, params, turned)
    if nearest:
        store = ops._quant_blockwise_fp32_direct

        def exact(values, *args):  # its path for dtypes that its compiled kernel does not take
            return store(values.double(), *args)

        patch = mock.patch.object(ops, "_quant_blockwise_fp32_direct", exact)
        loop.optimizer.step = patch(loop.optimizer.step)
    return loop


@functools.cache
def _solow():
    """`solo.adamw`, given the modules of torchao by the names they had, and noise of a CPU."""
    import torch
    import torchao.optim as new
    import torchao.utils
    from torchao.optim import quant_utils, subclass_4bit, subclass_8bit

    old = "torchao.prototype.low_bit_optim"
    modules = {old: new, f"{old}.quant_utils": quant_utils}
    modules |= {f"{old}.subclass_4bit": subclass_4bit, f"{old}.subclass_8bit": subclass_8bit}
    for name, module in modules.items():
        sys.modules.setdefault(name, module)
    recent = {"TORCH_VERSION_AT_LEAST_2_4": True, "TORCH_VERSION_AT_LEAST_2_5": True}
    with mock.patch.multiple(torchao.utils, create=True, **recent):
        import solo.adamw
        import solo.base
        from solo.quantizer import utils

    def seed():
        utils.adaq_generator = torch.Generator().manual_seed(0)

    solo.base.init_adaq_generator = seed  # its own asks for GPU 0
    return solo.adamw


def _solo(bits: tuple[int, int], params: Tree, turned: bool = False) -> Optimizer:
    return Torch(functools.partial(_solow().AdamWQ, bits=bits), params, turned)


def _flashoptim(params: Tree) -> Optimizer:
    import flashoptim_jax

    options = {"weight_decay": 0.0, "master_weight_bits": None, "fused": False}
    tx = flashoptim_jax.flash_adamw(1.0, B1, B2, EPS, **options)

    def step(state, g, t):
        p, state = tx.step(jax.tree.map(jnp.zeros_like, g), state, g)
        return jax.tree.map(jnp.negative, p), state

    return Jax(tx.init(params), step)


def _reference(item: formats.Format, params: Tree) -> Optimizer:
    peer = codec.Peer(item)
    return Jax(peer.init(params), peer.step)


def _ours(precision: Any, params: Tree) -> Optimizer:
    tx = stquant.scale_by_adam_q(b1=B1, b2=B2, eps=EPS, precision=precision)
    return Jax(tx.init(params), lambda state, g, t: tx.update(g, state))


def contenders() -> list[Contender]:
    part = functools.partial
    ao, bnb, solo = ("torchao", "torch"), ("bitsandbytes", "torch"), ("solow", "torchao", "torch")
    renamed = "torchao's modules under their former names; noise from a generator on the CPU"
    library = part(Contender, kind="library")
    out = [
        library(
            "torchao AdamW8bit",
            make=part(_torchao, "AdamW8bit"),
            packages=ao,
            format="bitsandbytes 8-bit",  # the same levels and blocks
        ),
        library("torchao AdamWFp8", make=part(_torchao, "AdamWFp8"), packages=ao),
        library(
            "torchao AdamW4bit",
            make=part(_torchao, "AdamW4bit"),
            packages=ao,
            format="torchao 4-bit",
        ),
        library(
            "bitsandbytes AdamW8bit",
            make=part(_bitsandbytes, False),
            packages=bnb,
            format="bitsandbytes 8-bit",
        ),
        library(
            "bitsandbytes AdamW8bit, nearest",
            make=part(_bitsandbytes, True),
            packages=bnb,
            format="bitsandbytes 8-bit",
            about="rounded to the nearest level by its own path for other dtypes than float32",
        ),
        library(
            "FlashOptim flash_adamw",
            make=_flashoptim,
            packages=("flashoptim-jax", "jax"),
            format="FlashOptim 8-bit",
            about="fused=False: the kernel needs a GPU",
        ),
        *(
            library(name, make=part(_solo, bits), packages=solo, format=name, about=renamed)
            for name, bits in (("SOLO 4/2", (4, 2)), ("SOLO 2/2", (2, 2)))
        ),
    ]
    for item in [item for item in out if "torch" in item.packages]:
        turned, name = part(item.make, turned=True), f"{item.name}, [out, in]"
        out.append(replace(item, name=name, make=turned, format=None))
    used = {item.format for item in out}
    for item in formats.PEERS:
        if item.name in used:
            out.append(Contender(f"reference {item.name}", "reference", part(_reference, item)))
    ours = {f"Budget {bits:g}": stquant.Budget(bits) for bits in BUDGETS}
    ours |= {f"Fixed {mu}, {nu}": stquant.Fixed(mu, nu) for mu, nu in PAIRS}
    return out + [Contender(name, "ours", part(_ours, how)) for name, how in ours.items()]


def measure(loop: Optimizer, stream: Tree, exact: Tree, timed: bool = True) -> dict[str, Any]:
    """Steps through a stream; the error after `codec.FIRST` steps, bytes of the state, seconds."""
    steps = len(next(iter(stream.values())))
    distance = energy = 0.0
    seconds = []
    for i in range(steps):
        loop.feed({path: g[i] for path, g in stream.items()})
        start = time.perf_counter()
        loop.step()
        seconds.append(time.perf_counter() - start)
        if i >= codec.FIRST:
            for path, u in loop.update().items():
                right = exact[path][i].astype(np.float64)
                distance += float(np.sum((u - right) ** 2))
                energy += float(np.sum(right**2))
    if not np.isfinite(distance):
        raise FloatingPointError(f"updates that are not finite after step {codec.FIRST}")
    parts, elements = loop.parts(), sum(g[0].size for g in stream.values())
    grows = sum(size for name, size in parts if name not in CONSTANT)
    held = sum(size for _, size in parts)
    return {
        "elements": elements,
        "state_bytes": held,
        "bits_held": 8 * held / (2 * elements),
        "bits": 8 * grows / (2 * elements),
        "error": distance / energy,
        "seconds_per_step": float(np.median(seconds[codec.FIRST :])) if timed else None,
    }


def run(item: Contender, stream: Tree, exact: Tree, timed: bool = True) -> dict[str, Any]:
    """A row: what was measured, or why nothing was."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    try:
        versions |= {name: version(name) for name in item.packages}
    except PackageNotFoundError as error:
        return {"status": f"not installed: {error.name}"}
    where = {
        "versions": versions,
        "cpu": _io.cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    params = {path: jnp.zeros(g.shape[1:]) for path, g in stream.items()}
    try:
        found = measure(item.make(params), stream, exact, timed)
    except Exception as error:
        if item.kind != "library":  # ours is to work
            raise
        return {"status": f"failed: {type(error).__name__}: {error}", **where}
    if item.kind == "reference":  # whose codes are a byte each, whatever their width
        named = next(x for x in formats.PEERS if x.name == item.name.removeprefix("reference "))
        found["bits"] = codec.Peer(named).bits({}, params)
        found["bits_held"] = found["state_bytes"] = found["seconds_per_step"] = None
    return {"status": "measured", **found, **where}


def measured(rows: list[dict], stream: str, kind: str) -> list[dict]:
    """Rows with an error, by bits."""
    here = [r for r in rows if r["stream"] == stream and r["kind"] == kind]
    return sorted((r for r in here if r["status"] == "measured"), key=lambda r: r["bits"])


def standing(rows: list[dict], stream: str) -> list[dict]:
    """Of every library's optimizer: the best of ours whose whole state takes no more bits."""
    out = []
    for row in measured(rows, stream, "library"):
        fit = [r for r in measured(rows, stream, "ours") if r["bits_held"] <= row["bits"]]
        best = min(fit, key=lambda r: r["error"], default=None)
        out.append({"library": row, "ours": best})
    return out


def agreement(rows: list[dict], stream: str) -> list[dict]:
    """Of every library's optimizer that `benchmarks.codec.formats` has: both errors."""
    known = {r["name"]: r for r in measured(rows, stream, "reference")}
    pairs = [(r, known.get(f"reference {r['format']}")) for r in measured(rows, stream, "library")]
    return [{"library": row, "reference": other} for row, other in pairs if other]


def show(rows: list[dict], stream: str) -> list[Table]:
    style = {"ours": "bold", "library": "cyan", "reference": ""}
    every = Table("optimizer", "bits", "bits held", "error", "ms per step", title=stream)
    here = [row for row in rows if row["stream"] == stream]
    for row in sorted(here, key=lambda row: row.get("bits", np.inf)):
        if row["status"] != "measured":
            every.add_row(escape(row["name"]), "", "", escape(row["status"]), "", style="red")
            continue
        held = f"{row['bits_held']:.3f}" if row["bits_held"] else ""
        ms = f"{1e3 * row['seconds_per_step']:.2f}" if row["seconds_per_step"] else ""
        cells = escape(row["name"]), f"{row['bits']:.3f}", held, f"{row['error']:.3g}", ms
        every.add_row(*cells, style=style[row["kind"]])
    best = Table("optimizer", "bits", "error", "ours at no more bits", "held", "error", "ratio")
    for pair in standing(rows, stream):
        theirs, ours = pair["library"], pair["ours"]
        cells = escape(theirs["name"]), f"{theirs['bits']:.3f}", f"{theirs['error']:.3g}"
        if ours is None:
            best.add_row(*cells, "none", "", "", "")
            continue
        ratio = f"{theirs['error'] / ours['error']:.3g}"
        best.add_row(
            *cells, ours["name"], f"{ours['bits_held']:.3f}", f"{ours['error']:.3g}", ratio
        )
    same = Table("optimizer", "error", "format of benchmarks.codec.formats", "error", "ratio")
    for pair in agreement(rows, stream):
        theirs, other = pair["library"], pair["reference"]
        errors = theirs["error"], other["error"]
        same.add_row(
            escape(theirs["name"]),
            f"{errors[0]:.4g}",
            theirs["format"],
            f"{errors[1]:.4g}",
            f"{errors[0] / errors[1]:.3f}",
        )
    return [every, best, same]


def plot(rows: list[dict], path: Path) -> None:
    """Error against bits, a panel per stream: ours as a front, the libraries' as named points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in STREAMS if measured(rows, name, "ours")]
    size = (5 * len(names) + 3, 4.5)  # the legend stands beside
    _, panels = plt.subplots(1, len(names), figsize=size, squeeze=False, sharey=True)
    for panel, name in zip(panels[0], names, strict=True):
        ours = [r | {"bits": r["bits_held"]} for r in measured(rows, name, "ours")]
        best = codec.front(ours)
        panel.plot(*_points(ours), ".", color="lightgray", zorder=0)
        line = {"drawstyle": "steps-post", "color": "black", "markersize": 3}
        panel.plot(*_points(best), "o-", **line, label="stquant_jax")
        for i, row in enumerate(measured(rows, name, "library")):
            panel.plot(*_points([row]), "Xsd^vP*<>ph"[i % 11], markersize=8, label=row["name"])
        panel.set(yscale="log", title=name, xlabel="bits per state element")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("update error, closed loop")
    panels[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def _points(rows: list[dict]) -> tuple[list[float], list[float]]:
    return [row["bits"] for row in rows], [row["error"] for row in rows]


def _done(row: dict, timed: bool) -> bool:
    no_time = timed and row["kind"] != "reference" and row.get("seconds_per_step") is None
    return row["status"] == "measured" and not no_time


def _arguments() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add, names = parser.add_argument, [item.name for item in contenders()]
    add("--streams", nargs="+", default=list(STREAMS), choices=STREAMS)
    add("--only", nargs="+", default=names, choices=names, metavar="NAME", help="default: all")
    add("--again", action="store_true", help="measure also what the JSON file has")
    add("--untimed", action="store_true", help="write no seconds")
    add("--json", type=Path, default=_io.RESULTS / "peers.json")
    add("--plot", type=Path, default=_io.RESULTS / "peers.png")
    streams.add_arguments(parser)
    return parser.parse_args()


def main():
    args = _arguments()
    rows = {(r["stream"], r["name"]): r for r in _io.read_json(args.json).get("results", [])}
    timed = not args.untimed
    for name in args.streams:
        todo = [item for item in contenders() if item.name in args.only]
        if not args.again:
            known = {item.name: rows.get((name, item.name)) for item in todo}
            todo = [x for x in todo if not (known[x.name] and _done(known[x.name], timed))]
        stream = streams.load(name, seed=args.seed, cache=args.cache) if todo else {}
        stream = {path: g for path, g in stream.items() if g[0].size >= args.min_size}
        exact = codec.exact_adam(stream)["u"]
        for item in tqdm(todo, desc=name):
            about = {"stream": name, "name": item.name, "kind": item.kind}
            about |= {"format": item.format, "about": item.about}
            row, key = about | run(item, stream, exact, timed), (name, item.name)
            # What is lacking here may have been measured elsewhere.
            if row["status"] == "measured" or key not in rows:
                rows[key] = row
            record = {"environment": _io.environment(), "results": list(rows.values())}
            _io.write_json(args.json, record)
        for table in show(list(rows.values()), name):
            Console(width=120).print(table)
    plot(list(rows.values()), args.plot)


if __name__ == "__main__":
    main()
