"""What adaptive precision costs: CPU time of deciding on a plan and of moving the arena to it.

    update      seconds of a step, by the interval of the decisions, from the first step on; None
                never decides
    decide      seconds of one decision: estimates, allocation, windows; also by number of slots
    repack      seconds to move the arena to another plan: to the same plan, to one in which a tenth
                of the slots moved by one width (half of them wider, half narrower: what a decision
                changes in training), and to one in which all did
    share       (decide + repack of a tenth) / (interval * step without decisions)

The difference of two noisy steps says little, so the share is taken from the parts, each measured
on its own. All on one core, to which the process is pinned before JAX starts; CPU time of the
process, not the clock's, medians of several calls, the state donated.

    python -m benchmarks.speed.policy
    python -m benchmarks.speed.policy --shapes gpt2-block --intervals 5 1
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks import _io
from benchmarks.shapes import SETS, size
from stquant_jax.backends.repack import repack
from stquant_jax.engine.planning import layout_for, slots_for
from stquant_jax.precision import Budget, Plan, Slots
from stquant_jax.storage import arena

matplotlib.use("agg")

BITS = 5.0
INTERVALS = (100, 25, 5, 1)
SLOTS = (10, 30, 100, 300, 1000, 3000)
SECONDS = 0.05  # of CPU time that one figure is taken over, at least
DECAYS = (0.9, 0.999)
WARMUP = 3


def cpu_seconds(call: Callable[[], Any], calls: int) -> float:
    """CPU time of one of so many calls."""
    start = time.process_time()
    for _ in range(calls):
        jax.block_until_ready(call())
    return (time.process_time() - start) / calls


def median_seconds(call: Callable[[], Any], repeats: int, calls: int | None = None) -> float:
    """Median over repeats of as many calls as fill `SECONDS`, or of a given number."""
    jax.block_until_ready(call())
    calls = calls or max(1, round(SECONDS / max(cpu_seconds(call, 1), 1e-6)))
    return float(np.median([cpu_seconds(call, calls) for _ in range(repeats)]))


def time_decide(slots: Slots, rows: int, repeats: int) -> float:
    """Seconds of a decision of `Budget`."""
    policy = Budget(BITS)
    state, count, decays = policy.init(slots, rows), jnp.int32(1000), jnp.float32(DECAYS)
    decide = jax.jit(
        lambda state, decays, count: policy.decide(slots, rows, state, tuple(decays), count)
    )
    return median_seconds(lambda: decide(state, decays, count), repeats)


def decide_by_slots(number: int, repeats: int) -> float:
    tiles = np.repeat(np.random.default_rng(0).integers(1, 1000, number // 2), 2)
    slots = Slots(tiles, tuple(f"leaf{i // 2}" for i in range(number)))
    return time_decide(slots, 5 * int(tiles.sum()), repeats)


def other_plan(slots: Slots, widths: np.ndarray, part: float) -> np.ndarray:
    """Widths, of which this part moved by one: first narrower, then wider as far as they fit."""
    order = np.random.default_rng(0).permutation(len(widths))[: max(2, round(part * len(widths)))]
    new, rows = widths.copy(), int(np.sum(slots.tiles * widths))
    for i, slot in enumerate(order):
        allowed = np.flatnonzero(slots.allowed[slot])
        at = int(np.searchsorted(allowed, widths[slot]))
        wider = i % 2 == 1 and at + 1 < len(allowed)
        moved = allowed[at + 1] if wider else allowed[max(at - 1, 0)]
        if np.sum(slots.tiles * new) + slots.tiles[slot] * (moved - new[slot]) <= rows:
            new[slot] = moved
    return new


def time_repack(shapes: dict, repeats: int) -> dict[str, Any]:
    """Seconds to another plan and back, halved, on random contents."""
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    policy, storage = Budget(BITS), stquant.Storage()
    layout = layout_for(params, policy, storage)
    state = stquant.scale_by_adam_q(precision=policy).init(params)
    packed = arena.Packed(state.arena, state.mu_scale, state.nu_scale, state.nu_row)
    random = np.random.default_rng(0)
    contents = random.integers(0, 2**32, packed.arena.shape, np.uint32)
    packed = packed._replace(
        arena=jnp.asarray(contents),
        mu_scale=jnp.full_like(packed.mu_scale, 128),
        nu_scale=jnp.full_like(packed.nu_scale, 30_000),
    )
    slots, first = slots_for(layout, policy), state.precision.plan
    widths = np.asarray(first.widths)
    plans = {
        part: Plan(jnp.asarray(other_plan(slots, widths, part)), *first[1:]) for part in (0.1, 1.0)
    }
    move = jax.jit(
        lambda packed, old, new: repack(layout, storage, jnp.int32(1), packed, old, new),
        donate_argnums=0,
    )

    def there_and_back(other: Plan) -> Any:
        nonlocal packed
        packed = move(move(packed, first, other), other, first)
        return packed

    targets = {"none": first, "tenth": plans[0.1], "all": plans[1.0]}
    seconds = {
        name: median_seconds(lambda plan=plan: there_and_back(plan), repeats) / 2
        for name, plan in targets.items()
    }
    moved = {name: int(np.sum(np.asarray(p.widths) != widths)) for name, p in targets.items()}
    return {"seconds": seconds, "slots_moved": moved}


class Steps:
    """A compiled update that owns its state: seconds of CPU time per step."""

    def __init__(self, shapes: dict, interval: int | None):
        random = np.random.default_rng(0)
        self.grads = {
            path: jnp.asarray(1e-3 * random.standard_normal(shape, np.float32))
            for path, shape in shapes.items()
        }
        tx = stquant.scale_by_adam_q(precision=Budget(BITS, interval=interval, warmup=0))
        self.state = tx.init(self.grads)
        self.update = jax.jit(tx.update, donate_argnums=1)
        for _ in range(WARMUP):
            self()

    def __call__(self) -> Any:
        updates, self.state = self.update(self.grads, self.state)
        return updates, self.state


def time_steps(shapes: dict, interval: int | None, repeats: int) -> float:
    """Seconds per step; over whole intervals, where there are any."""
    calls = interval or 1
    steps = Steps(shapes, interval)
    times = [cpu_seconds(steps, calls) for _ in range(max(2, -(-repeats // calls)))]
    return float(np.median(times))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    todo = [(name, None) for name in args.shapes]
    todo += [(args.shapes[-1], interval) for interval in args.intervals]
    record: dict[str, Any] = {"bits": BITS, "shapes": {}, "decide_seconds_by_slots": {}}
    with tqdm(total=len(SLOTS) + len(todo) + len(args.shapes)) as bar:
        for number in SLOTS:
            bar.set_description(f"decide, {number} slots")
            record["decide_seconds_by_slots"][number] = decide_by_slots(number, args.repeats)
            bar.update()
        for name in args.shapes:
            shapes = SETS[name]
            params = {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in shapes.items()}
            slots = slots_for(layout_for(params, Budget(BITS), stquant.Storage()), Budget(BITS))
            rows = int(np.sum(slots.tiles * 5))
            bar.set_description(f"{name}, decide and repack")
            record["shapes"][name] = {
                "elements": size(shapes),
                "slots": len(slots.tiles),
                "decide_seconds": time_decide(slots, rows, args.repeats),
                "repack": time_repack(shapes, args.repeats),
                "step_seconds": {},
            }
            bar.update()
        for name, interval in todo:
            bar.set_description(f"{name}, interval {interval}")
            found = record["shapes"][name]["step_seconds"]
            found[str(interval)] = time_steps(SETS[name], interval, args.repeats)
            bar.update()
            _io.write_json(args.json, record)
    for found in record["shapes"].values():
        change = found["decide_seconds"] + found["repack"]["seconds"]["tenth"]
        step = found["step_seconds"]["None"]
        found["share"] = {interval: change / (interval * step) for interval in INTERVALS}
    return record


def show(record: dict[str, Any]) -> Table:
    table = Table("shapes", "slots", "step", "decide", "repack: none", "a tenth", "all", "share")
    table.title = "seconds of CPU time; share of the step at an interval of 100"
    for name, found in record["shapes"].items():
        times = [found["step_seconds"]["None"], found["decide_seconds"]]
        times += found["repack"]["seconds"].values()
        share = f"{found['share'][100]:.3%}"
        table.add_row(name, str(found["slots"]), *(f"{x:.4g}" for x in times), share)
    return table


def show_steps(record: dict[str, Any]) -> Table:
    table = Table("shapes", "interval", "seconds per step", "over no interval", "by the parts")
    for name, found in record["shapes"].items():
        steps = found["step_seconds"]
        for interval, seconds in steps.items():
            share = found["share"].get(int(interval)) if interval != "None" else None
            more = seconds / steps["None"] - 1
            parts = "" if share is None else f"{share:+.3%}"
            table.add_row(name, interval, f"{seconds:.4f}", f"{more:+.2%}", parts)
    return table


def plot(record: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, found in record["shapes"].items():
        share = {int(k): 100 * x for k, x in found["share"].items()}
        left.loglog(list(share), list(share.values()), "o-", label=f"{name}, by the parts")
        base = found["step_seconds"]["None"]
        steps = {int(k): x for k, x in found["step_seconds"].items() if k != "None"}
        direct = {k: 100 * (x / base - 1) for k, x in steps.items() if x > base}
        if direct:
            left.loglog(list(direct), list(direct.values()), "x", label=f"{name}, whole steps")
    left.axhline(2, color="gray", linewidth=0.8, linestyle=":")
    left.set(xlabel="steps between decisions", ylabel="cost, % of a step")
    left.legend(fontsize=8)
    slots = {int(n): 1e3 * x for n, x in record["decide_seconds_by_slots"].items()}
    right.loglog(list(slots), list(slots.values()), "o-", label="one decision")
    last = max(slots)
    line = [slots[last] * n / last for n in slots]
    right.loglog(list(slots), line, color="gray", linestyle=":", label="linear")
    right.set(xlabel="slots", ylabel="milliseconds of CPU time")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    last = "of the last of them, whole steps with decisions are measured as well"
    add("--shapes", nargs="+", default=["gpt2", "gpt2-2blocks"], choices=SETS, help=last)
    add("--intervals", nargs="*", type=int, default=INTERVALS, help=f"default: {INTERVALS}")
    add("--repeats", type=int, default=9, help="of each figure, default 9")
    add("--json", type=Path, default=_io.RESULTS / "policy.json")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    record = measure(args)
    Console().print(show(record), show_steps(record), sep="\n")
    plot(record, args.json.with_suffix(".png"))
    _io.write_json(args.json, {"environment": _io.environment(), **record})


if __name__ == "__main__":
    main()
