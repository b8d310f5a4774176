"""The demo's model trained on many meshes: the same parameters and state, bit for bit.

    python -m benchmarks.distributed.sharded

Gradients are recorded on one device and fed to all, since a mesh adds up a batch in an order of
its own. Precision moves every ten steps. Half way each run saves its state and goes on with what
the run before it has saved, on another mesh.
"""

import argparse
import json
import sysconfig
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks._io import RESULTS, environment, write_json
from examples import train_gpt

jax.config.update("jax_num_cpu_devices", 8)

# Wider than the demo, so that eight devices have whole tiles each.
CONFIG = train_gpt.Config(layers=2, features=256)
STEPS, HALF = 50, 25
BUDGET = stquant.Budget(5.0, interval=10, warmup=0)


def specs(params: Any, wide: Any, deep: Any) -> Any:
    """By the shape of a kernel: matrices along two axes of the mesh, vectors along one."""

    def of(x):
        if x.ndim < 2:
            return P(wide)
        return P(wide, deep) if x.shape[0] <= x.shape[1] else P(deep, wide)

    return jax.tree.map(of, params)


def shardings(params: Any) -> dict[str, stquant.Sharding | None]:
    def mesh(shape, *names, types=AxisType.Auto):
        return jax.make_mesh(shape, names, axis_types=(types,) * len(names))

    eight, explicit = mesh((8,), "a"), mesh((2, 2, 2), "a", "b", "c", types=AxisType.Explicit)
    return {
        "one device": None,
        "(8,) FSDP": stquant.Sharding(eight, specs(params, "a", None)),
        "(8,) replicated, ZeRO-1": stquant.Sharding(eight, P(), zero_axis="a"),
        "(4, 2) FSDP and tensor": stquant.Sharding(mesh((4, 2), "a", "b"), specs(params, "a", "b")),
        "(2, 2, 2) data, FSDP and tensor, Explicit": stquant.Sharding(
            explicit, specs(params, "b", "c")
        ),
    }


def recorded(params: Any, graph: Any) -> list[Any]:
    """Gradients of a run on one device."""
    text = train_gpt.load_corpus(Path(sysconfig.get_path("stdlib")))[0]
    tx = stquant.adamw(1e-3, precision=BUDGET)
    state, random, grads = tx.init(params), np.random.default_rng(0), []

    @jax.jit
    def step(params, state, batch):
        g = jax.grad(lambda p: train_gpt.loss_of(graph, p, batch))(params)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state, g

    for _ in tqdm(range(STEPS), desc="gradients", disable=None):
        starts = random.integers(0, text.size - CONFIG.length, CONFIG.batch)
        batch = train_gpt.windows(text, starts, CONFIG.length)
        params, state, g = step(params, state, batch)
        grads.append(jax.device_get(g))
    return grads


class Run:
    """A run on one mesh."""

    def __init__(self, params: Any, sharding: stquant.Sharding | None):
        self.sharding, self.shapes = sharding, params
        self.tx = stquant.adamw(1e-3, weight_decay=0.1, precision=BUDGET, sharding=sharding)
        self.params = self.put(params)
        self.state = self.tx.init(self.params)

        def step(params, state, grads):
            updates, state = self.tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))

    def put(self, tree: Any) -> Any:
        if self.sharding is None:
            return jax.tree.map(jax.numpy.asarray, tree)
        mesh, by = self.sharding.mesh, self.sharding.specs
        by = jax.tree.map(lambda _: by, tree) if isinstance(by, P) else by
        named = jax.tree.map(lambda x, spec: jax.NamedSharding(mesh, spec), tree, by)
        return jax.device_put(tree, named)

    def train(self, grads: list[Any]) -> None:
        for g in grads:
            self.params, self.state = self.step(self.params, self.state, self.put(g))
            jax.block_until_ready(self.params)  # or devices that are threads wait for one another

    def saved(self) -> Any:
        state = stquant.to_portable(self.state, self.shapes, BUDGET, sharding=self.sharding)
        return jax.device_get((self.params, state))

    def restore(self, saved: Any) -> None:
        params, state = saved
        self.params = self.put(params)
        self.state = stquant.from_portable(state, self.shapes, BUDGET, sharding=self.sharding)


def differing(a: Any, b: Any) -> int:
    """Elements of two trees that are not the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return int(sum(np.sum(np.asarray(x) != np.asarray(y)) for x, y in pairs))


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    graph, params = nnx.split(train_gpt.GPT(CONFIG, nnx.Rngs(0)))
    params = jax.device_get(params)
    grads = recorded(params, graph)
    found, first, before = {}, None, None
    for name, sharding in tqdm(shardings(params).items(), desc="meshes", disable=None):
        run = Run(params, sharding)
        run.train(grads[:HALF])
        half = run.saved()
        run.restore(before or half)
        run.train(grads[HALF:])
        final = run.saved()
        first, before = first or (half, final), half
        widths = [saved[1][0]["plan"]["widths"] for saved in (half, final)]
        found[name] = {
            "bits": stquant.plan(params, BUDGET, sharding=sharding).bits,
            "elements": sum(x.size for x in jax.tree.leaves(final)),
            "differing_half_way": differing(half, first[0]),
            "differing_at_the_end": differing(final, first[1]),
            "widths_moved": int(np.sum(widths[0] != widths[1])),
        }
    record = {"environment": environment(), "steps": STEPS, "elements_of": "params and state"}
    write_json(RESULTS / "sharded.json", record | {"meshes": found})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
