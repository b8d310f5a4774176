"""Operations per element of the update's arithmetic, as the XLA loop runs it, by kind and by
function: counted from the JAX program of one tile that is full, with codes of nu and without.

    python -m benchmarks.speed.ops

What a compiler makes of them is another matter: it fuses products into sums, and folds constants.
The GPU kernel is counted from its machine code, by `benchmarks.gpu.ptxas`.
"""

import argparse
from collections import Counter

import jax
import jax.numpy as jnp

from benchmarks._io import RESULTS, environment, write_json
from benchmarks.speed.compile import LIBRARY, STAGES
from stquant_jax.backends.block import Codes, update_block
from stquant_jax.codecs import Ops, lattice, levels
from stquant_jax.rules.adam import Adam
from stquant_jax.storage.noise import Dither, keys_of
from stquant_jax.storage.planes import GROUP, LANES, pack, unpack

KINDS = {
    "special": {"div", "sqrt", "rsqrt", "exp", "log"},
    "free": {
        *("broadcast_in_dim", "reshape", "squeeze", "slice", "concatenate", "iota"),
        *("bitcast_convert_type", "stop_gradient", "copy", "dynamic_slice", "transpose"),
    },
}


def tile(widths, window, g, planes, scales, row, numbers):
    """One tile: planes in, planes out, of mu alone or of both moments."""
    mu, nu = (*(unpack(x) for x in planes), None)[:2]
    rule = Adam()
    scalars = rule.prepare(0.9, 0.999, 1e-8, 0.0, numbers)
    lat = lattice(widths[1], window, jnp.float32(0.2))
    group = jax.lax.broadcasted_iota(jnp.uint32, (1, LANES), 1)
    element = jax.lax.broadcasted_iota(jnp.uint32, (GROUP, 1), 0)
    noise = Dither(keys_of(0, numbers, numbers), group, element)
    codes, valid = Codes(mu, nu, *scales, row), jnp.ones((GROUP, 1))
    round_row, lev = numbers % GROUP, levels(widths[0])
    update, new, terms = update_block(
        rule, scalars, g, codes, valid, lev, lat, noise, round_row, Ops()
    )
    return update, [pack(x) for x in new[:2] if x is not None], new[2:], terms


def count(jaxpr, found: Counter, outer: str = "") -> None:
    """Elements that each kind of operation makes, by (stage, kind)."""
    for equation in jaxpr.eqns:
        stage = outer or stage_of(equation)
        inner = [x for x in equation.params.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
        for x in inner:
            count(getattr(x, "jaxpr", x), found, stage)
        name = equation.primitive.name
        if inner or name in KINDS["free"]:
            continue
        reads = name.startswith("reduce")
        value = (equation.invars if reads else equation.outvars)[0].aval
        kind = "special" if name in KINDS["special"] else "float"
        if kind == "float" and not jnp.issubdtype(equation.invars[0].aval.dtype, jnp.floating):
            kind = "integer"
        found[stage, kind] += value.size


def stage_of(equation) -> str:
    """The outermost function of the library that has a stage, or this module's own."""
    traceback = equation.source_info.traceback
    names = [
        frame.function_name.rpartition(".")[2]
        for frame in traceback.frames
        if LIBRARY in frame.file_name
    ]
    return next((STAGES[name] for name in reversed(names) if name in STAGES), "rest")


def measure(moments: int) -> dict[str, dict[str, float]]:
    """Operations per element by kind and by stage; of two moments with codes, or one."""

    def shape(dtype, *size):
        return jax.ShapeDtypeStruct(size, dtype)

    u32, f32, i32 = jnp.uint32, jnp.float32, jnp.int32
    jaxpr = jax.make_jaxpr(tile)(
        [shape(i32), shape(i32)],
        shape(i32),
        shape(f32, GROUP, LANES),
        [shape(u32, 8, LANES)] * moments,
        [shape(u32, 1, LANES)] * 2,
        shape(u32, GROUP, 1),
        shape(i32),
    )
    found: Counter = Counter()
    count(jaxpr.jaxpr, found)
    told: dict[str, dict[str, float]] = {}
    for way, key in (("by_kind", 1), ("by_stage", 0)):
        part: Counter = Counter()
        for entry, n in found.items():
            part[entry[key]] += n / (GROUP * LANES)
        told[way] = {name: round(n, 2) for name, n in sorted(part.items())}
    return told | {"all": round(sum(found.values()) / (GROUP * LANES), 2)}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    programs = {"with codes of nu": measure(2), "without": measure(1)}
    print(programs)
    record = {"environment": environment(), "operations_per_element": programs}
    write_json(RESULTS / "ops.json", record)


if __name__ == "__main__":
    main()
