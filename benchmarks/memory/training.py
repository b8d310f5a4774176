"""Bytes of a whole training step: what lies there between steps, and the most during one.

Loss, gradient, update and its application in one program, parameters and state donated, of
transformers of the shapes of GPT-2 and ViT, every block under `jax.checkpoint`. Programs are
compiled for shapes alone; nothing is allocated or run. Of each the compiler says

    arguments, outputs, aliased, temporaries
                    bytes; what is aliased is counted twice among the former two
    peak            arguments + outputs - aliased + temporaries
    peak, reported  the compiler's own figure; on a CPU it has no temporaries
    realized        (peak of float32 AdamW - peak) / (its state - state): how much of what the state
                    saves the step saves as well; once more by the reported peak, where it is one

Parameters are float32 unless --params says bfloat16. Arithmetic is bfloat16 on TPUs and float32 on
a CPU, whose XLA would make float32 copies of all that is not. Layers are scanned, each leaf that of
all blocks, or unrolled, a leaf for each block. A TPU's compiler orders a program by time and looks
after memory only where it is scarce: what a step saves shows in batches that nearly fill the chip.
Where it is not, even the order of a step's results counts, parameters or the state first.

    python -m benchmarks.memory.training                # resumes where it stopped; compiles for all
    python -m benchmarks.memory.training --models gpt2 --platforms cpu --batches 1 8
    python -m benchmarks.memory.training --platforms device --run # on the accelerator that is there

Platforms: cpu, TPUs that are not there by name (`pip install '.[aot]'`), or the default device,
where --run also takes some steps and reads the device's own statistics.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks import _io
from benchmarks.speed import aot

Params = dict[str, Any]
Step = Callable[[Any, Any, Any], tuple[Any, Any]]  # gradients, state, parameters -> new ones

RATE = 1e-3
STEPS = 3  # of --run


@dataclasses.dataclass(frozen=True)
class Model:
    """A pre-norm transformer; a patch of 0 is a causal one of words, its head tied."""

    layers: int
    width: int
    heads: int
    words: int  # or classes
    length: int  # words or patches of a sequence
    patch: int = 0


MODELS = {
    "gpt2": Model(12, 768, 12, 50257, 1024),
    "gpt2-medium": Model(24, 1024, 16, 50257, 1024),
    "gpt2-xl": Model(48, 1600, 25, 50257, 1024),
    "vit-b16": Model(12, 768, 12, 1000, 196, 16),
    "vit-l16": Model(24, 1024, 16, 1000, 196, 16),
}


def shapes_of(model: Model, unrolled: bool) -> Params:
    """Shapes of the parameters, with the leaves of `benchmarks.shapes`."""
    d = model.width
    block = {f"ln_{i}.{name}": (d,) for i in (1, 2) for name in ("scale", "bias")}
    kernels = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    for name, shape in kernels.items():
        block |= {f"{name}.kernel": shape, f"{name}.bias": shape[1:]}
    if unrolled:
        blocks: Any = tuple(dict(block) for _ in range(model.layers))
    else:
        blocks = {name: (model.layers, *shape) for name, shape in block.items()}
    tree = {"blocks": blocks, "ln_f.scale": (d,), "ln_f.bias": (d,)}
    if model.patch:
        tree |= {"cls": (1, 1, d), "position": (1, model.length + 1, d)}
        tree |= {"patch.kernel": (model.patch, model.patch, 3, d), "patch.bias": (d,)}
        return tree | {"head.kernel": (d, model.words), "head.bias": (model.words,)}
    return tree | {"embedding": (model.words, d), "position": (model.length, d)}


def params_of(model: Model, unrolled: bool, dtype: Any) -> Params:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes_of(model, unrolled),
        is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], int),
    )


def batch_of(model: Model, batch: int) -> Any:
    """Words and the ones after them, or images and classes."""
    if not model.patch:
        return jax.ShapeDtypeStruct((batch, model.length + 1), jnp.int32)
    side = model.patch * round(model.length**0.5)
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    return images, jax.ShapeDtypeStruct((batch,), jnp.int32)


# --- the model ---


def layer_norm(x: jax.Array, w: Params, name: str) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = jax.nn.standardize(wide, epsilon=1e-5)
    return (wide * w[f"{name}.scale"] + w[f"{name}.bias"]).astype(x.dtype)


def dense(x: jax.Array, w: Params, name: str) -> jax.Array:
    return x @ w[f"{name}.kernel"].astype(x.dtype) + w[f"{name}.bias"].astype(x.dtype)


def block(model: Model, x: jax.Array, w: Params) -> jax.Array:
    q, k, v = (
        part.reshape(*x.shape[:2], model.heads, -1)
        for part in jnp.split(dense(layer_norm(x, w, "ln_1"), w, "qkv"), 3, axis=-1)
    )
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=not model.patch)
    x = x + dense(mixed.reshape(x.shape), w, "out")
    return x + dense(jax.nn.gelu(dense(layer_norm(x, w, "ln_2"), w, "up")), w, "down")


def loss_of(model: Model, dtype: Any, params: Params, batch: Any) -> jax.Array:
    """Mean cross-entropy."""
    if model.patch:
        images, targets = batch
        kernel, size = params["patch.kernel"].astype(dtype), (model.patch, model.patch)
        order = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            images.astype(dtype), kernel, size, "VALID", dimension_numbers=order
        )
        x = x.reshape(len(images), model.length, model.width) + params["patch.bias"].astype(dtype)
        first = jnp.broadcast_to(params["cls"].astype(dtype), (len(images), 1, model.width))
        x = jnp.concatenate([first, x], axis=1)
    else:
        words, targets = batch[:, :-1], batch[:, 1:]
        x = params["embedding"][words].astype(dtype)
    x = x + params["position"].astype(dtype)
    run = jax.checkpoint(functools.partial(block, model))
    if isinstance(params["blocks"], tuple):
        for w in params["blocks"]:
            x = run(x, w)
    else:
        x, _ = jax.lax.scan(lambda x, w: (run(x, w), None), x, params["blocks"])
    x = layer_norm(x, params, "ln_f")
    logits = (
        dense(x[:, 0], params, "head") if model.patch else x @ params["embedding"].T.astype(dtype)
    )
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


# --- optimizers: how each is made for a platform's backend, and how it steps ---


def applied(tx: optax.GradientTransformation) -> tuple[Callable, Step]:
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def ours(bits: float, backend: str | None) -> Any:
    storage = stquant.Storage(backend=backend)
    return stquant.adamw(RATE, precision=stquant.Budget(bits), storage=storage)


def fused(bits: float, backend: str | None) -> tuple[Callable, Step]:
    """bfloat16 parameters are rounded at random."""
    tx = ours(bits, backend)
    return tx.init, functools.partial(stquant.fused_update, tx, stochastic_rounding=True)


def leafwise(bits: float) -> tuple[Callable, Step]:
    budget = stquant.Budget(bits)
    return applied(stquant.quantize_state(optax.adamw(RATE), budget, leafwise=True))


def flashoptim(backend: str | None, wide: bool) -> tuple[Callable, Step]:
    """Its kernels are for GPUs; elsewhere its step is XLA's. Of narrow parameters its state has 8
    bits more.

    Raises:
      ImportError: flashoptim-jax is not installed.
    """
    from flashoptim_jax import flash_adamw

    kernels = backend is None and jax.default_backend() == "gpu"
    tx = flash_adamw(RATE, fused=kernels, master_weight_bits=None if wide else 24)

    def step(grads, state, params):
        return tx.step(params, state, grads)

    return tx.init, step


BASE = "optax.adamw"
# Of a backend, and of whether parameters are float32.
OPTIMIZERS: dict[str, Callable[[str | None, bool], tuple[Callable, Step]]] = {
    BASE: lambda *_: applied(optax.adamw(RATE)),
    "optax.adamw, mu bfloat16": lambda *_: applied(optax.adamw(RATE, mu_dtype=jnp.bfloat16)),
    "stquant.adamw 5": lambda backend, _: applied(ours(5.0, backend)),
    "stquant.adamw 4": lambda backend, _: applied(ours(4.0, backend)),
    "stquant.adamw 3": lambda backend, _: applied(ours(3.0, backend)),
    "fused_update 5": lambda backend, _: fused(5.0, backend),
    "quantize_state 8, leafwise": lambda *_: leafwise(8.0),
    "flashoptim-jax": flashoptim,
}


# --- one row, in a process of its own ---


@dataclasses.dataclass(frozen=True)
class Row:
    platform: str
    model: str
    batch: int
    layers: str
    params: str
    first: str  # of what a step returns: "params" or "state"
    optimizer: str

    @property
    def key(self) -> str:
        return " | ".join(map(str, dataclasses.astuple(self)))

    @property
    def setting(self) -> tuple:
        """All but the optimizer."""
        return dataclasses.astuple(self)[:-1]


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def backend_of(platform: str) -> str | None:
    return {"cpu": "xla", "device": None}.get(platform, "pallas_tpu")


def program_of(row: Row) -> tuple[Callable, tuple[Any, Any, Any], tuple[Callable, Step]]:
    """A training step, the shapes of its arguments, and the optimizer's functions."""
    model = MODELS[row.model]
    dtype = jnp.float32 if row.platform == "cpu" else jnp.bfloat16
    init, update = OPTIMIZERS[row.optimizer](backend_of(row.platform), row.params == "float32")
    loss = functools.partial(loss_of, model, dtype)

    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        params, state = update(grads, state, params)
        return (params, state, value) if row.first == "params" else (state, params, value)

    params = params_of(model, row.layers == "unrolled", jnp.dtype(row.params))
    return step, (params, jax.eval_shape(init, params), batch_of(model, row.batch)), (init, update)


def measure(row: Row, run: bool = False) -> dict[str, Any]:
    """What the compiler says of a row's step; with ``run`` what the device says, too."""
    step, args, (init, _) = program_of(row)
    if row.platform in aot.TOPOLOGIES:
        compiled = aot.compile_for(row.platform, step, *args, donate=(0, 1))
    else:
        device = jax.devices("cpu" if row.platform == "cpu" else None)[0]
        placed = aot.shapes(args, SingleDeviceSharding(device))
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*placed)
        # Code for a CPU, which does not run here, is written after memory is laid out.
        options = {"xla_backend_optimization_level": 0} if row.platform == "cpu" else None
        compiled = lowered.compile(options)
    memory = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    found = {
        "leaves": len(jax.tree.leaves(args[0])),
        "elements": sum(x.size for x in jax.tree.leaves(args[0])),
        "params": nbytes(args[0]),
        "state": nbytes(args[1]),
        **parts,
        "peak": sum(parts.values()) - 2 * parts["aliased"],
        "peak_reported": getattr(memory, "peak_memory_in_bytes", 0) or None,
    }
    if row.platform == "device":
        found["device"] = jax.devices()[0].device_kind
    return found | (device_statistics(compiled, args, init, row.first) if run else {})


def device_statistics(
    compiled: Any, args: tuple[Any, Any, Any], init: Callable, first: str
) -> dict[str, Any]:
    """The most that this process has had on the device, before and after some steps.

    Raises:
      ValueError: the device keeps no statistics, as CPUs do not.
    """
    device = jax.devices()[0]
    if not device.memory_stats():
        raise ValueError(f"--run on {device.device_kind}: expected a device with memory_stats()")

    def zeros(shapes):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    params = jax.jit(lambda: zeros(args[0]))()
    state = jax.jit(init)(params)
    batch = zeros(args[2])
    jax.block_until_ready((params, state, batch))
    before = device.memory_stats()
    for _ in range(STEPS):
        *new, loss = compiled(params, state, batch)
        params, state = new if first == "params" else reversed(new)
    jax.block_until_ready((params, state, loss))
    after = device.memory_stats()
    return {
        "device_in_use": before["bytes_in_use"],
        "device_peak_of_init": before["peak_bytes_in_use"],
        "device_peak": after["peak_bytes_in_use"],
    }


def attempt(row: Row, run: bool) -> dict[str, Any]:
    """`measure`, or why there is nothing: a library that is not installed, a chip too small."""
    try:
        return measure(row, run)
    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
        return {"not_measured": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def in_process(row: Row, limit: float, run: bool) -> dict[str, Any]:
    """`attempt` in a process that may take so many seconds: compilers cannot be interrupted."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory.training",
        "--worker",
        json.dumps(row.__dict__),
    ]
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if row.platform != "device":
        environment["JAX_PLATFORMS"] = "cpu"
    command += ["--run"] * run
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"not_measured": f"takes more than {limit:g} s"}
    if done.returncode:
        raise SystemExit(f"{row.key} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- tables and plot ---


def realized(found: dict[str, Any], base: dict[str, Any], peak: str = "peak") -> float:
    """Of the bytes that the state saves, the share that the peak saves."""
    return (base[peak] - found[peak]) / (base["state"] - found["state"])


def settings(results: dict[str, Any]) -> Iterator[tuple[tuple, dict[str, dict[str, Any]]]]:
    """What is the same for several optimizers, and what was found for each of them."""
    rows = sorted(
        (Row(**found["row"]) for found in results.values()), key=lambda row: str(row.setting)
    )
    for setting, group in itertools.groupby(rows, key=lambda row: row.setting):
        found = {row.optimizer: results[row.key] for row in group}
        yield setting, {name: found[name] for name in OPTIMIZERS if name in found}


def show(results: dict[str, Any]) -> Table:
    """A row per program."""
    table = Table("platform, model, batch, layers, params, first", "optimizer")
    for name in ("params", "state", "arguments", "aliased", "temporaries", "peak", "reported"):
        table.add_column(f"{name}, MB", justify="right")
    table.add_column("realized, %", justify="right")
    table.add_column("... as reported", justify="right")
    for setting, found in settings(results):
        for name, row in found.items():
            where = " ".join(map(str, setting)) if name == next(iter(found)) else ""
            if "not_measured" in row:
                table.add_row(where, name, f"not measured: {row['not_measured'][:60]}")
                continue
            keys = "params", "state", "arguments", "aliased", "temporaries", "peak", "peak_reported"
            cells = [f"{row[key] / 1e6:.1f}" if row[key] else "" for key in keys]
            base = found.get(BASE, {})
            compared = name != BASE and "peak" in base
            cells.append(f"{100 * realized(row, base):.1f}" if compared else "")
            reported = compared and setting[0] != "cpu" and row["peak_reported"]
            cells.append(f"{100 * realized(row, base, 'peak_reported'):.1f}" if reported else "")
            table.add_row(where, name, *cells, end_section=name == list(found)[-1])
    return table


def plot(results: dict[str, Any], path: Path) -> None:
    """A panel per setting: what a step has at its peak."""
    from matplotlib.figure import Figure

    groups = [
        (setting, measured)
        for setting, found in settings(results)
        if len(measured := {k: x for k, x in found.items() if "peak" in x}) > 1
    ]
    columns = 3
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(13, 2.4 * lines), layout="constrained")
    for i, (setting, found) in enumerate(groups):
        axes = figure.add_subplot(lines, columns, i + 1)
        left = [0.0] * len(found)
        for part in ("params", "state", "temporaries"):
            label = part if part != "temporaries" else "temporaries: gradients, activations"
            widths = [row[part] / 1e9 for row in found.values()]
            axes.barh(list(found), widths, left=left, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)
        platform, model, batch, layers, params, first = setting
        title = f"{model}, {platform}, batch {batch}, {layers}, {params}"
        axes.set_title(title + ", state first" * (first == "state"), fontsize=8)
        axes.set_xlabel("GB", fontsize=7)
        if i == 0:
            axes.legend(fontsize=6)
    figure.savefig(path, dpi=110)


# --- which rows, and the rest ---

PAIR = (BASE, "stquant.adamw 5")


def default_rows() -> list[Row]:
    """Those worth their compilation, the most telling first."""
    todo: list[tuple[str, str, int, str, str, tuple[str, ...]]] = [
        ("cpu", "gpt2", 8, "scanned", "float32", (*PAIR, "fused_update 5", "flashoptim-jax")),
        ("cpu", "gpt2", 1, "scanned", "float32", PAIR),
        ("v5e", "gpt2", 8, "scanned", "float32", (*PAIR, "fused_update 5")),
        *(("cpu", name, 8, "scanned", "float32", PAIR) for name in ("vit-b16", "gpt2-medium")),
        ("v5e", "gpt2-medium", 8, "scanned", "float32", PAIR),
        *(("cpu", name, 8, "scanned", "float32", PAIR) for name in ("gpt2-xl", "vit-l16")),
        ("cpu", "gpt2", 8, "scanned", "float32", tuple(OPTIMIZERS)),
        ("v5p", "gpt2-xl", 8, "scanned", "float32", PAIR),
        ("v5e", "vit-b16", 8, "scanned", "float32", PAIR),
        ("cpu", "gpt2", 8, "scanned", "bfloat16", (BASE, "fused_update 5", "flashoptim-jax")),
        ("v5e", "gpt2", 8, "scanned", "bfloat16", (BASE, "fused_update 5")),
        ("v5e", "gpt2", 1, "scanned", "float32", PAIR),
        ("cpu", "gpt2", 8, "unrolled", "float32", PAIR),
        ("v5e", "vit-l16", 8, "scanned", "float32", PAIR),
        *(("cpu", name, 64, "scanned", "float32", PAIR) for name in ("vit-b16", "vit-l16")),
        *(("v5e", "gpt2-medium", batch, "scanned", "float32", PAIR) for batch in (16, 24)),
    ]
    rows = [Row(*setting, "params", name) for *setting, names in todo for name in names]
    turned = [row for row in rows if (row.platform, row.model) == ("v5e", "gpt2-medium")]
    rows += [dataclasses.replace(row, first="state") for row in turned]
    return list(dict.fromkeys(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    platforms = ("cpu", "device", *aot.TOPOLOGIES)
    add("--platforms", nargs="+", choices=platforms, help="with any of these six: all products")
    add("--models", nargs="+", choices=MODELS, help="default gpt2")
    add("--batches", nargs="+", type=int, help="sequences or images, default 8")
    add("--layers", nargs="+", choices=("scanned", "unrolled"), help="default scanned")
    add("--params", nargs="+", choices=("float32", "bfloat16"), help="default float32")
    add("--first", nargs="+", choices=("params", "state"), help="result, default params")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, help="default all")
    add("--limit", type=float, default=600.0, help="seconds for a program, default 600")
    add("--run", action="store_true", help="run it, too, with --platforms device")
    add("--json", type=Path, default=_io.RESULTS / "memory.json")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run and not args.worker and args.platforms != ["device"]:
        parser.error(f"--run with --platforms {args.platforms}: expected device alone")
    if args.batches and min(args.batches) < 1:
        parser.error(f"--batches {args.batches}: expected at least 1")
    if args.limit <= 0:
        parser.error(f"--limit {args.limit}: expected more than 0 seconds")
    if args.worker:
        print(json.dumps(attempt(Row(**json.loads(args.worker)), args.run)))
        return
    jax.config.update("jax_platforms", "cpu")  # the accelerator is the workers'
    rows = default_rows()
    choices = args.platforms, args.models, args.batches, args.layers, args.params, args.first
    if any(choices):
        defaults = ["cpu"], ["gpt2"], [8], ["scanned"], ["float32"], ["params"]
        chosen = [choice or default for choice, default in zip(choices, defaults, strict=True)]
        rows = [Row(*x) for x in itertools.product(*chosen, args.optimizers or OPTIMIZERS)]
    elif args.optimizers:
        rows = [row for row in rows if row.optimizer in args.optimizers]

    record = {"environment": None, "results": {}} | _io.read_json(args.json)
    results = record["results"]
    todo = [row for row in rows if args.run or "peak" not in results.get(row.key, {})]
    for row in tqdm(todo, disable=None):
        results[row.key] = {"row": row.__dict__, **in_process(row, args.limit, args.run)}
        record["environment"] = _io.environment() | {"libtpu": version_of("libtpu")}
        record["environment"]["flashoptim-jax"] = version_of("flashoptim-jax")
        _io.write_json(args.json, record)
    Console(width=200).print(show(results))
    plot(results, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
