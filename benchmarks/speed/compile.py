"""What XLA makes of one update: seconds to trace, lower and compile it, its memory, its copies.

Nothing is allocated: the update is compiled for shapes alone, its state donated, and described
from the compiled program.

    temporaries     bytes that XLA allocates beside arguments and results, also as a multiple of
                    the gradient's bytes
    alias           bytes of the results that lie where donated arguments lay, and their number
    arena copies    instructions that copy an array of the arena's shape
    executable      bytes of the serialized program: its HLO and its machine code
    recompilations  on a small tree, over three updates from a fresh state

Seconds are medians of several compilations, with all of JAX's caches cleared before each; the first
one also warms up Python and LLVM. Next to it the same for float32 `optax.scale_by_adam`.

    python -m benchmarks.speed.compile
    python -m benchmarks.speed.compile --shapes gpt2-block --bits 4
"""

import argparse
import math
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import stquant_jax as stquant
from benchmarks import _io
from benchmarks.shapes import SETS, Shapes, size

UPDATES = 3  # on the small tree
LIBRARY = str(Path(stquant.__file__).parent)

# What the library's functions are called in a profile; any other goes by its own name.
STAGES = {
    **dict.fromkeys(("read", "to_tiles", "load", "lay"), "read leaves"),
    **dict.fromkeys(("write", "from_tiles", "unload", "take"), "write leaves"),
    "put": "write scales",
    "read_planes": "read planes",
    "write_planes": "write planes",
    "decode_second": "decode nu",
    "decode_first": "decode mu",
    "pack": "pack",
    "unpack": "unpack",
    "encode_second": "encode nu",
    "encode_first": "encode mu",
    "accumulate": "rule",
    "direction": "rule",
    **dict.fromkeys(("nu", "nu_row", "mu", "nu_coin", "mu_coin"), "noise"),
    "of_tiles": "places",
    "to_float": "casts of codes",
    "to_code": "casts of codes",
    "terms_of": "statistics",
    "error_of": "statistics",
    "at_round_row": "statistics",
    "aged": "statistics",
    "add": "tally",
    "renewed": "averages",
    "prepare": "rule",
    "_update_exact": "exact leaves",
    **dict.fromkeys(("_refresh", "decide", "halve", "widen"), "decide and repack"),
}
# Functions that only hold others: what is theirs alone goes by these names.
HOLDERS = dict.fromkeys(("update", "fused_update", "step", "call", "local", "_update"), "set-up")
LOOPS = ("update_bucket", "update_leaf", "over_tiles", "body", "update_chunk", "compute")
LOOPS += ("update_block", "in_place_if", "once", "in_place_at", "ask")
HOLDERS |= dict.fromkeys(LOOPS, "loop control")
NAMELESS = "other ops of XLA's own"  # without source line
XLAS_OWN = {"copy": "copies of XLA's own", "broadcast": "fills of XLA's own"}
# Work of one element of an instruction's result, in additions; 1 if not named here.
WORK = {"divide": 8, "sqrt": 8, "rsqrt": 8, "remainder": 8, "exponential": 16, "log": 16}
WORK |= {"broadcast": 1e-6}
FREE = {"parameter", "constant", "bitcast", "reshape", "iota", "tuple", "get-tuple-element"}
FREE |= {"while", "fusion", "call", "conditional"}


def compile_update(tx: optax.GradientTransformation, params: Any) -> tuple[dict[str, float], Any]:
    """Seconds of each stage, and the compiled update with its state donated."""
    jax.clear_caches()
    state = jax.eval_shape(tx.init, params)
    times = [time.perf_counter()]
    traced = jax.jit(tx.update, donate_argnums=1).trace(params, state)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    seconds = dict(zip(("trace", "lower", "compile"), np.diff(times), strict=True))
    return seconds | {"total": times[-1] - times[0]}, compiled


def copies(hlo: str, array: jax.Array) -> int:
    """Copy instructions whose result is an unsigned array of this shape."""
    shape = rf"u{8 * array.dtype.itemsize}\[{','.join(map(str, array.shape))}\]"
    return len(re.findall(rf" = \(?{shape}.* copy(?:-start)?\(", hlo))


def aliased_outputs(hlo: str) -> set[int]:
    """Flat indices of the results that lie in a donated argument."""
    header = hlo.partition("\n")[0]
    return {int(i) for i in re.findall(r"\{(\d+)\}: \(\d+, \{\}, (?:may|must)-alias\)", header)}


def stages_by_instruction(hlo: str) -> dict[str, dict[str, float]]:
    """Instruction -> share of its work by stage.

    Every instruction names the stack of Python calls that it was traced in: its stage is the
    outermost function of the library in it that is no holder. A fusion is split by the work of the
    instructions that XLA put into it: elements times `WORK`, an estimate.
    """
    stages = _stages_of_frames(hlo)
    pattern = re.compile(r" +(?:ROOT )?%(\S+) = (?:\w+\[([\d,]*)\]\S*|\(.*?\)) ([\w-]+)\((.*?)\)")
    sizes: dict[str, int] = {}
    work: dict[str, dict[str, float]] = {}  # of computations and of instructions
    here: dict[str, float] = {}
    for line in hlo.splitlines():
        if start := re.match(r"(?:ENTRY )?%(\S+) \(", line):
            here = work.setdefault(start[1], {})
        elif found := pattern.match(line):
            name, shape, opcode, operands = found.groups()
            size = sizes[name] = math.prod(map(int, shape.split(","))) if shape else 1
            if opcode in ("reduce", "dynamic-update-slice"):  # the work is in what is read
                operand = re.findall(r"%([\w.-]+)", operands)[opcode == "dynamic-update-slice"]
                size = sizes.get(operand, 1)
            frame = re.search(r"stack_frame_id=(\d+)", line)
            own = XLAS_OWN.get(opcode, NAMELESS)
            stage = stages.get(int(frame[1]), own) if frame else own
            amount = 1e-9 if opcode in FREE else size * WORK.get(opcode, 1)
            if stage in {own, *HOLDERS.values()}:  # counts where there is nothing else
                amount *= 1e-9
            here[stage] = here.get(stage, 0.0) + amount
            called = re.search(r"calls=%([\w.-]+)", line) if opcode == "fusion" else None
            work[name] = work[called[1]] if called else {stage: 1.0}
    return {
        name: {stage: amount / sum(parts.values()) for stage, amount in parts.items()}
        for name, parts in work.items()
    }


def _stages_of_frames(hlo: str) -> dict[int, str]:
    """Stack frame -> stage, from the tables at the head of the program's text."""

    def table(title: str) -> dict[int, str]:
        found = re.search(rf"^{title}\n((?:\d+ .*\n)+)", hlo, re.MULTILINE)
        pairs = (line.split(" ", 1) for line in found[1].splitlines()) if found else ()
        return {int(key): value for key, value in pairs}

    def number(text: str, key: str) -> int:
        found = re.search(rf"{key}=(\d+)", text)
        return int(found[1]) if found else 0

    files, functions, locations = map(table, ("FileNames", "FunctionNames", "FileLocations"))
    frames = table("StackFrames")
    # Parents are printed one too high in some versions: the first frame has none.
    shift = number(frames.get(1, ""), "parent_frame_id")
    out = {0: NAMELESS}
    for frame, text in sorted(frames.items()):  # parents come before their children
        above = out.get(number(text, "parent_frame_id") - shift, NAMELESS)
        place = locations[number(text, "file_location_id")]
        name = functions[number(place, "function_name_id")].strip('"').rpartition(".")[2]
        ours = files[number(place, "file_name_id")].strip('"').startswith(LIBRARY)
        if ours and not name.startswith("<") and above in {NAMELESS, *HOLDERS.values()}:
            above = HOLDERS.get(name) or STAGES.get(name, name)
        out[frame] = above
    return out


def describe(tx: optax.GradientTransformation, params: Any, compiled: Any) -> dict[str, Any]:
    """Memory and structure of a compiled update."""
    state = jax.eval_shape(tx.init, params)
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    gradient = sum(4 * x.size for x in jax.tree.leaves(params))
    aliases = aliased_outputs(hlo)
    record = {
        "argument_bytes": memory.argument_size_in_bytes,
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
        "alias_bytes": memory.alias_size_in_bytes,
        "alias_leaves": len(aliases),
        "state_leaves": len(jax.tree.leaves(state)),
        "temporary_bytes": memory.temp_size_in_bytes,
        "temporaries_over_gradient": memory.temp_size_in_bytes / gradient,
        "while_loops": len(re.findall(r" while\(", hlo)),
        "instructions": len(re.findall(r"^ +(?:ROOT )?%\S+ = ", hlo, re.MULTILINE)),
        "executable_bytes": len(compiled.runtime_executable().serialize()),
    }
    if isinstance(state, stquant.ScaleByAdamQState):
        results = jax.tree.leaves((params, state))  # updates have the shapes of the parameters
        index = next(i for i, x in enumerate(results) if x is state.arena)
        record["arena_bytes"] = state.arena.size * state.arena.dtype.itemsize
        record["arena_copies"] = copies(hlo, state.arena)
        record["arena_aliased"] = index in aliases
    return record


def recompilations(tx: optax.GradientTransformation) -> int:
    """Compilations beyond the first over a few updates of a small tree."""
    params = {"kernel": jnp.ones((256, 384)), "bias": jnp.ones(384)}
    update, state = jax.jit(tx.update, donate_argnums=1), tx.init(params)
    for _ in range(UPDATES):
        _, state = update(params, state)
    return update._cache_size() - 1  # pyright: ignore[reportAttributeAccessIssue]


def measure(name: str, tx: optax.GradientTransformation, shapes: Shapes, repeats: int) -> dict:
    """Everything of one transformation on one set of shapes."""
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    seconds, compiled = [], None
    for _ in range(repeats):
        taken, compiled = compile_update(tx, params)
        seconds.append(taken)
    medians = {key: round(float(np.median([s[key] for s in seconds])), 3) for key in seconds[0]}
    return {
        "transformation": name,
        "seconds": medians,
        "seconds_total_of_each": [round(float(s["total"]), 3) for s in seconds],
        **describe(tx, params, compiled),
        "recompilations": recompilations(tx),
    }


def show(record: dict[str, Any]) -> Table:
    """A row per figure, a column per transformation."""
    results = record["results"]
    table = Table("figure", *(r["transformation"] for r in results))
    extent = f"{record['leaves']} leaves, {record['elements'] / 1e6:.1f}M elements"
    table.title = f"one update of {record['shapes']}: {extent}"

    def add(label: str, cell):
        table.add_row(label, *(cell(r) for r in results))

    for stage in ("trace", "lower", "compile", "total"):
        add(f"{stage}, s", lambda r, stage=stage: f"{r['seconds'][stage]:.2f}")
    for key in ("argument", "state", "alias", "temporary", "executable"):
        add(f"{key}, MB", lambda r, key=key: f"{r[key + '_bytes'] / 1e6:.2f}")
    add("temporaries / gradient", lambda r: f"{r['temporaries_over_gradient']:.3f}")
    add("donated leaves reused", lambda r: f"{r['alias_leaves']} of {r['state_leaves']}")
    for key in ("arena_aliased", "arena_copies", "while_loops", "instructions", "recompilations"):
        add(key.replace("_", " "), lambda r, key=key: str(r.get(key, "-")))
    return table


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="gpt2", choices=SETS)
    parser.add_argument("--bits", type=float, default=5.0, help="all-in budget, default 5.0")
    parser.add_argument("--repeats", type=int, default=3, help="compilations, default 3")
    parser.add_argument("--json", type=Path, default=_io.RESULTS / "compile.json")
    args = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)  # or a cache on disk would be timed
    shapes = SETS[args.shapes]
    ours = stquant.scale_by_adam_q(precision=stquant.Budget(args.bits))
    todo = {f"stquant, {args.bits:g} bits": ours, "optax, float32": optax.scale_by_adam()}
    record = {
        "environment": _io.environment(),
        "shapes": args.shapes,
        "leaves": len(shapes),
        "elements": size(shapes),
        "results": [measure(name, tx, shapes, args.repeats) for name, tx in todo.items()],
    }
    Console().print(show(record))
    _io.write_json(args.json, record)


if __name__ == "__main__":
    main()
