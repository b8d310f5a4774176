"""Programs compiled for TPUs that are not there: libtpu does so on any machine."""

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Sharding, SingleDeviceSharding

# The smallest that libtpu describes: one host, four chips.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def devices(chip: str) -> list[jax.Device]:
    """Devices to compile for: a core of a v4 each, a chip of all others."""
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices


def shapes(tree: Any, sharding: Sharding) -> Any:
    """The shapes of a tree of arrays, to be placed there."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_for(chip: str, f: Callable, *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """``f`` compiled for one device; ``args`` are arrays, or shapes of arrays."""
    device = devices(chip)[0]
    with jax.default_device(device):  # lowering asks it for which chip a kernel is
        jitted = jax.jit(f, donate_argnums=donate)
        return jitted.lower(*shapes(args, SingleDeviceSharding(device))).compile()


def copies(program: Any, array: Any) -> int:
    """Instructions that copy an array of this shape, whatever its dtype is by then. Not those that
    move a small one into the chip's own memory, S(1), for a while.
    """
    shape = ",".join(map(str, array.shape))
    found = re.findall(rf" = (\(?\w+\[{shape}\].*) copy(?:-start)?\(", program.as_text())
    return sum("S(1)" not in result for result in found)
