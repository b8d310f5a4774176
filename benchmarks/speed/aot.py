"""Programs compiled for TPUs that are not there: libtpu does so on any machine.

    python -m benchmarks.speed.aot

writes what the update's program costs before it runs: seconds to lower and to compile it, bytes of
code and of temporaries, at 148 leaves and at 500. `pip install '.[aot]'` brings libtpu.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Sharding, SingleDeviceSharding
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks._io import RESULTS, environment, write_json
from benchmarks.shapes import SETS, WIDTH, Shapes, blocks, size

# The smallest that libtpu describes: one host, four chips.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def devices(chip: str) -> list[jax.Device]:
    """Devices to compile for: a core of a v4 each, a chip of all others."""
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices


def shapes(tree: Any, sharding: Sharding) -> Any:
    """The shapes of a tree of arrays, to be placed there."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def lower_for(chip: str, f: Callable, *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """``f`` lowered for one device; ``args`` are arrays, or shapes of arrays."""
    device = devices(chip)[0]
    with jax.default_device(device):  # lowering asks it for which chip a kernel is
        jitted = jax.jit(f, donate_argnums=donate)
        return jitted.lower(*shapes(args, SingleDeviceSharding(device)))


def compile_for(chip: str, f: Callable, *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """``f`` compiled for one device."""
    return lower_for(chip, f, *args, donate=donate).compile()


def copies(program: Any, array: Any) -> int:
    """Instructions that copy an array of this shape, whatever its dtype is by then. Not those that
    move a small one into the chip's own memory, S(1), for a while.
    """
    shape = ",".join(map(str, array.shape))
    found = re.findall(rf" = (\(?\w+\[{shape}\].*) copy(?:-start)?\(", program.as_text())
    return sum("S(1)" not in result for result in found)


# --- what a program costs before it runs ---

CHIPS = ("v5e", "v5p", "v6e")
# 148 leaves, and 500: 41 blocks of the same width.
MODELS = {
    "gpt2": SETS["gpt2"],
    "500 leaves": {
        **{path: shape for path, shape in SETS["gpt2"].items() if not path.startswith("h.")},
        **blocks(41),
        **{f"extra.{i}": (WIDTH, WIDTH) for i in range(4)},
    },
}


def cost(chip: str, shapes_of: Shapes) -> dict[str, float]:
    """Seconds and bytes of the update's program, its state donated."""
    tx = stquant.scale_by_adam_q(storage=stquant.Storage(backend="pallas_tpu"))
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes_of.items()}
    state = jax.eval_shape(tx.init, params)
    start = time.perf_counter()
    lowered = lower_for(chip, tx.update, params, state, donate=(1,))
    middle = time.perf_counter()
    program = lowered.compile()
    memory, gradients = program.memory_analysis(), 4 * size(shapes_of)
    return {
        "leaves": len(shapes_of),
        "kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
        "lower_s": round(middle - start, 2),
        "compile_s": round(time.perf_counter() - middle, 2),
        "code_bytes": memory.generated_code_size_in_bytes,
        "temporaries": round(memory.temp_size_in_bytes / gradients, 4),
        "arena_copies": copies(program, state.arena),
    }


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    found = {}
    for model, leaves in tqdm(MODELS.items(), disable=None):
        found[model] = {chip: cost(chip, leaves) for chip in CHIPS}
    record = {"environment": environment() | {"libtpu": version("libtpu")}, "programs": found}
    write_json(RESULTS / "aot.json", record)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
