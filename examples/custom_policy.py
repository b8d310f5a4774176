"""A precision policy of one's own, `Stages`, beside `Budget`, on the GPT of `train_gpt.py`.

    python -m examples.custom_policy --bits 4.0 --json custom_policy.json

Takes some minutes on two cores. `Stages` is for those who think they know better than measurements
which leaves need bits, and when: from each of its steps on, some leaves have given widths, and all
others share what is left of a constant budget. Here embedding and head are at 8 bits for the first
quarter of the run, the first and the last block are wider than the others in the second, and then
all leaves are alike. Both policies fill the same bytes, so the table tells which one spends them
better; one run of each shows how a policy is written, not which is the better one.
`custom_policy_stages.png` and `custom_policy_budget.png` show the widths over time.

A policy is a frozen dataclass derived from `stquant.Policy`. It is asked for three things:

    rows          how many rows of 512 bytes the codes may take, once, on the host
    first_widths  bits of a code, for every slot (a leaf and a moment), on the host
    decide        the next plan, under jit, every `interval` steps

Codes are repacked to any plan that `decide` returns as long as sum(tiles * widths) <= rows; a plan
that does not fit makes all updates NaN. `Stages` leaves the arithmetic to `Budget`: the plan of
each stage is the first plan of a budget with that stage's pins. A policy that goes by measurements
finds them in `state.observed`.
"""

import argparse
import dataclasses
import re
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import stquant_jax as stquant
from benchmarks._io import environment, write_json
from examples import train_gpt as gpt
from examples.train_gpt import flag
from stquant_jax.precision import PrecisionState, Slots


@dataclasses.dataclass(frozen=True)
class Stages(stquant.Policy):
    """Widths by a schedule, inside a constant budget.

    Attributes:
      bits: all-in bits per state element, as for `stquant.Budget`.
      stages: (first step, pins) of each stage, the first from step 0 on. Pins are as for
        `stquant.Budget`, without "exact": what is packed at all cannot change.
      interval: steps between decisions; stages begin at multiples of it.
    """

    bits: float
    stages: tuple[tuple[int, Mapping[str, Any] | tuple], ...]
    interval: int = 50

    def __post_init__(self):
        super().__post_init__()
        budgets = [self._budget(pins) for _, pins in self.stages]  # they check all but the steps
        starts = [start for start, _ in self.stages]
        if starts[:1] != [0] or sorted(set(starts)) != starts:
            raise ValueError(f"Stages: they begin at {starts}, expected 0 and then later steps")
        if any(start % self.interval for start in starts):
            raise ValueError(
                f"Stages: they begin at {starts}, expected multiples of interval={self.interval}"
            )
        for budget in budgets:
            if any(value == "exact" for _, value in budget.pins):
                raise ValueError(f"Stages: pins={budget.pins}, expected widths, not 'exact'")
        # a budget has made tuples of its pins: with them a policy can be hashed
        pins = (budget.pins for budget in budgets)
        object.__setattr__(self, "stages", tuple(zip(starts, pins, strict=True)))

    def rows(self, slots: Slots, fixed_bytes: int, reference_bytes: int) -> int:
        sizes = fixed_bytes, reference_bytes
        return max(budget.rows(known, *sizes) for budget, known in self._of_stages(slots))

    def first_widths(self, slots: Slots, rows: int) -> np.ndarray:
        budget, known = self._of_stages(slots)[0]
        return budget.first_widths(known, rows)

    def decide(
        self, slots: Slots, rows: int, state: PrecisionState, decays: tuple, count: jax.Array
    ) -> PrecisionState:
        plans = [budget.init(known, rows).plan for budget, known in self._of_stages(slots)]
        starts = jnp.asarray([start for start, _ in self.stages])
        now = jnp.searchsorted(starts, count, side="right") - 1
        plan = jax.tree.map(lambda *stages: jnp.stack(stages)[now], *plans)
        # What was measured is of codes that are no more, where widths change.
        kept = jnp.all((plan.widths == state.plan.widths).reshape(-1, 2), axis=1)
        seen = state.observed
        seen = seen._replace(averages=seen.averages * kept, weight=seen.weight * kept)
        return state._replace(plan=plan, observed=seen)

    def _budget(self, pins: Any) -> stquant.Budget:
        return stquant.Budget(self.bits, self.interval, pins=pins)

    def _of_stages(self, slots: Slots) -> list[tuple[stquant.Budget, Slots]]:
        """For each stage its budget, and the slots with its pins."""
        for pattern, _ in (pin for _, pins in self.stages for pin in pins):
            if slots.paths and not any(re.search(pattern, path) for path in slots.paths):
                raise ValueError(
                    f"Stages: {pattern!r} is found in none of {sorted(set(slots.paths))}"
                )
        budgets = [self._budget(pins) for _, pins in self.stages]
        return [(budget, dataclasses.replace(slots, pins=budget.pins)) for budget in budgets]


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = flag(400, "training steps of each run, a multiple of 4 intervals")
    bits: float = flag(4.0, "all-in bits per element of optimizer state, of both policies")
    interval: int = flag(50, "steps between two decisions")
    batch: int = flag(8, "sequences per step")
    length: int = flag(128, "bytes per sequence")
    layers: int = flag(4, "transformer blocks")
    features: int = flag(128, "width of the residual stream")
    seed: int = flag(0, "seed of the weights and of the order of the data")


def stages_of(cfg: Config) -> Stages:
    ends = {"tokens|head": (8, 8)}
    outer = {rf"blocks\.(0|{cfg.layers - 1})\.": (5, 4)}
    stages = (0, ends), (cfg.steps // 4, outer), (cfg.steps // 2, {})
    return Stages(cfg.bits, stages, cfg.interval)


def show(cfg: Config, runs: dict[str, dict[str, Any]]) -> None:
    fp32 = runs["optax.adamw"]
    table = Table(title=f"{fp32['params']:,} parameters, {cfg.steps} steps, {cfg.bits} bits")
    table.add_column("optimizer", no_wrap=True)
    for heading in ("loss", "change", "bytes", "ratio", "all-in bits", "moves"):
        table.add_column(heading, justify="right")
    for name, run in runs.items():
        ratio, moves = run["state_bytes"] / fp32["state_bytes"], ""
        if "widths" in run:
            moves = str(np.count_nonzero(np.diff(run["widths"], axis=0)))
        table.add_row(
            name,
            f"{run['val_loss']:.4f}",
            f"{run['val_loss'] - fp32['val_loss']:+.4f}",
            f"{run['state_bytes']:,}",
            f"{ratio:.4f}",
            f"{run.get('bits', 32):.3f}",
            moves,
        )
    Console().print(table)


def parse() -> tuple[Config, Path, Path | None]:
    parser = argparse.ArgumentParser(
        description="Train a byte-level GPT with a precision policy of one's own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        options = {"default": field.default, "type": type(field.default), **field.metadata}
        parser.add_argument(f"--{field.name}", **options)
    plot = Path("custom_policy.png")
    parser.add_argument("--plot", type=Path, default=plot, help="loss curves; widths lie beside it")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    flags = vars(parser.parse_args())
    files = flags.pop("plot"), flags.pop("json")
    return Config(**flags), *files


def main() -> None:
    cfg, plot, json_file = parse()
    stages = stages_of(cfg)
    names = "steps", "interval", "batch", "length", "layers", "features"
    training = gpt.Config(**{name: getattr(cfg, name) for name in names})
    corpus = gpt.load_corpus(Path(sysconfig.get_path("stdlib")))
    runs = {"optax.adamw": gpt.train(training, "optax.adamw", corpus, cfg.seed)}
    policies = {"Budget": stquant.Budget(cfg.bits, interval=cfg.interval), "Stages": stages}
    widths = []
    for name, policy in policies.items():
        widths.append(plot.with_stem(f"{plot.stem}_{name.lower()}"))
        run = gpt.train(training, name, corpus, cfg.seed, stquant.adamw, policy, widths[-1])
        runs[f"stquant.adamw, {name}"] = run
    show(cfg, runs)
    gpt.save_plot(plot, runs)
    print(f"loss curves: {plot}; widths over time: {', '.join(map(str, widths))}")
    if json_file:
        about = {"environment": environment(), "config": dataclasses.asdict(cfg)}
        write_json(json_file, about | {"stages": stages.stages, "runs": runs})


if __name__ == "__main__":
    main()
