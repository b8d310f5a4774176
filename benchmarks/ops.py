"""Operations per element of the update's arithmetic, as the XLA loop and the TPU kernel run it, by
kind: counted from the JAX program of one tile.

    python -m benchmarks.ops

What a compiler makes of them is another matter: it fuses products into sums, and folds constants.
The GPU kernel is counted from its machine code, by `benchmarks.ptxas`.
"""

import argparse
from collections import Counter

import jax
import jax.numpy as jnp

from benchmarks._io import RESULTS, environment, write_json
from stquant_jax.backends.fused import Codes, update_block
from stquant_jax.codecs import Ops, lattice, levels
from stquant_jax.noise import dither, keys_of
from stquant_jax.planes import GROUP, LANES, pack, unpack
from stquant_jax.rules import Adam

KINDS = {
    "special": {"div", "sqrt", "rsqrt", "exp", "log"},
    "free": {
        *("broadcast_in_dim", "reshape", "squeeze", "slice", "concatenate", "iota"),
        *("bitcast_convert_type", "stop_gradient", "copy", "dynamic_slice", "transpose"),
    },
}


def tile(widths, window, g, planes, scales, row, numbers):
    """One tile: planes in, planes out."""
    mu, nu = (unpack(x) for x in planes)
    rule = Adam()
    scalars = rule.prepare(0.9, 0.999, 1e-8, 0.0, numbers)
    lat = lattice(widths[1], window, jnp.float32(0.2))
    group = jax.lax.broadcasted_iota(jnp.uint32, (1, LANES), 1)
    element = jax.lax.broadcasted_iota(jnp.uint32, (GROUP, LANES), 0)
    noise = dither(keys_of(0, numbers, numbers), group, element)
    codes, valid = Codes(mu, nu, *scales, row), jnp.ones((GROUP, LANES))
    turn, lev = numbers % GROUP, levels(widths[0])
    update, new, terms = update_block(rule, scalars, g, codes, valid, lev, lat, noise, turn, Ops())
    return update, pack(new.mu), pack(new.nu), new[2:], terms


def count(jaxpr, found: Counter) -> None:
    """Elements that each kind of operation makes."""
    for equation in jaxpr.eqns:
        inner = [x for x in equation.params.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
        for x in inner:
            count(getattr(x, "jaxpr", x), found)
        name = equation.primitive.name
        if inner or name in KINDS["free"]:
            continue
        reads = name.startswith("reduce")
        value = (equation.invars if reads else equation.outvars)[0].aval
        kind = "special" if name in KINDS["special"] else "float"
        if kind == "float" and not jnp.issubdtype(equation.invars[0].aval.dtype, jnp.floating):
            kind = "integer"
        found[kind] += value.size


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()

    def shape(dtype, *size):
        return jax.ShapeDtypeStruct(size, dtype)

    u32, f32, i32 = jnp.uint32, jnp.float32, jnp.int32
    jaxpr = jax.make_jaxpr(tile)(
        [shape(i32), shape(i32)],
        shape(f32),
        shape(f32, GROUP, LANES),
        [shape(u32, 8, LANES)] * 2,
        [shape(u32, 1, LANES)] * 2,
        shape(u32, GROUP, 1),
        shape(i32),
    )
    found: Counter = Counter()
    count(jaxpr.jaxpr, found)
    per_element = {kind: round(n / (GROUP * LANES), 2) for kind, n in sorted(found.items())}
    per_element["all"] = round(sum(found.values()) / (GROUP * LANES), 2)
    print(per_element)
    record = {"environment": environment(), "operations_per_element": per_element}
    write_json(RESULTS / "ops.json", record)


if __name__ == "__main__":
    main()
